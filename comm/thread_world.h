/**
 * @file  comm/thread_world.h
 * @brief Worlds whose ranks are threads of one process: matching, waiting, cancelling, aborting.
 *        Internal to comm/. What differs between the transports built on it is a ra_thread_row_t.
 *
 * An offer (send, lend) and a want (receive, borrow) meet in the mailbox of the destination rank,
 * matched per (source, tag) in post order. Whoever posts the second of a pair completes it: moves
 * the bytes, or hands the lender's pointer to the borrower.
 *
 * Concurrency  one mutex per world guards everything but the bytes themselves; they are moved
 * outside it, in state RA_OP_MOVING, which only the moving thread leaves. Each rank sleeps on its
 * own condition; only completions of its own transfers and abort() signal it.
 */
#ifndef RA_COMM_THREAD_WORLD_H
#define RA_COMM_THREAD_WORLD_H

#include "comm/transport.h"
#include <pthread.h>

enum { RA_MAILBOX_BUCKETS = 64, RA_THREAD_FAILURE_BYTES = 256 };

typedef enum ra_op_state {
    RA_OP_HELD,   /**< its group waits for its turn */
    RA_OP_QUEUED, /**< in a mailbox, no partner yet */
    RA_OP_MOVING, /**< the thread that completed the pair is moving its bytes */
    RA_OP_LENT,   /**< a lend whose bytes the borrower reads */
    RA_OP_DONE
} ra_op_state_t;

typedef struct ra_thread_request ra_thread_request_t;
typedef struct ra_thread_end ra_thread_end_t;
typedef struct ra_thread_world ra_thread_world_t;

/** One side of a transfer. */
typedef struct ra_thread_op {
    ra_transfer_t transfer;
    ra_thread_request_t *request;
    ra_op_state_t state;
    bool on_device;               /**< set by the mover: data is device memory */
    struct ra_thread_op *next;    /**< in a mailbox queue, then in a list of pairs to move */
    struct ra_thread_op *partner; /**< while moving; lend and borrow: until the borrow is freed */
    const void *borrowed;
    void *moved; /**< the mover's: what later work of this side must wait for */
} ra_thread_op_t;

/** Device memory of a row; all slots are required. Host memory is moved by thread_world.c. */
typedef struct ra_thread_mover {
    /** @a end follows @a compute, a stream of another device than the CPU. */
    ra_status_t (*attach)(ra_thread_end_t *end, ra_stream_t *compute);
    /** At close of an attached end. */
    void (*detach)(ra_thread_end_t *end);
    /** Before a group of an attached end is posted: sets on_device of its ops, notes where its
     * compute stream is. Undone by settle(). */
    ra_status_t (*prepare)(ra_thread_request_t *request);
    /** Queue the pairs (linked by next, either side) that are on_device, gates included. */
    ra_status_t (*move)(ra_thread_op_t *pairs);
    /** Once for each prepared group, by its poster, when nothing of it can be moved any more: work
     * queued later on its compute stream runs after what was moved. */
    ra_status_t (*settle)(ra_thread_request_t *request);
    /** ra_comm_measure_waits() and ra_comm_waited() of an attached end. */
    ra_status_t (*measure_waits)(ra_thread_end_t *end, bool on);
    ra_status_t (*waited)(ra_thread_end_t *end, double *seconds_p);
    /** Open the gate of a want that will not be moved. */
    void (*open_gate)(const ra_thread_op_t *want);
} ra_thread_mover_t;

/** What a transport of threads is. */
typedef struct ra_thread_row {
    const ra_transport_ops_t *ops;
    const ra_thread_mover_t *mover; /**< NULL: host memory only */
} ra_thread_row_t;

typedef struct ra_op_queue {
    ra_thread_op_t *head, **tail;
} ra_op_queue_t;

typedef struct ra_mailbox {
    struct {
        ra_op_queue_t offers, wants;
    } bucket[RA_MAILBOX_BUCKETS];
} ra_mailbox_t;

struct ra_thread_end {
    ra_transport_t base;
    ra_thread_world_t *world;
    pthread_cond_t changed;
    void *device; /**< the mover's; NULL until attached */
    ra_mailbox_t mailbox;
    ra_thread_request_t *started, *held; /**< in turn: the open group; those after it */
    bool measures;     /**< ra_comm_measure_waits() of an end that is not attached */
    int64_t waited_ns; /**< in ra_comm_wait(), since then */
};

struct ra_thread_world {
    const ra_thread_row_t *row;
    pthread_mutex_t mutex;
    int size, open_ends;
    bool aborted;
    ra_status_t cause;
    ra_thread_end_t **ends;
};

struct ra_thread_request {
    ra_request_t base;
    ra_thread_end_t *end;
    int count, pending;
    bool in_turn;       /**< starts when those before it are done; where in_order, all of them */
    ra_status_t status; /**< RA_OK until a transfer failed or the group was cancelled */
    char failure[RA_THREAD_FAILURE_BYTES];
    bool prepared; /**< by the mover, and not settled yet */
    void *start;   /**< the mover's: where the compute stream was when the group was posted */
    ra_thread_request_t *next_held;
    ra_thread_op_t ops[];
};

/* mailbox.c: the world's mutex is held. */

void ra_mailbox_init(ra_mailbox_t *mailbox);
/** Oldest waiting counterpart of @a op, taken out of its mailbox, or NULL. */
ra_thread_op_t *ra_mailbox_take_partner(const ra_thread_op_t *op);
void ra_mailbox_put(ra_thread_op_t *op);
void ra_mailbox_withdraw(ra_thread_op_t *op);

static inline bool ra_op_is_offer(const ra_thread_op_t *op)
{
    return op->transfer.kind == RA_SEND || op->transfer.kind == RA_LEND;
}

/* thread_world.c: slots of ra_transport_ops_t, and open() for a row. */

ra_status_t ra_thread_world_open(const ra_thread_row_t *row, int size, ra_transport_t **ends_p);
ra_status_t ra_thread_attach(ra_transport_t *transport, ra_stream_t *compute);
ra_status_t ra_thread_measure_waits(ra_transport_t *transport, bool on);
ra_status_t ra_thread_waited(ra_transport_t *transport, double *seconds_p);
ra_status_t ra_thread_post(ra_transport_t *transport, const ra_transfer_t *transfers, int count,
                           bool in_turn, ra_request_t **request_p);
ra_status_t ra_thread_test(ra_request_t *base);
ra_status_t ra_thread_wait(ra_request_t *base, int64_t deadline_ns);
ra_status_t ra_thread_cancel(ra_request_t *base);
const void *ra_thread_borrowed(const ra_request_t *base, int index);
void ra_thread_free(ra_request_t *base);
void ra_thread_abort(ra_transport_t *transport, ra_status_t cause);
bool ra_thread_aborted(ra_transport_t *transport);
void ra_thread_close(ra_transport_t *transport);

/** A thread cannot vanish, and a block of a million keys takes its time. */
#define RA_THREAD_PATIENCE_S 86400
#define RA_THREAD_SLOTS                                                                            \
    .patience_s = RA_THREAD_PATIENCE_S, .attach = ra_thread_attach,                                \
    .measure_waits = ra_thread_measure_waits, .waited = ra_thread_waited,                          \
    .close = ra_thread_close, .post = ra_thread_post, .test = ra_thread_test,                      \
    .wait = ra_thread_wait, .cancel = ra_thread_cancel, .borrowed = ra_thread_borrowed,            \
    .free = ra_thread_free, .abort = ra_thread_abort, .aborted = ra_thread_aborted

#endif
