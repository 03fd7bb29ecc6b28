/*
 * Ranks are threads of one process. An offer (send, lend) and a want (receive, borrow) meet in the
 * mailbox of the destination rank, matched per (source, tag) in post order. Whoever posts the
 * second of a pair completes it: copies the bytes, or hands the lender's pointer to the borrower.
 *
 * Concurrency  one mutex per world guards everything but the bytes themselves; copies run outside
 * it, in state OP_COPYING, which only the copying thread leaves. Each rank sleeps on its own
 * condition; only completions of its own transfers and abort() signal it.
 */
#include "comm/transport.h"

#include "base/clock.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAILBOX_BUCKETS = 64,
    FAILURE_BYTES = 192,
    A_DAY_S = 86400 /* a thread cannot vanish, and a block of a million keys takes its time */
};

typedef enum op_state {
    OP_QUEUED,  /* in a mailbox, no partner yet */
    OP_COPYING, /* the thread that completed the pair is copying */
    OP_LENT,    /* a lend whose bytes the borrower reads */
    OP_DONE
} op_state_t;

typedef struct local_request local_request_t;

typedef struct local_op {
    ra_transfer_t transfer;
    local_request_t *request;
    op_state_t state;
    struct local_op *next;    /* in a mailbox queue, then in the poster's list of copies */
    struct local_op *partner; /* while copying; lend and borrow: until the borrow is freed */
    const void *borrowed;
} local_op_t;

typedef struct op_queue {
    local_op_t *head, **tail;
} op_queue_t;

typedef struct mailbox_bucket {
    op_queue_t offers, wants;
} mailbox_bucket_t;

typedef struct local_world local_world_t;

typedef struct local_end {
    ra_transport_t base;
    local_world_t *world;
    pthread_cond_t changed;
    mailbox_bucket_t mailbox[MAILBOX_BUCKETS];
} local_end_t;

struct local_world {
    pthread_mutex_t mutex;
    int open_ends;
    bool aborted;
    ra_status_t cause;
    local_end_t **ends;
};

struct local_request {
    ra_request_t base;
    local_end_t *end;
    int count, pending;
    ra_status_t status; /* RA_OK until a transfer failed or the group was cancelled */
    char failure[FAILURE_BYTES];
    local_op_t ops[];
};

static const char *const kind_names[] = {[RA_SEND] = "send to",
                                         [RA_RECV] = "receive from",
                                         [RA_LEND] = "lend to",
                                         [RA_BORROW] = "borrow from"};

static bool is_offer(const local_op_t *op)
{
    return op->transfer.kind == RA_SEND || op->transfer.kind == RA_LEND;
}

static int source_rank(const local_op_t *op)
{
    return is_offer(op) ? op->request->end->base.rank : op->transfer.peer;
}

static mailbox_bucket_t *bucket_of(const local_op_t *op)
{
    local_end_t *self = op->request->end;
    local_end_t *to = is_offer(op) ? self->world->ends[op->transfer.peer] : self;
    uint32_t hash = op->transfer.tag * 2654435761u + (uint32_t)source_rank(op) * 40503u;
    return &to->mailbox[(hash ^ hash >> 16) % MAILBOX_BUCKETS];
}

static void queue_push(op_queue_t *queue, local_op_t *op)
{
    op->next = NULL;
    *queue->tail = op;
    queue->tail = &op->next;
}

static void queue_unlink(op_queue_t *queue, local_op_t **place)
{
    local_op_t *op = *place;
    *place = op->next;
    if (queue->tail == &op->next) {
        queue->tail = place;
    }
    op->next = NULL;
}

