/**
 * @file  comm/comm.h
 * @brief Ranks and bytes: groups of sends and receives between ranks, and collectives on top.
 *
 * One verb posts a group of transfers that may all run at once (a ring step is one send and one
 * receive); it never blocks. Requests are tested, waited on with a deadline, or cancelled. A rank
 * that fails calls ra_comm_abort(): every wait of every surviving rank then returns RA_ERR_PEER;
 * nobody hangs.
 *
 * A communicator handle belongs to one rank and is used by that rank's thread; only ra_comm_abort()
 * may be called from any thread. Posted memory belongs to the transport until its request
 * completes. Knows nothing of attention. Transports are rows of one table (transport_table.c).
 */
#ifndef RA_COMM_COMM_H
#define RA_COMM_COMM_H

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
} ra_transfer_t;

#define RA_TAG_RESERVED 0xffff0000u /**< tags from here on belong to the collectives */

int ra_comm_rank(const ra_comm_t *comm);
int ra_comm_size(const ra_comm_t *comm);
const char *ra_comm_transport(const ra_comm_t *comm);
/** True when RA_BORROW needs no landing buffer. */
bool ra_comm_lends(const ra_comm_t *comm);
/** Seconds any single wait of the plan layers may take; set before use. The default is the
 * transport's: a day where ranks are threads, which cannot vanish unnoticed. */
void ra_comm_set_timeout(ra_comm_t *comm, double seconds);
/** Deadline from now for one wait, from ra_comm_set_timeout(). */
int64_t ra_comm_deadline(const ra_comm_t *comm);

/**
 * Post @a count transfers as one group. Never blocks, never fails part way: on error nothing is
 * posted.
 * @retval RA_ERR_INVALID  bad peer, tag or size; RA_ERR_PEER when the communicator is aborted.
 */
ra_status_t ra_comm_post(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
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
 * completed. */
ra_status_t ra_comm_cancel(ra_request_t *request);
/** Bytes of borrow number @a index of the group, after completion. */
const void *ra_request_borrowed(const ra_request_t *request, int index);
/** Release; completes the lender's side. Accepts NULL. Cancels first when still in progress. */
void ra_request_free(ra_request_t *request);

/** Wake every waiter of every rank with RA_ERR_PEER; keeps the first cause. Any thread, any time.
 */
void ra_comm_abort(ra_comm_t *comm, ra_status_t cause);

/* Collectives: every rank calls in the same order. All wait at most ra_comm_deadline(). */

ra_status_t ra_comm_barrier(ra_comm_t *comm);
/** Every rank gives @a bytes; all = rank 0's, rank 1's, ... */
ra_status_t ra_comm_allgather(ra_comm_t *comm, const void *mine, int64_t bytes, void *all);
/** Blocks of different sizes: bytes[r] from rank r, landing at offset[r] of all. @a mine may be its
 * place in @a all. */
ra_status_t ra_comm_allgatherv(ra_comm_t *comm, const void *mine, void *all, const int64_t *bytes,
                               const int64_t *offset);
ra_status_t ra_comm_broadcast(ra_comm_t *comm, int root, void *data, int64_t bytes);
/** send_bytes[p] from send + send_offset[p] go to rank p; recv_* likewise (all known to the
 * caller). */
ra_status_t ra_comm_alltoallv(ra_comm_t *comm, const void *send, const int64_t *send_bytes,
                              const int64_t *send_offset, void *recv, const int64_t *recv_bytes,
                              const int64_t *recv_offset);

#endif
