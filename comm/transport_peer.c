/*
 * Ranks are threads of this process, each with a GPU (several may share one); device memory is
 * pulled by copy engines. The rank that wants the bytes owns the queues they come by, one for each
 * rank they come from, so that a pull that waits for its source holds up no other, and one for
 * those that are to come in turn.
 *
 *     post         event `start` on the poster's compute stream
 *     pair found   on the queue: wait for both starts, copy, open the gate; event `done` after the
 *                  last of a run of pairs on one queue
 *     wait, test   the compute stream of either side waits for `done`
 *
 * Without peer access between two GPUs the driver stages the copies through the host.
 */
#include "comm/thread_world.h"

#include "base/device_cuda.h"
#include "base/trace.h"
#include "comm/cuda_memory.h"
#include "comm/cuda_waits.h"
#include <cuda_runtime_api.h>
#include <stdlib.h>

typedef struct peer_side peer_side_t;

typedef struct peer_event {
    cudaEvent_t event;
    peer_side_t *home; /* of the device the event belongs to */
    int uses;          /* guarded by the home's mutex, as the list of idle ones */
    struct peer_event *next;
} peer_event_t;

/* What an attached end has on its device. */
struct peer_side {
    int device, rank, size;
    cudaStream_t compute;   /* borrowed */
    cudaStream_t *incoming; /* [size + 1] by source rank, then those in turn */
    pthread_mutex_t mutex;
    peer_event_t *idle;
    ra_cuda_waits_t waits;
};

/* Pairs of one queue, one after another. */
typedef struct peer_run {
    peer_side_t *to;
    cudaStream_t queue;
    const ra_thread_request_t *after[2]; /* requests whose starts the queue waits for */
    peer_event_t *done;
    ra_span_t span;
    int64_t bytes;
} peer_run_t;

static ra_status_t event_create(peer_side_t *side, peer_event_t **event_p)
{
    peer_event_t *event = calloc(1, sizeof(*event));
    if (event == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate an event");
    }
    int caller = 0;
    cudaError_t error = cudaGetDevice(&caller);
    if (error == cudaSuccess) {
        error = cudaSetDevice(side->device);
    }
    if (error == cudaSuccess) {
        error = cudaEventCreateWithFlags(&event->event, cudaEventDisableTiming);
        cudaSetDevice(caller);
    }
    if (error != cudaSuccess) {
        free(event);
        return ra_cuda_check(error, "making an event");
    }
    event->home = side;
    *event_p = event;
    return RA_OK;
}

static ra_status_t event_take(peer_side_t *side, peer_event_t **event_p)
{
    pthread_mutex_lock(&side->mutex);
    peer_event_t *event = side->idle;
    if (event != NULL) {
        side->idle = event->next;
    }
    pthread_mutex_unlock(&side->mutex);
    if (event == NULL) {
        RA_TRY(event_create(side, &event));
    }
    event->uses = 1;
    *event_p = event;
    return RA_OK;
}

static peer_event_t *event_share(peer_event_t *event)
{
    pthread_mutex_lock(&event->home->mutex);
    event->uses++;
    pthread_mutex_unlock(&event->home->mutex);
    return event;
}

/* Accepts NULL. Whoever waits for the event has queued that already. */
static void event_drop(peer_event_t *event)
{
    if (event == NULL) {
        return;
    }
    peer_side_t *home = event->home;
    pthread_mutex_lock(&home->mutex);
    if (--event->uses == 0) {
        event->next = home->idle;
        home->idle = event;
    }
    pthread_mutex_unlock(&home->mutex);
}

static void side_destroy(peer_side_t *side)
{
    if (cudaSetDevice(side->device) == cudaSuccess) {
        ra_cuda_waits_clear(&side->waits);
        for (int r = 0; r <= side->size; r++) {
            if (side->incoming != NULL && side->incoming[r] != NULL) {
                cudaStreamDestroy(side->incoming[r]);
            }
        }
        while (side->idle != NULL) {
            peer_event_t *event = side->idle;
            side->idle = event->next;
            cudaEventDestroy(event->event);
            free(event);
        }
    }
    pthread_mutex_destroy(&side->mutex);
    free(side->incoming);
    free(side);
}

/* Once a pair and process: the runtime, and tools that watch it, take a second time for an error.
 */
static ra_status_t reach_peer(int device, int other)
{
    enum { DEVICES_MOST = 64 };
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static bool reached[DEVICES_MOST][DEVICES_MOST];
    bool known = device < DEVICES_MOST && other < DEVICES_MOST;
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&mutex);
    if (!known || !reached[device][other]) {
        error = cudaDeviceEnablePeerAccess(other, 0);
    }
    if (error == cudaErrorPeerAccessAlreadyEnabled) { /* by someone else */
        error = cudaSuccess;
        cudaGetLastError();
    }
    if (known) {
        reached[device][other] = error == cudaSuccess;
    }
    pthread_mutex_unlock(&mutex);
    return ra_cuda_check(error, "enabling peer access");
}

