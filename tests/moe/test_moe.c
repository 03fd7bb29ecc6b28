#include "tests/moe/moe_call.h"
#include <string.h>

static const ra_moe_shape_t shapes[] = {
    {64, 32, 32, {16, 4, 4, 2, true, 2.5F}},
    {96, 24, 48, {32, 8, 8, 4, true, 2.5F}},
    {50, 17, 9, {8, 2, 1, 1, true, 1}},
    {32, 16, 0, {5, 3, 1, 1, false, 1}},
};

static const ra_gemm_kernel_t *gemm_named(const char *name)
{
    const ra_gemm_kernel_t *kernel = NULL;
    assert_int_equal(ra_gemm_select(name, RA_DEVICE_CPU, false, &kernel), RA_OK);
    return kernel;
}

static ra_moe_weights_t *make_weights(moe_layer_t *layer, const char *gemm, int32_t first,
                                      int32_t last)
{
    ra_moe_weights_t *weights = NULL;
    assert_int_equal(ra_moe_weights_create(gemm_named(gemm), &layer->ref.shape, &layer->tensors,
                                           first, last, RA_F32, NULL, &weights),
                     RA_OK);
    return weights;
}

static void forward_equals_the_dense_loop(void **unused)
{
    (void)unused;
    static const int64_t row_counts[] = {0, 1, 5, 300};
    static const char *const gemms[] = {"openblas", "packed"};
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_layer_t *layer = moe_usual_layer(&shapes[s], false);
        for (size_t r = 0; r < sizeof(row_counts) / sizeof(row_counts[0]); r++) {
            moe_call_t call = moe_call_make(layer, false, RA_F32, row_counts[r], 1);
            call.tile_rows = call.rows == 300 ? 64 : 0;
            for (size_t g = 0; g < sizeof(gemms) / sizeof(gemms[0]); g++) {
                call.gemm = gemms[g];
                assert_int_equal(moe_call_run(&call, NULL), RA_OK);
                moe_call_check(&call);
            }
            moe_call_free(&call);
        }
        moe_layer_destroy(layer);
    }
}

static void forced_experts_run_instead_of_the_chosen(void **unused)
{
    (void)unused;
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_check_forced(&shapes[s], false, RA_F32, 32);
    }
}

static void accumulating_adds_to_what_is_there(void **unused)
{
    (void)unused;
    moe_check_accumulates(&shapes[0], false, RA_F32);
}

static void a_row_that_is_not_finite_stays_alone(void **unused)
{
    (void)unused;
    moe_check_not_finite(&shapes[0], false, RA_F32);
}

static void expert_parallel_gives_the_bits_of_replicated(void **unused)
{
    (void)unused;
    static const int rank_counts[] = {1, 2, 3, 4, 7};
    ra_pool_t *pool;
    assert_int_equal(ra_pool_create(2, &pool), RA_OK);
    for (size_t r = 0; r < sizeof(rank_counts) / sizeof(rank_counts[0]); r++) {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
            moe_split_t split = {.ranks = rank_counts[r], .rows = 60};
            moe_check_split(&shapes[s], &split);
            split.tile_rows = 16; /* several rounds */
            split.pool = pool;
            moe_check_split(&shapes[s], &split);
            split.forced = true;
            moe_check_split(&shapes[s], &split);
        }
    }
    ra_pool_destroy(pool);
}

/* More ranks than experts: some run none and only hand in their tokens. */
static void ranks_without_experts_take_part(void **unused)
{
    (void)unused;
    ra_moe_shape_t shape = {16, 8, 8, {4, 2, 1, 1, true, 1}};
    /* fewer rows in flight than ranks */
    moe_check_split(&shape, &(moe_split_t){.ranks = 7, .rows = 60, .tile_rows = 3, .forced = true});
}

static void every_expert_has_one_owner(void **unused)
{
    (void)unused;
    for (int ranks = 1; ranks <= 40; ranks++) {
        int32_t next = 0, first, last;
        for (int rank = 0; rank < ranks; rank++) {
            ra_moe_expert_range(16, ranks, rank, &first, &last);
            assert_int_equal(first, next);
            assert_true(last >= first && last - first <= 16 / ranks + 1);
            next = last;
        }
        assert_int_equal(next, 16);
    }
}

static void wrong_weights_are_refused_with_their_name(void **unused)
{
    (void)unused;
    moe_layer_t *layer = moe_layer_create(&shapes[0], RA_F32, RA_F32);
    const ra_gemm_kernel_t *gemm = gemm_named("packed");
    ra_moe_weights_t *weights = NULL;
    layer->down[2].extent[1] = 31;
    assert_int_equal(
        ra_moe_weights_create(gemm, &shapes[0], &layer->tensors, 0, 16, RA_F32, NULL, &weights),
        RA_ERR_SHAPE);
    assert_non_null(strstr(ra_last_error(), "down of expert 2"));
    assert_int_equal(
        ra_moe_weights_create(gemm, &shapes[0], &layer->tensors, 3, 17, RA_F32, NULL, &weights),
        RA_ERR_INVALID);
    assert_null(weights);

    /* a plan that runs all experts, weights that hold some */
    weights = make_weights(layer, "packed", 3, 16);
    ra_device_t *device = NULL;
    ra_moe_plan_t *plan = NULL;
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    assert_int_equal(ra_moe_plan_create(&shapes[0], 0, RA_F32, device, NULL, &plan), RA_OK);
    ra_moe_args_t args = {.weights = weights};
    assert_int_equal(ra_moe_forward(plan, &args, NULL), RA_ERR_INVALID);
    ra_moe_plan_destroy(plan);
    ra_moe_weights_destroy(weights);
    ra_device_close(device);
    moe_layer_destroy(layer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forward_equals_the_dense_loop),
        cmocka_unit_test(forced_experts_run_instead_of_the_chosen),
        cmocka_unit_test(accumulating_adds_to_what_is_there),
        cmocka_unit_test(a_row_that_is_not_finite_stays_alone),
        cmocka_unit_test(expert_parallel_gives_the_bits_of_replicated),
        cmocka_unit_test(ranks_without_experts_take_part),
        cmocka_unit_test(every_expert_has_one_owner),
        cmocka_unit_test(wrong_weights_are_refused_with_their_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
