/**
 * @file  tests/comm/gpu_ranks.h
 * @brief Run a test's ranks with a GPU each where there are any, so that every transport can run.
 */
#ifndef RA_TESTS_COMM_GPU_RANKS_H
#define RA_TESTS_COMM_GPU_RANKS_H

#include "base/device.h"
#include "tests/comm/ranks_check.h"
#include "tests/test_support.h"
#include <string.h>

typedef ra_status_t (*gpu_rank_func_t)(ra_comm_t *comm, ra_stream_t *stream, void *arg);

typedef struct gpu_ranks {
    gpu_rank_func_t func;
    ra_rank_func_t host_func;
    void *arg;
    int gpus;
} gpu_ranks_t;

/** GPUs of this machine, 0 in a build without CUDA. */
static inline int gpu_count(void)
{
    int count = 0;
    ra_log_set_quiet(1);
    ra_status_t status = ra_device_count("cuda", &count);
    ra_log_set_quiet(0);
    return status == RA_OK ? count : 0;
}

/** nccl needs a GPU a rank, peer none as long as only host memory is moved. */
static inline bool gpu_row_can_run(const char *row, int ranks)
{
    return strcmp(row, "nccl") != 0 || ranks <= gpu_count();
}

static inline ra_status_t gpu_rank_main(ra_comm_t *comm, void *arg)
{
    const gpu_ranks_t *job = arg;
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    ra_status_t status;
    RA_TRY(ra_device_open("cuda", ra_comm_rank(comm) % job->gpus, NULL, &device));
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

/** ra_ranks_run() with GPUs: rank r on GPU r modulo their number. */
static inline ra_status_t gpu_ranks_run(const char *row, int ranks, gpu_rank_func_t func, void *arg)
{
    gpu_ranks_t job = {.func = func, .arg = arg, .gpus = gpu_count()};
    return ra_ranks_run(row, ranks, gpu_rank_main, &job);
}

/** ra_ranks_run() of a function that moves host memory, on GPUs if @a row can use any. */
static inline ra_status_t host_ranks_run(const char *row, int ranks, ra_rank_func_t func, void *arg)
{
    gpu_ranks_t job = {.host_func = func, .arg = arg, .gpus = gpu_count()};
    if (job.gpus == 0 || (strcmp(row, "nccl") != 0 && strcmp(row, "peer") != 0)) {
        return ra_ranks_run(row, ranks, func, arg);
    }
    return ra_ranks_run(row, ranks, gpu_rank_main, &job);
}

#endif
