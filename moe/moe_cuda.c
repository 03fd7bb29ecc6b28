/* moe/moe_cuda.c - a layer on a CUDA device: weights, plan, and the steps of experts_cuda.h. */
#include "moe/moe_cuda.h"

#include "base/checked.h"
#include "base/device_cuda.h"
#include "base/log.h"
#include <stddef.h>
#include <stdlib.h>

/* 1024 rows for each of Ring's 256 experts at 8 a token: enough for full tiles, and weights that
 * are read once for them. */
enum { DEFAULT_TILE_ROWS = 32768, CONVERT_CHUNK = 1 << 20 };

/* ---- weights ------------------------------------------------------------------------------- */

static float element_at(const ra_tensor_t *tensor, int64_t i)
{
    return tensor->dtype == RA_F32 ? ((const float *)tensor->data)[i]
                                   : ra_bf16_to_f32(((const uint16_t *)tensor->data)[i]);
}

/* Queue a copy of a host matrix in the type of the device's. @a staging is reusable on return. */
static ra_status_t upload(ra_stream_t *stream, const ra_tensor_t *from, ra_dtype_t dtype,
                          void *staging, char *to)
{
    const int64_t count = ra_tensor_count(from), element = ra_dtype_bytes(dtype);
    if (from->dtype == dtype) {
        return ra_stream_copy(stream, to, from->data, count * element);
    }
    for (int64_t at = 0; at < count; at += CONVERT_CHUNK) {
        int64_t n = ra_min_i64(count - at, CONVERT_CHUNK);
        for (int64_t i = 0; i < n; i++) {
            float value = element_at(from, at + i);
            if (dtype == RA_F32) {
                ((float *)staging)[i] = value;
            } else {
                ((uint16_t *)staging)[i] = ra_bf16_from_f32(value);
            }
        }
        RA_TRY(ra_stream_copy(stream, to + at * element, staging, n * element));
    }
    return RA_OK;
}

/* w = hi + mid + lo, each the bf16 of what is left: 24 bits. */
static ra_status_t upload_router_parts(ra_stream_t *stream, const ra_tensor_t *from, int64_t hidden,
                                       uint16_t *staging, char *to)
{
    for (int64_t e = 0; e < from->extent[0]; e++) {
        for (int64_t i = 0; i < hidden; i++) {
            float left = element_at(from, e * hidden + i);
            for (int part = 0; part < 3; part++) {
                uint16_t bits = ra_bf16_from_f32(left);
                staging[part * hidden + i] = bits;
                left -= ra_bf16_to_f32(bits);
            }
        }
        int64_t bytes = 3 * hidden * 2;
        RA_TRY(ra_stream_copy(stream, to + e * bytes, staging, bytes));
    }
    return RA_OK;
}

static ra_status_t upload_all(const ra_moe_tensors_t *from, ra_stream_t *stream, void *staging,
                              ra_moe_weights_t *to)
{
    struct ra_moe_cuda_weights *cuda = to->cuda;
    const ra_moe_shape_t *shape = &to->shape;
    const int64_t element = ra_dtype_bytes(to->x_dtype);
    const int64_t expert = shape->expert_width * shape->hidden * element;
    const int64_t shared = shape->shared_width * shape->hidden * element;
    if (cuda->router_parts > 1) {
        RA_TRY(upload_router_parts(stream, &from->router, shape->hidden, staging, cuda->router));
    } else {
        RA_TRY(upload(stream, &from->router, to->x_dtype, staging, cuda->router));
    }
    RA_TRY(ra_stream_copy(stream, cuda->bias, to->bias, shape->router.experts * 4));
    for (int32_t e = to->first; e < to->last; e++) {
        char *up = (char *)cuda->up + (e - to->first) * 2 * expert;
        char *down = (char *)cuda->down + (e - to->first) * expert;
        RA_TRY(upload(stream, &from->gate[e], to->x_dtype, staging, up));
        RA_TRY(upload(stream, &from->up[e], to->x_dtype, staging, up + expert));
        RA_TRY(upload(stream, &from->down[e], to->x_dtype, staging, down));
    }
    if (shared == 0) {
        return RA_OK;
    }
    char *up = cuda->shared_up;
    RA_TRY(upload(stream, &from->shared_gate, to->x_dtype, staging, up));
    RA_TRY(upload(stream, &from->shared_up, to->x_dtype, staging, up + shared));
    return upload(stream, &from->shared_down, to->x_dtype, staging, cuda->shared_down);
}

#define WEIGHT(name) offsetof(struct ra_moe_cuda_weights, name)