/* Copy engines of this GPU read the others' memory directly where the machine allows it. */
static ra_status_t reach_peers(int device)
{
    int count = 0;
    RA_TRY(ra_cuda_check(cudaGetDeviceCount(&count), "counting GPUs"));
    for (int other = 0; other < count; other++) {
        int access = 0;
        if (other != device && cudaDeviceCanAccessPeer(&access, device, other) == cudaSuccess &&
            access != 0) {
            RA_TRY(reach_peer(device, other));
        }
    }
    return RA_OK;
}

static ra_status_t fill_side(peer_side_t *side)
{
    enum { EVENTS_AT_FIRST = 16 };
    peer_event_t *events[EVENTS_AT_FIRST];
    side->incoming = calloc((size_t)side->size + 1, sizeof(cudaStream_t));
    if (side->incoming == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate the queues of %d ranks", side->size);
    }
    RA_TRY(reach_peers(side->device));
    for (int r = 0; r <= side->size; r++) {
        cudaError_t error = cudaStreamCreateWithFlags(&side->incoming[r], cudaStreamNonBlocking);
        RA_TRY(ra_cuda_check(error, "making a copy queue"));
    }
    for (int i = 0; i < EVENTS_AT_FIRST; i++) {
        RA_TRY(event_take(side, &events[i]));
    }
    for (int i = 0; i < EVENTS_AT_FIRST; i++) {
        event_drop(events[i]);
    }
    return RA_OK;
}

static ra_status_t peer_attach(ra_thread_end_t *end, ra_stream_t *compute)
{
    peer_side_t *side = calloc(1, sizeof(*side));
    if (side == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate the device side of a rank");
    }
    side->device = ra_device_index(ra_stream_device(compute));
    side->rank = end->base.rank;
    side->size = end->base.size;
    side->compute = ra_stream_cuda(compute);
    pthread_mutex_init(&side->mutex, NULL);
    ra_status_t status = ra_stream_make_current(compute);
    if (status == RA_OK) {
        status = fill_side(side);
    }
    if (status != RA_OK) {
        side_destroy(side);
        return status;
    }
    end->device = side;
    return RA_OK;
}

static void peer_detach(ra_thread_end_t *end)
{
    side_destroy(end->device);
    end->device = NULL;
}

static ra_status_t peer_measure_waits(ra_thread_end_t *end, bool on)
{
    return ra_cuda_waits_set(&((peer_side_t *)end->device)->waits, on);
}

static ra_status_t peer_waited(ra_thread_end_t *end, double *seconds_p)
{
    return ra_cuda_waits_sum(&((peer_side_t *)end->device)->waits, seconds_p);
}

static ra_status_t peer_settle(ra_thread_request_t *request)
{
    peer_side_t *side = request->end->device;
    const peer_event_t *last = NULL;
    bool any = request->start != NULL; /* some of it is device memory */
    ra_status_t status = any ? ra_cuda_waits_begin(&side->waits, side->compute) : RA_OK;
    for (int i = 0; i < request->count; i++) {
        peer_event_t *done = request->ops[i].moved;
        if (done == NULL) {
            continue;
        }
        if (done != last && status == RA_OK) {
            status = ra_cuda_check(cudaStreamWaitEvent(side->compute, done->event, 0),
                                   "ordering work after a transfer");
        }
        last = done;
        event_drop(done);
        request->ops[i].moved = NULL;
    }
    event_drop(request->start);
    request->start = NULL;
    if (any && status == RA_OK) {
        status = ra_cuda_waits_end(&side->waits, side->compute);
    }
    return status;
}

static ra_status_t peer_prepare(ra_thread_request_t *request)
{
    peer_side_t *side = request->end->device;
    bool any = false;
    for (int i = 0; i < request->count; i++) {
        ra_thread_op_t *op = &request->ops[i];
        RA_TRY(ra_cuda_is_device_memory(&op->transfer, side->device, &op->on_device));
        any = any || op->on_device;
    }
    if (!any) {
        return RA_OK;
    }
    peer_event_t *start = NULL;
    RA_TRY(event_take(side, &start));
    cudaError_t error = cudaEventRecord(start->event, side->compute);
    if (error != cudaSuccess) {
        event_drop(start);
        return ra_cuda_check(error, "marking a compute stream");
    }
    request->start = start;
    return RA_OK;
}

static ra_status_t wait_start(peer_run_t *run, int which, const ra_thread_op_t *op)
{
    if (op->request == run->after[which] || op->request->start == NULL) {
        return RA_OK;
    }
    const peer_event_t *start = op->request->start;
    run->after[which] = op->request;
    return ra_cuda_check(cudaStreamWaitEvent(run->queue, start->event, 0),
                         "ordering a copy after its memory");
}