/* Oldest waiting counterpart of @a op, taken out of its mailbox, or NULL. */
static local_op_t *take_partner(const local_op_t *op)
{
    mailbox_bucket_t *bucket = bucket_of(op);
    op_queue_t *queue = is_offer(op) ? &bucket->wants : &bucket->offers;
    for (local_op_t **place = &queue->head; *place != NULL; place = &(*place)->next) {
        local_op_t *other = *place;
        if (source_rank(other) == source_rank(op) && other->transfer.tag == op->transfer.tag) {
            queue_unlink(queue, place);
            return other;
        }
    }
    return NULL;
}

static void withdraw(local_op_t *op)
{
    mailbox_bucket_t *bucket = bucket_of(op);
    op_queue_t *queue = is_offer(op) ? &bucket->offers : &bucket->wants;
    local_op_t **place = &queue->head;
    while (*place != op) {
        place = &(*place)->next;
    }
    queue_unlink(queue, place);
}

static void complete(local_op_t *op)
{
    op->state = OP_DONE;
    op->request->pending--;
    pthread_cond_broadcast(&op->request->end->changed);
}

static void fail_pair(local_op_t *offer, local_op_t *want)
{
    local_op_t *pair[] = {offer, want};
    for (int i = 0; i < 2; i++) {
        local_request_t *request = pair[i]->request;
        if (request->status == RA_OK) {
            request->status = RA_ERR_INVALID;
            snprintf(request->failure, sizeof(request->failure),
                     "tag %u: rank %d %s rank %d %lld bytes, which has posted %s it of %lld bytes",
                     offer->transfer.tag, source_rank(offer), kind_names[offer->transfer.kind],
                     offer->transfer.peer, (long long)offer->transfer.bytes,
                     kind_names[want->transfer.kind], (long long)want->transfer.bytes);
        }
        complete(pair[i]);
    }
}

/* Decide what becomes of a matched pair; true when the caller has to copy. */
static bool join(local_op_t *op, local_op_t *other)
{
    local_op_t *offer = is_offer(op) ? op : other, *want = is_offer(op) ? other : op;
    bool lending = offer->transfer.kind == RA_LEND;
    if (offer->transfer.bytes != want->transfer.bytes ||
        lending != (want->transfer.kind == RA_BORROW)) {
        fail_pair(offer, want);
        return false;
    }
    offer->partner = want;
    want->partner = offer;
    if (lending && op->request->base.ops->lends) {
        want->borrowed = offer->transfer.data;
        offer->state = OP_LENT;
        complete(want);
        return false;
    }
    offer->state = want->state = OP_COPYING;
    return true;
}

static void copy_pair(local_op_t *op)
{
    local_op_t *offer = is_offer(op) ? op : op->partner, *want = offer->partner;
    if (offer->transfer.bytes > 0) {
        memcpy(want->transfer.data, offer->transfer.data, (size_t)offer->transfer.bytes);
    }
    want->borrowed = want->transfer.data;
}

static ra_status_t fail_aborted(const local_world_t *world)
{
    char text[96];
    snprintf(text, sizeof(text), "another rank failed: %s", ra_status_text(world->cause));
    ra_last_error_set(text); /* the rank that failed has printed why */
    return RA_ERR_PEER;
}

/* Match or queue every transfer; the pairs to copy come back linked through next. */
static local_op_t *enter_transfers(local_request_t *request)
{
    local_op_t *copies = NULL;
    for (int i = 0; i < request->count; i++) {
        local_op_t *op = &request->ops[i];
        local_op_t *other = take_partner(op);
        if (other == NULL) {
            mailbox_bucket_t *bucket = bucket_of(op);
            queue_push(is_offer(op) ? &bucket->offers : &bucket->wants, op);
        } else if (join(op, other)) {
            op->next = copies;
            copies = op;
        }
    }
    return copies;
}

