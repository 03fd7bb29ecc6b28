/*
 * attention/linear_cpu.c - chunked linear attention on the thread pool.
 *
 * Heads and segments are independent, so each (segment, some neighbouring heads) is one task; the
 * longest segments go first, which keeps the last thread from starting a long one alone.
 */
#include "attention/linear_cpu.h"

#include "attention/linear_kernel.h"
#include "base/checked.h"
#include "base/cpu_isa.h"
#include <stdatomic.h>
#include <stdlib.h>

RA_ISA_TABLE(ra_linear_task_func_t, ra_linear_task);

enum {
    TASK_STATE = 64 << 10, /* floats of states that a task may keep */
    MAX_TASK_HEADS = 16,
};

typedef struct job {
    const ra_linear_args_t *args;
    int64_t task_heads;
    const ra_linear_segment_t **order; /* longest first */
    bool state_only;
    ra_linear_task_func_t *func;
    atomic_bool failed; /* any task sets it; read after the job */
} job_t;

static bool fits(const ra_linear_args_t *shape)
{
    return shape->dtype == RA_F32;
}

static int longer_first(const void *left, const void *right)
{
    const ra_linear_segment_t *a = *(const ra_linear_segment_t *const *)left;
    const ra_linear_segment_t *b = *(const ra_linear_segment_t *const *)right;
    return (a->row_count < b->row_count) - (a->row_count > b->row_count);
}

static void task(void *arg, int64_t index)
{
    job_t *job = arg;
    int64_t groups = ra_ceil_div(job->args->heads, job->task_heads);
    int64_t head = index % groups * job->task_heads;
    ra_linear_task_t one = {.args = job->args,
                            .segment = job->order[index / groups],
                            .head = head,
                            .head_count = ra_min_i64(job->task_heads, job->args->heads - head),
                            .state_only = job->state_only};
    if (job->func(&one) != RA_OK) {
        atomic_store(&job->failed, true);
    }
}

/*
 * As many as share a task while every thread has one, or two where segments differ in length:
 * neighbouring heads share pages and cache lines that are fetched ahead. Evenly cut: the longest
 * task is what all wait for.
 */
static int64_t heads_of_task(const ra_linear_args_t *args, int64_t threads)
{
    int64_t state = (int64_t)args->key_dim * args->value_dim;
    int64_t most = ra_max_i64(ra_min_i64(TASK_STATE / state, MAX_TASK_HEADS), 1);
    int64_t wanted = threads > 1 && args->segment_count > 1 ? 2 * threads : threads;
    int64_t groups = ra_max_i64(ra_ceil_div(args->heads, most),
                                ra_ceil_div(wanted, ra_max_i64(args->segment_count, 1)));
    return ra_ceil_div(args->heads, ra_min_i64(groups, args->heads));
}

static ra_status_t run(const ra_linear_args_t *args, bool state_only, ra_stream_t *stream)
{
    job_t job = {
        .args = args, .state_only = state_only, .func = ra_linear_task_table[ra_cpu_isa()]};
    atomic_init(&job.failed, false);
    /* Slot 3: the tasks, which may run on this very thread, use slot 0. */
    job.order = ra_scratch(3, args->segment_count * (int64_t)sizeof(*job.order));
    if (job.order == NULL) {
        return RA_ERR_NOMEM;
    }
    for (int64_t s = 0; s < args->segment_count; s++) {
        job.order[s] = &args->segments[s];
    }
    qsort(job.order, (size_t)args->segment_count, sizeof(*job.order), longer_first);
    job.task_heads = heads_of_task(args, ra_pool_threads(ra_stream_pool(stream)));
    ra_pool_for(ra_stream_pool(stream),
                args->segment_count * ra_ceil_div(args->heads, job.task_heads), task, &job);
    return atomic_load(&job.failed) ? RA_ERR_NOMEM : RA_OK;
}

const ra_linear_kernel_t ra_linear_cpu = {.name = "cpu",
                                          .doc = "chunks of register-tiled products, vectorised",
                                          .device = RA_DEVICE_CPU,
                                          .fits = fits,
                                          .run = run};
