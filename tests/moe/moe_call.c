#include "tests/moe/moe_call.h"

#include "tests/moe/random_replay.h"
#include <string.h>

int64_t moe_call_stride(const moe_call_t *call)
{
    return call->layer->ref.shape.hidden + (call->gpu ? 8 : 3);
}

moe_layer_t *moe_usual_layer(const ra_moe_shape_t *shape, bool gpu)
{
    return moe_layer_create(shape, gpu ? RA_BF16 : RA_F32, gpu ? RA_BF16 : RA_F32);
}

moe_call_t moe_call_make(moe_layer_t *layer, bool gpu, ra_dtype_t dtype, int64_t rows, float size)
{
    uint64_t seed = 5;
    moe_call_t call = {.layer = layer, .gpu = gpu, .dtype = dtype, .rows = rows};
    int64_t count = rows * moe_call_stride(&call);
    float *x = moe_random_floats(count, &seed, size);
    round_values(gpu ? RA_BF16 : dtype, x, count);
    call.x = x;
    call.y = moe_random_floats(count, &seed, 1);
    call.gap = moe_random_floats(rows, &seed, 1);
    return call;
}

void moe_call_free(moe_call_t *call)
{
    free((void *)(uintptr_t)call->x);
    free(call->y);
    free(call->gap);
}

/* ---- running ------------------------------------------------------------------------------- */

/* The call's arrays where the device has them: the host's own on the CPU, else copies. */
typedef struct place {
    ra_stream_t *stream;
    bool gpu;
    int64_t count; /* elements of x and y */
    int64_t choices;
    void *x, *y, *gap, *forced, *chosen;
} place_t;

static ra_status_t put(const place_t *place, const void *host, int64_t bytes, void **device_p)
{
    *device_p = (void *)(uintptr_t)host;
    if (!place->gpu || host == NULL) {
        return RA_OK;
    }
    RA_TRY(ra_device_alloc(ra_stream_device(place->stream), bytes, device_p));
    return ra_stream_copy(place->stream, *device_p, host, bytes);
}

static ra_status_t put_all(place_t *place, const moe_call_t *call)
{
    ra_device_t *device = ra_stream_device(place->stream);
    if (place->gpu) {
        RA_TRY(ra_device_alloc(device, place->count * ra_dtype_bytes(call->dtype), &place->x));
        RA_TRY(values_to_device(place->stream, call->dtype, call->x, place->count, place->x));
    } else {
        place->x = (void *)(uintptr_t)call->x;
    }
    RA_TRY(put(place, call->y, place->count * 4, &place->y));
    RA_TRY(put(place, call->gap, call->rows * 4, &place->gap));
    RA_TRY(put(place, call->replay.forced, place->choices * 4, &place->forced));
    return put(place, call->replay.chosen, place->choices * 4, &place->chosen);
}

static ra_status_t get(const place_t *place, void *host, int64_t bytes, const void *device)
{
    return place->gpu && host != NULL ? ra_stream_copy(place->stream, host, device, bytes) : RA_OK;
}

/* Also after an error; waits for the stream. */
static ra_status_t get_all(place_t *place, const moe_call_t *call)
{
    RA_TRY(get(place, call->y, place->count * 4, place->y));
    RA_TRY(get(place, call->gap, call->rows * 4, place->gap));
    RA_TRY(get(place, call->replay.chosen, place->choices * 4, place->chosen));
    RA_TRY(ra_stream_sync(place->stream));
    void *const all[] = {place->x, place->y, place->gap, place->forced, place->chosen};
    for (size_t i = 0; i < RA_ARRAY_LEN(all) && place->gpu; i++) {
        ra_device_free(ra_stream_device(place->stream), all[i]);
    }
    return RA_OK;
}

static ra_status_t forward(const moe_call_t *call, ra_moe_plan_t *plan,
                           const ra_moe_weights_t *weights, ra_stream_t *stream)
{
    int64_t stride = moe_call_stride(call);
    place_t place = {.stream = stream,
                     .gpu = call->gpu,
                     .count = call->rows * stride,
                     .choices = call->rows * call->replay.stride};
    RA_TRY(put_all(&place, call));
    ra_moe_args_t args = {
        .weights = weights,
        .rows = call->rows,
        .x = place.x,
        .x_stride = stride,
        .y = place.y,
        .y_stride = stride,
        .accumulate = call->accumulate,
        .gap = place.gap,
        .replay = {.forced = place.forced, .chosen = place.chosen, .stride = call->replay.stride}};
    ra_status_t status = ra_moe_forward(plan, &args, stream);
    ra_status_t got = get_all(&place, call);
    return status != RA_OK ? status : got;
}

