/*
 * Device memory by NCCL, one GPU a rank. A group is one ncclGroup on the rank's own queue, so
 * groups run one after another and only order matches transfers; tags are not sent.
 *
 *     post    start of the compute stream -> queue: group, gates, event `done`
 *     wait    the compute stream waits for `done`; the host waits only where a group has host
 * memory
 *
 * Host memory goes through pinned and device staging. A group without bytes between two ranks sends
 * one, so that it still synchronises them. Connections between all pairs are made in attach(), so
 * that posting never waits for a peer. Few thread blocks are given to NCCL: they are taken from the
 * compute kernels beside it.
 *
 * abort() from any thread ends the kernels of all ranks of this process (ncclCommAbort), so that
 * queues drain, and every later call returns RA_ERR_PEER.
 */
#include "comm/transport.h"

#include "base/clock.h"
#include "base/device_cuda.h"
#include "comm/cuda_memory.h"
#include "comm/nccl_staging.h"
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    NCCL_BLOCKS_MOST = 16, /* thread blocks, so multiprocessors; NCCL_MAX_CTAS overrides it */
    PATIENCE_S = 600,
    ABORT_LOCK_S = 2,
    SPIN_NS = 200000, /* a wait of the host first spins: most end within microseconds */
    SLEEP_NS = 20000,
    LOOK_NS = 10000000 /* between looks for asynchronous errors */
};

typedef struct nccl_end nccl_end_t;

typedef struct nccl_world {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int size, open_ends;
    int arrived; /* ranks in attach(); guarded by mutex, as devices */
    int *devices;
    ncclUniqueId id;
    atomic_bool aborted;
    ra_status_t cause;
    nccl_end_t **ends;
} nccl_world_t;

struct nccl_end {
    ra_transport_t base;
    nccl_world_t *world;
    int device;
    cudaStream_t compute; /* borrowed; NULL until attached */
    cudaStream_t queue;
    cudaEvent_t start;     /* of the last post: waited for at once, so one is enough */
    pthread_mutex_t issue; /* held while NCCL is called on comm */
    ncclComm_t comm;       /* guarded by issue; NULL until attached and after an abort */
    ra_nccl_staging_t *staging;
};

typedef struct nccl_op {
    ra_transfer_t transfer;
    bool on_device;
    int64_t at; /* host memory: its place in the staging block */
} nccl_op_t;

typedef struct nccl_request {
    ra_request_t base;
    nccl_end_t *end;
    cudaEvent_t done;
    ra_nccl_block_t *block; /* staging, NULL without host memory */
    bool on_host;           /* some transfers are of host memory: the host waits */
    bool ordered;           /* the compute stream waits for done */
    bool complete, cancelled;
    int count;
    nccl_op_t ops[];
} nccl_request_t;

static ra_status_t fail_aborted(nccl_world_t *world)
{
    char text[96];
    pthread_mutex_lock(&world->mutex);
    snprintf(text, sizeof(text), "another rank failed: %s", ra_status_text(world->cause));
    pthread_mutex_unlock(&world->mutex);
    ra_last_error_set(text);
    return RA_ERR_PEER;
}

static ra_status_t check_nccl(ncclResult_t result, const char *what)
{
    if (result == ncclSuccess) {
        return RA_OK;
    }
    return ra_fail(result == ncclRemoteError ? RA_ERR_PEER : RA_ERR_DEVICE, "comm",
                   "NCCL, %s: %s (%s)", what, ncclGetErrorString(result), ncclGetLastError(NULL));
}

/* A rank's kernels end by themselves once the flag that this sets is seen. */
static void abort_comm(nccl_end_t *end)
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

static void nccl_abort(ra_transport_t *transport, ra_status_t cause)
{
    nccl_world_t *world = ((nccl_end_t *)transport)->world;
    pthread_mutex_lock(&world->mutex);
    bool first = !atomic_load(&world->aborted);
    if (first) {
        world->cause = cause;
        atomic_store(&world->aborted, true);
        pthread_cond_broadcast(&world->changed);
    }
    pthread_mutex_unlock(&world->mutex);
    for (int r = 0; r < world->size && first; r++) {
        if (world->ends[r] != NULL) {
            abort_comm(world->ends[r]);
        }
    }
}

