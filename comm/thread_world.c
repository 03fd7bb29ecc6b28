#include "comm/thread_world.h"

#include "base/clock.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const kind_names[] = {[RA_SEND] = "send to",
                                         [RA_RECV] = "receive from",
                                         [RA_LEND] = "lend to",
                                         [RA_BORROW] = "borrow from"};

static void queue_init(ra_op_queue_t *queue)
{
    queue->head = NULL;
    queue->tail = &queue->head;
}

static void queue_push(ra_op_queue_t *queue, ra_thread_op_t *op)
{
    op->next = NULL;
    *queue->tail = op;
    queue->tail = &op->next;
}

static void complete(ra_thread_op_t *op)
{
    op->state = RA_OP_DONE;
    op->request->pending--;
    pthread_cond_broadcast(&op->request->end->changed);
}

/* The bytes of a want will not come: let nobody wait for them. */
static void open_gate(const ra_thread_op_t *op)
{
    if (ra_op_is_offer(op) || op->transfer.gate == NULL) {
        return;
    }
    if (op->on_device) {
        op->request->end->world->row->mover->open_gate(op);
    } else {
        __atomic_store_n(op->transfer.gate, op->transfer.gate_value, __ATOMIC_RELEASE);
    }
}

static void fail_pair(ra_thread_op_t *offer, ra_thread_op_t *want)
{
    const char *place[] = {"", " of device memory"};
    ra_thread_op_t *pair[] = {offer, want};
    for (int i = 0; i < 2; i++) {
        ra_thread_request_t *request = pair[i]->request;
        if (request->status == RA_OK) {
            request->status = RA_ERR_INVALID;
            snprintf(request->failure, sizeof(request->failure),
                     "tag %u: rank %d %s rank %d %lld bytes%s, which has posted %s it of %lld "
                     "bytes%s",
                     offer->transfer.tag, want->transfer.peer, kind_names[offer->transfer.kind],
                     offer->transfer.peer, (long long)offer->transfer.bytes,
                     place[offer->on_device], kind_names[want->transfer.kind],
                     (long long)want->transfer.bytes, place[want->on_device]);
        }
        open_gate(pair[i]);
        complete(pair[i]);
    }
}

/* Decide what becomes of a matched pair; true when the caller has to move its bytes. */
static bool join(ra_thread_op_t *op, ra_thread_op_t *other)
{
    ra_thread_op_t *offer = ra_op_is_offer(op) ? op : other;
    ra_thread_op_t *want = ra_op_is_offer(op) ? other : op;
    bool lending = offer->transfer.kind == RA_LEND;
    if (offer->transfer.bytes != want->transfer.bytes ||
        lending != (want->transfer.kind == RA_BORROW) ||
        (offer->transfer.bytes > 0 && offer->on_device != want->on_device)) {
        fail_pair(offer, want);
        return false;
    }
    offer->partner = want;
    want->partner = offer;
    if (lending && op->request->base.ops->lends) {
        want->borrowed = offer->transfer.data;
        offer->state = RA_OP_LENT;
        complete(want);
        return false;
    }
    offer->state = want->state = RA_OP_MOVING;
    return true;
}

/* Match or queue every transfer; pairs to move are appended to @a pairs. */
static void start_group(ra_thread_request_t *request, ra_op_queue_t *pairs)
{
    for (int i = 0; i < request->count; i++) {
        ra_thread_op_t *op = &request->ops[i];
        ra_thread_op_t *other = ra_mailbox_take_partner(op);
        if (other == NULL) {
            ra_mailbox_put(op);
        } else if (join(op, other)) {
            queue_push(pairs, op);
        }
    }
}

