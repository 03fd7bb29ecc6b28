/**
 * @file  ring/state_scan.h
 * @brief Linear attention over documents sharded by a layout: each run is an affine map of the
 *        state, all runs are summarised at once, one exchange, no chain of ranks.
 *
 *     1. every run with a successor:   (G, B) from its own tokens    S_out = e^G S_in + B
 *     2. all-gather of (G, B) of the sharded documents
 *     3. incoming state of each own run: fold of its predecessors, from the initial state
 *     4. forward of all own runs at once
 *
 * Documents that one rank owns whole are one forward pass and exchange nothing.
 *
 * On a GPU the communicator is attached to the plan's stream and a call only queues work.
 *
 * Numerics  fp32 sums and states (GPUs: linear_cuda.h). A row's bits depend on its document, the
 * rank count and the layout kind. With `reproducible` (contiguous only) documents are folded tile
 * by tile, S <- e^G S + B of one tile, and the folded state goes from rank to rank, so the bits do
 * not depend on the rank count or on where (at which tile) a document was cut for continuation.
 * That keeps one state a tile.
 *
 * Source    arXiv 2401.04658 (lightning attention-2), 2404.02882 (LASP), 2502.07563 (LASP-2).
 */
#ifndef RA_RING_STATE_SCAN_H
#define RA_RING_STATE_SCAN_H

#include "base/device.h"
#include "base/dtype.h"
#include "comm/comm.h"
#include "ring/layout.h"
#include "ring/ring_stats.h"

typedef struct ra_state_scan ra_state_scan_t;

typedef struct ra_state_scan_params {
    const ra_layout_t *layout; /**< borrowed, outlives the plan */
    int32_t heads, key_dim, value_dim;
    float scale;
    bool decay_per_token; /**< log_decay is [R, H] instead of [H] */
    bool reproducible;
    /** Final states are those after the last whole tile of each document, not after its last
     * token: what a cache that is continued later stores. */
    bool final_at_tile;
    const char *kernel; /**< row of the linear kernel table; NULL means "auto" */
    ra_dtype_t dtype;   /**< of q, k, v and o: F32, on a GPU also BF16 */
} ra_state_scan_params_t;

/** One call's tensors on the stream's device; R = layout->rows[rank]; strides in elements between
 * rows. States are fp32; a constant log_decay is host memory. */
typedef struct ra_state_scan_io {
    const void *q, *k; /**< [R, H, Dk] */
    const void *v;     /**< [R, H, Dv] */
    int64_t q_stride, k_stride, v_stride;
    const float *log_decay;   /**< [H], or [R, H] with decay_per_token; <= 0 */
    int64_t log_decay_stride; /**< with decay_per_token */
    void *o;                  /**< [R, H, Dv]; may be exactly v */
    int64_t o_stride;
    /** Optional host array [documents]: state [H, Dk, Dv] on the device before documents[d].first,
     * entry NULL = zero. Every rank gives the same. */
    const float *const *initial;
    /** Optional host array [documents]: where on the device the final state [H, Dk, Dv] goes, entry
     * NULL = not wanted. Written on the rank of ra_layout_last_run(d) only; other ranks' entries
     * are ignored. Which entries are wanted on that rank is its own affair. Documents with count 0:
     * nobody. Overlaps no initial state. */
    float *const *final_state;
} ra_state_scan_io_t;

/**
 * Make a plan for one layer shape and one layout; any number of layers may use it in turn.
 * @param comm, stream  borrowed, outlive the plan.
 * @retval RA_ERR_INVALID      a dim below 1, a state of 2^31 values or more, or a layout of another
 *                             number of ranks; RA_ERR_NOMEM.
 * @retval RA_ERR_UNSUPPORTED  no kernel, reproducible with zigzag on more than one rank, or
 *                             decays per token of runs to be folded on a GPU.
 */
ra_status_t ra_state_scan_create(ra_comm_t *comm, ra_stream_t *stream,
                                 const ra_state_scan_params_t *params, ra_state_scan_t **plan_p);
/** Accepts NULL. */
void ra_state_scan_destroy(ra_state_scan_t *plan);

/**
 * Collective: every rank calls. A rank that fails aborts the communicator. Other errors are those
 * of ra_linear_forward().
 * @retval RA_ERR_PEER  another rank failed; RA_ERR_TIMEOUT  a state did not come in time.
 */
ra_status_t ra_state_scan_run(ra_state_scan_t *plan, const ra_state_scan_io_t *io);
ra_ring_stats_t ra_state_scan_stats(const ra_state_scan_t *plan);

#endif
