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

enum { DEVICE_RANKS_MOST = 64 };

typedef ra_status_t (*device_rank_func_t)(ra_comm_t *comm, ra_stream_t *stream, void *arg);

/** What ranks keep between calls. */
typedef struct device_world {
    const char *device;
    int count; /**< rank r has device r modulo count */
    ra_pool_t *pool;
    ra_device_t *opened[DEVICE_RANKS_MOST];
    ra_stream_t *stream[DEVICE_RANKS_MOST];
    ra_ranks_t *ranks;
} device_world_t;

/** nccl needs a GPU a rank, peer none as long as only host memory is moved. */
static inline bool gpu_row_can_run(const char *row, int ranks)
{
    return strcmp(row, "nccl") != 0 || ranks <= gpu_count();
}

/** Go through the transports that can run here: *row_p from *index on; the others are told of. */
static inline bool next_transport(int *index, const char **row_p)
{
    const char *doc;
    while (ra_transport_list((*index)++, row_p, &doc)) {
        if (gpu_row_can_run(*row_p, 1)) {
            return true;
        }
        print_message("%s: no GPU, not tested\n", *row_p);
    }
    return false;
}

static inline bool gpu_row_uses_gpus(const char *row)
{
    return (strcmp(row, "nccl") == 0 || strcmp(row, "peer") == 0) && gpu_count() > 0;
}

static inline device_world_t gpu_world(void)
{
    return (device_world_t){.device = "cuda", .count = gpu_count()};
}

/** Hooks of a world; @a arg is its device_world_t. */
static inline ra_status_t device_rank_open(ra_comm_t *comm, void *arg)
{
    device_world_t *world = arg;
    int rank = ra_comm_rank(comm);
    RANK_CHECK(comm, rank < DEVICE_RANKS_MOST);
    RA_TRY(ra_device_open(world->device, rank % world->count, world->pool, &world->opened[rank]));
    RA_TRY(ra_stream_create(world->opened[rank], &world->stream[rank]));
    return ra_comm_attach(comm, world->stream[rank]);
}

static inline void device_rank_close(ra_comm_t *comm, void *arg)
{
    device_world_t *world = arg;
    int rank = ra_comm_rank(comm);
    ra_stream_destroy(world->stream[rank]);
    ra_device_close(world->opened[rank]);
    world->stream[rank] = NULL;
    world->opened[rank] = NULL;
}

static inline ra_status_t device_world_open(const char *row, int ranks, device_world_t *world)
{
    ra_rank_hooks_t hooks = {.open = device_rank_open, .close = device_rank_close, .arg = world};
    return ra_ranks_open(row, ranks, &hooks, &world->ranks);
}

typedef struct device_job {
    const device_world_t *world;
    device_rank_func_t func;
    ra_rank_func_t host_func;
    void *arg;
} device_job_t;

static inline ra_status_t device_rank_main(ra_comm_t *comm, void *arg)
{
    const device_job_t *job = arg;
    ra_stream_t *stream = job->world->stream[ra_comm_rank(comm)];
    RA_TRY(job->func != NULL ? job->func(comm, stream, job->arg) : job->host_func(comm, job->arg));
    return ra_stream_sync(stream);
}

/** checked_ranks_call() of a function that also gets the rank's stream. */
static inline ra_status_t device_world_call(const device_world_t *world, device_rank_func_t func,
                                            void *arg)
{
    device_job_t job = {.world = world, .func = func, .arg = arg};
    return checked_ranks_call(world->ranks, device_rank_main, &job);
}

/* One call on a world of its own. */
static inline ra_status_t device_ranks_run(const char *row, int ranks, device_world_t *world,
                                           device_job_t job)
{
    job.world = world;
    RA_TRY(device_world_open(row, ranks, world));
    ra_status_t status = checked_ranks_call(world->ranks, device_rank_main, &job);
    ra_ranks_close(world->ranks);
    return status;
}

/** checked_ranks_run() on the CPU. @param pool  threads that the ranks share, or NULL. */
static inline ra_status_t cpu_ranks_run(const char *row, int ranks, ra_pool_t *pool,
                                        device_rank_func_t func, void *arg)
{
    device_world_t world = {.device = "cpu", .count = 1, .pool = pool};
    return device_ranks_run(row, ranks, &world, (device_job_t){.func = func, .arg = arg});
}

/** checked_ranks_run() on GPUs: rank r on GPU r modulo their number. */
static inline ra_status_t gpu_ranks_run(const char *row, int ranks, device_rank_func_t func,
                                        void *arg)
{
    device_world_t world = gpu_world();
    return device_ranks_run(row, ranks, &world, (device_job_t){.func = func, .arg = arg});
}

/** checked_ranks_run() of a function that moves host memory, on GPUs if @a row can use any. */
static inline ra_status_t host_ranks_run(const char *row, int ranks, ra_rank_func_t func, void *arg)
{
    if (!gpu_row_uses_gpus(row)) {
        return checked_ranks_run(row, ranks, func, arg);
    }
    device_world_t world = gpu_world();
    return device_ranks_run(row, ranks, &world, (device_job_t){.host_func = func, .arg = arg});
}

#endif
