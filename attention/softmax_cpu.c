/*
 * The "cpu" row of the softmax table: cuts a block into tasks of some rows and the query heads of
 * one key/value head, and runs them longest first on the pool. How the rows are cut does not show
 * in any result.
 */
#include "attention/softmax_cpu.h"

#include "attention/softmax_kernel.h"
#include "base/checked.h"
#include "base/cpu_isa.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

enum {
    TASK_FLOATS = 64 << 10, /* of queries: they and O stay in the L2 cache, one packing of keys and
                               values serves all their rows */
    MAX_TASK_ROWS = 512,    /* packing costs little beyond; half the L2 cache may be another's */
    MIN_TASK_ROWS = 24,     /* below, packing costs more than idle threads */
    TASKS_A_THREAD = 4,
    FINISH_ROWS = 64,
};

typedef struct fold_call {
    const ra_softmax_block_t *block;
    const ra_softmax_state_t *state;
    const ra_softmax_task_t *tasks;
    ra_softmax_task_func_t *func;
    atomic_int status; /* first failure */
} fold_call_t;

static bool cpu_fits(const ra_softmax_block_t *shape)
{
    return shape->dtype == RA_F32 && shape->head_dim <= RA_SOFTMAX_MAX_DIM;
}

static int longest_first(const void *a, const void *b)
{
    const ra_softmax_task_t *x = a, *y = b;
    if (x->cost != y->cost) {
        return x->cost < y->cost ? 1 : -1;
    }
    if (x->kv_head != y->kv_head) {
        return x->kv_head < y->kv_head ? -1 : 1;
    }
    return (x->row_begin > y->row_begin) - (x->row_begin < y->row_begin);
}

/* Keys of the group's spans between the smallest row_lo and the largest row_hi of the rows. */
static int64_t visible_keys(const ra_softmax_block_t *block, const ra_row_group_t *group,
                            int64_t row_begin, int64_t row_count)
{
    int64_t lo = INT64_MAX, hi = INT64_MIN, keys = 0;
    for (int64_t r = row_begin; r < row_begin + row_count; r++) {
        lo = ra_min_i64(lo, block->mask.row_lo[r]);
        hi = ra_max_i64(hi, block->mask.row_hi[r]);
    }
    for (int64_t s = 0; s < group->span_count && lo < hi; s++) {
        const ra_key_span_t *span = &block->spans[group->span_begin + s];
        const int64_t *pos = block->mask.key_pos + span->key_begin;
        keys += ra_softmax_lower_bound(pos, span->key_count, hi) -
                ra_softmax_lower_bound(pos, span->key_count, lo);
    }
    return keys;
}

/* Tasks of all groups when each has at most `rows` rows. tasks NULL: only count. */
static int64_t list_tasks(const ra_softmax_block_t *block, int64_t rows, ra_softmax_task_t *tasks)
{
    int64_t count = 0;
    for (int64_t g = 0; g < block->group_count; g++) {
        const ra_row_group_t *group = &block->groups[g];
        if (tasks == NULL) {
            count += ra_ceil_div(group->row_count, rows) * block->kv_heads;
            continue;
        }
        for (int64_t r = 0; r < group->row_count; r += rows) {
            int64_t begin = group->row_begin + r, n = ra_min_i64(rows, group->row_count - r);
            int64_t keys = visible_keys(block, group, begin, n);
            for (int32_t h = 0; h < block->kv_heads && keys > 0; h++) {
                tasks[count++] = (ra_softmax_task_t){g, begin, n, h, keys * n};
            }
        }
    }
    return count;
}

static void run_task(void *arg, int64_t index)
{
    fold_call_t *call = arg;
    int none = RA_OK;
    ra_status_t status = call->func(call->block, call->state, &call->tasks[index]);
    if (status != RA_OK) {
        atomic_compare_exchange_strong(&call->status, &none, (int)status);
    }
}

