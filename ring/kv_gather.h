/**
 * @file  ring/kv_gather.h
 * @brief All keys and values that a rank needs, brought into one buffer straight from their owners
 *        while a kernel is at work. Internal to ring/. Knows rows and bytes, not attention.
 *
 * The buffer is a row of sections: this rank's own rows (gated only), then those of rank r - 1,
 * r - 2, ... A section holds the runs of its owner that some run of this rank sees, in the owner's
 * order, and ends at a multiple of gate_keys rows. What lies between sections is zero.
 *
 *     gated    pieces of gate_keys rows are groups of their own, the last rows of a section first,
 *              and each opens a gate of the device: one kernel may walk all rows as they come. They
 *              come in turn, the order in which such a kernel wants them: beside each other all
 *              sections would be late. For transports of copy engines, a GPU a rank.
 *     else     one group brings everything; its rows may be used once ra_kv_gather_finish() has
 *              returned. Meanwhile this rank's own rows are to be worked on.
 */
#ifndef RA_RING_KV_GATHER_H
#define RA_RING_KV_GATHER_H

#include "base/device.h"
#include "comm/comm.h"
#include "ring/layout.h"
#include "ring/ring_stats.h"

/** A run of the layout in the buffer; section 0 is this rank's own. */
typedef struct ra_gathered_run {
    int64_t document, start, count, row;
    int section;
} ra_gathered_run_t;

typedef struct ra_kv_gather {
    ra_comm_t *comm;           /**< borrowed */
    ra_stream_t *stream;       /**< borrowed */
    const ra_layout_t *layout; /**< borrowed */
    int rank;
    bool causal, gated;
    int64_t row_bytes;
    void *kv;     /**< [2][rows][row_bytes]: keys, then values */
    int64_t rows; /**< 0: this rank needs nothing of others (and its own rows are not here) */
    ra_gathered_run_t *runs;
    int64_t run_count;
    uint32_t *gates; /**< [rows / gate_keys] on the device */
    int64_t gate_keys;
    uint32_t epoch; /**< of the walk that was started last */
    struct ra_gather_move *moves;
    int64_t receive_count, move_count;
    ra_transfer_t *transfers;
    ra_request_t **requests;
    int request_count;
    ra_ring_stats_t stats; /**< waits and bytes */
} ra_kv_gather_t;

/**
 * Collective. Whether gates are used, and whether every rank found the memory, is agreed on.
 * @param gates_wanted  the kernel waits at gates.
 * @param piece_bytes   keys of a piece at least, where there are so many; 0: chosen.
 * @param gather_p      NULL where some rank has no room: nobody gathers then.
 */
ra_status_t ra_kv_gather_create(ra_comm_t *comm, ra_stream_t *stream, const ra_layout_t *layout,
                                bool causal, int64_t row_bytes, bool gates_wanted,
                                int64_t piece_bytes, ra_kv_gather_t **gather_p);
/** Accepts NULL. */
void ra_kv_gather_destroy(ra_kv_gather_t *gather);

/** Collective. Post everything. @param kv  [2][R][row_bytes] of this rank, unchanged until finish;
 * where gated also gather->kv itself, whose first R rows of both planes then hold the rank's own
 * and are not copied. On error nothing stays posted and the communicator is aborted. */
ra_status_t ra_kv_gather_start(ra_kv_gather_t *gather, const void *kv);
/** Work queued from now on runs after all transfers. On error as ra_kv_gather_cancel(). */
ra_status_t ra_kv_gather_finish(ra_kv_gather_t *gather);
/** Give up after an error: the communicator is aborted, gates are open, nothing stays posted. */
void ra_kv_gather_cancel(ra_kv_gather_t *gather, ra_status_t cause);

#endif
