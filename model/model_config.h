/**
 * @file  model/model_config.h
 * @brief config.json of a Hugging Face model directory as one checked, plain structure.
 *
 * Every number comes from config.json and is checked here (range, divisibility), so that later code
 * may multiply freely: no product of two extents below exceeds 2^48. A family (a value of
 * "model_type") is one row of the table in model/families.c; it knows which keys it needs, which
 * layers are what, and which tensors a checkpoint must hold.
 *
 * Symbols: C hidden size, H query heads, Hk key/value heads, D head dim, R rotary dims, E experts.
 */
#ifndef RA_MODEL_MODEL_CONFIG_H
#define RA_MODEL_MODEL_CONFIG_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

typedef enum ra_mixer {
    RA_MIXER_SOFTMAX = 0, /**< causal grouped-query attention */
    RA_MIXER_LINEAR       /**< lightning attention: constant decay per head, state D x D */
} ra_mixer_t;

typedef enum ra_feed_forward { RA_FFN_DENSE = 0, RA_FFN_MOE } ra_feed_forward_t;

/** Which layer factor f_l scales the decay slopes of layer l of L (0-based). */
typedef enum ra_decay_factor {
    RA_DECAY_A = 0, /**< 1 - l / (L-1) + 1e-5: training code and serving engines */
    RA_DECAY_B      /**< 1 - (l-1) / (L-1) + 1e-5: the Hugging Face remote code */
} ra_decay_factor_t;

typedef enum ra_rope_scaling { RA_ROPE_NONE = 0, RA_ROPE_YARN } ra_rope_scaling_t;

/** Rotary embedding of the first `rotary_dim` channels of a head, halves paired (i, i + R/2). */
typedef struct ra_rope_config {
    double theta;
    int64_t rotary_dim; /**< R, even, <= D */
    ra_rope_scaling_t scaling;
    double factor;                  /**< YaRN: positions grow by this factor; 1 without */
    int64_t original_max_positions; /**< YaRN: positions the model was trained on */
    double beta_fast, beta_slow;    /**< YaRN: rotations where interpolation starts and is full */
    double attention_factor;        /**< cos and sin are multiplied by this; 1 without scaling */
} ra_rope_config_t;

typedef struct ra_layer_config {
    ra_mixer_t mixer;
    ra_feed_forward_t feed_forward;
    int64_t window;   /**< softmax: a token sees itself and window-1 before it; 0: all before it */
    int64_t kv_heads; /**< Hk of this layer: H in linear layers */
} ra_layer_config_t;

struct ra_family;

typedef struct ra_model_config {
    const struct ra_family *family;
    char path[4096]; /**< of the config.json, for messages */

    int64_t layers;
    int64_t hidden_size;
    int64_t vocab_size;
    int64_t max_position_embeddings;
    int64_t heads;    /**< H */
    int64_t kv_heads; /**< Hk of softmax layers */
    int64_t head_dim; /**< D */
    double rms_norm_eps;
    bool use_qk_norm;
    bool tie_word_embeddings;
    ra_rope_config_t rope;

    int64_t group_norm_groups;      /**< linear layers: groups of the output norm, divides H*D */
    ra_decay_factor_t decay_factor; /**< linear layers */

    int64_t intermediate_size; /**< dense feed-forward */
    int64_t moe_intermediate_size;
    int64_t shared_intermediate_size; /**< of all shared experts together; 0: none */
    int64_t experts;
    int64_t experts_per_token;
    int64_t expert_groups, expert_groups_kept;
    bool normalise_expert_weights;
    bool expert_bias;
    double routed_scaling_factor;

    int64_t bos_token_id; /**< of config.json; -1: not given there */

    ra_layer_config_t *layer; /**< [layers] */
    float *log_decay;         /**< [layers][H]: -slope <= 0 in linear layers, 0 in softmax layers */
} ra_model_config_t;

/**
 * Read and check DIR/config.json.
 * @param decay_factor  Setting `model.decay_factor`; not stored in any checkpoint.
 * @retval RA_ERR_USAGE  nothing exists at that path.
 * @retval RA_ERR_INPUT  refused; the message names the file, the key, its value, what is allowed.
 */
ra_status_t ra_model_config_load(const char *model_dir, ra_decay_factor_t decay_factor,
                                 ra_model_config_t **config_p);
/** The same from bytes in memory; @a name stands in messages. */
ra_status_t ra_model_config_parse(const char *name, const char *bytes, int64_t length,
                                  ra_decay_factor_t decay_factor, ra_model_config_t **config_p);
/** Accepts NULL. */
void ra_model_config_destroy(ra_model_config_t *config);

/** Log-decay of layer @a l: H values (all 0 in a softmax layer). */
const float *ra_model_log_decay(const ra_model_config_t *config, int64_t l);

/** "bailing_moe_linear" and so on. */
const char *ra_model_type(const ra_model_config_t *config);

/**
 * Decay slopes of one layer, s_h = b_h f_l > 0; the decay of a step is exp(-s_h).
 * b_h = 2^(-8(h+1)/H) for H a power of two; otherwise, with P the largest power of two below H, the
 * first P of the P-head schedule, then entries 0, 2, 4, ... of the 2P-head schedule. b_h is rounded
 * to fp32, f_l computed in double, rounded and multiplied in fp32.
 * Source: ALiBi (arXiv 2108.12409) for b; Lightning attention (arXiv 2401.04658) for f.
 */
void ra_decay_slopes(int64_t heads, int64_t l, int64_t layers, ra_decay_factor_t factor,
                     float *slopes);

/**
 * Inverse frequencies of the R/2 rotated pairs, without and with YaRN (arXiv 2309.00071):
 * w_i = theta^(-2i/R);  c(r) = R ln(orig / (2 pi r)) / (2 ln theta);  low = floor(c(beta_fast)),
 * high = ceil(c(beta_slow)), both in [0, R-1];  ramp_i = clip((i - low) / (high - low), 0, 1);
 * result w_i / factor * ramp_i + w_i (1 - ramp_i).
 */
void ra_rope_inv_freq(const ra_rope_config_t *rope, double *inv_freq);

/** Where the beginning-of-sequence token of a model is written down. */
typedef struct ra_bos {
    int64_t id;      /**< >= 0: given as an id by config.json */
    char token[512]; /**< otherwise the token's text by tokenizer_config.json, "" when neither */
} ra_bos_t;

/**
 * Look the BOS up: config.json first, then tokenizer_config.json ("bos_token" as a string or an
 * object with "content"). Finding none is no error: id -1 and token "".
 */
ra_status_t ra_model_bos(const ra_model_config_t *config, const char *model_dir, ra_bos_t *bos);

#endif