/* Start every group whose turn has come: its predecessor on its end is done. */
static void start_held(ra_thread_world_t *world, ra_op_queue_t *pairs)
{
    bool again = true;
    while (again) {
        again = false;
        for (int r = 0; r < world->size; r++) {
            ra_thread_end_t *end = world->ends[r];
            if (end == NULL || end->held == NULL ||
                (end->started != NULL && end->started->pending > 0)) {
                continue;
            }
            end->started = end->held;
            end->held = end->started->next_held;
            start_group(end->started, pairs);
            again = true;
        }
    }
}

static void copy_pair(ra_thread_op_t *op)
{
    ra_thread_op_t *offer = ra_op_is_offer(op) ? op : op->partner, *want = offer->partner;
    if (offer->transfer.bytes > 0) {
        memcpy(want->transfer.data, offer->transfer.data, (size_t)offer->transfer.bytes);
    }
    open_gate(want);
}

/* Both sides agree where bytes are; without bytes it is the gate that counts. */
static bool pair_is_on_device(const ra_thread_op_t *op)
{
    return ra_op_is_offer(op) ? op->partner->on_device : op->on_device;
}

static void fail_move(ra_thread_op_t *op, ra_status_t status)
{
    ra_thread_request_t *request = op->request;
    if (request->status == RA_OK) {
        request->status = status;
        snprintf(request->failure, sizeof(request->failure), "%s", ra_last_error());
    }
}

static void finish_pair(ra_thread_op_t *op, ra_status_t device_status)
{
    ra_thread_op_t *pair[] = {op->partner, op};
    ra_status_t status = pair_is_on_device(op) ? device_status : RA_OK;
    op->partner = pair[0]->partner = NULL;
    for (int i = 0; i < 2; i++) {
        if (status != RA_OK) {
            fail_move(pair[i], status);
            open_gate(pair[i]);
        }
        pair[i]->borrowed = ra_op_is_offer(pair[i]) ? NULL : pair[i]->transfer.data;
        complete(pair[i]);
    }
}

/* Move the bytes of matched pairs, then those of groups that may start because of it. */
static void move_pairs(ra_thread_world_t *world, ra_op_queue_t *pairs)
{
    while (pairs->head != NULL) {
        ra_thread_op_t *first = pairs->head, *next;
        ra_status_t status = RA_OK;
        bool any_on_device = false;
        for (ra_thread_op_t *op = first; op != NULL; op = op->next) {
            if (pair_is_on_device(op)) {
                any_on_device = true;
            } else {
                copy_pair(op);
            }
        }
        if (any_on_device) {
            status = world->row->mover->move(first);
        }
        queue_init(pairs);
        pthread_mutex_lock(&world->mutex);
        for (ra_thread_op_t *op = first; op != NULL; op = next) {
            next = op->next;
            finish_pair(op, status);
        }
        start_held(world, pairs);
        pthread_mutex_unlock(&world->mutex);
    }
}

static ra_status_t fail_aborted(const ra_thread_world_t *world)
{
    char text[96];
    snprintf(text, sizeof(text), "another rank failed: %s", ra_status_text(world->cause));
    ra_last_error_set(text); /* the rank that failed has printed why */
    return RA_ERR_PEER;
}

static ra_thread_request_t *request_new(ra_thread_end_t *end, const ra_transfer_t *transfers,
                                        int count, bool in_turn)
{
    ra_thread_request_t *request =
        calloc(1, sizeof(*request) + (size_t)count * sizeof(request->ops[0]));
    if (request == NULL) {
        ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a group of %d transfers", count);
        return NULL;
    }
    request->base.ops = end->base.ops;
    request->end = end;
    request->count = request->pending = count;
    request->in_turn = in_turn || end->base.ops->in_order;
    for (int i = 0; i < count; i++) {
        request->ops[i] = (ra_thread_op_t){.transfer = transfers[i], .request = request};
    }
    return request;
}

static ra_status_t settle(ra_thread_request_t *request)
{
    if (!request->prepared) {
        return RA_OK;
    }
    request->prepared = false;
    return request->end->world->row->mover->settle(request);
}

