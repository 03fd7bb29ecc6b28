#include "base/cpu_isa.h"
#include "comm/ranks.h"
#include "moe/moe.h"
#include "tests/moe/moe_layer.h"
#include "tests/moe/random_replay.h"
#include <stdlib.h>
#include <string.h>

enum { PAD = 3 };

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

/* One call on one rank. y and gap are poisoned first; rows are padded by PAD floats. */
typedef struct call {
    moe_layer_t *layer;
    const char *gemm;
    int64_t tile_rows, rows;
    const float *x;
    float *y, *gap;
    bool accumulate;
    ra_router_replay_t replay;
    ra_pool_t *pool;
} call_t;

static ra_status_t run_call(const call_t *call, ra_comm_t *comm)
{
    const ra_moe_shape_t *shape = &call->layer->ref.shape;
    int64_t stride = shape->hidden + PAD;
    int ranks = comm != NULL ? ra_comm_size(comm) : 1, rank = comm != NULL ? ra_comm_rank(comm) : 0;
    int32_t first, last;
    ra_moe_expert_range(shape->router.experts, ranks, rank, &first, &last);
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    ra_moe_plan_t *plan = NULL;
    ra_moe_weights_t *weights = make_weights(call->layer, call->gemm, first, last);
    assert_int_equal(ra_device_open("cpu", 0, call->pool, &device), RA_OK);
    assert_int_equal(ra_stream_create(device, &stream), RA_OK);
    assert_int_equal(ra_moe_plan_create(shape, call->tile_rows, RA_F32, device, comm, &plan),
                     RA_OK);
    assert_true(ra_moe_plan_bytes(plan) > 0);
    if (!call->accumulate) {
        test_poison(call->y, call->rows * stride);
    }
    ra_moe_args_t args = {.weights = weights,
                          .rows = call->rows,
                          .x = call->x,
                          .x_stride = stride,
                          .y = call->y,
                          .y_stride = stride,
                          .accumulate = call->accumulate,
                          .gap = call->gap,
                          .replay = call->replay};
    ra_status_t status = ra_moe_forward(plan, &args, stream);
    ra_moe_plan_destroy(plan);
    ra_moe_weights_destroy(weights);
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

/* Compare with the oracle, row by row, where the choice of experts is forced or not a near tie. */
static void compare(const call_t *call)
{
    const moe_layer_t *layer = call->layer;
    int64_t hidden = layer->ref.shape.hidden, stride = hidden + PAD, compared = 0;
    double *want = malloc((size_t)hidden * sizeof(*want));
    for (int64_t t = 0; t < call->rows; t++) {
        const float *y = call->y + t * stride;
        const int32_t *forced = ra_router_replay_at(&call->replay, t * call->replay.stride).forced;
        double want_gap = moe_ref_row_forced(&layer->ref, call->x + t * stride, forced, want);
        assert_true(fabs((double)call->gap[t] - want_gap) < 5e-6);
        if (want_gap > 1e-5 || (forced != NULL && forced[0] >= 0)) {
            /* fp32 sums over hidden and width of terms below 1 */
            test_near(y, want, hidden, 5e-6, 5e-6, "y");
            compared++;
        }
        for (int64_t d = hidden; d < stride; d++) {
            assert_true(isnan(y[d])); /* nothing beyond the row is written */
        }
    }
    assert_true(compared >= call->rows * 9 / 10);
    free(want);
}

static void forward_equals_the_dense_loop(void **unused)
{
    (void)unused;
    static const int64_t row_counts[] = {0, 1, 5, 300};
    static const char *const gemms[] = {"openblas", "packed"};
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_layer_t *layer = moe_layer_create(&shapes[s], RA_F32, RA_F32);
        for (size_t r = 0; r < sizeof(row_counts) / sizeof(row_counts[0]); r++) {
            uint64_t seed = 5;
            int64_t rows = row_counts[r], count = rows * (shapes[s].hidden + PAD);
            float *x = moe_random_floats(count, &seed, 1), *y = moe_random_floats(count, &seed, 1);
            float *gap = moe_random_floats(rows, &seed, 1);
            for (size_t g = 0; g < sizeof(gemms) / sizeof(gemms[0]); g++) {
                call_t call = {.layer = layer,
                               .gemm = gemms[g],
                               .tile_rows = rows == 300 ? 64 : 0,
                               .rows = rows,
                               .x = x,
                               .y = y,
                               .gap = gap};
                test_poison(gap, rows);
                assert_int_equal(run_call(&call, NULL), RA_OK);
                compare(&call);
            }
            free(x);
            free(y);
            free(gap);
        }
        moe_layer_destroy(layer);
    }
}