static ra_status_t cpu_fold(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                            ra_stream_t *stream)
{
    RA_ISA_TABLE(ra_softmax_task_func_t, ra_softmax_task);
    int64_t stacked = block->heads / block->kv_heads;
    int64_t rows =
        ra_max_i64(ra_min_i64(TASK_FLOATS / block->head_dim, MAX_TASK_ROWS) / stacked, 1);
    int64_t least = ra_max_i64(MIN_TASK_ROWS / stacked, 1);
    int64_t threads = ra_pool_threads(ra_stream_pool(stream));
    int64_t wanted = threads > 1 ? threads * TASKS_A_THREAD : 1;
    while (rows > least && list_tasks(block, rows, NULL) < wanted) {
        rows = ra_max_i64(rows / 2, least);
    }

    int64_t bytes = (list_tasks(block, rows, NULL) + 1) * (int64_t)sizeof(ra_softmax_task_t);
    ra_softmax_task_t *tasks = ra_scratch(3, bytes);
    if (tasks == NULL) {
        return RA_ERR_NOMEM;
    }
    int64_t count = list_tasks(block, rows, tasks);
    qsort(tasks, (size_t)count, sizeof(*tasks), longest_first);
    fold_call_t call = {.block = block,
                        .state = state,
                        .tasks = tasks,
                        .func = ra_softmax_task_table[ra_cpu_isa()]};
    atomic_init(&call.status, RA_OK);
    ra_pool_for(ra_stream_pool(stream), count, run_task, &call);
    return (ra_status_t)atomic_load(&call.status);
}

const ra_softmax_kernel_t ra_softmax_cpu = {
    .name = "cpu",
    .doc = "tiled and vectorised, any head size up to 256, all mask features",
    .device = RA_DEVICE_CPU,
    .fits = cpu_fits,
    .fold = cpu_fold,
};

typedef struct state_call {
    int64_t rows;
    int32_t heads, head_dim;
    const ra_softmax_state_t *state;
    float *lse; /* finish: may be NULL */
} state_call_t;

static void reset_rows(void *arg, int64_t index)
{
    const state_call_t *call = arg;
    int64_t end = ra_min_i64((index + 1) * FINISH_ROWS, call->rows);
    for (int64_t r = index * FINISH_ROWS; r < end; r++) {
        float *o = call->state->o + r * call->state->o_stride;
        for (int64_t i = 0; i < (int64_t)call->heads * call->head_dim; i++) {
            o[i] = 0.0f;
        }
        for (int64_t h = 0; h < call->heads; h++) {
            call->state->m[h * call->rows + r] = -INFINITY;
            call->state->l[h * call->rows + r] = 0.0f;
        }
    }
}

/* l = 0 only for rows that saw no key: m is -inf then and O is 0. */
static void finish_rows(void *arg, int64_t index)
{
    const state_call_t *call = arg;
    int64_t end = ra_min_i64((index + 1) * FINISH_ROWS, call->rows);
    for (int64_t r = index * FINISH_ROWS; r < end; r++) {
        for (int64_t h = 0; h < call->heads; h++) {
            float *o = call->state->o + r * call->state->o_stride + h * call->head_dim;
            float m = call->state->m[h * call->rows + r], l = call->state->l[h * call->rows + r];
            bool empty = m == -INFINITY && l == 0.0f;
            float inverse = empty ? 0.0f : 1.0f / l;
            for (int32_t d = 0; d < call->head_dim; d++) {
                o[d] *= inverse;
            }
            if (call->lse != NULL) {
                call->lse[h * call->rows + r] = empty ? -INFINITY : m + logf(l);
            }
        }
    }
}

void ra_softmax_cpu_reset(int64_t rows, int32_t heads, int32_t head_dim,
                          const ra_softmax_state_t *state, ra_stream_t *stream)
{
    state_call_t call = {rows, heads, head_dim, state, NULL};
    ra_pool_for(ra_stream_pool(stream), ra_ceil_div(rows, FINISH_ROWS), reset_rows, &call);
}

void ra_softmax_cpu_finish(int64_t rows, int32_t heads, int32_t head_dim,
                           const ra_softmax_state_t *state, float *lse, ra_stream_t *stream)
{
    state_call_t call = {rows, heads, head_dim, state, lse};
    ra_pool_for(ra_stream_pool(stream), ra_ceil_div(rows, FINISH_ROWS), finish_rows, &call);
}