static ra_status_t prepare(const ra_gemm_kernel_t *kernel, const ra_moe_tensors_t *tensors,
                           ra_stream_t *stream, ra_moe_weights_t *weights)
{
    (void)kernel;
    const ra_moe_shape_t *shape = &weights->shape;
    const int64_t held = weights->last - weights->first, element = ra_dtype_bytes(weights->x_dtype);
    const int32_t parts = tensors->router.dtype == RA_F32 && weights->x_dtype == RA_BF16 ? 3 : 1;
    const ra_moe_buffer_t buffers[] = {
        {WEIGHT(router), shape->router.experts, parts * shape->hidden, element},
        {WEIGHT(bias), shape->router.experts, 1, sizeof(float)},
        {WEIGHT(up), held * 2 * shape->expert_width, shape->hidden, element},
        {WEIGHT(down), held * shape->expert_width, shape->hidden, element},
        {WEIGHT(shared_up), 2 * shape->shared_width, shape->hidden, element},
        {WEIGHT(shared_down), shape->shared_width, shape->hidden, element},
    };
    int64_t bytes;
    struct ra_moe_cuda_weights *cuda = calloc(1, sizeof(*cuda));
    void *staging = malloc((size_t)ra_max_i64(CONVERT_CHUNK * 4, 3 * shape->hidden * 2));
    weights->cuda = cuda;
    ra_status_t status = RA_OK;
    if (cuda == NULL || staging == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate a staging buffer");
        goto done;
    }
    cuda->device = ra_stream_device(stream);
    cuda->router_parts = parts;
    RA_TRY_GOTO(ra_moe_lay_out(cuda, buffers, RA_ARRAY_LEN(buffers), NULL, &bytes), done);
    RA_TRY_GOTO(ra_device_alloc(cuda->device, bytes, &cuda->memory), done);
    RA_TRY_GOTO(ra_moe_lay_out(cuda, buffers, RA_ARRAY_LEN(buffers), cuda->memory, &bytes), done);
    RA_TRY_GOTO(upload_all(tensors, stream, staging, weights), done);
done:
    free(staging);
    return status;
}

static void release(ra_moe_weights_t *weights)
{
    if (weights->cuda != NULL) {
        ra_device_free(weights->cuda->device, weights->cuda->memory);
        free(weights->cuda);
    }
}

/* ---- plan ---------------------------------------------------------------------------------- */

#define MEMBER(name) offsetof(struct ra_moe_cuda_plan, name)

static ra_status_t allocate(ra_moe_plan_t *plan)
{
    const ra_moe_shape_t *shape = &plan->shape;
    const int64_t tile = plan->tile_rows, k = shape->router.top_k, hidden = shape->hidden;
    const int64_t act = ra_dtype_bytes(plan->x_dtype), index = sizeof(int32_t);
    const int64_t ranks = plan->comm != NULL ? plan->ranks : 0; /* 0: no exchange buffers */
    const int64_t mine = plan->comm != NULL ? tile : 0, at_hand = tile * plan->ranks;
    const int64_t leaving = mine * ra_min_i64(plan->ranks, k);
    const int32_t experts = plan->last - plan->first;
    struct ra_moe_cuda_plan *cuda = calloc(1, sizeof(*cuda));
    plan->cuda = cuda;
    if (cuda == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate a plan");
    }
    if (at_hand > INT32_MAX / 2 / k) {
        return ra_fail(RA_ERR_SHAPE, "moe", "a tile of %lld rows with %lld experts a token",
                       (long long)at_hand, (long long)k);
    }
    const int64_t sorted = cuda->sorted_rows = ra_moe_cuda_sorted_rows(plan->max_slots, experts);
    cuda->max_tiles = ra_moe_cuda_tiles(plan->max_slots, experts);
    const ra_moe_buffer_t buffers[] = {
        {MEMBER(logits), tile, shape->router.experts, sizeof(float)},
        {MEMBER(expert), tile, k, index},
        {MEMBER(position), at_hand, k, index},
        {MEMBER(source), sorted, 1, index},
        {MEMBER(tiles), cuda->max_tiles, 1, sizeof(ra_moe_tile_t)},
        {MEMBER(tile_count), 1, 1, index},
        {MEMBER(scratch), ra_moe_cuda_sort_scratch(at_hand, experts), 1, index},
        {MEMBER(inner), sorted, shape->expert_width, act},
        {MEMBER(out), sorted, hidden, act},
        {MEMBER(shared_inner), tile, shape->shared_width, act},
        {MEMBER(totals), 2, ranks, index},
        {MEMBER(tokens_before), ranks, tile, index},
        {MEMBER(slots_before), ranks, tile, index},
        {MEMBER(round[0].weight), tile, k, sizeof(float)},
        {MEMBER(round[1].weight), mine, k, sizeof(float)},
        {MEMBER(round[2].weight), mine, k, sizeof(float)},
        {MEMBER(round[0].result_at), mine, k, index},
        {MEMBER(round[1].result_at), mine, k, index},
        {MEMBER(round[2].result_at), mine, k, index},
        {MEMBER(lane[0].shared), shape->shared_width > 0 ? tile : 0, hidden, act},
        {MEMBER(lane[1].shared), shape->shared_width > 0 ? mine : 0, hidden, act},
        {MEMBER(lane[0].send), leaving, hidden, act},
        {MEMBER(lane[1].send), leaving, hidden, act},
        {MEMBER(lane[0].send_expert), leaving, k, index},
        {MEMBER(lane[1].send_expert), leaving, k, index},
        {MEMBER(lane[0].received), ranks * tile, hidden, act},
        {MEMBER(lane[1].received), ranks * tile, hidden, act},
        {MEMBER(lane[0].received_expert), ranks * tile, k, index},
        {MEMBER(lane[1].received_expert), ranks * tile, k, index},
        {MEMBER(lane[0].back), ranks > 0 ? plan->max_slots : 0, hidden, act},
        {MEMBER(lane[1].back), ranks > 0 ? plan->max_slots : 0, hidden, act},
        {MEMBER(lane[0].returned), mine * k, hidden, act},
        {MEMBER(lane[1].returned), mine * k, hidden, act},
    };
    RA_TRY(ra_moe_lay_out(cuda, buffers, RA_ARRAY_LEN(buffers), NULL, &plan->bytes));
    RA_TRY(ra_device_alloc(plan->device, plan->bytes, &cuda->memory));
    RA_TRY(ra_moe_lay_out(cuda, buffers, RA_ARRAY_LEN(buffers), cuda->memory, &plan->bytes));
    return plan->comm != NULL ? ra_moe_cuda_exchange_create(plan) : RA_OK;
}

