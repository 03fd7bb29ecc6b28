/**
 * @file  model/families.h
 * @brief The table of model families: what a value of "model_type" means.
 *
 * A new family is one row in families.c and one file with the two functions it names: the keys it
 * reads from config.json, and the tensors it asks of a checkpoint. The forward reads only
 * ra_model_config_t and ra_layer_weights_t.
 */
#ifndef RA_MODEL_FAMILIES_H
#define RA_MODEL_FAMILIES_H

#include "model/model_config.h"
#include "model/model_tensors.h"
#include <cjson/cJSON.h>
#include <stdbool.h>

/** Collects what a family asks for, checks it, and fills the views (model/model_tensors.c). */
typedef struct ra_weight_binder ra_weight_binder_t;

/**
 * Ask for one tensor of shape [rows, columns], or [rows] when @a columns is 0; its name is given
 * printf-style. The view is filled when the tensor is there and right; problems are collected.
 */
void ra_weight_want(ra_weight_binder_t *binder, ra_tensor_t *view, int64_t rows, int64_t columns,
                    const char *name_format, ...) __attribute__((format(printf, 5, 6)));

/** Views to fill; layers [config->layers], with the arrays of experts already in place. */
typedef struct ra_weight_views {
    ra_tensor_t *embeddings, *final_norm;
    ra_tensor_t *lm_head; /**< not asked for when the config ties it to the embeddings */
    ra_layer_weights_t *layers;
} ra_weight_views_t;

typedef struct ra_family {
    const char *model_type;
    /**
     * Fill every field of @a config except family, path, layer[] and log_decay[], which exist but
     * for the number of layers: read_layers is called once that is known.
     */
    ra_status_t (*read)(const char *file, const cJSON *root, ra_model_config_t *config);
    /** Fill config->layer[]. */
    ra_status_t (*read_layers)(const char *file, const cJSON *root, ra_model_config_t *config);
    void (*bind)(ra_weight_binder_t *binder, const ra_model_config_t *config,
                 const ra_weight_views_t *views);
    /** Is a tensor that nobody asked for known to be of no use (training heads, buffers)? */
    bool (*ignores)(const ra_model_config_t *config, const char *tensor);
} ra_family_t;

/** @return NULL when unknown. */
const ra_family_t *ra_family_find(const char *model_type);
/** "a, b, c": every row, for messages. */
const char *ra_family_names(void);

extern const ra_family_t ra_family_bailing_moe_linear;

/* Parts of config.json that families share. All report like the getters of json_check.h. */

/** "rope_theta", "rotary_dim" or "partial_rotary_factor", "rope_scaling" (or "rope_parameters"). */
ra_status_t ra_config_read_rope(const char *file, const cJSON *root, int64_t head_dim,
                                double default_theta, int64_t max_positions,
                                ra_rope_config_t *rope);
/** A flag that changes the arithmetic in a way that is not implemented: refused when true. */
ra_status_t ra_config_refuse_true(const char *file, const cJSON *root, const char *key,
                                  const char *meaning);
/** Require a % b == 0. */
ra_status_t ra_config_divides(const char *file, const char *key, int64_t a, const char *by_key,
                              int64_t b);

#endif