static ra_status_t local_post(ra_transport_t *transport, const ra_transfer_t *transfers, int count,
                              ra_request_t **request_p)
{
    local_end_t *end = (local_end_t *)transport;
    local_world_t *world = end->world;
    local_request_t *request =
        calloc(1, sizeof(*request) + (size_t)count * sizeof(request->ops[0]));
    if (request == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a group of %d transfers", count);
    }
    request->base.ops = transport->ops;
    request->end = end;
    request->count = request->pending = count;
    for (int i = 0; i < count; i++) {
        request->ops[i] = (local_op_t){.transfer = transfers[i], .request = request};
    }

    pthread_mutex_lock(&world->mutex);
    if (world->aborted) {
        ra_status_t status = fail_aborted(world);
        pthread_mutex_unlock(&world->mutex);
        free(request);
        return status;
    }
    local_op_t *copies = enter_transfers(request);
    pthread_mutex_unlock(&world->mutex);

    if (copies != NULL) {
        for (local_op_t *op = copies; op != NULL; op = op->next) {
            copy_pair(op);
        }
        pthread_mutex_lock(&world->mutex);
        for (local_op_t *op = copies; op != NULL; op = op->next) {
            local_op_t *other = op->partner;
            op->partner = other->partner = NULL;
            complete(other);
            complete(op);
        }
        pthread_mutex_unlock(&world->mutex);
    }
    *request_p = &request->base;
    return RA_OK;
}

/* With the mutex held. */
static ra_status_t state_of(const local_request_t *request)
{
    if (request->status != RA_OK) {
        return request->status;
    }
    if (request->pending == 0) {
        return RA_OK;
    }
    return request->end->world->aborted ? RA_ERR_PEER : RA_INPROGRESS;
}

static ra_status_t report(const local_request_t *request, ra_status_t status)
{
    if (status == RA_ERR_PEER) {
        return fail_aborted(request->end->world);
    }
    if (status == RA_ERR_INVALID) {
        return ra_fail(status, "comm", "%s", request->failure);
    }
    if (status == RA_ERR_CANCELED) {
        ra_last_error_set("the transfers were canceled");
    }
    return status;
}

static ra_status_t local_test(ra_request_t *base)
{
    local_request_t *request = (local_request_t *)base;
    pthread_mutex_t *mutex = &request->end->world->mutex;
    pthread_mutex_lock(mutex);
    ra_status_t status = state_of(request);
    pthread_mutex_unlock(mutex);
    return report(request, status);
}

/* Sleep until something of this end changed. @return false when the deadline has passed. */
static bool sleep_until(local_end_t *end, int64_t deadline_ns)
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

static ra_status_t fail_timeout(const local_request_t *request, const local_op_t *op)
{
    return ra_fail(RA_ERR_TIMEOUT, "comm",
                   "deadline passed on rank %d: %d of %d transfers are open, the first is %s rank "
                   "%d, tag %u, %lld bytes",
                   request->end->base.rank, request->pending, request->count,
                   kind_names[op->transfer.kind], op->transfer.peer, op->transfer.tag,
                   (long long)op->transfer.bytes);
}

static ra_status_t local_wait(ra_request_t *base, int64_t deadline_ns)
{
    local_request_t *request = (local_request_t *)base;
    local_end_t *end = request->end;
    ra_status_t status;

    pthread_mutex_lock(&end->world->mutex);
    while ((status = state_of(request)) == RA_INPROGRESS) {
        if (!sleep_until(end, deadline_ns)) {
            const local_op_t *open = request->ops;
            while (open->state == OP_DONE) {
                open++;
            }
            status = fail_timeout(request, open);
            break;
        }
    }
    pthread_mutex_unlock(&end->world->mutex);
    return status == RA_ERR_TIMEOUT ? status : report(request, status);
}

/*
 * A matched transfer is no longer the caller's to stop: a copy is awaited, a lent block is awaited
 * until its borrower lets go (soon after an abort, since the borrower's waits fail). A rank that
 * borrows from itself would wait for itself, so that pair is cut at once.
 */