static void free_plan(ra_moe_plan_t *plan)
{
    if (plan->cuda != NULL) {
        ra_device_free_host(plan->device, plan->cuda->host_totals);
        ra_device_free(plan->device, plan->cuda->memory);
        free(plan->cuda->counts);
        free(plan->cuda->transfers);
        free(plan->cuda);
    }
    free(plan->rank_rows);
}

/* ---- forward ------------------------------------------------------------------------------- */

ra_status_t ra_moe_cuda_run_experts(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                    ra_moe_cuda_tokens_t tokens, ra_stream_t *stream)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    const ra_moe_shape_t *shape = &plan->shape;
    const int64_t expert = shape->expert_width * shape->hidden * ra_dtype_bytes(plan->x_dtype);
    const int64_t skipped = plan->first - weights->first;
    const ra_moe_cuda_sort_t sort = {.expert = tokens.expert,
                                     .rows = tokens.rows,
                                     .top_k = shape->router.top_k,
                                     .first = plan->first,
                                     .last = plan->last,
                                     .position = cuda->position,
                                     .source = cuda->source,
                                     .tiles = cuda->tiles,
                                     .tile_count = cuda->tile_count,
                                     .scratch = cuda->scratch};
    RA_TRY(ra_moe_cuda_sort(&sort, ra_stream_cuda(stream)));
    ra_moe_cuda_gemm_t gemm = {.dtype = plan->x_dtype,
                               .y_dtype = plan->x_dtype,
                               .x = tokens.x,
                               .x_rows = tokens.rows,
                               .x_stride = tokens.x_stride,
                               .source = cuda->source,
                               .weight = (char *)weights->cuda->up + skipped * 2 * expert,
                               .groups = plan->last - plan->first,
                               .swiglu = true,
                               .n = shape->expert_width,
                               .k = shape->hidden,
                               .tiles = cuda->tiles,
                               .tile_count = cuda->tile_count,
                               .max_tiles = cuda->max_tiles,
                               .y = cuda->inner,
                               .y_rows = cuda->sorted_rows,
                               .y_stride = shape->expert_width};
    if (tokens.rows == 0 || gemm.groups == 0) {
        return RA_OK;
    }
    RA_TRY(ra_moe_cuda_gemm(&gemm, ra_stream_cuda(stream)));
    gemm.x = cuda->inner;
    gemm.x_rows = cuda->sorted_rows;
    gemm.x_stride = shape->expert_width;
    gemm.source = NULL;
    gemm.weight = (char *)weights->cuda->down + skipped * expert;
    gemm.swiglu = false;
    gemm.n = gemm.y_stride = shape->hidden;
    gemm.k = shape->expert_width;
    gemm.y = cuda->out;
    return ra_moe_cuda_gemm(&gemm, ra_stream_cuda(stream));
}

