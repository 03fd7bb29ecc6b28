/**
 * @file  model/forward.h
 * @brief The forward pass of one rank: embedding of its rows, every layer, LM head,
 * log-probabilities.
 *
 *     x = E[token];  for each layer:  x += mixer(rms(x));  x += feed_forward(rms(x))
 *     ln p(target) = z_target - logsumexp(z),   z = W_head rms(x)
 *
 * Rows are the packed rows of a layout (ring/layout.h). Row-wise work goes in tiles of rows, so
 * beside the residual stream and one layer's q, k, v nothing is as long as the sequence, and logits
 * exist for one tile of rows and ra_head_block() vocabulary entries at a time.
 *
 * A plan belongs to one rank, owns every buffer and is made for one layout. Source: model families,
 * see model/families.c; blockwise computation, arXiv 2310.01889.
 */
#ifndef RA_MODEL_FORWARD_H
#define RA_MODEL_FORWARD_H

#include "comm/comm.h"
#include "model/prepared_weights.h"
#include "moe/router.h"
#include "ring/layout.h"
#include <stdatomic.h>

/** Shared by all ranks of a call; written by any thread. */
typedef struct ra_forward_control {
    atomic_int stop;        /**< set: every rank leaves at its next layer with RA_ERR_STOPPED */
    atomic_llong rows_done; /**< rows x layers finished, of total_rows x layers */
} ra_forward_control_t;

/**
 * Cached prefixes in, caches out; all members may be NULL. Called by the rank that runs the layer.
 * All arrays are fp32 in host memory; kv blocks are [2][rows][kv_heads * head_dim], keys normed and
 * rotated.
 */
typedef struct ra_forward_cache {
    void *arg;
    /** Fill this rank's rows of the prefix layout. */
    ra_status_t (*load_kv)(void *arg, int rank, int64_t layer, float *kv);
    /** State before the first row of document 0, [heads, D, D]. */
    const float *(*initial_state)(void *arg, int64_t layer);
    /** This rank's rows of a softmax layer. */
    ra_status_t (*save_kv)(void *arg, int rank, int64_t layer, const float *kv);
    /** State of a linear layer after the last whole tile of document 0, on the rank of its last
     * run. */
    ra_status_t (*save_state)(void *arg, int64_t layer, const float *state);
} ra_forward_cache_t;

typedef struct ra_forward_params {
    const ra_model_config_t *config;
    ra_prepared_weights_t *weights;
    ra_comm_t *comm;
    ra_device_t *device;
    ra_stream_t *stream;
    const ra_layout_t *layout;
    const ra_layout_t *prefix;       /**< NULL: no document has a cached prefix */
    const ra_forward_cache_t *cache; /**< NULL: none; otherwise the layout has one document */
    ra_dtype_t act;                  /**< of activations: F32, or BF16 on a GPU */
    bool expert_parallel;
    bool reproducible;
    const char *softmax_kernel, *linear_kernel;
    bool scores; /**< calls name targets */
    bool walk; /**< softmax layers without the memory that gathering keys takes (softmax_ring.h) */
    ra_forward_control_t *control;
} ra_forward_params_t; /**< everything is borrowed and outlives the plan */

typedef struct ra_forward ra_forward_t;

/**
 * Collective. Device and stream may be counting ones (base/device.h): the plan cannot be run then.
 * @retval RA_ERR_NOMEM  says how many bytes were asked; RA_ERR_UNSUPPORTED  no kernel fits.
 */
ra_status_t ra_forward_create(const ra_forward_params_t *params, ra_forward_t **forward_p);
/** Accepts NULL. */
void ra_forward_destroy(ra_forward_t *forward);

/** One call's arrays, in the memory of the stream's device; results are there after a
 * ra_stream_sync(). */
typedef struct ra_forward_io {
    const int32_t *token;  /**< [rows] */
    const int32_t *target; /**< [rows] token to score, or -1; NULL unless params.scores */
    float *logprob;        /**< [rows] out where target >= 0, else 0 */
    float
        *routing_gap; /**< optional [rows]: smallest gap of the row's expert choices over layers */
    ra_router_replay_t replay; /**< optional; a row is the MoE layers' choices, one layer after the
                                  other: the arrays begin with the first layer's */
    int64_t
        logits_row; /**< row whose log-probabilities of the whole vocabulary are wanted, or -1 */
    float *next_logprob; /**< [vocab_size] out for logits_row */
} ra_forward_io_t;

/**
 * Collective: every rank of the communicator calls.
 * @retval RA_ERR_STOPPED  control->stop was set; RA_ERR_PEER another rank left.
 */
ra_status_t ra_forward_run(ra_forward_t *forward, const ra_forward_io_t *io);

#endif
