/**
 * @file  tests/comm/device_ranks.h
 * @brief Run a test's ranks with a device and a stream each: the CPU, or a GPU each where there are
 *        any, so that every transport can run.
 */
#ifndef RA_TESTS_COMM_DEVICE_RANKS_H
#define RA_TESTS_COMM_DEVICE_RANKS_H

#include "base/device.h"
#include "tests/comm/ranks_check.h"
#include "tests/gpu_support.h"
#include <string.h>

typedef ra_status_t (*device_rank_func_t)(ra_comm_t *comm, ra_stream_t *stream, void *arg);

typedef struct device_ranks {
    const char *device;
    int count; /* rank r has device r modulo count */
    ra_pool_t *pool;
    device_rank_func_t func;
    ra_rank_func_t host_func;
    void *arg;
} device_ranks_t;

/** nccl needs a GPU a rank, peer none as long as only host memory is moved. */
static inline bool gpu_row_can_run(const char *row, int ranks)
{
    return strcmp(row, "nccl") != 0 || ranks <= gpu_count();
}

static inline ra_status_t device_rank_main(ra_comm_t *comm, void *arg)
{
    const device_ranks_t *job = arg;
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    ra_status_t status;
    RA_TRY(ra_device_open(job->device, ra_comm_rank(comm) % job->count, job->pool, &device));
    RA_TRY_GOTO(ra_stream_create(device, &stream), out);
    RA_TRY_GOTO(ra_comm_attach(comm, stream), out);
    status = job->func != NULL ? job->func(comm, stream, job->arg) : job->host_func(comm, job->arg);
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
out:
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

/** checked_ranks_run() on the CPU. @param pool  threads that the ranks share, or NULL. */
static inline ra_status_t cpu_ranks_run(const char *row, int ranks, ra_pool_t *pool,
                                        device_rank_func_t func, void *arg)
{
    device_ranks_t job = {.device = "cpu", .count = 1, .pool = pool, .func = func, .arg = arg};
    return checked_ranks_run(row, ranks, device_rank_main, &job);
}

/** checked_ranks_run() on GPUs: rank r on GPU r modulo their number. */
static inline ra_status_t gpu_ranks_run(const char *row, int ranks, device_rank_func_t func,
                                        void *arg)
{
    device_ranks_t job = {.device = "cuda", .count = gpu_count(), .func = func, .arg = arg};
    return checked_ranks_run(row, ranks, device_rank_main, &job);
}

/** checked_ranks_run() of a function that moves host memory, on GPUs if @a row can use any. */
static inline ra_status_t host_ranks_run(const char *row, int ranks, ra_rank_func_t func, void *arg)
{
    device_ranks_t job = {.device = "cuda", .count = gpu_count(), .host_func = func, .arg = arg};
    if (job.count == 0 || (strcmp(row, "nccl") != 0 && strcmp(row, "peer") != 0)) {
        return checked_ranks_run(row, ranks, func, arg);
    }
    return checked_ranks_run(row, ranks, device_rank_main, &job);
}

#endif
