#include "comm/nccl_end.h"

#include "base/clock.h"
#include "base/device_cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    BLOCKS_MOST = 16, /* thread blocks, so multiprocessors; NCCL_MAX_CTAS overrides it */
    ABORT_LOCK_S = 2
};

ra_status_t ra_nccl_fail_aborted(ra_nccl_world_t *world)
{
    char text[96];
    pthread_mutex_lock(&world->mutex);
    snprintf(text, sizeof(text), "another rank failed: %s", ra_status_text(world->cause));
    pthread_mutex_unlock(&world->mutex);
    ra_last_error_set(text); /* the rank that failed has printed why */
    return RA_ERR_PEER;
}

ra_status_t ra_nccl_check(ncclResult_t result, const char *what)
{
    if (result == ncclSuccess) {
        return RA_OK;
    }
    return ra_fail(result == ncclRemoteError ? RA_ERR_PEER : RA_ERR_DEVICE, "comm",
                   "NCCL, %s: %s (%s)", what, ncclGetErrorString(result), ncclGetLastError(NULL));
}

/* The rank's kernels see a flag and end. */
static void abort_comm(ra_nccl_end_t *end)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ABORT_LOCK_S;
    /* A thread stuck inside NCCL holds the lock; aborting is what frees it. */
    bool locked = pthread_mutex_timedlock(&end->issue, &until) == 0;
    ncclComm_t comm = end->comm;
    end->comm = NULL;
    if (comm != NULL) {
        ncclCommAbort(comm);
    }
    if (locked) {
        pthread_mutex_unlock(&end->issue);
    }
}

void ra_nccl_abort(ra_transport_t *transport, ra_status_t cause)
{
    ra_nccl_world_t *world = ((ra_nccl_end_t *)transport)->world;
    pthread_mutex_lock(&world->mutex);
    bool first = !atomic_load(&world->aborted);
    if (first) {
        world->cause = cause;
        atomic_store(&world->aborted, true);
        pthread_cond_broadcast(&world->changed);
    }
    ra_bootstrap_t *bootstrap = world->bootstrap;
    pthread_mutex_unlock(&world->mutex);
    if (first && bootstrap != NULL) {
        ra_bootstrap_abort(bootstrap, cause);
    }
    for (int r = 0; r < world->size && first; r++) {
        if (world->ends[r] != NULL) {
            abort_comm(world->ends[r]);
        }
    }
}

bool ra_nccl_aborted(ra_transport_t *transport)
{
    return atomic_load(&((ra_nccl_end_t *)transport)->world->aborted);
}

/* Threads sleep until all have come, so that nobody waits inside NCCL for one that never will. */
static ra_status_t meet_threads(ra_nccl_end_t *end)
{
    ra_nccl_world_t *world = end->world;
    struct timespec until = {.tv_sec = (time_t)(ra_deadline_in(RA_NCCL_PATIENCE_S) / 1000000000)};
    ra_status_t status = RA_OK;
    pthread_mutex_lock(&world->mutex);
    world->arrived++;
    pthread_cond_broadcast(&world->changed);
    while (world->arrived < world->size && !atomic_load(&world->aborted) && status == RA_OK) {
        if (pthread_cond_timedwait(&world->changed, &world->mutex, &until) != 0) {
            status = ra_fail(RA_ERR_TIMEOUT, "comm", "%d of %d ranks came within %d s",
                             world->arrived, world->size, RA_NCCL_PATIENCE_S);
        }
    }
    pthread_mutex_unlock(&world->mutex);
    if (status == RA_OK && atomic_load(&world->aborted)) {
        return ra_nccl_fail_aborted(world);
    }
    return status;
}

static void on_loss(void *arg, ra_status_t cause)
{
    ra_nccl_abort(arg, cause);
}

static ra_status_t meet_processes(ra_nccl_end_t *end)
{
    ra_nccl_world_t *world = end->world;
    ra_nccl_card_t mine = world->cards[end->base.rank];
    ra_bootstrap_t *bootstrap = NULL;
    RA_TRY(ra_bootstrap_open(&world->launch, RA_NCCL_PATIENCE_S, &mine, sizeof(mine), world->cards,
                             &bootstrap));
    world->id = world->cards[0].id;
    pthread_mutex_lock(&world->mutex);
    world->bootstrap = bootstrap;
    pthread_mutex_unlock(&world->mutex);
    return ra_bootstrap_watch(bootstrap, on_loss, &end->base);
}

