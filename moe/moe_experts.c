/*
 * moe/moe_experts.c - the feed-forward of many experts as grouped products.
 *
 * Slots are sorted by expert (counting sort, stable), so the rows of an expert are adjacent and the
 * whole layer is two calls of ra_gemm(): all gates and ups, then all downs.
 */
#include "base/checked.h"
#include "moe/moe_plan.h"
#include "moe/moe_simd.h"
#include <string.h>

enum { CHUNK_ROWS = 16 }; /* rows that a thread takes at once */

typedef struct row_job {
    int64_t rows;
    ra_moe_rows_func_t func;
    void *arg;
} row_job_t;

static void run_chunk(void *arg, int64_t index)
{
    const row_job_t *job = arg;
    int64_t begin = index * CHUNK_ROWS;
    job->func(job->arg, begin, ra_min_i64(begin + CHUNK_ROWS, job->rows));
}

void ra_moe_for_rows(ra_stream_t *stream, int64_t rows, ra_moe_rows_func_t func, void *arg)
{
    row_job_t job = {.rows = rows, .func = func, .arg = arg};
    ra_pool_for(ra_stream_pool(stream), ra_ceil_div(rows, CHUNK_ROWS), run_chunk, &job);
}

typedef struct gather {
    ra_moe_plan_t *plan;
    ra_moe_tokens_t tokens;
} gather_t;

static void gather_rows(void *arg, int64_t begin, int64_t end)
{
    const gather_t *gather = arg;
    const ra_moe_plan_t *plan = gather->plan;
    int64_t hidden = plan->shape.hidden;
    for (int64_t s = begin; s < end; s++) {
        memcpy(plan->sorted + plan->position[s] * hidden,
               gather->tokens.x + plan->slots[s].row * gather->tokens.x_stride,
               (size_t)hidden * sizeof(float));
    }
}

static void sort_by_expert(ra_moe_plan_t *plan, int64_t slots)
{
    int64_t *begin = plan->begin;
    memset(begin, 0, (size_t)(plan->shape.router.experts + 1) * sizeof(*begin));
    for (int64_t s = 0; s < slots; s++) {
        begin[plan->slots[s].expert + 1]++;
    }
    for (int32_t e = 0; e < plan->shape.router.experts; e++) {
        begin[e + 1] += begin[e];
    }
    for (int64_t s = 0; s < slots; s++) {
        plan->position[s] = begin[plan->slots[s].expert]++;
    }
    /* Placing moved every start to its end, which is the start of the next expert. */
    memmove(begin + 1, begin, (size_t)plan->shape.router.experts * sizeof(*begin));
    begin[0] = 0;
}

/* Inner rows of the slots and, after them, of the shared expert. */
typedef struct activation {
    const ra_moe_plan_t *plan;
    int64_t slots;
} activation_t;

static void activate_rows(void *arg, int64_t begin, int64_t end)
{
    const activation_t *activation = arg;
    const ra_moe_plan_t *plan = activation->plan;
    const ra_moe_ops_t *ops = ra_moe_ops();
    for (int64_t r = begin; r < end; r++) {
        int64_t width = plan->shape.expert_width, at = r;
        float *gate = plan->inner, *up = plan->up;
        if (r >= activation->slots) {
            width = plan->shape.shared_width;
            at = r - activation->slots;
            gate = plan->shared_inner;
            up = plan->shared_up;
        }
        ops->swiglu(gate + at * width, up + at * width, width);
    }
}

static ra_gemm_job_t *add_job(ra_gemm_job_t *job, const ra_gemm_weight_t *weight, const float *x,
                              int64_t x_stride, int64_t rows, float *y)
{
    *job = (ra_gemm_job_t){.weight = weight,
                           .x = x,
                           .x_stride = x_stride,
                           .rows = rows,
                           .y = y,
                           .y_stride = ra_gemm_weight_out(weight)};
    return job + 1;
}

ra_status_t ra_moe_run_experts(ra_moe_plan_t *plan, const ra_moe_weights_t *weights, int64_t slots,
                               ra_moe_tokens_t tokens, int64_t rows, ra_moe_tokens_t home,
                               ra_stream_t *stream)
{
    const int64_t hidden = plan->shape.hidden, width = plan->shape.expert_width;
    const int64_t shared_width = plan->shape.shared_width;
    sort_by_expert(plan, slots);
    ra_moe_for_rows(stream, slots, gather_rows, &(gather_t){.plan = plan, .tokens = tokens});

    ra_gemm_job_t *job = plan->jobs;
    for (int32_t e = plan->first; e < plan->last; e++) {
        int64_t at = plan->begin[e], count = plan->begin[e + 1] - at;
        const float *x = plan->sorted + at * hidden;
        if (count > 0) {
            int32_t held = e - weights->first;
            job = add_job(job, weights->gate[held], x, hidden, count, plan->inner + at * width);
            job = add_job(job, weights->up[held], x, hidden, count, plan->up + at * width);
        }
    }
    if (shared_width > 0 && rows > 0) {
        job = add_job(job, weights->shared_gate, home.x, home.x_stride, rows, plan->shared_inner);
        job = add_job(job, weights->shared_up, home.x, home.x_stride, rows, plan->shared_up);
    }
    RA_TRY(ra_gemm(plan->jobs, job - plan->jobs, false, stream));

    int64_t inner_rows = slots + (shared_width > 0 ? rows : 0);
    activation_t activation = {.plan = plan, .slots = slots};
    ra_moe_for_rows(stream, inner_rows, activate_rows, &activation);

    job = plan->jobs;
    for (int32_t e = plan->first; e < plan->last; e++) {
        int64_t at = plan->begin[e], count = plan->begin[e + 1] - at;
        if (count > 0) {
            job = add_job(job, weights->down[e - weights->first], plan->inner + at * width, width,
                          count, plan->outputs + at * hidden);
        }
    }
    if (shared_width > 0 && rows > 0) {
        job = add_job(job, weights->shared_down, plan->shared_inner, shared_width, rows,
                      plan->shared);
    }
    return ra_gemm(plan->jobs, job - plan->jobs, false, stream);
}
