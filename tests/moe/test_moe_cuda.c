/* The whole layer on CUDA devices, against the dense loop in double and, over ranks, itself. */
#include "base/device_cuda.h"
#include "comm/ranks.h"
#include "moe/moe.h"
#include "tests/gpu_support.h"
#include "tests/moe/moe_layer.h"
#include "tests/moe/random_replay.h"
#include <stdlib.h>
#include <string.h>

enum { PAD = 8 };

static const ra_moe_shape_t shapes[] = {
    {64, 32, 32, {16, 4, 4, 2, true, 2.5F}}, {256, 128, 128, {32, 8, 8, 4, true, 2.5F}},
    {128, 200, 72, {12, 5, 3, 2, true, 1}},  {50, 17, 9, {8, 2, 1, 1, true, 1}},
    {32, 16, 0, {5, 3, 1, 1, false, 1}},     {192, 64, 64, {64, 1, 8, 4, true, 1}},
};

/* One call on one rank: x bf16 values in fp32; y and gap are poisoned unless accumulated to. */
typedef struct call {
    moe_layer_t *layer;
    ra_dtype_t dtype;
    int64_t tile_rows, rows;
    const float *x;
    float *y, *gap;
    bool accumulate;
    ra_router_replay_t replay; /* host arrays */
} call_t;

/* Rows of x in the call's type. */
static void *typed_rows(const call_t *call, int64_t count)
{
    float *wide = malloc((size_t)count * sizeof(float) + 1);
    memcpy(wide, call->x, (size_t)count * sizeof(float));
    if (call->dtype == RA_BF16) {
        uint16_t *narrow = (uint16_t *)wide;
        for (int64_t i = 0; i < count; i++) {
            narrow[i] = ra_bf16_from_f32(call->x[i]);
        }
    }
    return wide;
}

/* The call's replay in device memory, or back from there and freed. */
static ra_router_replay_t upload_replay(const call_t *call, ra_device_t *device,
                                        ra_stream_t *stream)
{
    int64_t bytes = call->rows * call->replay.stride * 4;
    void *forced = NULL, *chosen = NULL;
    if (call->replay.forced != NULL) {
        assert_int_equal(ra_device_alloc(device, bytes, &forced), RA_OK);
        assert_int_equal(ra_stream_copy(stream, forced, call->replay.forced, bytes), RA_OK);
    }
    if (call->replay.chosen != NULL) {
        assert_int_equal(ra_device_alloc(device, bytes, &chosen), RA_OK);
        assert_int_equal(ra_stream_copy(stream, chosen, call->replay.chosen, bytes), RA_OK);
    }
    return (ra_router_replay_t){.forced = forced, .chosen = chosen, .stride = call->replay.stride};
}

static void download_replay(const call_t *call, ra_device_t *device, ra_stream_t *stream,
                            const ra_router_replay_t *replay)
{
    if (replay->chosen != NULL) {
        assert_int_equal(ra_stream_copy(stream, call->replay.chosen, replay->chosen,
                                        call->rows * replay->stride * 4),
                         RA_OK);
    }
    assert_int_equal(ra_stream_sync(stream), RA_OK);
    ra_device_free(device, (void *)(uintptr_t)replay->forced);
    ra_device_free(device, replay->chosen);
}