ra_status_t ra_thread_post(ra_transport_t *transport, const ra_transfer_t *transfers, int count,
                           bool in_turn, ra_request_t **request_p)
{
    ra_thread_end_t *end = (ra_thread_end_t *)transport;
    ra_thread_world_t *world = end->world;
    ra_thread_request_t *request = request_new(end, transfers, count, in_turn);
    if (request == NULL) {
        return RA_ERR_NOMEM;
    }
    if (end->device != NULL) {
        ra_status_t status = world->row->mover->prepare(request);
        if (status != RA_OK) {
            free(request);
            return status;
        }
        request->prepared = true;
    }

    ra_op_queue_t pairs;
    queue_init(&pairs);
    pthread_mutex_lock(&world->mutex);
    if (world->aborted) {
        ra_status_t status = fail_aborted(world);
        pthread_mutex_unlock(&world->mutex);
        settle(request);
        free(request);
        return status;
    }
    if (request->in_turn) {
        ra_thread_request_t **last = &end->held;
        while (*last != NULL) {
            last = &(*last)->next_held;
        }
        *last = request;
        start_held(world, &pairs);
    } else {
        start_group(request, &pairs);
    }
    pthread_mutex_unlock(&world->mutex);
    move_pairs(world, &pairs);
    *request_p = &request->base;
    return RA_OK;
}

/* With the mutex held. */
static ra_status_t state_of(const ra_thread_request_t *request)
{
    if (request->status != RA_OK) {
        return request->status;
    }
    if (request->pending == 0) {
        return RA_OK;
    }
    return request->end->world->aborted ? RA_ERR_PEER : RA_INPROGRESS;
}

static ra_status_t report(ra_thread_request_t *request, ra_status_t status)
{
    switch (status) {
    case RA_OK:
        return settle(request);
    case RA_INPROGRESS:
        return status;
    case RA_ERR_PEER:
        return fail_aborted(request->end->world);
    case RA_ERR_CANCELED:
        ra_last_error_set("the transfers were canceled");
        return status;
    default:
        return ra_fail(status, "comm", "%s", request->failure);
    }
}

ra_status_t ra_thread_test(ra_request_t *base)
{
    ra_thread_request_t *request = (ra_thread_request_t *)base;
    pthread_mutex_t *mutex = &request->end->world->mutex;
    pthread_mutex_lock(mutex);
    ra_status_t status = state_of(request);
    pthread_mutex_unlock(mutex);
    return report(request, status);
}

/* Sleep until something of this end changed. @return false when the deadline has passed. */
static bool sleep_until(ra_thread_end_t *end, int64_t deadline_ns)
{
    if (deadline_ns == RA_NO_DEADLINE) {
        pthread_cond_wait(&end->changed, &end->world->mutex);
        return true;
    }
    if (ra_clock_ns() >= deadline_ns) {
        return false;
    }
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000),
                             .tv_nsec = (long)(deadline_ns % 1000000000)};
    pthread_cond_timedwait(&end->changed, &end->world->mutex, &until);
    return true;
}

static ra_status_t fail_timeout(const ra_thread_request_t *request, const ra_thread_op_t *op)
{
    return ra_fail(RA_ERR_TIMEOUT, "comm",
                   "deadline passed on rank %d: %d of %d transfers are open, the first is %s rank "
                   "%d, tag %u, %lld bytes%s",
                   request->end->base.rank, request->pending, request->count,
                   kind_names[op->transfer.kind], op->transfer.peer, op->transfer.tag,
                   (long long)op->transfer.bytes,
                   op->state == RA_OP_HELD ? ", behind a group that is not done" : "");
}

