/**
 * @file  ring/softmax_ring.h
 * @brief Exact softmax attention over documents sharded by a layout: key/value blocks go round the
 *        ring of ranks while each rank folds the block it holds into its own rows.
 *
 *     step s: fold block of rank (r - s) mod N   |   lend it to rank r+1, borrow the next from r-1
 *
 * Row (document d, position p) sees keys of d at positions [lo, hi): hi = p + 1 when causal, else
 * the end of d; lo = p - window + 1 when a window is set, else 0. Keys of a cached prefix count.
 * The state (m, l, O) of attention/softmax_block.h is carried over all blocks and normalised once.
 * The cached prefix is folded in a second phase, lent by its owners directly. With a window only
 * the window - 1 tokens before each run are fetched (ring/halo.h) and nothing goes round.
 * A step beyond the last one that any rank needs is not taken: whole documents exchange nothing.
 *
 * Ranks that share memory (ra_comm_lends) exchange pointers; others copy into two landing buffers.
 *
 * On a GPU the communicator is attached to the plan's stream, and a call only queues work. What
 * every fold of the plan needs is on the device once the plan is made. One rank without a prefix
 * is one kernel that reads io->kv in place. Several ranks without window, prefix and `reproducible`
 * gather instead of going round (ring/kv_gather.h), as long as every rank has room for it: where
 * copy engines bring the keys, one kernel walks all keys as they arrive; elsewhere one kernel folds
 * the rank's own keys while the others come, and a second one those. Long documents are folded
 * some keys a launch with the state in memory (ring/softmax_stages.h).
 *
 * Numerics  fp32 sums and states (GPUs: softmax_cuda.h). A row's bits depend on its own document,
 * the rank count and the layout kind, and never on other documents. With `reproducible` (contiguous
 * and causal only) every row folds tiles of keys one by one from its own tile downward, so they do
 * not depend on the rank count or on how much of the document is a cached prefix either.
 *
 * Source    Ring Attention, arXiv 2310.01889; zigzag as in arXiv 2411.01783.
 */
#ifndef RA_RING_SOFTMAX_RING_H
#define RA_RING_SOFTMAX_RING_H

#include "base/device.h"
#include "base/dtype.h"
#include "comm/comm.h"
#include "ring/layout.h"
#include "ring/ring_stats.h"

typedef struct ra_softmax_ring ra_softmax_ring_t;

typedef struct ra_softmax_ring_params {
    const ra_layout_t *layout; /**< borrowed, outlives the plan */
    /** Who holds cached keys: documents {0, first}, same tile and ranks
     * (ra_layout_create_prefix()); borrowed. NULL: no document has a prefix. */
    const ra_layout_t *prefix;
    int32_t heads, kv_heads, head_dim; /**< H, G, D: H a multiple of G */
    float scale;
    int64_t window; /**< tokens a row sees including itself; 0: no window */
    bool causal;    /**< required by window and reproducible */
    bool reproducible;
    const char *kernel; /**< row of the softmax kernel table; NULL means "auto" */
    ra_dtype_t dtype;   /**< of q, k, v and o: F32, on a GPU also BF16 */
    /** GPUs: blocks go round even where there is room for all keys that a rank needs. */
    bool walk;
    /** GPUs, neither window nor `reproducible`: keys of a document that a launch takes at most; 0:
     * chosen, which is all but for documents of more than 2^19 tokens (one rank: 2^20). */
    int64_t part_keys;
} ra_softmax_ring_params_t;

/** One call's tensors on the stream's device. R = layout->rows[rank]; P = prefix rows. */
typedef struct ra_softmax_ring_io {
    const void *q; /**< [R, H, D] */
    int64_t q_stride;
    /** [2][R][G * D]: keys, then values; or ra_softmax_ring_own_kv(). Unchanged until the call
     * ends. */
    const void *kv;
    const void *prefix_kv; /**< [2][P][G * D], or NULL without a prefix */
    void *o;               /**< [R, H, D]; overlaps nothing */
    int64_t o_stride;      /**< strides in elements */
    float *lse;            /**< optional [H, R] */
} ra_softmax_ring_io_t;

/**
 * Collective. Make a plan for one layer shape and one layout; any number of layers may use it in
 * turn.
 * @param comm, stream  borrowed, outlive the plan.
 * @retval RA_ERR_INVALID      shapes or layouts do not fit together; RA_ERR_NOMEM.
 * @retval RA_ERR_UNSUPPORTED  no kernel, reproducible with zigzag on several ranks or
 *                             without causal.
 */
ra_status_t ra_softmax_ring_create(ra_comm_t *comm, ra_stream_t *stream,
                                   const ra_softmax_ring_params_t *params,
                                   ra_softmax_ring_t **plan_p);
/** Accepts NULL. */
void ra_softmax_ring_destroy(ra_softmax_ring_t *plan);

/**
 * Where this rank may put its own keys and values so that a call with io->kv = this does not copy
 * them: keys [R][G * D], values as many rows of G * D after them as @a plane_rows_p says. Device
 * memory of the plan, which other ranks read and calls leave as it is.
 * @return NULL: no such place, io->kv is the caller's; @a plane_rows_p is R.
 */
void *ra_softmax_ring_own_kv(const ra_softmax_ring_t *plan, int64_t *plane_rows_p);

/**
 * Collective: every rank calls, a rank without rows too. On return (GPU: in stream order) the kv
 * blocks are the caller's again. A rank that fails aborts the communicator. Other errors are those
 * of ra_softmax_fold().
 * @retval RA_ERR_PEER  another rank failed; RA_ERR_TIMEOUT  a block did not come in time.
 */
ra_status_t ra_softmax_ring_run(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io);
ra_ring_stats_t ra_softmax_ring_stats(const ra_softmax_ring_t *plan);

#endif