static ra_status_t queue_call(const call_t *call, ra_comm_t *comm, ra_device_t *device,
                              ra_stream_t *stream)
{
    const ra_moe_shape_t *shape = &call->layer->ref.shape;
    int64_t stride = shape->hidden + PAD, count = call->rows * stride;
    int64_t x_bytes = count * (call->dtype == RA_F32 ? 4 : 2);
    int ranks = comm != NULL ? ra_comm_size(comm) : 1, rank = comm != NULL ? ra_comm_rank(comm) : 0;
    int32_t first, last;
    void *x, *y, *gap, *host_x = typed_rows(call, count);
    ra_moe_weights_t *weights = NULL;
    ra_moe_plan_t *plan = NULL;
    ra_moe_expert_range(shape->router.experts, ranks, rank, &first, &last);
    assert_int_equal(ra_moe_weights_create(NULL, shape, &call->layer->tensors, first, last,
                                           call->dtype, stream, &weights),
                     RA_OK);
    assert_int_equal(ra_moe_plan_create(shape, call->tile_rows, call->dtype, device, comm, &plan),
                     RA_OK);
    assert_true(ra_moe_plan_bytes(plan) > 0);
    assert_int_equal(ra_device_alloc(device, x_bytes, &x), RA_OK);
    assert_int_equal(ra_device_alloc(device, count * 4, &y), RA_OK);
    assert_int_equal(ra_device_alloc(device, call->rows * 4, &gap), RA_OK);
    if (!call->accumulate) {
        test_poison(call->y, count);
        test_poison(call->gap, call->rows);
    }
    assert_int_equal(ra_stream_copy(stream, x, host_x, x_bytes), RA_OK);
    assert_int_equal(ra_stream_copy(stream, y, call->y, count * 4), RA_OK);
    assert_int_equal(ra_stream_copy(stream, gap, call->gap, call->rows * 4), RA_OK);
    ra_moe_args_t args = {.weights = weights,
                          .rows = call->rows,
                          .x = x,
                          .x_stride = stride,
                          .y = y,
                          .y_stride = stride,
                          .accumulate = call->accumulate,
                          .gap = gap,
                          .replay = upload_replay(call, device, stream)};
    ra_status_t status = ra_moe_forward(plan, &args, stream);
    assert_int_equal(ra_stream_copy(stream, call->y, y, count * 4), RA_OK);
    assert_int_equal(ra_stream_copy(stream, call->gap, gap, call->rows * 4), RA_OK);
    download_replay(call, device, stream, &args.replay);
    ra_moe_plan_destroy(plan);
    ra_moe_weights_destroy(weights);
    ra_device_free(device, x);
    ra_device_free(device, y);
    ra_device_free(device, gap);
    free(host_x);
    return status;
}

static ra_status_t run_call(const call_t *call, ra_comm_t *comm)
{
    int count, rank = comm != NULL ? ra_comm_rank(comm) : 0;
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    assert_int_equal(ra_device_count("cuda", &count), RA_OK);
    assert_int_equal(ra_device_open("cuda", rank % count, NULL, &device), RA_OK);
    assert_int_equal(ra_stream_create(device, &stream), RA_OK);
    if (comm != NULL) {
        assert_int_equal(ra_comm_attach(comm, stream), RA_OK);
    }
    ra_status_t status = queue_call(call, comm, device, stream);
    if (comm != NULL) {
        assert_int_equal(ra_comm_barrier(comm), RA_OK); /* nobody's memory goes while it is read */
    }
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

static float *bf16_floats(int64_t n, uint64_t *seed)
{
    float *values = moe_random_floats(n, seed, 1);
    for (int64_t i = 0; i < n; i++) {
        values[i] = ra_bf16_to_f32(ra_bf16_from_f32(values[i]));
    }
    return values;
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
        if (!(fabs((double)call->gap[t] - want_gap) < 5e-6)) {
            fail_msg("gap of row %d: got %.9g, want %.9g", (int)t, (double)call->gap[t], want_gap);
        }
        for (int64_t d = hidden; d < stride; d++) {
            assert_true(isnan(y[d])); /* nothing beyond the row is written */
        }
        if (want_gap < 1e-5 && (forced == NULL || forced[0] < 0)) {
            continue;
        }
        compared++;
        if (call->dtype == RA_F32) {
            /* fp32 sums over hidden and width of terms below 1 */
            test_near(y, want, hidden, 1e-5, 1e-5, "y");
            continue;
        }
        /* Inner values and an expert's results are rounded to bf16: each of both changes the norm
         * by at most 2^-8, together below 8e-3. */
        double error = 0, norm = 0;
        for (int64_t d = 0; d < hidden; d++) {
            error += ((double)y[d] - want[d]) * ((double)y[d] - want[d]);
            norm += want[d] * want[d];
        }
        if (!(sqrt(error) <= 8e-3 * sqrt(norm))) {
            fail_msg("row %d of %d, hidden %d: relative error %.3g", (int)t, (int)call->rows,
                     (int)hidden, sqrt(error / norm));
        }
    }
    assert_true(compared >= call->rows * 9 / 10);
    free(want);
}

