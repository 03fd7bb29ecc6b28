/* Rounds of the layer for CUDA devices over ranks, with cuda_steps_double.c in place of kernels. */
#include "tests/moe/cuda_steps_double.h"
#include "tests/moe/moe_call.h"

static const ra_moe_shape_t shapes[] = {
    {64, 32, 32, {16, 4, 4, 2, true, 2.5F}},
    {50, 17, 9, {8, 2, 1, 1, true, 1}},
    {32, 16, 0, {5, 3, 1, 1, false, 1}},
};

static void forward_equals_the_dense_loop(void **unused)
{
    (void)unused;
    for (size_t s = 0; s < RA_ARRAY_LEN(shapes); s++) {
        moe_layer_t *layer = moe_usual_layer(&shapes[s], false);
        moe_call_t call = moe_call_make(layer, false, RA_F32, 70, 1);
        call.tile_rows = 16;
        assert_int_equal(moe_call_run(&call, NULL), RA_OK);
        moe_call_check(&call);
        moe_call_free(&call);
        moe_layer_destroy(layer);
    }
}

static void splitting_experts_over_ranks_keeps_the_bits(void **unused)
{
    (void)unused;
    static const int rank_counts[] = {1, 2, 3, 4};
    static const int64_t tiles[] = {0, 48, 32, 16, 4}; /* one round, two, three, many */
    for (size_t s = 0; s < RA_ARRAY_LEN(shapes); s++) {
        for (size_t r = 0; r < RA_ARRAY_LEN(rank_counts); r++) {
            for (size_t t = 0; t < RA_ARRAY_LEN(tiles); t++) {
                moe_check_split(&shapes[s], &(moe_split_t){.ranks = rank_counts[r],
                                                           .rows = 60,
                                                           .tile_rows = tiles[t],
                                                           .forced = t % 2 == 1});
            }
        }
    }
}

static void ranks_without_experts_take_part(void **unused)
{
    (void)unused;
    ra_moe_shape_t shape = {16, 8, 8, {4, 2, 1, 1, true, 1}};
    moe_check_split(&shape, &(moe_split_t){.ranks = 7, .rows = 60, .tile_rows = 3, .forced = true});
}

static ra_status_t run_rank(ra_comm_t *comm, void *arg)
{
    moe_call_t call = moe_call_make(arg, false, RA_F32, 40, 1);
    call.tile_rows = 24;
    ra_status_t status = moe_call_run(&call, comm);
    moe_call_free(&call);
    return status;
}

/* Wherever a rank stops, the others end too, and nothing is left in flight. */
static void a_failing_rank_ends_all(void **unused)
{
    (void)unused;
    moe_layer_t *layer = moe_usual_layer(&shapes[0], false);
    int failed = 0;
    for (int left = 0;; left++) {
        atomic_store(&cuda_double_products_left, left);
        ra_status_t status = ra_ranks_run("local", 3, run_rank, layer);
        bool reached = atomic_exchange(&cuda_double_products_left, -1) < 0;
        assert_int_equal(status, reached ? RA_ERR_DEVICE : RA_OK);
        if (!reached) {
            break;
        }
        failed++;
    }
    assert_true(failed > 3 * 4 * 5); /* 3 ranks, 5 rounds of at least 4 products */
    moe_layer_destroy(layer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forward_equals_the_dense_loop),
        cmocka_unit_test(splitting_experts_over_ranks_keeps_the_bits),
        cmocka_unit_test(ranks_without_experts_take_part),
        cmocka_unit_test(a_failing_rank_ends_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
