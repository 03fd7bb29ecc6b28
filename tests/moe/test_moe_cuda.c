/* The whole layer on CUDA devices, against the dense loop in double and, over ranks, itself. */
#include "tests/moe/moe_call.h"

static const ra_moe_shape_t shapes[] = {
    {64, 32, 32, {16, 4, 4, 2, true, 2.5F}}, {256, 128, 128, {32, 8, 8, 4, true, 2.5F}},
    {128, 200, 72, {12, 5, 3, 2, true, 1}},  {50, 17, 9, {8, 2, 1, 1, true, 1}},
    {32, 16, 0, {5, 3, 1, 1, false, 1}},     {192, 64, 64, {64, 1, 8, 4, true, 1}},
};

static void compare_shape(const ra_moe_shape_t *shape, ra_dtype_t dtype, ra_dtype_t weights,
                          ra_dtype_t router)
{
    static const int64_t row_counts[] = {0, 1, 5, 300};
    moe_layer_t *layer = moe_layer_create(shape, weights, router);
    for (size_t r = 0; r < sizeof(row_counts) / sizeof(row_counts[0]); r++) {
        moe_call_t call = moe_call_make(layer, true, dtype, row_counts[r], 1);
        moe_call_t again = moe_call_make(layer, true, dtype, row_counts[r], 1);
        call.tile_rows = call.rows == 300 ? 128 : 0;
        again.tile_rows = 64;
        assert_int_equal(moe_call_run(&call, NULL), RA_OK);
        moe_call_check(&call);
        assert_int_equal(moe_call_run(&again, NULL), RA_OK);
        assert_memory_equal(call.y, again.y, /* whatever the tile */
                            (size_t)(call.rows * moe_call_stride(&call)) * sizeof(float));
        moe_call_free(&call);
        moe_call_free(&again);
    }
    moe_layer_destroy(layer);
}

static void forward_equals_the_dense_loop(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        compare_shape(&shapes[s], RA_F32, RA_F32, RA_F32);
        compare_shape(&shapes[s], RA_F32, RA_BF16, RA_BF16);
        compare_shape(&shapes[s], RA_BF16, RA_BF16, RA_BF16);
        compare_shape(&shapes[s], RA_BF16, RA_BF16, RA_F32); /* the router keeps its precision */
    }
}

static void forced_experts_run_instead_of_the_chosen(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_check_forced(&shapes[s], true, s % 2 ? RA_BF16 : RA_F32, 48);
    }
}

/* Ring-mini's sizes with fewer experts. x is small, so that scores do not crowd at 1. */
static void a_published_size_equals_the_dense_loop(void **unused)
{
    (void)unused;
    skip_without_gpu();
    const ra_moe_shape_t shape = {2048, 512, 512, {16, 4, 4, 2, true, 2.5F}};
    moe_layer_t *layer = moe_usual_layer(&shape, true);
    moe_call_t call = moe_call_make(layer, true, RA_BF16, 70, 0.0625F);
    assert_int_equal(moe_call_run(&call, NULL), RA_OK);
    moe_call_check(&call);
    moe_call_free(&call);
    moe_layer_destroy(layer);
}

static void accumulating_adds_to_what_is_there(void **unused)
{
    (void)unused;
    skip_without_gpu();
    moe_check_accumulates(&shapes[1], true, RA_F32);
    moe_check_accumulates(&shapes[1], true, RA_BF16);
}

static void a_row_that_is_not_finite_stays_alone(void **unused)
{
    (void)unused;
    skip_without_gpu();
    moe_check_not_finite(&shapes[1], true, RA_BF16);
}

static void expert_parallel_gives_the_bits_of_replicated(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (int ranks = 1; ranks <= 3; ranks++) {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
            moe_split_t split = {
                .gpu = true, .dtype = s == 3 ? RA_F32 : RA_BF16, .ranks = ranks, .rows = 200};
            moe_check_split(&shapes[s], &split);
            split.tile_rows = 48; /* several rounds */
            moe_check_split(&shapes[s], &split);
            split.forced = true;
            moe_check_split(&shapes[s], &split);
        }
    }
    /* More ranks than experts: some run none and only hand in their tokens. */
    const ra_moe_shape_t few = {64, 32, 32, {4, 2, 1, 1, true, 1}};
    const moe_split_t split = {
        .gpu = true, .dtype = RA_BF16, .ranks = 6, .rows = 200, .forced = true};
    moe_check_split(&few, &split);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forward_equals_the_dense_loop),
        cmocka_unit_test(forced_experts_run_instead_of_the_chosen),
        cmocka_unit_test(a_published_size_equals_the_dense_loop),
        cmocka_unit_test(accumulating_adds_to_what_is_there),
        cmocka_unit_test(a_row_that_is_not_finite_stays_alone),
        cmocka_unit_test(expert_parallel_gives_the_bits_of_replicated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
