/**
 * @file  model/model_tensors.h
 * @brief The weights of a model: every tensor the config asks for, found, checked and viewed.
 *
 * All matrices are stored [out, in] (y = W x), row-major, BF16 or F32; norms and biases are
 * vectors of the same dtypes. Views point into the mapped files, or into a copy where a file places
 * a tensor at an address its element size does not divide.
 *
 * The forward reaches a layer's weights only between acquire and release, so that a later placement
 * may stream them; in the placement here (replicated: one mapping a process, shared by its ranks)
 * both are free. A view that does not apply to a layer has data == NULL.
 */
#ifndef RA_MODEL_MODEL_TENSORS_H
#define RA_MODEL_MODEL_TENSORS_H

#include "base/pool.h"
#include "base/status.h"
#include "base/tensor.h"
#include "model/model_config.h"
#include <stdbool.h>
#include <stdint.h>

/** FFN(x) = down (silu(gate x) * (up x)); gate, up [width, C], down [C, width]. */
typedef struct ra_ffn_weights {
    ra_tensor_t gate, up, down;
} ra_ffn_weights_t;

typedef struct ra_layer_weights {
    ra_tensor_t input_norm;          /**< [C] */
    ra_tensor_t post_attention_norm; /**< [C] */
    ra_tensor_t qkv;                 /**< [(H + 2 Hk) D, C], rows Q | K | V, head-major */
    ra_tensor_t q_norm, k_norm;      /**< [D], NULL without use_qk_norm */
    ra_tensor_t dense;               /**< [C, H D]: output projection */
    ra_tensor_t g_proj;              /**< [H D, C], linear layers */
    ra_tensor_t g_norm;              /**< [H D], linear layers */

    ra_ffn_weights_t mlp; /**< dense layers, width intermediate_size */

    ra_tensor_t router;        /**< [E, C], MoE layers */
    ra_tensor_t expert_bias;   /**< [E], MoE layers with expert_bias */
    int64_t expert_count;      /**< E, 0 in dense layers */
    ra_ffn_weights_t *experts; /**< [E], width moe_intermediate_size */
    ra_ffn_weights_t shared;   /**< width shared_intermediate_size, NULL without shared experts */
} ra_layer_weights_t;

typedef struct ra_model_weights ra_model_weights_t;

/**
 * Open the checkpoint of @a model_dir (model/checkpoint.h) and check it against @a config.
 * @param config  Borrowed; must outlive the weights.
 * @retval RA_ERR_INPUT  a tensor is missing or has another shape or dtype: file, tensor, both
 *                       shapes. Tensors nobody asked for are warnings.
 */
ra_status_t ra_model_weights_open(const char *model_dir, const ra_model_config_t *config,
                                  ra_model_weights_t **weights_p);
/**
 * Weights from @a seed instead of a checkpoint, to run a config whose weights are not at hand:
 * bf16; matrices uniform with variance 1 / in, norms 1, biases within 0.01. A value depends on the
 * seed, its tensor's name and its place alone.
 * @param keep  Layers stay in memory once acquired; else a layer is made by acquire, one at a time,
 *              and freed by release.
 * @param pool  Borrowed; makes layers.
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_model_weights_random(const ra_model_config_t *config, uint64_t seed, bool keep,
                                    ra_pool_t *pool, ra_model_weights_t **weights_p);
/** Accepts NULL. Every view dies with it. */
void ra_model_weights_destroy(ra_model_weights_t *weights);

/** Weights of layer @a l until the matching release. Safe from several threads at once. */
ra_status_t ra_model_weights_acquire(ra_model_weights_t *weights, int64_t l,
                                     const ra_layer_weights_t **layer_p);
void ra_model_weights_release(ra_model_weights_t *weights, int64_t l);

const ra_tensor_t *ra_model_embeddings(const ra_model_weights_t *weights); /**< [vocab, C] */
const ra_tensor_t *ra_model_final_norm(const ra_model_weights_t *weights); /**< [C] */
/** [vocab, C]; the embeddings themselves when the config ties them. */
const ra_tensor_t *ra_model_lm_head(const ra_model_weights_t *weights);

/** Number of parameters and bytes of all tensors the model uses. */
int64_t ra_model_parameters(const ra_model_weights_t *weights);
int64_t ra_model_weight_bytes(const ra_model_weights_t *weights);

/**
 * "xxh3:" and 32 hex digits over config.json and every shard: equal directories, equal digests.
 * Reads every byte on the first call, remembers the result. Not safe from two threads at once.
 */
ra_status_t ra_model_digest(ra_model_weights_t *weights, const char **digest_p);

/**
 * Did a weight file change while it was mapped? To be asked before results are believed.
 * @retval RA_ERR_INPUT  a file became shorter or was written to (model/mapped_file.h).
 */
ra_status_t ra_model_weights_verify(const ra_model_weights_t *weights);

#endif
