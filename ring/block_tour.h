/**
 * @file  ring/block_tour.h
 * @brief One rank's walk over the blocks of other ranks, the next in flight while one is used.
 *        Internal to ring/. Knows bytes, not attention.
 *
 * Two routes. RING: block i is that of rank r - i; it comes from the left neighbour, which held it
 * one step before, and is lent on to the right one. DIRECT: blocks of the listed owners in the
 * listed order, each lent by its owner to everybody who wants it.
 *
 * On transports that lend, borrowed blocks are lent on without a copy and let go in reverse at the
 * end. On others two landing buffers alternate: block i + 2 lands where block i was, once block i
 * has been passed on; a step is one group, so that transports which match in order can run it.
 *
 * Blocks in device memory: the communicator is attached to the stream that uses them. A block may
 * be used by work queued on that stream until the next call of ra_block_tour_next() or _end().
 */
#ifndef RA_RING_BLOCK_TOUR_H
#define RA_RING_BLOCK_TOUR_H

#include "base/device.h"
#include "comm/comm.h"
#include "ring/ring_stats.h"

typedef struct ra_block_tour ra_block_tour_t;

/**
 * Walk @a count blocks including this rank's own; the same count on every rank.
 * @param tag          of all its transfers (ring/ring_tags.h).
 * @param block_bytes  [ranks] of each rank's block; copied.
 */
ra_status_t ra_block_tour_create_ring(ra_comm_t *comm, ra_device_t *device, uint32_t tag,
                                      const int64_t *block_bytes, int count,
                                      ra_block_tour_t **tour_p);
/** A rank that is visited or visits, and when: steps ascend, and both sides of a visit name the
 * same step. What happens at a step waits for nothing that happens at a later one. */
typedef struct ra_block_stop {
    int rank, step;
} ra_block_stop_t;

/**
 * @param owners     ranks whose blocks this rank visits, at most one a step; may include itself.
 * @param borrowers  other ranks that visit this rank's block.
 */
ra_status_t ra_block_tour_create_direct(ra_comm_t *comm, ra_device_t *device, uint32_t tag,
                                        const int64_t *block_bytes, const ra_block_stop_t *owners,
                                        int count, const ra_block_stop_t *borrowers,
                                        int borrower_count, ra_block_tour_t **tour_p);
/** Accepts NULL. */
void ra_block_tour_destroy(ra_block_tour_t *tour);

/** Start a walk. @param own  this rank's block, unchanged until ra_block_tour_end(). */
ra_status_t ra_block_tour_begin(ra_block_tour_t *tour, const void *own);
/** Wait for the next block, start fetching the one after. *owner_p = -1 at the end. */
ra_status_t ra_block_tour_next(ra_block_tour_t *tour, int *owner_p, const void **block_p);
/** Let every block go and wait until nobody reads this rank's own. */
ra_status_t ra_block_tour_end(ra_block_tour_t *tour);
/** Give up after an error: the communicator is aborted, nothing stays posted. */
void ra_block_tour_cancel(ra_block_tour_t *tour, ra_status_t cause);
/** Adds waits and bytes of all walks so far to @a stats. */
void ra_block_tour_add_stats(const ra_block_tour_t *tour, ra_ring_stats_t *stats);

#endif
