/* Rounds of the layer for CUDA devices over ranks, with cuda_steps_double.c in place of kernels. */
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forward_equals_the_dense_loop),
        cmocka_unit_test(splitting_experts_over_ranks_keeps_the_bits),
        cmocka_unit_test(ranks_without_experts_take_part),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