static ra_status_t run_on(const moe_call_t *call, ra_comm_t *comm, ra_stream_t *stream)
{
    const ra_moe_shape_t *shape = &call->layer->ref.shape;
    const ra_gemm_kernel_t *gemm = NULL;
    ra_moe_weights_t *weights = NULL;
    ra_moe_plan_t *plan = NULL;
    int ranks = comm != NULL ? ra_comm_size(comm) : 1, rank = comm != NULL ? ra_comm_rank(comm) : 0;
    int32_t first, last;
    ra_status_t status = RA_OK;
    ra_moe_expert_range(shape->router.experts, ranks, rank, &first, &last);
    if (!call->gpu) {
        const char *name = call->gemm != NULL ? call->gemm : "packed";
        RA_TRY(ra_gemm_select(name, RA_DEVICE_CPU, false, &gemm));
    }
    RA_TRY_GOTO(ra_moe_weights_create(gemm, shape, &call->layer->tensors, first, last, call->dtype,
                                      stream, &weights),
                out);
    RA_TRY_GOTO(ra_moe_plan_create(shape, call->tile_rows, call->dtype, ra_stream_device(stream),
                                   comm, &plan),
                out);
    if (ra_moe_plan_bytes(plan) <= 0) {
        status = ra_fail(RA_ERR_INTERNAL, "test", "a plan of no bytes");
        goto out;
    }
    if (!call->accumulate) {
        test_poison(call->y, call->rows * moe_call_stride(call));
    }
    if (call->gap != NULL) {
        test_poison(call->gap, call->rows);
    }
    status = forward(call, plan, weights, stream);
out:
    ra_moe_plan_destroy(plan);
    ra_moe_weights_destroy(weights);
    return status;
}

