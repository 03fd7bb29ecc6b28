/** @file model/forward_plan.h  @brief Internal to model/: the buffers of one rank's forward pass.
 */
#ifndef RA_MODEL_FORWARD_PLAN_H
#define RA_MODEL_FORWARD_PLAN_H

#include "model/cache_exchange.h"
#include "model/forward.h"
#include "ring/softmax_ring.h"
#include "ring/state_scan.h"

/** Rows a row-wise step and the LM head handle at once; a GPU needs many to be busy. */
enum {
    RA_FORWARD_TILE = 2048,
    RA_HEAD_TILE = 512,
    RA_FORWARD_TILE_CUDA = 32768,
    RA_HEAD_TILE_CUDA = 2048
};

struct ra_forward {
    ra_forward_params_t params;
    int rank;
    int64_t rows;
    ra_dtype_t act;          /**< of activations, params.act; all the rest is fp32 */
    int64_t tile, head_tile; /**< rows a row-wise step and the LM head handle at once */
    float *x;                /**< [rows, C] residual stream */
    float *rope;             /**< [rows, R] cosines and sines of the rows' positions */
    void *mixer;     /**< act; softmax: q, o [rows, H D] and kv; linear: qkv [rows, 3 H D] */
    void *prefix_kv; /**< act [2][prefix rows][Hk D] */
    void *normed;    /**< act [larger tile, C] */
    void *wide;      /**< act [tile, widest product of a row-wise step] */
    void *head;      /**< scratch of folds of [head tile, ra_head_block()] logits */
    float *lse_m, *lse_l, *picked;  /**< [head tile] */
    float *gap;                     /**< [tile] routing gaps of one layer */
    float *state;                   /**< [H, D, D] final state of a linear layer */
    ra_cache_exchange_t *exchange;  /**< with a cache */
    ra_softmax_ring_t *full_ring;   /**< softmax layers without a window */
    ra_softmax_ring_t *window_ring; /**< softmax layers with one */
    ra_state_scan_t *scan;
    ra_moe_plan_t *moe;
};

/** y [n, out] = rms(x) W^T of rows [begin, begin + n) of the residual stream, with the input norm.
 */
ra_status_t ra_project_rows(ra_forward_t *f, const ra_prepared_layer_t *layer,
                            const ra_gemm_weight_t *weight, int64_t begin, int64_t n, void *y,
                            int64_t y_stride);
/** x += attention(rms(x)) of softmax layer @a l. */
ra_status_t ra_mixer_softmax(ra_forward_t *f, int64_t l, const ra_prepared_layer_t *layer);
/** x += lightning attention of linear layer @a l. */
ra_status_t ra_mixer_linear(ra_forward_t *f, int64_t l, const ra_prepared_layer_t *layer);
/** x += feed forward, dense or mixture of experts; folds the routing gap. @a replay is the layer's,
 * untouched by a dense one. */
ra_status_t ra_feed_forward(ra_forward_t *f, const ra_prepared_layer_t *layer, float *routing_gap,
                            const ra_router_replay_t *replay);
/** Bytes of f->head. */
int64_t ra_lm_head_scratch(const ra_forward_t *f, int64_t head_tile);
/** Log-probabilities of targets and, where asked, of one row's whole vocabulary. */
ra_status_t ra_lm_head(ra_forward_t *f, const ra_forward_io_t *io);

#endif
