/**
 * @file  model/prepared_weights.h
 * @brief A model's weights prepared for the kernels that will use them, once, when a session opens.
 *
 * Matrices become GEMM handles (which on the CPU may keep reading the mapped bf16 checkpoint),
 * norm vectors fp32 copies. Placements: dense weights are replicated, one copy a device, shared by
 * its ranks; experts are replicated or split over ranks. The forward reaches a layer only between
 * acquire and release.
 */
#ifndef RA_MODEL_PREPARED_WEIGHTS_H
#define RA_MODEL_PREPARED_WEIGHTS_H

#include "base/gemm.h"
#include "model/model_tensors.h"
#include "moe/moe.h"

/**
 * Rows of the LM head in one GEMM handle: logits exist only for this many tokens of the vocabulary.
 * CUDA: 66 tiles of 256 columns, so that with 16 tiles of 128 rows (RA_HEAD_TILE_CUDA) a product is
 * 8 whole waves on 132 multiprocessors.
 */
enum { RA_HEAD_BLOCK = 4096, RA_HEAD_BLOCK_CUDA = 66 * 256 };

static inline int64_t ra_head_block(ra_device_kind_t device)
{
    return device == RA_DEVICE_CUDA ? RA_HEAD_BLOCK_CUDA : RA_HEAD_BLOCK;
}

/** FFN(x) = down (silu(gate x) * (up x)). */
typedef struct ra_prepared_ffn {
    ra_gemm_weight_t *gate, *up, *down;
} ra_prepared_ffn_t;

/** One layer as the forward sees it; fields that do not apply are NULL. */
typedef struct ra_prepared_layer {
    float *input_norm, *post_attention_norm; /**< [C] */
    float *q_norm, *k_norm;                  /**< [D] */
    float *g_norm;                           /**< [H D] */
    ra_gemm_weight_t *qkv, *dense, *g_proj;
    ra_prepared_ffn_t mlp;
    ra_moe_weights_t **moe; /**< [ranks]: what rank r runs; one shared object when replicated */
} ra_prepared_layer_t;

typedef struct ra_prepared_weights ra_prepared_weights_t;

/** What is prepared and for whom. */
typedef struct ra_prepared_params {
    const ra_model_config_t *config; /**< borrowed, outlives the result */
    ra_model_weights_t *weights;     /**< CPU: borrowed, outlives the result; else read once */
    const ra_gemm_kernel_t *kernel;
    ra_dtype_t act;   /**< of the activations */
    int expert_ranks; /**< 1: every rank runs every expert; N: experts split over N ranks */
    /** With experts split: ranks r with r % rank_step == rank_first run on this device. */
    int rank_first, rank_step;
    ra_stream_t *stream; /**< of the device that gets the weights; synchronised on return */
} ra_prepared_params_t;

/**
 * Prepare the weights of @a count devices, layer by layer, so that a layer is read once for all.
 * @param prepared_p  [count]; on an error none is made.
 */
ra_status_t ra_prepared_weights_create(const ra_prepared_params_t *params, int count,
                                       ra_prepared_weights_t **prepared_p);
/** Accepts NULL. */
void ra_prepared_weights_destroy(ra_prepared_weights_t *prepared);

/** Layer @a l until the matching release. Safe from several ranks at once. */
const ra_prepared_layer_t *ra_prepared_acquire(ra_prepared_weights_t *prepared, int64_t l);
void ra_prepared_release(ra_prepared_weights_t *prepared, int64_t l);

/** Experts this rank runs in a layer. */
const ra_moe_weights_t *ra_prepared_moe(const ra_prepared_weights_t *prepared,
                                        const ra_prepared_layer_t *layer, int rank);
const ra_tensor_t *ra_prepared_embeddings(const ra_prepared_weights_t *prepared); /**< [vocab, C] */
const float *ra_prepared_final_norm(const ra_prepared_weights_t *prepared);       /**< [C] */
/** Handle of vocabulary rows [block * ra_head_block(), ...); NULL past the last block. */
const ra_gemm_weight_t *ra_prepared_head(const ra_prepared_weights_t *prepared, int64_t block);

/** The sizes moe/ needs, from the config. */
ra_moe_shape_t ra_model_moe_shape(const ra_model_config_t *config);

#endif