static ra_status_t meet(ra_nccl_end_t *end)
{
    ra_nccl_world_t *world = end->world;
    ra_nccl_card_t *card = &world->cards[end->base.rank];
    struct cudaDeviceProp properties;
    RA_TRY(ra_cuda_check(cudaGetDeviceProperties(&properties, end->device), "looking at a GPU"));
    pthread_mutex_lock(&world->mutex);
    *card = (ra_nccl_card_t){.id = world->id, .gpu = properties.uuid, .device = end->device};
    pthread_mutex_unlock(&world->mutex);
    RA_TRY(world->launch.size > 1 ? meet_processes(end) : meet_threads(end));
    for (int r = 0; r < world->size; r++) {
        for (int s = 0; s < r; s++) {
            if (memcmp(&world->cards[r].gpu, &world->cards[s].gpu, sizeof(cudaUUID_t)) == 0) {
                return ra_fail(RA_ERR_USAGE, "comm",
                               "nccl needs a GPU for each rank, but ranks %d and %d are both on "
                               "GPU %d; use fewer ranks or transport peer",
                               s, r, world->cards[r].device);
            }
        }
    }
    return RA_OK;
}

static ra_status_t connect_comm(ra_nccl_end_t *end)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    config.maxCTAs = BLOCKS_MOST;
    config.cgaClusterSize = 0; /* single blocks fit beside a kernel that leaves some room */
    ncclComm_t comm = NULL;
    RA_TRY(ra_nccl_check(
        ncclCommInitRankConfig(&comm, end->base.size, end->world->id, end->base.rank, &config),
        "connecting"));
    pthread_mutex_lock(&end->issue);
    bool aborted = atomic_load(&end->world->aborted);
    end->comm = aborted ? NULL : comm;
    pthread_mutex_unlock(&end->issue);
    if (aborted) {
        ncclCommAbort(comm);
        return ra_nccl_fail_aborted(end->world);
    }
    return RA_OK;
}

/* A byte between all pairs: NCCL connects a pair at its first transfer. */
static ra_status_t warm_up(ra_nccl_end_t *end)
{
    int size = end->base.size;
    ra_nccl_block_t *block = NULL;
    RA_TRY(ra_nccl_staging_take(end->staging, 2 * size, &block));
    char *bytes = ra_nccl_block_device(block);
    pthread_mutex_lock(&end->issue);
    ncclResult_t result = end->comm == NULL ? ncclInvalidUsage : ncclGroupStart();
    for (int r = 0; r < size && result == ncclSuccess; r++) {
        result = ncclSend(bytes + r, 1, ncclInt8, r, end->comm, end->queue);
        if (result == ncclSuccess) {
            result = ncclRecv(bytes + size + r, 1, ncclInt8, r, end->comm, end->queue);
        }
    }
    if (result == ncclSuccess) {
        result = ncclGroupEnd();
    }
    pthread_mutex_unlock(&end->issue);
    ra_status_t status = ra_nccl_check(result, "connecting pairs of ranks");
    if (status == RA_OK) {
        status = ra_cuda_check(cudaStreamSynchronize(end->queue), "connecting pairs of ranks");
    }
    ra_nccl_staging_give(block);
    return status;
}