/* Sleep until every rank has come, so that nobody waits inside NCCL for one that never will. */
static ra_status_t meet(nccl_end_t *end)
{
    nccl_world_t *world = end->world;
    int64_t deadline_ns = ra_deadline_in(PATIENCE_S);
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000)};
    ra_status_t status = RA_OK;
    pthread_mutex_lock(&world->mutex);
    world->devices[end->base.rank] = end->device;
    world->arrived++;
    pthread_cond_broadcast(&world->changed);
    while (world->arrived < world->size && !atomic_load(&world->aborted) && status == RA_OK) {
        if (pthread_cond_timedwait(&world->changed, &world->mutex, &until) != 0) {
            status = ra_fail(RA_ERR_TIMEOUT, "comm", "%d of %d ranks came within %d s",
                             world->arrived, world->size, PATIENCE_S);
        }
    }
    pthread_mutex_unlock(&world->mutex);
    if (status == RA_OK && atomic_load(&world->aborted)) {
        status = fail_aborted(world);
    }
    return status;
}

static ra_status_t check_devices(const nccl_world_t *world)
{
    for (int r = 0; r < world->size; r++) {
        for (int s = 0; s < r; s++) {
            if (world->devices[r] == world->devices[s]) {
                return ra_fail(RA_ERR_USAGE, "comm",
                               "nccl needs a GPU for each rank, but ranks %d and %d are both on "
                               "GPU %d; use fewer ranks or transport peer",
                               s, r, world->devices[r]);
            }
        }
    }
    return RA_OK;
}

static ra_status_t connect_comm(nccl_end_t *end)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    config.maxCTAs = NCCL_BLOCKS_MOST;
    ncclComm_t comm = NULL;
    RA_TRY(check_nccl(
        ncclCommInitRankConfig(&comm, end->base.size, end->world->id, end->base.rank, &config),
        "connecting"));
    pthread_mutex_lock(&end->issue);
    bool aborted = atomic_load(&end->world->aborted);
    end->comm = aborted ? NULL : comm;
    pthread_mutex_unlock(&end->issue);
    if (aborted) {
        ncclCommAbort(comm);
        return fail_aborted(end->world);
    }
    return RA_OK;
}

/* A byte between all pairs: NCCL connects a pair at its first transfer. */
static ra_status_t warm_up(nccl_end_t *end)
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
    ra_status_t status = check_nccl(result, "connecting pairs of ranks");
    if (status == RA_OK) {
        status = ra_cuda_check(cudaStreamSynchronize(end->queue), "connecting pairs of ranks");
    }
    ra_nccl_staging_give(end->staging, block);
    return status;
}

