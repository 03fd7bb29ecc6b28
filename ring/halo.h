/**
 * @file  ring/halo.h
 * @brief The rows just before each owned run, fetched from their owners point to point.
 *
 * Layers that see only the last w tokens (sliding windows, short convolutions) need, for a run
 * [start, start + count) of a document, rows of positions
 *
 *     [max(0, down(start - before, align)), start)       down(x, a): largest multiple of a <= x
 *
 * whoever owns them, cached prefix included. Any layout; runs may be shorter than the halo.
 * Halo rows of a rank are packed run after run in the order of its runs, positions ascending.
 */
#ifndef RA_RING_HALO_H
#define RA_RING_HALO_H

#include "base/device.h"
#include "comm/comm.h"
#include "ring/layout.h"
#include "ring/ring_stats.h"

typedef struct ra_halo ra_halo_t;

/** Halo of run i of this rank (order of ra_layout_runs()). */
typedef struct ra_halo_run {
    int64_t start; /**< position of its first row */
    int64_t count; /**< 0 at the start of a document */
    int64_t row;   /**< first row in the packed halo rows */
} ra_halo_run_t;

/** Rows are dense; a payload may have several planes (keys and values) of the same row size. */
typedef struct ra_halo_io {
    int64_t row_bytes;
    int planes;
    const void *rows; /**< [planes][rows of this rank] */
    int64_t plane_bytes;
    const void *prefix_rows; /**< [planes][prefix rows of this rank], NULL without a prefix */
    int64_t prefix_plane_bytes;
    void *out; /**< [planes][ra_halo_rows()] */
    int64_t out_plane_bytes;
} ra_halo_io_t;

/**
 * @param stream          of the device that holds the rows; borrowed. On a GPU the communicator is
 *                        attached to it.
 * @param layout, prefix  borrowed; prefix as in ring/softmax_ring.h, or NULL: halos then stop at
 *                        the first laid out position of each document.
 * @param before  rows wanted before each run (window - 1), >= 0.
 * @param align   the halo starts at a multiple of this position, >= 1.
 * @param max_planes  most planes a call will fetch.
 * @retval RA_ERR_INVALID  a number out of range, or layouts that do not fit; RA_ERR_NOMEM.
 */
ra_status_t ra_halo_create(ra_comm_t *comm, ra_stream_t *stream, const ra_layout_t *layout,
                           const ra_layout_t *prefix, int64_t before, int64_t align, int max_planes,
                           ra_halo_t **halo_p);
/** Accepts NULL. Cancels a fetch that was started and not finished. */
void ra_halo_destroy(ra_halo_t *halo);

int64_t ra_halo_rows(const ra_halo_t *halo);
/** [runs of this rank] */
const ra_halo_run_t *ra_halo_runs(const ra_halo_t *halo);

/** Collective. Posts all transfers and returns; @a io's memory stays in use until finish.
 * @retval RA_ERR_INVALID  more planes than the plan has, or prefix rows are missing.
 * @retval RA_ERR_PEER     another rank failed. */
ra_status_t ra_halo_start(ra_halo_t *halo, const ra_halo_io_t *io);
/** Wait until the rows are there and this rank's own rows are no longer read; in stream order on a
 * GPU. @retval RA_ERR_PEER  another rank failed; RA_ERR_TIMEOUT  rows did not come in time. */
ra_status_t ra_halo_finish(ra_halo_t *halo);
ra_ring_stats_t ra_halo_stats(const ra_halo_t *halo);

#endif