static void settle(local_request_t *request, local_op_t *op)
{
    if (op->state == OP_QUEUED) {
        withdraw(op);
        complete(op);
    } else if (op->state == OP_LENT && op->partner->request->end == request->end) {
        op->partner->partner = NULL;
        op->partner = NULL;
        complete(op);
    }
    while (op->state != OP_DONE) {
        sleep_until(request->end, RA_NO_DEADLINE);
    }
}

static ra_status_t local_cancel(ra_request_t *base)
{
    local_request_t *request = (local_request_t *)base;
    pthread_mutex_t *mutex = &request->end->world->mutex;

    pthread_mutex_lock(mutex);
    if (request->pending > 0) {
        for (int i = 0; i < request->count; i++) {
            settle(request, &request->ops[i]);
        }
        if (request->status == RA_OK) {
            request->status = RA_ERR_CANCELED;
        }
    }
    pthread_mutex_unlock(mutex);
    return RA_OK;
}

static const void *local_borrowed(const ra_request_t *base, int index)
{
    const local_request_t *request = (const local_request_t *)base;
    return request->ops[index].borrowed;
}

static void local_free(ra_request_t *base)
{
    local_request_t *request = (local_request_t *)base;
    pthread_mutex_t *mutex = &request->end->world->mutex;

    local_cancel(base);
    pthread_mutex_lock(mutex);
    for (int i = 0; i < request->count; i++) {
        local_op_t *op = &request->ops[i];
        if (op->transfer.kind == RA_BORROW && op->partner != NULL) {
            op->partner->partner = NULL;
            complete(op->partner);
        }
    }
    pthread_mutex_unlock(mutex);
    free(request);
}

static void local_abort(ra_transport_t *transport, ra_status_t cause)
{
    local_world_t *world = ((local_end_t *)transport)->world;
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

static void local_close(ra_transport_t *transport)
{
    if (transport == NULL) {
        return;
    }
    local_end_t *end = (local_end_t *)transport;
    local_world_t *world = end->world;
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

static local_end_t *end_create(const ra_transport_ops_t *ops, local_world_t *world, int rank,
                               int size)
{
    local_end_t *end = calloc(1, sizeof(*end));
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
    for (int i = 0; i < MAILBOX_BUCKETS; i++) {
        end->mailbox[i].offers.tail = &end->mailbox[i].offers.head;
        end->mailbox[i].wants.tail = &end->mailbox[i].wants.head;
    }
    return end;
}

static ra_status_t open_world(const ra_transport_ops_t *ops, int size, ra_transport_t **ends_p)
{
    local_world_t *world = calloc(1, sizeof(*world));
    local_end_t **ends = calloc((size_t)size, sizeof(*ends));
    if (world == NULL || ends == NULL) {
        goto err_free;
    }
    pthread_mutex_init(&world->mutex, NULL);
    world->ends = ends;
    world->open_ends = size;
    for (int r = 0; r < size; r++) {
        ends[r] = end_create(ops, world, r, size);
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

static ra_status_t local_open(int size, ra_transport_t **ends_p)
{
    return open_world(&ra_transport_local, size, ends_p);
}

static ra_status_t local_copy_open(int size, ra_transport_t **ends_p)
{
    return open_world(&ra_transport_local_copy, size, ends_p);
}

#define LOCAL_SLOTS                                                                                \
    .close = local_close, .post = local_post, .test = local_test, .wait = local_wait,              \
    .cancel = local_cancel, .borrowed = local_borrowed, .free = local_free, .abort = local_abort

const ra_transport_ops_t ra_transport_local = {
    .name = "local",
    .doc = "ranks are threads of this process; blocks are handed over without copying",
    .lends = true,
    .patience_s = A_DAY_S,
    .open = local_open,
    LOCAL_SLOTS};

const ra_transport_ops_t ra_transport_local_copy = {
    .name = "local-copy",
    .doc = "as local, but every block is copied, as transports between processes must",
    .lends = false,
    .patience_s = A_DAY_S,
    .open = local_copy_open,
    LOCAL_SLOTS};