/* Forced experts run, with their own weights; those chosen are the ones of a call that forces none.
 */
static void forced_experts_run_instead_of_the_chosen(void **unused)
{
    (void)unused;
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_layer_t *layer = moe_layer_create(&shapes[s], RA_F32, RA_F32);
        uint64_t seed = 5;
        int64_t rows = 100, count = rows * (shapes[s].hidden + PAD);
        ra_router_replay_t replay = random_replay_create(&shapes[s].router, rows);
        ra_router_replay_t free_choice = random_replay_create(&shapes[s].router, rows);
        call_t call = {.layer = layer,
                       .gemm = "packed",
                       .tile_rows = 32,
                       .rows = rows,
                       .x = moe_random_floats(count, &seed, 1),
                       .y = moe_random_floats(count, &seed, 1),
                       .gap = moe_random_floats(rows, &seed, 1),
                       .replay = {.chosen = free_choice.chosen, .stride = free_choice.stride}};
        assert_int_equal(run_call(&call, NULL), RA_OK);
        compare(&call);
        call.replay = replay;
        assert_int_equal(run_call(&call, NULL), RA_OK);
        compare(&call);
        assert_memory_equal(replay.chosen, free_choice.chosen, random_replay_bytes(&replay, rows));
        random_replay_destroy(&replay);
        random_replay_destroy(&free_choice);
        free((void *)(uintptr_t)call.x);
        free(call.y);
        free(call.gap);
        moe_layer_destroy(layer);
    }
}

static void accumulating_adds_to_what_is_there(void **unused)
{
    (void)unused;
    uint64_t seed = 3;
    moe_layer_t *layer = moe_layer_create(&shapes[0], RA_F32, RA_F32);
    int64_t rows = 20, stride = shapes[0].hidden + PAD, count = rows * stride;
    float *x = moe_random_floats(count, &seed, 1), *alone = moe_random_floats(count, &seed, 1);
    float *sum = moe_random_floats(count, &seed, 1),
          *before = malloc((size_t)count * sizeof(float));
    memcpy(before, sum, (size_t)count * sizeof(float));
    call_t call = {.layer = layer, .gemm = "packed", .rows = rows, .x = x, .y = alone};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    call.y = sum;
    call.accumulate = true;
    assert_int_equal(run_call(&call, NULL), RA_OK);
    for (int64_t i = 0; i < count; i++) {
        float want = i % stride < shapes[0].hidden ? before[i] + alone[i] : before[i];
        assert_true(sum[i] == want);
    }
    free(x);
    free(alone);
    free(sum);
    free(before);
    moe_layer_destroy(layer);
}

static void a_row_that_is_not_finite_stays_alone(void **unused)
{
    (void)unused;
    uint64_t seed = 3;
    moe_layer_t *layer = moe_layer_create(&shapes[0], RA_F32, RA_F32);
    int64_t rows = 9, hidden = shapes[0].hidden, stride = hidden + PAD;
    float *x = moe_random_floats(rows * stride, &seed, 1),
          *y = moe_random_floats(rows * stride, &seed, 1);
    x[4 * stride + 7] = NAN;
    call_t call = {.layer = layer, .gemm = "packed", .rows = rows, .x = x, .y = y};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t d = 0; d < hidden; d++) {
            assert_true(isnan(y[t * stride + d]) == (t == 4));
        }
    }
    free(x);
    free(y);
    moe_layer_destroy(layer);
}