static ra_status_t open_queue(nccl_end_t *end)
{
    int least = 0, greatest = 0;
    RA_TRY(ra_cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities"));
    RA_TRY(ra_cuda_check(cudaStreamCreateWithPriority(&end->queue, cudaStreamNonBlocking, greatest),
                         "making NCCL's queue"));
    RA_TRY(ra_cuda_check(cudaEventCreateWithFlags(&end->start, cudaEventDisableTiming),
                         "making an event"));
    return ra_nccl_staging_create(&end->staging);
}

static ra_status_t nccl_attach(ra_transport_t *transport, ra_stream_t *compute)
{
    nccl_end_t *end = (nccl_end_t *)transport;
    if (ra_stream_kind(compute) != RA_DEVICE_CUDA) {
        return ra_fail(RA_ERR_USAGE, "comm", "transport nccl needs --device cuda");
    }
    if (end->compute != NULL) {
        return ra_fail(RA_ERR_INVALID, "comm", "rank %d is attached to a stream already",
                       transport->rank);
    }
    end->device = ra_device_index(ra_stream_device(compute));
    RA_TRY(ra_stream_make_current(compute));
    RA_TRY(open_queue(end));
    RA_TRY(meet(end));
    RA_TRY(check_devices(end->world));
    RA_TRY(connect_comm(end));
    RA_TRY(warm_up(end));
    end->compute = ra_stream_cuda(compute);
    return RA_OK;
}

static nccl_request_t *request_new(nccl_end_t *end, const ra_transfer_t *transfers, int count)
{
    nccl_request_t *request = calloc(1, sizeof(*request) + (size_t)count * sizeof(nccl_op_t));
    if (request == NULL) {
        ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a group of %d transfers", count);
        return NULL;
    }
    request->base.ops = end->base.ops;
    request->end = end;
    request->count = count;
    for (int i = 0; i < count; i++) {
        request->ops[i].transfer = transfers[i];
    }
    return request;
}

static bool is_send(const nccl_op_t *op)
{
    return op->transfer.kind == RA_SEND || op->transfer.kind == RA_LEND;
}

/* Where each transfer's bytes are for NCCL; host memory and missing bytes get a place in staging.
 */
static ra_status_t place_ops(nccl_request_t *request)
{
    int64_t staged = 0;
    for (int i = 0; i < request->count; i++) {
        nccl_op_t *op = &request->ops[i];
        RA_TRY(ra_cuda_is_device_memory(&op->transfer, request->end->device, &op->on_device));
        if (op->transfer.bytes > 0 && op->on_device) {
            continue;
        }
        request->on_host = request->on_host || !op->on_device;
        op->at = staged;
        staged += op->transfer.bytes > 0 ? (op->transfer.bytes + 15) / 16 * 16 : 16;
    }
    if (staged > 0) {
        RA_TRY(ra_nccl_staging_take(request->end->staging, staged, &request->block));
    }
    for (int i = 0; i < request->count; i++) {
        const nccl_op_t *op = &request->ops[i];
        if (is_send(op) && !op->on_device && op->transfer.bytes > 0) {
            memcpy(ra_nccl_block_host(request->block) + op->at, op->transfer.data,
                   (size_t)op->transfer.bytes);
        }
    }
    return RA_OK;
}

/* Copies of host memory between the pinned and the device half of staging. */
static ra_status_t copy_staged(nccl_request_t *request, bool sends)
{
    for (int i = 0; i < request->count; i++) {
        const nccl_op_t *op = &request->ops[i];
        if (is_send(op) != sends || op->on_device || op->transfer.bytes == 0) {
            continue;
        }
        char *host = ra_nccl_block_host(request->block) + op->at;
        char *device = ra_nccl_block_device(request->block) + op->at;
        cudaError_t error =
            cudaMemcpyAsync(sends ? device : host, sends ? host : device,
                            (size_t)op->transfer.bytes, cudaMemcpyDefault, request->end->queue);
        RA_TRY(ra_cuda_check(error, "staging host memory"));
    }
    return RA_OK;
}

static ncclResult_t issue_ops(const nccl_request_t *request)
{
    const nccl_end_t *end = request->end;
    ncclResult_t result = ncclSuccess;
    for (int i = 0; i < request->count && result == ncclSuccess; i++) {
        const nccl_op_t *op = &request->ops[i];
        const ra_transfer_t *transfer = &op->transfer;
        bool staged = !op->on_device || transfer->bytes == 0;
        void *data = staged ? ra_nccl_block_device(request->block) + op->at : transfer->data;
        size_t bytes = transfer->bytes > 0 ? (size_t)transfer->bytes : 1;
        result = is_send(op)
                     ? ncclSend(data, bytes, ncclInt8, transfer->peer, end->comm, end->queue)
                     : ncclRecv(data, bytes, ncclInt8, transfer->peer, end->comm, end->queue);
    }
    return result;
}

static ra_status_t issue_group(const nccl_request_t *request)
{
    nccl_end_t *end = request->end;
    pthread_mutex_lock(&end->issue);
    if (end->comm == NULL) {
        pthread_mutex_unlock(&end->issue);
        return fail_aborted(end->world);
    }
    ncclResult_t result = ncclGroupStart();
    if (result == ncclSuccess) {
        result = issue_ops(request);
        ncclResult_t ended = ncclGroupEnd();
        result = result == ncclSuccess ? ended : result;
    }
    pthread_mutex_unlock(&end->issue);
    return check_nccl(result, "a group");
}

static ra_status_t write_gates(const nccl_request_t *request)
{
    for (int i = 0; i < request->count; i++) {
        const nccl_op_t *op = &request->ops[i];
        if (!is_send(op) && op->on_device && op->transfer.gate != NULL) {
            RA_TRY(ra_cuda_write_gate(request->end->queue, op->transfer.gate,
                                      op->transfer.gate_value));
        }
    }
    return RA_OK;
}

static ra_status_t enqueue(nccl_request_t *request)
{
    nccl_end_t *end = request->end;
    RA_TRY(place_ops(request));
    RA_TRY(ra_cuda_check(cudaEventCreateWithFlags(&request->done, cudaEventDisableTiming),
                         "making an event"));
    RA_TRY(ra_cuda_check(cudaEventRecord(end->start, end->compute), "marking a compute stream"));
    RA_TRY(ra_cuda_check(cudaStreamWaitEvent(end->queue, end->start, 0),
                         "ordering a group after its memory"));
    RA_TRY(copy_staged(request, true));
    RA_TRY(issue_group(request));
    RA_TRY(copy_staged(request, false));
    RA_TRY(write_gates(request));
    return ra_cuda_check(cudaEventRecord(request->done, end->queue), "marking NCCL's queue");
}

static void request_destroy(nccl_request_t *request)
{
    if (request->done != NULL) {
        cudaEventDestroy(request->done);
    }
    if (request->block != NULL) {
        ra_nccl_staging_give(request->end->staging, request->block);
    }
    free(request);
}

static ra_status_t nccl_post(ra_transport_t *transport, const ra_transfer_t *transfers, int count,
                             ra_request_t **request_p)
{
    nccl_end_t *end = (nccl_end_t *)transport;
    if (atomic_load(&end->world->aborted)) {
        return fail_aborted(end->world);
    }
    if (end->compute == NULL) {
        return ra_fail(RA_ERR_INVALID, "comm", "nccl: rank %d posts before ra_comm_attach()",
                       transport->rank);
    }
    nccl_request_t *request = request_new(end, transfers, count);
    if (request == NULL) {
        return RA_ERR_NOMEM;
    }
    ra_status_t status = count == 0 ? RA_OK : enqueue(request);
    if (status != RA_OK) {
        /* Part of a group may be queued: its peers could wait for the rest forever. */
        if (status != RA_ERR_INVALID) {
            nccl_abort(transport, status);
        }
        request_destroy(request);
        return status;
    }
    *request_p = &request->base;
    return RA_OK;
}

/* Bytes for the host are in staging: hand them over. */
static void unstage(nccl_request_t *request)
{
    for (int i = 0; i < request->count; i++) {
        nccl_op_t *op = &request->ops[i];
        if (is_send(op) || op->on_device) {
            continue;
        }
        if (op->transfer.bytes > 0) {
            memcpy(op->transfer.data, ra_nccl_block_host(request->block) + op->at,
                   (size_t)op->transfer.bytes);
        }
        if (op->transfer.gate != NULL) {
            __atomic_store_n(op->transfer.gate, op->transfer.gate_value, __ATOMIC_RELEASE);
        }
    }
}

static ra_status_t look_for_errors(nccl_end_t *end)
{
    ncclResult_t error = ncclSuccess;
    pthread_mutex_lock(&end->issue);
    if (end->comm != NULL && ncclCommGetAsyncError(end->comm, &error) != ncclSuccess) {
        error = ncclInternalError;
    }
    pthread_mutex_unlock(&end->issue);
    if (error == ncclSuccess || error == ncclInProgress) {
        return RA_OK;
    }
    ra_status_t status = check_nccl(error, "a transfer");
    nccl_abort(&end->base, status);
    return status;
}

/* Where the request stands; on RA_OK its effects are in place. */
static ra_status_t progress(nccl_request_t *request)
{
    nccl_end_t *end = request->end;
    if (request->complete) {
        return request->cancelled ? RA_ERR_CANCELED : RA_OK;
    }
    if (request->count > 0 && !request->ordered) {
        RA_TRY(ra_cuda_check(cudaStreamWaitEvent(end->compute, request->done, 0),
                             "ordering work after a group"));
        request->ordered = true;
    }
    if (atomic_load(&end->world->aborted)) {
        return fail_aborted(end->world);
    }
    if (request->on_host) {
        cudaError_t error = cudaEventQuery(request->done);
        if (error == cudaErrorNotReady) {
            return RA_INPROGRESS;
        }
        RA_TRY(ra_cuda_check(error, "waiting for a group"));
        if (atomic_load(&end->world->aborted)) { /* which is how it came to its end */
            return fail_aborted(end->world);
        }
        unstage(request);
    }
    request->complete = true;
    return RA_OK;
}

static ra_status_t nccl_test(ra_request_t *base)
{
    return progress((nccl_request_t *)base);
}

static ra_status_t nccl_wait(ra_request_t *base, int64_t deadline_ns)
{
    nccl_request_t *request = (nccl_request_t *)base;
    int64_t begin = ra_clock_ns(), looked = begin;
    ra_status_t status;
    while ((status = progress(request)) == RA_INPROGRESS) {
        int64_t now = ra_clock_ns();
        if (now >= deadline_ns) {
            const ra_transfer_t *first = &request->ops[0].transfer;
            return ra_fail(RA_ERR_TIMEOUT, "comm",
                           "deadline passed on rank %d: a group of %d transfers is open, the first "
                           "with rank %d of %lld bytes",
                           request->end->base.rank, request->count, first->peer,
                           (long long)first->bytes);
        }
        if (now - looked > LOOK_NS) {
            looked = now;
            RA_TRY(look_for_errors(request->end));
        }
        if (now - begin < SPIN_NS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        }
    }
    return status;
}

static ra_status_t nccl_cancel(ra_request_t *base)
{
    nccl_request_t *request = (nccl_request_t *)base;
    if (progress(request) == RA_INPROGRESS) {
        nccl_abort(&request->end->base, RA_ERR_CANCELED);
    }
    if (!request->complete) {
        /* Aborted: NCCL's kernels are gone, so the queue drains. */
        cudaStreamSynchronize(request->end->queue);
        request->complete = request->cancelled = true;
    }
    return RA_OK;
}

static const void *nccl_borrowed(const ra_request_t *base, int index)
{
    return ((const nccl_request_t *)base)->ops[index].transfer.data;
}

static void nccl_free(ra_request_t *base)
{
    nccl_cancel(base);
    request_destroy((nccl_request_t *)base);
}

static void end_destroy(nccl_end_t *end)
{
    if (end->queue != NULL && cudaSetDevice(end->device) == cudaSuccess) {
        if (end->comm != NULL) {
            ncclCommDestroy(end->comm);
        }
        ra_nccl_staging_destroy(end->staging);
        if (end->start != NULL) {
            cudaEventDestroy(end->start);
        }
        cudaStreamDestroy(end->queue);
    }
    pthread_mutex_destroy(&end->issue);
    free(end);
}

static void nccl_close(ra_transport_t *transport)
{
    if (transport == NULL) {
        return;
    }
    nccl_end_t *end = (nccl_end_t *)transport;
    nccl_world_t *world = end->world;
    pthread_mutex_lock(&world->mutex);
    world->ends[transport->rank] = NULL;
    bool last = --world->open_ends == 0;
    pthread_mutex_unlock(&world->mutex);
    end_destroy(end);
    if (last) {
        pthread_cond_destroy(&world->changed);
        pthread_mutex_destroy(&world->mutex);
        free(world->devices);
        free(world->ends);
        free(world);
    }
}

static nccl_world_t *world_new(int size)
{
    nccl_world_t *world = calloc(1, sizeof(*world));
    if (world == NULL) {
        return NULL;
    }
    world->devices = calloc((size_t)size, sizeof(int));
    world->ends = calloc((size_t)size, sizeof(nccl_end_t *));
    if (world->devices == NULL || world->ends == NULL) {
        free(world->devices);
        free(world->ends);
        free(world);
        return NULL;
    }
    world->size = world->open_ends = size;
    pthread_mutex_init(&world->mutex, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&world->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return world;
}

static ra_status_t nccl_open(int size, ra_transport_t **ends_p)
{
    nccl_world_t *world = world_new(size);
    if (world == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", size);
    }
    int made = 0;
    for (; made < size; made++) {
        nccl_end_t *end = calloc(1, sizeof(*end));
        if (end == NULL) {
            break;
        }
        end->base = (ra_transport_t){.ops = &ra_transport_nccl, .rank = made, .size = size};
        end->world = world;
        pthread_mutex_init(&end->issue, NULL);
        world->ends[made] = end;
        ends_p[made] = &end->base;
    }
    ra_status_t status =
        made == size ? check_nccl(ncclGetUniqueId(&world->id), "making an id")
                     : ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", size);
    if (status != RA_OK) {
        world->open_ends = made;
        for (int r = 0; r < made; r++) {
            ends_p[r] = NULL;
            nccl_close(&world->ends[r]->base);
        }
    }
    return status;
}

const ra_transport_ops_t ra_transport_nccl = {
    .name = "nccl",
    .doc = "NCCL between GPUs, one a rank; groups run one after another and match by order",
    .in_order = true,
    .uses_kernels = true,
    .patience_s = PATIENCE_S,
    .open = nccl_open,
    .attach = nccl_attach,
    .close = nccl_close,
    .post = nccl_post,
    .test = nccl_test,
    .wait = nccl_wait,
    .cancel = nccl_cancel,
    .borrowed = nccl_borrowed,
    .free = nccl_free,
    .abort = nccl_abort};