ra_status_t ra_thread_wait(ra_request_t *base, int64_t deadline_ns)
{
    ra_thread_request_t *request = (ra_thread_request_t *)base;
    ra_thread_end_t *end = request->end;
    int64_t before = end->measures ? ra_clock_ns() : 0;
    ra_status_t status;

    pthread_mutex_lock(&end->world->mutex);
    while ((status = state_of(request)) == RA_INPROGRESS) {
        if (!sleep_until(end, deadline_ns)) {
            const ra_thread_op_t *open = request->ops;
            while (open->state == RA_OP_DONE) {
                open++;
            }
            status = fail_timeout(request, open);
            break;
        }
    }
    pthread_mutex_unlock(&end->world->mutex);
    end->waited_ns += end->measures ? ra_clock_ns() - before : 0;
    return status == RA_ERR_TIMEOUT ? status : report(request, status);
}

static void unlink_held(ra_thread_request_t *request)
{
    ra_thread_request_t **place = &request->end->held;
    while (*place != NULL && *place != request) {
        place = &(*place)->next_held;
    }
    if (*place != NULL) {
        *place = request->next_held;
    }
}

/*
 * A matched transfer is no longer the caller's to stop: a copy is awaited, a lent block is awaited
 * until its borrower lets go (soon after an abort, since the borrower's waits fail). A rank that
 * borrows from itself would wait for itself, so that pair is cut at once.
 */
static void give_up(ra_thread_request_t *request, ra_thread_op_t *op)
{
    if (op->state == RA_OP_QUEUED || op->state == RA_OP_HELD) {
        if (op->state == RA_OP_QUEUED) {
            ra_mailbox_withdraw(op);
        }
        open_gate(op);
        complete(op);
    } else if (op->state == RA_OP_LENT && op->partner->request->end == request->end) {
        op->partner->partner = NULL;
        op->partner = NULL;
        complete(op);
    }
    while (op->state != RA_OP_DONE) {
        sleep_until(request->end, RA_NO_DEADLINE);
    }
}

ra_status_t ra_thread_cancel(ra_request_t *base)
{
    ra_thread_request_t *request = (ra_thread_request_t *)base;
    ra_thread_world_t *world = request->end->world;
    ra_op_queue_t pairs;

    queue_init(&pairs);
    pthread_mutex_lock(&world->mutex);
    if (request->pending > 0) {
        unlink_held(request);
        for (int i = 0; i < request->count; i++) {
            give_up(request, &request->ops[i]);
        }
        if (request->status == RA_OK) {
            request->status = RA_ERR_CANCELED;
        }
        start_held(world, &pairs);
    }
    pthread_mutex_unlock(&world->mutex);
    move_pairs(world, &pairs);
    return RA_OK;
}

const void *ra_thread_borrowed(const ra_request_t *base, int index)
{
    const ra_thread_request_t *request = (const ra_thread_request_t *)base;
    return request->ops[index].borrowed;
}

void ra_thread_free(ra_request_t *base)
{
    ra_thread_request_t *request = (ra_thread_request_t *)base;
    pthread_mutex_t *mutex = &request->end->world->mutex;

    ra_thread_cancel(base);
    pthread_mutex_lock(mutex);
    for (int i = 0; i < request->count; i++) {
        ra_thread_op_t *op = &request->ops[i];
        if (op->transfer.kind == RA_BORROW && op->partner != NULL) {
            op->partner->partner = NULL;
            complete(op->partner);
        }
    }
    if (request->end->started == request) {
        request->end->started = NULL;
    }
    pthread_mutex_unlock(mutex);
    settle(request); /* what was moved before a failure still orders the compute stream */
    free(request);
}

void ra_thread_abort(ra_transport_t *transport, ra_status_t cause)
{
    ra_thread_world_t *world = ((ra_thread_end_t *)transport)->world;
    pthread_mutex_lock(&world->mutex);
    if (!world->aborted) {
        world->aborted = true;
        world->cause = cause;
        for (int r = 0; r < transport->size; r++) {
            if (world->ends[r] != NULL) {
                pthread_cond_broadcast(&world->ends[r]->changed);
            }
        }
    }
    pthread_mutex_unlock(&world->mutex);
}