/* Within one GPU a plain copy may be a kernel; asked to overlap it goes to a copy engine. */
static ra_status_t copy_within(void *to, const void *from, size_t bytes, cudaStream_t queue)
{
    struct cudaMemcpyAttributes attributes = {.srcAccessOrder = cudaMemcpySrcAccessOrderStream,
                                              .flags = cudaMemcpyFlagPreferOverlapWithCompute};
    size_t first = 0;
    void *const targets[] = {to};
    const void *const sources[] = {from};
    return ra_cuda_check(
        cudaMemcpyBatchAsync(targets, sources, &bytes, 1, &attributes, &first, 1, queue),
        "copying within a GPU");
}

static ra_status_t pull(peer_run_t *run, ra_thread_op_t *offer, ra_thread_op_t *want)
{
    const ra_transfer_t *transfer = &want->transfer;
    RA_TRY(wait_start(run, 0, offer));
    RA_TRY(wait_start(run, 1, want));
    if (run->span.start_ns == 0) {
        run->span = ra_trace_transfer_begin("pull", run->to->rank, run->queue);
    }
    offer->moved = offer->request->prepared ? event_share(run->done) : NULL;
    want->moved = event_share(run->done);
    run->bytes += transfer->bytes;
    if (transfer->bytes > 0) {
        const peer_side_t *source = offer->request->end->device;
        if (source->device == run->to->device) {
            RA_TRY(copy_within(transfer->data, offer->transfer.data, (size_t)transfer->bytes,
                               run->queue));
        } else {
            cudaError_t error =
                cudaMemcpyPeerAsync(transfer->data, run->to->device, offer->transfer.data,
                                    source->device, (size_t)transfer->bytes, run->queue);
            RA_TRY(ra_cuda_check(error, "copying between GPUs"));
        }
    }
    if (transfer->gate != NULL) {
        return ra_cuda_write_gate(run->queue, transfer->gate, transfer->gate_value);
    }
    return RA_OK;
}

static ra_status_t run_finish(peer_run_t *run)
{
    if (run->done == NULL) {
        return RA_OK;
    }
    ra_trace_transfer_end(run->span, run->to->rank, run->queue, run->bytes);
    cudaError_t error = cudaEventRecord(run->done->event, run->queue);
    event_drop(run->done);
    run->done = NULL;
    return ra_cuda_check(error, "marking a copy queue");
}

static cudaStream_t queue_of(const ra_thread_op_t *want)
{
    const peer_side_t *to = want->request->end->device;
    return to->incoming[want->request->in_turn ? to->size : want->transfer.peer];
}

static ra_status_t run_begin(peer_run_t *run, peer_side_t *to, cudaStream_t queue)
{
    *run = (peer_run_t){.to = to, .queue = queue};
    RA_TRY(ra_cuda_check(cudaSetDevice(to->device), "choosing the receiving GPU"));
    return event_take(to, &run->done);
}

static ra_status_t peer_move(ra_thread_op_t *pairs)
{
    peer_run_t run = {0};
    int caller = 0;
    RA_TRY(ra_cuda_check(cudaGetDevice(&caller), "asking for the device"));
    ra_status_t status = RA_OK;
    for (ra_thread_op_t *op = pairs; op != NULL && status == RA_OK; op = op->next) {
        ra_thread_op_t *offer = ra_op_is_offer(op) ? op : op->partner, *want = offer->partner;
        if (!want->on_device) {
            continue;
        }
        peer_side_t *to = want->request->end->device;
        cudaStream_t queue = queue_of(want);
        if (run.done == NULL || run.queue != queue) {
            status = run_finish(&run);
            if (status == RA_OK) {
                status = run_begin(&run, to, queue);
            }
        }
        if (status == RA_OK) {
            status = pull(&run, offer, want);
        }
    }
    ra_status_t finished = run_finish(&run);
    cudaSetDevice(caller);
    return status != RA_OK ? status : finished;
}

static void peer_open_gate(const ra_thread_op_t *want)
{
    const peer_side_t *side = want->request->end->device;
    int caller = 0;
    if (cudaGetDevice(&caller) == cudaSuccess && cudaSetDevice(side->device) == cudaSuccess) {
        ra_cuda_write_gate(side->incoming[want->transfer.peer], want->transfer.gate,
                           want->transfer.gate_value);
        cudaSetDevice(caller);
    }
}

static ra_status_t peer_open(int size, ra_transport_t **ends_p);

const ra_transport_ops_t ra_transport_peer = {
    .name = "peer",
    .doc = "ranks are threads of this process with a GPU each; copy engines pull device memory",
    .open = peer_open,
    RA_THREAD_SLOTS};

static const ra_thread_mover_t peer_mover = {.attach = peer_attach,
                                             .detach = peer_detach,
                                             .prepare = peer_prepare,
                                             .move = peer_move,
                                             .settle = peer_settle,
                                             .measure_waits = peer_measure_waits,
                                             .waited = peer_waited,
                                             .open_gate = peer_open_gate};

static ra_status_t peer_open(int size, ra_transport_t **ends_p)
{
    static const ra_thread_row_t row = {.ops = &ra_transport_peer, .mover = &peer_mover};
    return ra_thread_world_open(&row, size, ends_p);
}