ra_status_t ra_moe_cuda_run_shared(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                   const void *x, int64_t x_stride, int64_t rows, void *shared,
                                   ra_stream_t *stream)
{
    const ra_moe_shape_t *shape = &plan->shape;
    if (shape->shared_width == 0 || rows == 0) {
        return RA_OK;
    }
    ra_moe_cuda_gemm_t gemm = {.dtype = plan->x_dtype,
                               .y_dtype = plan->x_dtype,
                               .x = x,
                               .x_rows = rows,
                               .x_stride = x_stride,
                               .weight = weights->cuda->shared_up,
                               .groups = 1,
                               .swiglu = true,
                               .n = shape->shared_width,
                               .k = shape->hidden,
                               .y = plan->cuda->shared_inner,
                               .y_rows = rows,
                               .y_stride = shape->shared_width};
    RA_TRY(ra_moe_cuda_gemm(&gemm, ra_stream_cuda(stream)));
    gemm.x = plan->cuda->shared_inner;
    gemm.x_stride = shape->shared_width;
    gemm.weight = weights->cuda->shared_down;
    gemm.swiglu = false;
    gemm.n = gemm.y_stride = shape->hidden;
    gemm.k = shape->shared_width;
    gemm.y = shared;
    return ra_moe_cuda_gemm(&gemm, ra_stream_cuda(stream));
}

/* Choices of a round to plan->cuda->expert and their weights. */
static ra_status_t route(ra_moe_plan_t *plan, const ra_moe_args_t *args, const void *x,
                         const struct ra_moe_cuda_round *round, ra_stream_t *stream)
{
    const ra_moe_weights_t *weights = args->weights;
    const ra_router_t *router = &plan->shape.router;
    const int64_t rows = round->rows;
    float *gap = args->gap != NULL ? args->gap + round->row : NULL;
    const ra_router_replay_t replay =
        ra_router_replay_at(&args->replay, round->row * args->replay.stride);
    const ra_moe_cuda_gemm_t gemm = {.dtype = plan->x_dtype,
                                     .y_dtype = RA_F32,
                                     .x = x,
                                     .x_rows = rows,
                                     .x_stride = args->x_stride,
                                     .weight = weights->cuda->router,
                                     .groups = 1,
                                     .repeat = weights->cuda->router_parts,
                                     .n = router->experts,
                                     .k = plan->shape.hidden,
                                     .y = plan->cuda->logits,
                                     .y_rows = rows,
                                     .y_stride = router->experts};
    if (rows == 0) {
        return RA_OK;
    }
    RA_TRY(ra_moe_cuda_gemm(&gemm, ra_stream_cuda(stream)));
    RA_TRY(ra_moe_cuda_select(router, rows, plan->cuda->logits, weights->cuda->bias,
                              plan->cuda->expert, round->weight, gap, ra_stream_cuda(stream)));
    return ra_moe_cuda_replay(router, &replay, rows, plan->cuda->logits, plan->cuda->expert,
                              round->weight, ra_stream_cuda(stream));
}

static ra_moe_cuda_tokens_t home_of(const ra_moe_plan_t *plan, const ra_moe_args_t *args,
                                    const struct ra_moe_cuda_round *round)
{
    const int64_t at = round->row * args->x_stride * ra_dtype_bytes(plan->x_dtype);
    return (ra_moe_cuda_tokens_t){.x = round->rows > 0 ? (const char *)args->x + at : NULL,
                                  .rows = round->rows,
                                  .x_stride = args->x_stride,
                                  .expert = plan->cuda->expert};
}

static struct ra_moe_cuda_round *round_of(const ra_moe_plan_t *plan, int64_t i)
{
    return &plan->cuda->round[plan->comm != NULL ? i % RA_MOE_CUDA_ROUNDS : 0];
}

static const struct ra_moe_cuda_round *begin_round(const ra_moe_plan_t *plan,
                                                   const ra_moe_args_t *args, int64_t i)
{
    struct ra_moe_cuda_round *round = round_of(plan, i);
    round->lane = &plan->cuda->lane[plan->comm != NULL ? i % RA_MOE_CUDA_LANES : 0];
    round->row = i * plan->tile_rows;
    round->rows = ra_min_i64(ra_max_i64(args->rows - round->row, 0), plan->tile_rows);
    return round;
}