static ra_status_t open_queue(ra_nccl_end_t *end)
{
    int least = 0, greatest = 0;
    RA_TRY(ra_cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities"));
    RA_TRY(ra_cuda_check(cudaStreamCreateWithPriority(&end->queue, cudaStreamNonBlocking, greatest),
                         "making NCCL's queue"));
    RA_TRY(ra_cuda_check(cudaEventCreateWithFlags(&end->start, cudaEventDisableTiming),
                         "making an event"));
    return ra_nccl_staging_create(&end->staging);
}

ra_status_t ra_nccl_attach(ra_transport_t *transport, ra_stream_t *compute)
{
    ra_nccl_end_t *end = (ra_nccl_end_t *)transport;
    if (ra_stream_kind(compute) != RA_DEVICE_CUDA) {
        return ra_fail(RA_ERR_USAGE, "comm", "transport nccl needs --device cuda");
    }
    if (end->queue != NULL) {
        return ra_fail(RA_ERR_INVALID, "comm", "rank %d is attached to a stream already",
                       transport->rank);
    }
    end->device = ra_device_index(ra_stream_device(compute));
    RA_TRY(ra_stream_make_current(compute));
    RA_TRY(open_queue(end));
    RA_TRY(meet(end));
    RA_TRY(connect_comm(end));
    RA_TRY(warm_up(end));
    end->compute = ra_stream_cuda(compute);
    return RA_OK;
}

static void end_destroy(ra_nccl_end_t *end)
{
    if (end->queue != NULL && cudaSetDevice(end->device) == cudaSuccess) {
        if (end->comm != NULL) {
            ncclCommDestroy(end->comm);
        }
        ra_nccl_staging_destroy(end->staging);
        ra_cuda_waits_clear(&end->waits);
        if (end->start != NULL) {
            cudaEventDestroy(end->start);
        }
        cudaStreamDestroy(end->queue);
    }
    pthread_mutex_destroy(&end->issue);
    free(end);
}

static void world_destroy(ra_nccl_world_t *world)
{
    pthread_cond_destroy(&world->changed);
    pthread_mutex_destroy(&world->mutex);
    free(world->cards);
    free(world->ends);
    free(world);
}

void ra_nccl_close(ra_transport_t *transport)
{
    if (transport == NULL) {
        return;
    }
    ra_nccl_end_t *end = (ra_nccl_end_t *)transport;
    ra_nccl_world_t *world = end->world;
    ra_bootstrap_close(world->bootstrap); /* first: its thread may abort this end */
    pthread_mutex_lock(&world->mutex);
    world->bootstrap = NULL;
    world->ends[transport->rank] = NULL;
    bool last = --world->open_ends == 0;
    pthread_mutex_unlock(&world->mutex);
    end_destroy(end);
    if (last) {
        world_destroy(world);
    }
}

static ra_status_t world_new(int size, int local_ends, ra_nccl_world_t **world_p)
{
    ra_nccl_world_t *world = calloc(1, sizeof(*world));
    if (world == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world");
    }
    world->cards = calloc((size_t)size, sizeof(*world->cards));
    world->ends = calloc((size_t)size, sizeof(*world->ends));
    world->size = size;
    world->open_ends = local_ends;
    pthread_mutex_init(&world->mutex, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&world->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    ra_status_t status =
        world->cards == NULL || world->ends == NULL
            ? ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", size)
            : ra_nccl_check(ncclGetUniqueId(&world->id), "making an id");
    if (status != RA_OK) {
        world_destroy(world);
        return status;
    }
    *world_p = world;
    return RA_OK;
}

static ra_nccl_end_t *end_new(ra_nccl_world_t *world, int rank)
{
    ra_nccl_end_t *end = calloc(1, sizeof(*end));
    if (end == NULL) {
        ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate rank %d", rank);
        return NULL;
    }
    end->base = (ra_transport_t){.ops = &ra_transport_nccl, .rank = rank, .size = world->size};
    end->world = world;
    pthread_mutex_init(&end->issue, NULL);
    world->ends[rank] = end;
    return end;
}

ra_status_t ra_nccl_open(int size, ra_transport_t **ends_p)
{
    ra_nccl_world_t *world = NULL;
    RA_TRY(world_new(size, size, &world));
    for (int r = 0; r < size; r++) {
        ra_nccl_end_t *end = end_new(world, r);
        if (end == NULL) {
            while (r-- > 0) {
                end_destroy(world->ends[r]);
            }
            world_destroy(world);
            return RA_ERR_NOMEM;
        }
    }
    for (int r = 0; r < size; r++) {
        ends_p[r] = &world->ends[r]->base;
    }
    return RA_OK;
}

ra_status_t ra_nccl_join(const ra_launch_t *launch, ra_transport_t **end_p)
{
    ra_nccl_world_t *world = NULL;
    RA_TRY(world_new(launch->size, 1, &world));
    world->launch = *launch;
    ra_nccl_end_t *end = end_new(world, launch->rank);
    if (end == NULL) {
        world_destroy(world);
        return RA_ERR_NOMEM;
    }
    *end_p = &end->base;
    return RA_OK;
}
