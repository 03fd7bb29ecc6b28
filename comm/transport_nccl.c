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
 * queues drain, and every later call returns RA_ERR_PEER. Between processes comm/bootstrap.c passes
 * it on, and notices processes that are gone.
 */
#include "comm/nccl_end.h"

#include "base/clock.h"
#include "base/device_cuda.h"
#include "base/trace.h"
#include "comm/cuda_memory.h"
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SPIN_NS = 200000, /* a wait of the host first spins: most end within microseconds */
    SLEEP_NS = 20000,
    LOOK_NS = 10000000 /* between looks for asynchronous errors */
};

typedef struct nccl_op {
    ra_transfer_t transfer;
    bool on_device;
    int64_t at; /* host memory: its place in the staging block */
} nccl_op_t;

typedef struct nccl_request {
    ra_request_t base;
    ra_nccl_end_t *end;
    cudaEvent_t done;
    ra_nccl_block_t *block; /* staging, NULL without host memory */
    bool on_host;           /* some transfers are of host memory: the host waits */
    bool ordered;           /* the compute stream waits for done */
    bool complete, cancelled;
    int count;
    nccl_op_t ops[];
} nccl_request_t;

static nccl_request_t *request_new(ra_nccl_end_t *end, const ra_transfer_t *transfers, int count)
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
    const ra_nccl_end_t *end = request->end;
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
    ra_nccl_end_t *end = request->end;
    pthread_mutex_lock(&end->issue);
    if (end->comm == NULL) {
        pthread_mutex_unlock(&end->issue);
        return ra_nccl_fail_aborted(end->world);
    }
    ncclResult_t result = ncclGroupStart();
    if (result == ncclSuccess) {
        result = issue_ops(request);
        ncclResult_t ended = ncclGroupEnd();
        result = result == ncclSuccess ? ended : result;
    }
    pthread_mutex_unlock(&end->issue);
    return ra_nccl_check(result, "a group");
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

static int64_t received_bytes(const nccl_request_t *request)
{
    int64_t bytes = 0;
    for (int i = 0; i < request->count; i++) {
        const ra_transfer_t *transfer = &request->ops[i].transfer;
        bytes += transfer->kind == RA_RECV || transfer->kind == RA_BORROW ? transfer->bytes : 0;
    }
    return bytes;
}

static ra_status_t enqueue_bytes(nccl_request_t *request)
{
    RA_TRY(copy_staged(request, true));
    RA_TRY(issue_group(request));
    RA_TRY(copy_staged(request, false));
    return write_gates(request);
}

static ra_status_t enqueue(nccl_request_t *request)
{
    ra_nccl_end_t *end = request->end;
    RA_TRY(place_ops(request));
    RA_TRY(ra_cuda_check(cudaEventCreateWithFlags(&request->done, cudaEventDisableTiming),
                         "making an event"));
    RA_TRY(ra_cuda_check(cudaEventRecord(end->start, end->compute), "marking a compute stream"));
    RA_TRY(ra_cuda_check(cudaStreamWaitEvent(end->queue, end->start, 0),
                         "ordering a group after its memory"));
    ra_span_t span = ra_trace_transfer_begin("nccl group", end->base.rank, end->queue);
    ra_status_t status = enqueue_bytes(request);
    ra_trace_transfer_end(span, end->base.rank, end->queue, received_bytes(request));
    RA_TRY(status);
    return ra_cuda_check(cudaEventRecord(request->done, end->queue), "marking NCCL's queue");
}

static void request_destroy(nccl_request_t *request)
{
    if (request->done != NULL) {
        cudaEventDestroy(request->done);
    }
    if (request->block != NULL) {
        ra_nccl_staging_give(request->block);
    }
    free(request);
}

static ra_status_t nccl_post(ra_transport_t *transport, const ra_transfer_t *transfers, int count,
                             bool in_turn, ra_request_t **request_p)
{
    (void)in_turn; /* all groups are */
    ra_nccl_end_t *end = (ra_nccl_end_t *)transport;
    if (atomic_load(&end->world->aborted)) {
        return ra_nccl_fail_aborted(end->world);
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
            ra_nccl_abort(transport, status);
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

static ra_status_t look_for_errors(ra_nccl_end_t *end)
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
    ra_status_t status = ra_nccl_check(error, "a transfer");
    ra_nccl_abort(&end->base, status);
    return status;
}

/* Where the request stands; on RA_OK its effects are in place. */
static ra_status_t progress(nccl_request_t *request)
{
    ra_nccl_end_t *end = request->end;
    if (request->complete) {
        return request->cancelled ? RA_ERR_CANCELED : RA_OK;
    }
    if (request->count > 0 && !request->ordered) {
        RA_TRY(ra_cuda_waits_begin(&end->waits, end->compute));
        RA_TRY(ra_cuda_check(cudaStreamWaitEvent(end->compute, request->done, 0),
                             "ordering work after a group"));
        RA_TRY(ra_cuda_waits_end(&end->waits, end->compute));
        request->ordered = true;
    }
    if (atomic_load(&end->world->aborted)) {
        return ra_nccl_fail_aborted(end->world);
    }
    if (request->on_host) {
        cudaError_t error = cudaEventQuery(request->done);
        if (error == cudaErrorNotReady) {
            return RA_INPROGRESS;
        }
        RA_TRY(ra_cuda_check(error, "waiting for a group"));
        if (atomic_load(&end->world->aborted)) { /* which is how it came to its end */
            return ra_nccl_fail_aborted(end->world);
        }
        unstage(request);
    }
    request->complete = true;
    return RA_OK;
}

static ra_status_t nccl_measure_waits(ra_transport_t *transport, bool on)
{
    return ra_cuda_waits_set(&((ra_nccl_end_t *)transport)->waits, on);
}

static ra_status_t nccl_waited(ra_transport_t *transport, double *seconds_p)
{
    return ra_cuda_waits_sum(&((ra_nccl_end_t *)transport)->waits, seconds_p);
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
        ra_nccl_abort(&request->end->base, RA_ERR_CANCELED);
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

const ra_transport_ops_t ra_transport_nccl = {
    .name = "nccl",
    .doc = "NCCL between GPUs, one a rank; groups run one after another and match by order",
    .in_order = true,
    .uses_kernels = true,
    .patience_s = RA_NCCL_PATIENCE_S,
    .open = ra_nccl_open,
    .join = ra_nccl_join,
    .attach = ra_nccl_attach,
    .measure_waits = nccl_measure_waits,
    .waited = nccl_waited,
    .close = ra_nccl_close,
    .post = nccl_post,
    .test = nccl_test,
    .wait = nccl_wait,
    .cancel = nccl_cancel,
    .borrowed = nccl_borrowed,
    .free = nccl_free,
    .abort = ra_nccl_abort,
    .aborted = ra_nccl_aborted};