static ra_status_t run_shared(ra_moe_plan_t *plan, const ra_moe_args_t *args,
                              const struct ra_moe_cuda_round *round, ra_stream_t *stream)
{
    const ra_moe_cuda_tokens_t home = home_of(plan, args, round);
    return ra_moe_cuda_run_shared(plan, args->weights, home.x, home.x_stride, home.rows,
                                  round->lane->shared, stream);
}

static ra_status_t combine(const ra_moe_plan_t *plan, const ra_moe_args_t *args,
                           const struct ra_moe_cuda_round *round, ra_stream_t *stream)
{
    const bool over_ranks = plan->comm != NULL;
    const ra_moe_cuda_combine_t sum = {
        .dtype = plan->x_dtype,
        .rows = round->rows,
        .hidden = plan->shape.hidden,
        .top_k = plan->shape.router.top_k,
        .position = over_ranks ? round->result_at : plan->cuda->position,
        .weight = round->weight,
        .out = over_ranks ? round->lane->returned : plan->cuda->out,
        .shared = plan->shape.shared_width > 0 ? round->lane->shared : NULL,
        .accumulate = args->accumulate,
        .y = round->rows > 0 ? args->y + round->row * args->y_stride : NULL,
        .y_stride = args->y_stride};
    return ra_moe_cuda_combine(&sum, ra_stream_cuda(stream));
}

static ra_status_t run_alone(ra_moe_plan_t *plan, const ra_moe_args_t *args, int64_t rounds,
                             ra_stream_t *stream)
{
    for (int64_t i = 0; i < rounds; i++) {
        const struct ra_moe_cuda_round *round = begin_round(plan, args, i);
        RA_TRY(route(plan, args, home_of(plan, args, round).x, round, stream));
        RA_TRY(run_shared(plan, args, round, stream));
        RA_TRY(ra_moe_cuda_run_experts(plan, args->weights, home_of(plan, args, round), stream));
        RA_TRY(combine(plan, args, round, stream));
    }
    return RA_OK;
}

static ra_status_t pack(ra_moe_plan_t *plan, const ra_moe_args_t *args, int64_t i,
                        ra_stream_t *stream)
{
    const struct ra_moe_cuda_round *round = begin_round(plan, args, i);
    const ra_moe_cuda_tokens_t home = home_of(plan, args, round);
    RA_TRY(route(plan, args, home.x, round, stream));
    return ra_moe_cuda_exchange_pack(plan, home, round, stream);
}

/*
 * While the experts run for round i, tokens of round i + 1 and results of round i - 1 travel. The
 * shared expert is what the device does while the host learns how many tokens go where.
 */
static ra_status_t run_over_ranks(ra_moe_plan_t *plan, const ra_moe_args_t *args, int64_t rounds,
                                  ra_stream_t *stream)
{
    for (int64_t i = -1; i <= rounds; i++) {
        const bool packs = i + 1 < rounds;
        const bool runs = i >= 0 && i < rounds;
        const bool ends = i > 0;
        if (packs) {
            RA_TRY(pack(plan, args, i + 1, stream));
        }
        if (runs) {
            RA_TRY(run_shared(plan, args, round_of(plan, i), stream));
        }
        if (packs) {
            RA_TRY(ra_moe_cuda_exchange_send(plan, round_of(plan, i + 1), stream));
        }
        if (runs) {
            RA_TRY(ra_moe_cuda_exchange_run(plan, args->weights, round_of(plan, i), stream));
        }
        if (ends) {
            RA_TRY(ra_moe_cuda_exchange_end(plan, round_of(plan, i - 1)));
            RA_TRY(combine(plan, args, round_of(plan, i - 1), stream));
        }
    }
    return RA_OK;
}

static ra_status_t forward(ra_moe_plan_t *plan, const ra_moe_args_t *args, ra_stream_t *stream)
{
    int64_t rounds;
    RA_TRY(ra_moe_agree_on_rounds(plan, args->rows, &rounds));
    if (plan->comm == NULL) {
        return run_alone(plan, args, rounds, stream);
    }
    ra_status_t status = run_over_ranks(plan, args, rounds, stream);
    for (int i = 0; i < RA_MOE_CUDA_ROUNDS; i++) { /* none is left unless something failed */
        struct ra_moe_cuda_round *round = &plan->cuda->round[i];
        ra_request_free(round->tokens);
        ra_request_free(round->results);
        round->tokens = round->results = NULL;
    }
    return status;
}

const ra_moe_device_ops_t ra_moe_cuda_ops = {.default_tile_rows = DEFAULT_TILE_ROWS,
                                             .prepare = prepare,
                                             .release = release,
                                             .allocate = allocate,
                                             .free = free_plan,
                                             .forward = forward};
