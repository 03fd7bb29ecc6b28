/**
 * @file  comm/comm.h
 * @brief Ranks and bytes: groups of sends and receives between ranks, and collectives on top.
 *
 * One verb posts a group of transfers that may all run at once (a ring step is one send and one
 * receive); it never blocks. Requests are tested, waited on with a deadline, or cancelled. A rank
 * that fails calls ra_comm_abort(): every wait of every surviving rank then returns RA_ERR_PEER;
 * nobody hangs.
 *
 * Device memory. ra_comm_attach() ties a communicator to a compute stream; from then on transfers
 * may name memory of that stream's device beside host memory, and those that do are stream-ordered:
 *   - a transfer starts after everything queued on the compute stream when it was posted;
 *   - it runs beside the compute stream, on queues of the communicator;
 *   - once ra_comm_wait() or ra_comm_test() has said RA_OK, work queued later on the compute stream
 *     runs after the transfer, of a send as of a receive. The host has waited for the other side to
 *     post at most, never for the bytes.
 * Transfers of host memory complete as they always do: the bytes are there when the wait returns.
 * Both sides of a transfer name the same kind of memory.
 *
 * Transports that match in order. On some (ra_comm_in_order()) a group starts only when the groups
 * posted before it are done, and tags are not sent. Callers that want to run on all of them post
 * transfers that need each other on both sides (a ring step) as one group, post the transfers of a
 * pair in the same order on both sides, and send to themselves within one group only.
 *
 * Kernels that hold all multiprocessors. What such a kernel waits for at a gate, and whatever its
 * peers wait for, must have been posted before it is launched: a transfer posted later starts after
 * it. Where ra_comm_uses_kernels() the transfers need multiprocessors themselves, so some must be
 * left free as well. Copy engines need none between GPUs; between ranks that share one a copy may.
 *
 * A communicator handle belongs to one rank and is used by that rank's thread; only ra_comm_abort()
 * may be called from any thread. Posted memory belongs to the transport until its request
 * completes. Knows nothing of attention. Transports are rows of one table (transport_table.c).
 */
#ifndef RA_COMM_COMM_H
#define RA_COMM_COMM_H

#include "base/device.h"
#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_comm ra_comm_t;
typedef struct ra_request ra_request_t;

typedef enum ra_transfer_kind {
    RA_SEND,
    RA_RECV,
    /**
     * Offer bytes for reading in place. Matches a RA_BORROW of the peer. The request completes when
     * the borrower has released it: until then the bytes may not change.
     */
    RA_LEND,
    /**
     * Receive bytes without copying where the transport can: after completion ra_request_borrowed()
     * points at the lender's bytes (or at a copy in @a data when the transport cannot lend). The
     * bytes stay valid until ra_request_free() of this request.
     */
    RA_BORROW
} ra_transfer_kind_t;

/** One directed transfer. Matched per (peer, tag) in post order; both sides agree on bytes. */
typedef struct ra_transfer {
    ra_transfer_kind_t kind;
    int peer;     /**< rank in this communicator; may be the caller itself */
    uint32_t tag; /**< below RA_TAG_RESERVED for callers */
    void *data; /**< RA_LEND/RA_SEND: read only. RA_BORROW: landing buffer, or NULL if the transport
                   lends */
    int64_t bytes; /**< 0 is legal and still synchronises the pair */
    /**
     * RA_RECV/RA_BORROW: optional, in the same kind of memory as data; set to gate_value after the
     * bytes have arrived, in stream order, so that a running kernel can wait for them. Set without
     * the bytes when the transfer is cancelled or fails, so that no kernel waits forever. Gates of
     * one group may open together: pieces to be used one by one are groups of their own.
     */
    uint32_t *gate;
    uint32_t gate_value;
} ra_transfer_t;

#define RA_TAG_RESERVED 0xffff0000u /**< tags from here on belong to the collectives */

int ra_comm_rank(const ra_comm_t *comm);
int ra_comm_size(const ra_comm_t *comm);
const char *ra_comm_transport(const ra_comm_t *comm);
/** True when RA_BORROW needs no landing buffer. */
bool ra_comm_lends(const ra_comm_t *comm);
/** True when groups run one after another and match by order alone (see above). */
bool ra_comm_in_order(const ra_comm_t *comm);
/** True when transfers of device memory need multiprocessors (see above). */
bool ra_comm_uses_kernels(const ra_comm_t *comm);
/**
 * Tie @a comm to @a compute, which it borrows from now on; once, before device memory is posted.
 * Every rank calls (some transports connect here). A stream of the CPU changes nothing.
 * @retval RA_ERR_USAGE  the transport does not reach memory of that device, or needs a device a
 *                       rank and there are fewer.
 */
