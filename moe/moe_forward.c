#include "base/checked.h"
#include "moe/moe_plan.h"
#include "moe/moe_simd.h"

/* One tile of a call. */
typedef struct tile {
    ra_moe_plan_t *plan;
    const ra_moe_args_t *args;
    int64_t row, rows; /* of the call */
    const float *results;
} tile_t;

static ra_moe_tokens_t tokens_of(const tile_t *tile)
{
    const ra_moe_args_t *args = tile->args;
    ra_moe_tokens_t tokens = {.x_stride = args->x_stride};
    if (tile->rows > 0) {
        tokens.x = (const float *)args->x + tile->row * args->x_stride;
    }
    return tokens;
}

static void select_rows(void *arg, int64_t begin, int64_t end)
{
    const tile_t *tile = arg;
    const ra_moe_plan_t *plan = tile->plan;
    const ra_router_t *router = &plan->shape.router;
    const ra_router_replay_t *all = &tile->args->replay;
    const float *logits = plan->logits + begin * router->experts;
    int32_t *expert = plan->expert + begin * router->top_k;
    float *weight = plan->weight + begin * router->top_k, *gap = tile->args->gap;
    ra_router_select(router, end - begin, logits, tile->args->weights->bias, expert, weight,
                     gap != NULL ? gap + tile->row + begin : NULL);
    ra_router_replay_t replay = ra_router_replay_at(all, (tile->row + begin) * all->stride);
    ra_router_replay(router, &replay, end - begin, logits, expert, weight);
}

static ra_status_t route(const tile_t *tile, ra_stream_t *stream)
{
    ra_moe_tokens_t tokens = tokens_of(tile);
    ra_gemm_job_t job = {.weight = tile->args->weights->router,
                         .x = tokens.x,
                         .x_stride = tokens.x_stride,
                         .rows = tile->rows,
                         .y = tile->plan->logits,
                         .y_stride = tile->plan->shape.router.experts};
    RA_TRY(ra_gemm(&job, tile->rows > 0, false, stream));
    ra_moe_for_rows(stream, tile->rows, select_rows, (void *)tile);
    return RA_OK;
}

/* Every expert is here. */
static ra_status_t run_alone(tile_t *tile, ra_stream_t *stream)
{
    ra_moe_plan_t *plan = tile->plan;
    const int32_t k = plan->shape.router.top_k;
    for (int64_t t = 0; t < tile->rows; t++) {
        for (int32_t j = 0; j < k; j++) {
            plan->slots[t * k + j] =
                (ra_moe_slot_t){.row = (int32_t)t, .expert = plan->expert[t * k + j]};
        }
    }
    RA_TRY(ra_moe_run_experts(plan, tile->args->weights, tile->rows * k, tokens_of(tile),
                              tile->rows, tokens_of(tile), stream));
    for (int64_t s = 0; s < tile->rows * k; s++) {
        plan->result_at[s] = plan->position[s];
    }
    tile->results = plan->outputs;
    return RA_OK;
}

static void combine_rows(void *arg, int64_t begin, int64_t end)
{
    const tile_t *tile = arg;
    const ra_moe_plan_t *plan = tile->plan;
    const ra_moe_args_t *args = tile->args;
    const ra_moe_ops_t *ops = ra_moe_ops();
    const int64_t hidden = plan->shape.hidden;
    const int32_t k = plan->shape.router.top_k;
    for (int64_t t = begin; t < end; t++) {
        const float *rows[RA_ROUTER_MAX_TOP_K];
        for (int32_t j = 0; j < k; j++) {
            rows[j] = tile->results + plan->result_at[t * k + j] * hidden;
        }
        const float *shared = plan->shape.shared_width > 0 ? plan->shared + t * hidden : NULL;
        ops->combine(rows, plan->weight + t * k, k, shared, args->accumulate, hidden,
                     args->y + (tile->row + t) * args->y_stride);
    }
}

static ra_status_t forward(ra_moe_plan_t *plan, const ra_moe_args_t *args, ra_stream_t *stream)
{
    int64_t rounds;
    RA_TRY(ra_moe_agree_on_rounds(plan, args->rows, &rounds));
    for (int64_t round = 0; round < rounds; round++) {
        int64_t row = round * plan->tile_rows;
        int64_t rows = ra_min_i64(ra_max_i64(args->rows - row, 0), plan->tile_rows);
        tile_t tile = {.plan = plan, .args = args, .row = row, .rows = rows};
        RA_TRY(route(&tile, stream));
        if (plan->comm == NULL) {
            RA_TRY(run_alone(&tile, stream));
        } else {
            RA_TRY(ra_moe_exchange_round(plan, args->weights, round, rows, tokens_of(&tile),
                                         &tile.results, stream));
        }
        ra_moe_for_rows(stream, rows, combine_rows, &tile);
    }
    return RA_OK;
}

const ra_moe_device_ops_t ra_moe_cpu_ops = {.default_tile_rows = 512,
                                            .prepare = ra_moe_cpu_prepare,
                                            .release = ra_moe_cpu_release,
                                            .allocate = ra_moe_cpu_allocate,
                                            .free = ra_moe_cpu_free,
                                            .forward = forward};