static ra_status_t rank_main(ra_comm_t *comm, void *arg)
{
    const call_t *all = arg;
    int64_t stride = all->layer->ref.shape.hidden + PAD, begin = 0;
    for (int r = 0; r < ra_comm_rank(comm); r++) {
        begin += moe_rows_of_rank(all->rows, ra_comm_size(comm), r);
    }
    call_t call = *all;
    call.rows = moe_rows_of_rank(all->rows, ra_comm_size(comm), ra_comm_rank(comm));
    call.x += begin * stride;
    call.y += begin * stride;
    call.gap += begin;
    call.replay = ra_router_replay_at(&call.replay, begin * call.replay.stride);
    return run_call(&call, comm);
}

static void expert_parallel(const ra_moe_shape_t *shape, int ranks, int64_t tile_rows,
                            ra_pool_t *pool, bool forced)
{
    uint64_t seed = 5;
    moe_layer_t *layer = moe_layer_create(shape, RA_F32, RA_F32);
    int64_t rows = 0;
    for (int r = 0; r < ranks; r++) {
        rows += moe_rows_of_rank(60, ranks, r);
    }
    int64_t count = rows * (shape->hidden + PAD);
    float *x = moe_random_floats(count, &seed, 1);
    float *want = moe_random_floats(count, &seed, 1), *want_gap = moe_random_floats(rows, &seed, 1);
    float *got = moe_random_floats(count, &seed, 1), *gap = moe_random_floats(rows, &seed, 1);
    call_t call = {
        .layer = layer, .gemm = "packed", .rows = rows, .x = x, .y = want, .gap = want_gap};
    ra_router_replay_t alone = random_replay_create(&shape->router, rows);
    ra_router_replay_t shared = random_replay_create(&shape->router, rows);
    call.replay = forced ? alone : (ra_router_replay_t){0};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    call_t all = call;
    all.replay = forced ? shared : (ra_router_replay_t){0};
    all.rows = 60;
    all.tile_rows = tile_rows;
    all.y = got;
    all.gap = gap;
    all.pool = pool;
    test_poison(gap, rows);
    assert_int_equal(ra_ranks_run("local", ranks, rank_main, &all), RA_OK);
    assert_memory_equal(gap, want_gap, (size_t)rows * sizeof(float));
    assert_memory_equal(shared.chosen, alone.chosen, random_replay_bytes(&alone, rows));
    moe_same_bits(got, want, count, ranks, shape->hidden);
    free(x);
    free(want);
    free(want_gap);
    free(got);
    free(gap);
    random_replay_destroy(&alone);
    random_replay_destroy(&shared);
    moe_layer_destroy(layer);
}

static void expert_parallel_gives_the_bits_of_replicated(void **unused)
{
    (void)unused;
    static const int rank_counts[] = {1, 2, 3, 4, 7};
    ra_pool_t *pool;
    assert_int_equal(ra_pool_create(2, &pool), RA_OK);
    for (size_t r = 0; r < sizeof(rank_counts) / sizeof(rank_counts[0]); r++) {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
            expert_parallel(&shapes[s], rank_counts[r], 0, NULL, false);
            expert_parallel(&shapes[s], rank_counts[r], 16, pool, false); /* several rounds */
            expert_parallel(&shapes[s], rank_counts[r], 16, pool, true);
        }
    }
    ra_pool_destroy(pool);
}

/* More ranks than experts: some run none and only hand in their tokens. */
static void ranks_without_experts_take_part(void **unused)
{
    (void)unused;
    ra_moe_shape_t shape = {16, 8, 8, {4, 2, 1, 1, true, 1}};
    expert_parallel(&shape, 7, 3, NULL, true); /* fewer rows in flight than ranks */
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