bool ra_thread_aborted(ra_transport_t *transport)
{
    ra_thread_world_t *world = ((ra_thread_end_t *)transport)->world;
    pthread_mutex_lock(&world->mutex);
    bool aborted = world->aborted;
    pthread_mutex_unlock(&world->mutex);
    return aborted;
}

ra_status_t ra_thread_attach(ra_transport_t *transport, ra_stream_t *compute)
{
    ra_thread_end_t *end = (ra_thread_end_t *)transport;
    const ra_thread_mover_t *mover = end->world->row->mover;
    if (ra_device_kind(ra_stream_device(compute)) == RA_DEVICE_CPU) {
        return RA_OK;
    }
    if (mover == NULL) {
        return ra_fail(RA_ERR_USAGE, "comm",
                       "transport '%s' moves host memory only, not that of %s",
                       transport->ops->name, ra_device_name(ra_stream_device(compute)));
    }
    if (end->device != NULL) {
        return ra_fail(RA_ERR_INVALID, "comm", "rank %d is attached to a stream already",
                       transport->rank);
    }
    return mover->attach(end, compute);
}

ra_status_t ra_thread_measure_waits(ra_transport_t *transport, bool on)
{
    ra_thread_end_t *end = (ra_thread_end_t *)transport;
    if (end->device != NULL) {
        return end->world->row->mover->measure_waits(end, on);
    }
    end->measures = on;
    end->waited_ns = 0;
    return RA_OK;
}

ra_status_t ra_thread_waited(ra_transport_t *transport, double *seconds_p)
{
    ra_thread_end_t *end = (ra_thread_end_t *)transport;
    if (end->device != NULL) {
        return end->world->row->mover->waited(end, seconds_p);
    }
    *seconds_p = (double)end->waited_ns * 1e-9;
    return RA_OK;
}

void ra_thread_close(ra_transport_t *transport)
{
    if (transport == NULL) {
        return;
    }
    ra_thread_end_t *end = (ra_thread_end_t *)transport;
    ra_thread_world_t *world = end->world;
    if (end->device != NULL) {
        world->row->mover->detach(end);
    }
    pthread_mutex_lock(&world->mutex);
    world->ends[transport->rank] = NULL;
    bool last = --world->open_ends == 0;
    pthread_mutex_unlock(&world->mutex);
    pthread_cond_destroy(&end->changed);
    free(end);
    if (last) {
        pthread_mutex_destroy(&world->mutex);
        free(world->ends);
        free(world);
    }
}

static ra_thread_end_t *end_create(const ra_transport_ops_t *ops, ra_thread_world_t *world,
                                   int rank, int size)
{
    ra_thread_end_t *end = calloc(1, sizeof(*end));
    if (end == NULL) {
        return NULL;
    }
    end->base = (ra_transport_t){.ops = ops, .rank = rank, .size = size};
    end->world = world;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&end->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    ra_mailbox_init(&end->mailbox);
    return end;
}

ra_status_t ra_thread_world_open(const ra_thread_row_t *row, int size, ra_transport_t **ends_p)
{
    ra_thread_world_t *world = calloc(1, sizeof(*world));
    ra_thread_end_t **ends = calloc((size_t)size, sizeof(*ends));
    if (world == NULL || ends == NULL) {
        goto err_free;
    }
    pthread_mutex_init(&world->mutex, NULL);
    world->row = row;
    world->ends = ends;
    world->size = world->open_ends = size;
    for (int r = 0; r < size; r++) {
        ends[r] = end_create(row->ops, world, r, size);
        if (ends[r] == NULL) {
            goto err_close;
        }
    }
    for (int r = 0; r < size; r++) {
        ends_p[r] = &ends[r]->base;
    }
    return RA_OK;

err_close:
    for (int r = 0; r < size && ends[r] != NULL; r++) {
        pthread_cond_destroy(&ends[r]->changed);
        free(ends[r]);
    }
    pthread_mutex_destroy(&world->mutex);
err_free:
    free(ends);
    free(world);
    return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", size);
}