ra_status_t ra_comm_attach(ra_comm_t *comm, ra_stream_t *compute);
/**
 * Measure, or not, how long this rank's computing stands still for transfers, from 0. With a stream
 * attached: the stream, for device memory; costs two events a wait. Else: the thread, in
 * ra_comm_wait() and collectives.
 */
ra_status_t ra_comm_measure_waits(ra_comm_t *comm, bool on);
/** Seconds measured so far; an attached stream has been synchronised. */
ra_status_t ra_comm_waited(ra_comm_t *comm, double *seconds_p);
/** Seconds any single wait of the plan layers may take; set before use. The default is the
 * transport's: a day where ranks are threads, which cannot vanish unnoticed. */
void ra_comm_set_timeout(ra_comm_t *comm, double seconds);
/** Deadline from now for one wait, from ra_comm_set_timeout(). */
int64_t ra_comm_deadline(const ra_comm_t *comm);

/**
 * Post @a count transfers as one group. Never blocks, never fails part way: on error nothing is
 * posted.
 * @retval RA_ERR_INVALID  bad peer, tag, size or memory; RA_ERR_PEER when the communicator is
 * aborted.
 */
ra_status_t ra_comm_post(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                         ra_request_t **request_p);
/**
 * The same for a group that starts only when the groups this rank has posted in turn before are
 * done: large transfers arrive one after another, each at the full rate, not beside each other at a
 * share of it. Groups of other ranks and ra_comm_post() do not wait for it. Where all groups are in
 * order it is ra_comm_post().
 */
ra_status_t ra_comm_post_in_turn(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                                 ra_request_t **request_p);
/** RA_OK, RA_INPROGRESS or an error. Never blocks. */
ra_status_t ra_comm_test(ra_request_t *request);
/**
 * Sleep until the whole group is done. @param deadline_ns ra_clock_ns() time.
 * @retval RA_ERR_TIMEOUT deadline passed (the request stays posted); RA_ERR_PEER aborted.
 */
ra_status_t ra_comm_wait(ra_request_t *request, int64_t deadline_ns);
/** Withdraw a group that has not completed; its memory is the caller's again (a lent block that is
 * being read is awaited first, so after an error abort before cancelling). RA_OK if it had
 * completed. A group of device memory on a transport that matches in order cannot be withdrawn
 * alone: the communicator is aborted. */
ra_status_t ra_comm_cancel(ra_request_t *request);
/** Bytes of borrow number @a index of the group, after completion. */
const void *ra_request_borrowed(const ra_request_t *request, int index);
/** Release; completes the lender's side. Accepts NULL. Cancels first when still in progress. */
void ra_request_free(ra_request_t *request);

/** Wake every waiter of every rank with RA_ERR_PEER; keeps the first cause. Any thread, any time.
 */
void ra_comm_abort(ra_comm_t *comm, ra_status_t cause);

/* Collectives: every rank calls in the same order. All wait at most ra_comm_deadline(). Device
 * memory is moved in stream order, as by posts that have been waited on. All functions:
 * RA_ERR_INVALID  ranks disagree on a size, where the transport compares (nccl does not);
 * RA_ERR_PEER  a rank failed; RA_ERR_TIMEOUT; RA_ERR_NOMEM. What has been moved is then unknown. */

/** Nobody leaves before everybody came. Of host threads: says nothing about compute streams. */
ra_status_t ra_comm_barrier(ra_comm_t *comm);
/** Every rank gives @a bytes; all = rank 0's, rank 1's, ... */
ra_status_t ra_comm_allgather(ra_comm_t *comm, const void *mine, int64_t bytes, void *all);
/** Blocks of different sizes: bytes[r] from rank r, landing at offset[r] of all. @a mine may be its
 * place in @a all. */
ra_status_t ra_comm_allgatherv(ra_comm_t *comm, const void *mine, void *all, const int64_t *bytes,
                               const int64_t *offset);
/** The bytes of rank @a root to all. */
ra_status_t ra_comm_broadcast(ra_comm_t *comm, int root, void *data, int64_t bytes);
/** send_bytes[p] from send + send_offset[p] go to rank p; recv_* likewise (all known to the
 * caller). */
ra_status_t ra_comm_alltoallv(ra_comm_t *comm, const void *send, const int64_t *send_bytes,
                              const int64_t *send_offset, void *recv, const int64_t *recv_bytes,
                              const int64_t *recv_offset);

#endif