ra_status_t moe_call_run(const moe_call_t *call, ra_comm_t *comm)
{
    int count = 1, rank = comm != NULL ? ra_comm_rank(comm) : 0;
    const char *name = call->gpu ? "cuda" : "cpu";
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    ra_status_t status;
    RA_TRY(ra_device_count(name, &count));
    RA_TRY(ra_device_open(name, rank % count, call->pool, &device));
    RA_TRY_GOTO(ra_stream_create(device, &stream), out);
    if (comm != NULL) {
        RA_TRY_GOTO(ra_comm_attach(comm, stream), out);
    }
    RA_TRY_GOTO(run_on(call, comm, stream), out);
    if (comm != NULL) {
        status = ra_comm_barrier(comm); /* nobody's memory goes while it is read */
    }
out:
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

/* ---- checking ------------------------------------------------------------------------------ */

/* F32: sums over hidden and width of terms below 1. BF16: inner values and an expert's results are
 * rounded; each of both changes the norm by at most 2^-8, together below 8e-3. */
static void check_row(const moe_call_t *call, int64_t t, const float *y, const double *want)
{
    int64_t hidden = call->layer->ref.shape.hidden;
    double error = 0, norm = 0, bound = call->gpu ? 1e-5 : 5e-6;
    if (call->dtype == RA_F32) {
        test_near(y, want, hidden, bound, bound, "y");
        return;
    }
    for (int64_t d = 0; d < hidden; d++) {
        error += ((double)y[d] - want[d]) * ((double)y[d] - want[d]);
        norm += want[d] * want[d];
    }
    if (!(sqrt(error) <= 8e-3 * sqrt(norm))) {
        fail_msg("row %d of %d, hidden %d: relative error %.3g", (int)t, (int)call->rows,
                 (int)hidden, sqrt(error / norm));
    }
}

void moe_call_check(const moe_call_t *call)
{
    int64_t hidden = call->layer->ref.shape.hidden, stride = moe_call_stride(call), compared = 0;
    double *want = malloc((size_t)hidden * sizeof(*want));
    for (int64_t t = 0; t < call->rows; t++) {
        const float *y = call->y + t * stride;
        const int32_t *forced = ra_router_replay_at(&call->replay, t * call->replay.stride).forced;
        double want_gap = moe_ref_row_forced(&call->layer->ref, call->x + t * stride, forced, want);
        if (!(fabs((double)call->gap[t] - want_gap) < 5e-6)) {
            fail_msg("gap of row %d: got %.9g, want %.9g", (int)t, (double)call->gap[t], want_gap);
        }
        if (want_gap > 1e-5 || (forced != NULL && forced[0] >= 0)) {
            check_row(call, t, y, want);
            compared++;
        }
        for (int64_t d = hidden; d < stride; d++) {
            assert_true(isnan(y[d])); /* nothing beyond the row is written */
        }
    }
    assert_true(compared >= call->rows * 9 / 10);
    free(want);
}

void moe_check_forced(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype, int64_t tile_rows)
{
    moe_layer_t *layer = moe_usual_layer(shape, gpu);
    moe_call_t call = moe_call_make(layer, gpu, dtype, 100, 1);
    ra_router_replay_t replay = random_replay_create(&shape->router, call.rows);
    ra_router_replay_t free_choice = random_replay_create(&shape->router, call.rows);
    call.tile_rows = tile_rows;
    call.replay = (ra_router_replay_t){.chosen = free_choice.chosen, .stride = free_choice.stride};
    assert_int_equal(moe_call_run(&call, NULL), RA_OK);
    moe_call_check(&call);
    call.replay = replay;
    assert_int_equal(moe_call_run(&call, NULL), RA_OK);
    moe_call_check(&call);
    assert_memory_equal(replay.chosen, free_choice.chosen, random_replay_bytes(&replay, call.rows));
    random_replay_destroy(&replay);
    random_replay_destroy(&free_choice);
    moe_call_free(&call);
    moe_layer_destroy(layer);
}

void moe_check_accumulates(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype)
{
    moe_layer_t *layer = moe_usual_layer(shape, gpu);
    moe_call_t alone = moe_call_make(layer, gpu, dtype, 20, 1);
    moe_call_t sum = moe_call_make(layer, gpu, dtype, 20, 1), sum_without_gap = sum;
    int64_t stride = moe_call_stride(&sum), count = sum.rows * stride;
    float *before = malloc((size_t)count * sizeof(float));
    memcpy(before, sum.y, (size_t)count * sizeof(float));
    assert_int_equal(moe_call_run(&alone, NULL), RA_OK);
    sum_without_gap.accumulate = true;
    sum_without_gap.gap = NULL;
    assert_int_equal(moe_call_run(&sum_without_gap, NULL), RA_OK);
    for (int64_t i = 0; i < count; i++) {
        float want = i % stride < shape->hidden ? before[i] + alone.y[i] : before[i];
        assert_true(sum.y[i] == want);
    }
    free(before);
    moe_call_free(&alone);
    moe_call_free(&sum);
    moe_layer_destroy(layer);
}

void moe_check_not_finite(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype)
{
    moe_layer_t *layer = moe_usual_layer(shape, gpu);
    moe_call_t call = moe_call_make(layer, gpu, dtype, 9, 1);
    int64_t stride = moe_call_stride(&call);
    ((float *)(uintptr_t)call.x)[4 * stride + 7] = NAN;
    assert_int_equal(moe_call_run(&call, NULL), RA_OK);
    for (int64_t t = 0; t < call.rows; t++) {
        for (int64_t d = 0; d < shape->hidden; d++) {
            assert_true(isnan(call.y[t * stride + d]) == (t == 4));
        }
    }
    moe_call_free(&call);
    moe_layer_destroy(layer);
}

/* Rows of rank r of n, some ranks without any. */
static int64_t rows_of(int64_t rows, int ranks, int rank)
{
    return rank % 3 == 1 && ranks > 2 ? 0 : rows / ranks + rank;
}

/* The call of all ranks, whose `rows` are to be dealt out. */
static ra_status_t run_part(ra_comm_t *comm, void *arg)
{
    const moe_call_t *all = arg;
    int64_t stride = moe_call_stride(all), begin = 0;
    for (int r = 0; r < ra_comm_rank(comm); r++) {
        begin += rows_of(all->rows, ra_comm_size(comm), r);
    }
    moe_call_t call = *all;
    call.rows = rows_of(all->rows, ra_comm_size(comm), ra_comm_rank(comm));
    call.x += begin * stride;
    call.y += begin * stride;
    call.gap += begin;
    call.replay = ra_router_replay_at(&call.replay, begin * call.replay.stride);
    return moe_call_run(&call, comm);
}

static void check_same_bits(const moe_call_t *got, const moe_call_t *want, int ranks)
{
    int64_t count = want->rows * moe_call_stride(want);
    assert_memory_equal(got->gap, want->gap, (size_t)want->rows * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        float a = got->y[i], b = want->y[i];
        if (memcmp(&a, &b, sizeof(a)) != 0 && !(isnan(a) && isnan(b))) {
            fail_msg("%d ranks, hidden %lld, y [%lld]: %.9g, replicated %.9g", ranks,
                     (long long)want->layer->ref.shape.hidden, (long long)i, (double)a, (double)b);
        }
    }
}

void moe_check_split(const ra_moe_shape_t *shape, const moe_split_t *split)
{
    moe_layer_t *layer = moe_usual_layer(shape, split->gpu);
    int64_t rows = 0;
    for (int r = 0; r < split->ranks; r++) {
        rows += rows_of(split->rows, split->ranks, r);
    }
    moe_call_t one = moe_call_make(layer, split->gpu, split->dtype, rows, 1);
    moe_call_t all = moe_call_make(layer, split->gpu, split->dtype, rows, 1), parts = all;
    ra_router_replay_t alone = random_replay_create(&shape->router, rows);
    ra_router_replay_t shared = random_replay_create(&shape->router, rows);
    one.replay = split->forced ? alone : (ra_router_replay_t){0};
    parts.replay = split->forced ? shared : (ra_router_replay_t){0};
    parts.rows = split->rows;
    parts.tile_rows = split->tile_rows;
    parts.pool = split->pool;
    assert_int_equal(moe_call_run(&one, NULL), RA_OK);
    assert_int_equal(ra_ranks_run(split->gpu ? "peer" : "local", split->ranks, run_part, &parts),
                     RA_OK);
    check_same_bits(&all, &one, split->ranks);
    assert_memory_equal(shared.chosen, alone.chosen, random_replay_bytes(&alone, rows));
    random_replay_destroy(&alone);
    random_replay_destroy(&shared);
    moe_call_free(&one);
    moe_call_free(&all);
    moe_layer_destroy(layer);
}