static void compare_shape(const ra_moe_shape_t *shape, ra_dtype_t dtype, ra_dtype_t weights,
                          ra_dtype_t router)
{
    static const int64_t row_counts[] = {0, 1, 5, 300};
    moe_layer_t *layer = moe_layer_create(shape, weights, router);
    for (size_t r = 0; r < sizeof(row_counts) / sizeof(row_counts[0]); r++) {
        uint64_t seed = 5;
        int64_t rows = row_counts[r], count = rows * (shape->hidden + PAD);
        float *x = bf16_floats(count, &seed), *again = moe_random_floats(count, &seed, 1);
        call_t call = {.layer = layer,
                       .dtype = dtype,
                       .tile_rows = rows == 300 ? 128 : 0,
                       .rows = rows,
                       .x = x,
                       .y = moe_random_floats(count, &seed, 1),
                       .gap = moe_random_floats(rows, &seed, 1)};
        assert_int_equal(run_call(&call, NULL), RA_OK);
        compare(&call);
        float *first = call.y;
        call.y = again;
        call.tile_rows = 64;
        assert_int_equal(run_call(&call, NULL), RA_OK);
        assert_memory_equal(first, again, (size_t)count * sizeof(float)); /* whatever the tile */
        free(x);
        free(again);
        free(first);
        free(call.gap);
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

/* Forced experts run, with their own weights; those chosen are the ones of a call that forces none.
 */
static void forced_experts_run_instead_of_the_chosen(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        moe_layer_t *layer = moe_layer_create(&shapes[s], RA_BF16, RA_BF16);
        uint64_t seed = 5;
        int64_t rows = 100, count = rows * (shapes[s].hidden + PAD);
        ra_router_replay_t replay = random_replay_create(&shapes[s].router, rows);
        ra_router_replay_t free_choice = random_replay_create(&shapes[s].router, rows);
        call_t call = {.layer = layer,
                       .dtype = s % 2 ? RA_BF16 : RA_F32,
                       .tile_rows = 48,
                       .rows = rows,
                       .x = bf16_floats(count, &seed),
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

/* Ring-mini's sizes with fewer experts. x is small, so that scores do not crowd at 1. */
static void a_published_size_equals_the_dense_loop(void **unused)
{
    (void)unused;
    skip_without_gpu();
    const ra_moe_shape_t shape = {2048, 512, 512, {16, 4, 4, 2, true, 2.5F}};
    moe_layer_t *layer = moe_layer_create(&shape, RA_BF16, RA_BF16);
    uint64_t seed = 9;
    int64_t rows = 70, count = rows * (shape.hidden + PAD);
    float *x = bf16_floats(count, &seed);
    for (int64_t i = 0; i < count; i++) {
        x[i] *= 0.0625F;
    }
    call_t call = {.layer = layer,
                   .dtype = RA_BF16,
                   .rows = rows,
                   .x = x,
                   .y = moe_random_floats(count, &seed, 1),
                   .gap = moe_random_floats(rows, &seed, 1)};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    compare(&call);
    free(x);
    free(call.y);
    free(call.gap);
    moe_layer_destroy(layer);
}

static void accumulating_adds_to_what_is_there(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (int d = 0; d < 2; d++) {
        uint64_t seed = 3;
        moe_layer_t *layer = moe_layer_create(&shapes[1], RA_BF16, RA_BF16);
        int64_t rows = 20, hidden = shapes[1].hidden, stride = hidden + PAD, count = rows * stride;
        float *before = moe_random_floats(count, &seed, 1);
        float *sum = malloc((size_t)count * sizeof(float));
        call_t call = {.layer = layer,
                       .dtype = d ? RA_BF16 : RA_F32,
                       .rows = rows,
                       .x = bf16_floats(count, &seed),
                       .y = moe_random_floats(count, &seed, 1),
                       .gap = moe_random_floats(rows, &seed, 1)};
        assert_int_equal(run_call(&call, NULL), RA_OK);
        float *alone = call.y;
        memcpy(sum, before, (size_t)count * sizeof(float));
        call.y = sum;
        call.accumulate = true;
        assert_int_equal(run_call(&call, NULL), RA_OK);
        for (int64_t i = 0; i < count; i++) {
            assert_true(sum[i] == (i % stride < hidden ? before[i] + alone[i] : before[i]));
        }
        free((void *)(uintptr_t)call.x);
        free(call.gap);
        free(before);
        free(sum);
        free(alone);
        moe_layer_destroy(layer);
    }
}

static void a_row_that_is_not_finite_stays_alone(void **unused)
{
    (void)unused;
    skip_without_gpu();
    uint64_t seed = 3;
    moe_layer_t *layer = moe_layer_create(&shapes[1], RA_BF16, RA_BF16);
    int64_t rows = 9, hidden = shapes[1].hidden, stride = hidden + PAD;
    float *x = bf16_floats(rows * stride, &seed);
    x[4 * stride + 7] = NAN;
    call_t call = {.layer = layer,
                   .dtype = RA_BF16,
                   .rows = rows,
                   .x = x,
                   .y = moe_random_floats(rows * stride, &seed, 1),
                   .gap = moe_random_floats(rows, &seed, 1)};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t d = 0; d < hidden; d++) {
            assert_true(isnan(call.y[t * stride + d]) == (t == 4));
        }
    }
    free(x);
    free(call.y);
    free(call.gap);
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

static void expert_parallel(const ra_moe_shape_t *shape, ra_dtype_t dtype, int ranks,
                            int64_t tile_rows, bool forced)
{
    uint64_t seed = 5;
    moe_layer_t *layer = moe_layer_create(shape, RA_BF16, RA_BF16);
    int64_t rows = 0;
    for (int r = 0; r < ranks; r++) {
        rows += moe_rows_of_rank(200, ranks, r);
    }
    int64_t count = rows * (shape->hidden + PAD);
    call_t call = {.layer = layer,
                   .dtype = dtype,
                   .rows = rows,
                   .x = bf16_floats(count, &seed),
                   .y = moe_random_floats(count, &seed, 1),
                   .gap = moe_random_floats(rows, &seed, 1)};
    ra_router_replay_t alone = random_replay_create(&shape->router, rows);
    ra_router_replay_t shared = random_replay_create(&shape->router, rows);
    call.replay = forced ? alone : (ra_router_replay_t){0};
    assert_int_equal(run_call(&call, NULL), RA_OK);
    call_t all = call;
    all.replay = forced ? shared : (ra_router_replay_t){0};
    all.rows = 200;
    all.tile_rows = tile_rows;
    all.y = moe_random_floats(count, &seed, 1);
    all.gap = moe_random_floats(rows, &seed, 1);
    assert_int_equal(ra_ranks_run("peer", ranks, rank_main, &all), RA_OK);
    assert_memory_equal(all.gap, call.gap, (size_t)rows * sizeof(float));
    assert_memory_equal(shared.chosen, alone.chosen, random_replay_bytes(&alone, rows));
    moe_same_bits(all.y, call.y, count, ranks, shape->hidden);
    free((void *)(uintptr_t)call.x);
    free(call.y);
    free(call.gap);
    free(all.y);
    free(all.gap);
    random_replay_destroy(&alone);
    random_replay_destroy(&shared);
    moe_layer_destroy(layer);
}

static void expert_parallel_gives_the_bits_of_replicated(void **unused)
{
    (void)unused;
    skip_without_gpu();
    static const int rank_counts[] = {1, 2, 3};
    for (size_t r = 0; r < sizeof(rank_counts) / sizeof(rank_counts[0]); r++) {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
            ra_dtype_t dtype = s == 3 ? RA_F32 : RA_BF16;
            expert_parallel(&shapes[s], dtype, rank_counts[r], 0, false);
            expert_parallel(&shapes[s], dtype, rank_counts[r], 48, false); /* several rounds */
            expert_parallel(&shapes[s], dtype, rank_counts[r], 48, true);
        }
    }
    /* More ranks than experts: some run none and only hand in their tokens. */
    const ra_moe_shape_t few = {64, 32, 32, {4, 2, 1, 1, true, 1}};
    expert_parallel(&few, RA_BF16, 6, 0, true);
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
