#include "model/model_tensors.h"

#include "base/log.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/file_io.h"
#include "model/random_weights.h"
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { PROBLEMS_SHOWN = 5, PROBLEM_BYTES = 1024, CONFIG_MAX_BYTES = 16 << 20 };

struct ra_model_weights {
    const ra_model_config_t *config;
    char *directory;
    ra_checkpoint_t *checkpoint; /* NULL with random weights */
    ra_random_weights_t *random; /* NULL with a checkpoint */
    uint64_t seed;
    ra_tensor_t embeddings, final_norm, lm_head;
    ra_layer_weights_t *layers;
    ra_ffn_weights_t *experts; /* of all layers */
    void **copies;             /* of tensors at unaligned addresses */
    int64_t copy_count;
    int64_t parameters, bytes;
    char digest[40];
};

struct ra_weight_binder {
    ra_model_weights_t *weights;
    bool *used; /* per tensor of the checkpoint */
    int64_t problems;
    ra_status_t status; /* RA_ERR_NOMEM outranks the problems */
    char first_problem[PROBLEM_BYTES];
};

static void problem(ra_weight_binder_t *binder, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void problem(ra_weight_binder_t *binder, const char *format, ...)
{
    char text[PROBLEM_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (binder->problems++ == 0) {
        memcpy(binder->first_problem, text, sizeof(text));
    } else if (binder->problems <= PROBLEMS_SHOWN) {
        ra_log(RA_LOG_ERROR, "weights", "%s", text);
    }
}

static void shape_text(const int64_t *extent, int32_t rank, char *out, size_t out_bytes)
{
    size_t used = (size_t)snprintf(out, out_bytes, "[");
    for (int32_t i = 0; i < rank && used < out_bytes; i++) {
        used += (size_t)snprintf(out + used, out_bytes - used, "%s%lld", i > 0 ? ", " : "",
                                 (long long)extent[i]);
    }
    if (used < out_bytes) {
        snprintf(out + used, out_bytes - used, "]");
    }
}

static bool right_shape(const ra_tensor_t *tensor, const int64_t *extent, int32_t rank)
{
    bool right = tensor->rank == rank;
    for (int32_t i = 0; right && i < rank; i++) {
        right = tensor->extent[i] == extent[i];
    }
    return right;
}

/* A file may place a tensor at any byte; reading it there through its type would be undefined. */
static bool align(ra_weight_binder_t *binder, const ra_safetensors_entry_t *entry,
                  ra_tensor_t *view)
{
    ra_model_weights_t *weights = binder->weights;
    if ((uintptr_t)entry->view.data % (uintptr_t)ra_dtype_bytes(entry->view.dtype) == 0) {
        return true;
    }
    size_t need = ((size_t)entry->bytes + 63) / 64 * 64;
    void *copy = aligned_alloc(64, need);
    void **copies =
        realloc(weights->copies, (size_t)(weights->copy_count + 1) * sizeof(*weights->copies));
    if (copies != NULL) {
        weights->copies = copies;
    }
    if (copy == NULL || copies == NULL) {
        free(copy);
        binder->status = ra_fail(RA_ERR_NOMEM, "weights", "%s: no memory for a copy of \"%s\"",
                                 weights->directory, entry->name);
        return false;
    }
    weights->copies[weights->copy_count++] = copy;
    memcpy(copy, entry->view.data, (size_t)entry->bytes);
    view->data = copy;
    return true;
}

static void bind_found(ra_weight_binder_t *binder, ra_tensor_t *view, const int64_t *extent,
                       int32_t rank, int64_t index)
{
    const ra_checkpoint_t *checkpoint = binder->weights->checkpoint;
    const ra_safetensors_entry_t *entry = ra_checkpoint_at(checkpoint, index);
    const char *file = ra_checkpoint_file_of(checkpoint, index);
    ra_dtype_t dtype = entry->view.dtype;
    binder->used[index] = true;
    if (!right_shape(&entry->view, extent, rank)) {
        char have[256], want[64];
        shape_text(entry->view.extent, entry->view.rank, have, sizeof(have));
        shape_text(extent, rank, want, sizeof(want));
        problem(binder, "%s: tensor \"%s\": its shape is %s, the config asks for %s", file,
                entry->name, have, want);
        return;
    }
    if (dtype != RA_BF16 && dtype != RA_F32) {
        problem(binder, "%s: tensor \"%s\": its dtype is %s; BF16 and F32 are allowed", file,
                entry->name, ra_dtype_name(dtype));
        return;
    }
    *view = entry->view;
    if (align(binder, entry, view)) {
        binder->weights->parameters += ra_tensor_count(view);
        binder->weights->bytes += entry->bytes;
    }
}

static void want_random(ra_weight_binder_t *binder, ra_tensor_t *view, int64_t rows,
                        int64_t columns, const char *name)
{
    ra_model_weights_t *weights = binder->weights;
    int64_t count = columns > 0 ? rows * columns : rows;
    if (binder->status == RA_OK) {
        binder->status = ra_random_weights_add(weights->random, view, rows, columns, name);
    }
    weights->parameters += count;
    weights->bytes += count * ra_dtype_bytes(RA_BF16);
}

void ra_weight_want(ra_weight_binder_t *binder, ra_tensor_t *view, int64_t rows, int64_t columns,
                    const char *name_format, ...)
{
    char name[RA_SAFETENSORS_MAX_NAME + 1];
    va_list args;
    va_start(args, name_format);
    vsnprintf(name, sizeof(name), name_format, args);
    va_end(args);
    if (binder->weights->random != NULL) {
        want_random(binder, view, rows, columns, name);
        return;
    }
    int64_t extent[2] = {rows, columns};
    int32_t rank = columns > 0 ? 2 : 1;
    int64_t index = ra_checkpoint_find(binder->weights->checkpoint, name);
    if (index >= 0) {
        bind_found(binder, view, extent, rank, index);
        return;
    }
    char want[64];
    shape_text(extent, rank, want, sizeof(want));
    problem(binder, "%s: tensor \"%s\" of shape %s is missing", binder->weights->directory, name,
            want);
}

static void warn_unused(const ra_weight_binder_t *binder)
{
    const ra_model_weights_t *weights = binder->weights;
    const ra_model_config_t *config = weights->config;
    int64_t unused = 0;
    for (int64_t i = 0; i < ra_checkpoint_count(weights->checkpoint); i++) {
        const char *name = ra_checkpoint_at(weights->checkpoint, i)->name;
        bool tied = config->tie_word_embeddings && strcmp(name, "lm_head.weight") == 0;
        if (binder->used[i] || tied || config->family->ignores(config, name)) {
            continue;
        }
        if (unused++ < PROBLEMS_SHOWN) {
            ra_log(RA_LOG_WARN, "weights", "%s: tensor \"%s\" is not used by this model",
                   ra_checkpoint_file_of(weights->checkpoint, i), name);
        }
    }
    if (unused > PROBLEMS_SHOWN) {
        ra_log(RA_LOG_WARN, "weights", "%s: %lld tensors are not used by this model",
               weights->directory, (long long)unused);
    }
}

static int64_t moe_layers(const ra_model_config_t *config)
{
    int64_t count = 0;
    for (int64_t l = 0; l < config->layers; l++) {
        count += config->layer[l].feed_forward == RA_FFN_MOE;
    }
    return count;
}

static ra_status_t allocate_views(ra_model_weights_t *weights)
{
    const ra_model_config_t *config = weights->config;
    int64_t experts = moe_layers(config) * config->experts;
    int64_t held = weights->random != NULL ? INT64_MAX : ra_checkpoint_count(weights->checkpoint);
    /* before memory is taken for what a config merely claims */
    if (3 * experts > held) {
        return ra_fail(RA_ERR_INPUT, "weights",
                       "%s: the config asks for %lld expert tensors (num_experts %lld), the "
                       "checkpoint holds %lld tensors in all",
                       weights->directory, (long long)(3 * experts), (long long)config->experts,
                       (long long)held);
    }
    weights->layers = calloc((size_t)config->layers, sizeof(*weights->layers));
    weights->experts = calloc((size_t)experts + 1, sizeof(*weights->experts));
    if (weights->layers == NULL || weights->experts == NULL) {
        return ra_fail(RA_ERR_NOMEM, "weights", "%s: no memory for the views of %lld layers",
                       weights->directory, (long long)config->layers);
    }
    ra_ffn_weights_t *next = weights->experts;
    for (int64_t l = 0; l < config->layers; l++) {
        if (config->layer[l].feed_forward == RA_FFN_MOE) {
            weights->layers[l].experts = next;
            weights->layers[l].expert_count = config->experts;
            next += config->experts;
        }
    }
    return RA_OK;
}

static void bind(ra_weight_binder_t *binder)
{
    ra_model_weights_t *weights = binder->weights;
    ra_weight_views_t views = {&weights->embeddings, &weights->final_norm, &weights->lm_head,
                               weights->layers};
    weights->config->family->bind(binder, weights->config, &views);
}

static ra_status_t bind_random(ra_model_weights_t *weights)
{
    ra_weight_binder_t binder = {.weights = weights, .status = RA_OK};
    bind(&binder);
    RA_TRY(binder.status);
    RA_TRY(ra_random_weights_acquire(weights->random, -1));
    if (weights->config->tie_word_embeddings) {
        weights->lm_head = weights->embeddings;
    }
    return RA_OK;
}

static ra_status_t bind_all(ra_model_weights_t *weights)
{
    ra_weight_binder_t binder = {.weights = weights, .status = RA_OK};
    binder.used = calloc((size_t)ra_checkpoint_count(weights->checkpoint) + 1, sizeof(bool));
    if (binder.used == NULL) {
        return ra_fail(RA_ERR_NOMEM, "weights", "%s: no memory to check it", weights->directory);
    }
    bind(&binder);
    ra_status_t status = binder.status;
    if (status == RA_OK && binder.problems > 1) {
        status = ra_fail(RA_ERR_INPUT, "weights", "%s (and %lld more problems)",
                         binder.first_problem, (long long)(binder.problems - 1));
    } else if (status == RA_OK && binder.problems == 1) {
        status = ra_fail(RA_ERR_INPUT, "weights", "%s", binder.first_problem);
    }
    if (status == RA_OK) {
        warn_unused(&binder);
    }
    if (weights->config->tie_word_embeddings) {
        weights->lm_head = weights->embeddings;
    }
    free(binder.used);
    return status;
}

/* Without tensors yet. */
static ra_status_t make_empty(const char *directory, const ra_model_config_t *config,
                              ra_model_weights_t **weights_p)
{
    ra_model_weights_t *weights = calloc(1, sizeof(*weights));
    char *copy = strdup(directory);
    if (weights == NULL || copy == NULL) {
        free(weights);
        free(copy);
        return ra_fail(RA_ERR_NOMEM, "weights", "%s: no memory to open it", directory);
    }
    weights->config = config;
    weights->directory = copy;
    *weights_p = weights;
    return RA_OK;
}

ra_status_t ra_model_weights_random(const ra_model_config_t *config, uint64_t seed, bool keep,
                                    ra_pool_t *pool, ra_model_weights_t **weights_p)
{
    ra_model_weights_t *weights = NULL;
    ra_status_t status;
    RA_TRY(make_empty(config->path, config, &weights));
    weights->seed = seed;
    RA_TRY_GOTO(ra_random_weights_create(seed, keep, pool, &weights->random), failed);
    RA_TRY_GOTO(allocate_views(weights), failed);
    RA_TRY_GOTO(bind_random(weights), failed);
    *weights_p = weights;
    return RA_OK;
failed:
    ra_model_weights_destroy(weights);
    return status;
}

ra_status_t ra_model_weights_open(const char *model_dir, const ra_model_config_t *config,
                                  ra_model_weights_t **weights_p)
{
    ra_model_weights_t *weights = NULL;
    ra_status_t status;
    RA_TRY(make_empty(model_dir, config, &weights));
    RA_TRY_GOTO(ra_checkpoint_open(model_dir, &weights->checkpoint), failed);
    RA_TRY_GOTO(allocate_views(weights), failed);
    RA_TRY_GOTO(bind_all(weights), failed);
    *weights_p = weights;
    return RA_OK;
failed:
    ra_model_weights_destroy(weights);
    return status;
}

void ra_model_weights_destroy(ra_model_weights_t *weights)
{
    if (weights == NULL) {
        return;
    }
    for (int64_t i = 0; i < weights->copy_count; i++) {
        free(weights->copies[i]);
    }
    free(weights->copies);
    ra_random_weights_destroy(weights->random); /* its views are in layers */
    free(weights->layers);
    free(weights->experts);
    ra_checkpoint_close(weights->checkpoint);
    free(weights->directory);
    free(weights);
}

ra_status_t ra_model_weights_acquire(ra_model_weights_t *weights, int64_t l,
                                     const ra_layer_weights_t **layer_p)
{
    if (l < 0 || l >= weights->config->layers) {
        return ra_fail(RA_ERR_INVALID, "weights", "layer %lld of %lld", (long long)l,
                       (long long)weights->config->layers);
    }
    if (weights->random != NULL) {
        RA_TRY(ra_random_weights_acquire(weights->random, l));
    }
    *layer_p = &weights->layers[l];
    return RA_OK;
}

void ra_model_weights_release(ra_model_weights_t *weights, int64_t l)
{
    if (weights->random != NULL) {
        ra_random_weights_release(weights->random, l);
    }
}

const ra_tensor_t *ra_model_embeddings(const ra_model_weights_t *weights)
{
    return &weights->embeddings;
}

const ra_tensor_t *ra_model_final_norm(const ra_model_weights_t *weights)
{
    return &weights->final_norm;
}

const ra_tensor_t *ra_model_lm_head(const ra_model_weights_t *weights)
{
    return &weights->lm_head;
}

int64_t ra_model_parameters(const ra_model_weights_t *weights)
{
    return weights->parameters;
}

int64_t ra_model_weight_bytes(const ra_model_weights_t *weights)
{
    return weights->bytes;
}

/* The length goes first, so that no two lists of files give the same stream of bytes. */
static void hash_part(XXH3_state_t *state, const void *bytes, int64_t length)
{
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) {
        prefix[i] = (unsigned char)((uint64_t)length >> (8 * i));
    }
    XXH3_128bits_update(state, prefix, sizeof(prefix));
    XXH3_128bits_update(state, bytes, (size_t)length);
}

ra_status_t ra_model_digest(ra_model_weights_t *weights, const char **digest_p)
{
    if (weights->digest[0] != '\0') {
        *digest_p = weights->digest;
        return RA_OK;
    }
    char *config_bytes = NULL;
    int64_t config_length = 0;
    RA_TRY(ra_file_read(weights->config->path, CONFIG_MAX_BYTES, &config_bytes, &config_length));
    XXH3_state_t *state = XXH3_createState();
    if (state == NULL) {
        free(config_bytes);
        return ra_fail(RA_ERR_NOMEM, "weights", "%s: no memory for its digest", weights->directory);
    }
    XXH3_128bits_reset(state);
    hash_part(state, config_bytes, config_length);
    if (weights->random != NULL) {
        hash_part(state, &weights->seed, (int64_t)sizeof(weights->seed));
    }
    int64_t shards = weights->random != NULL ? 0 : ra_checkpoint_shards(weights->checkpoint);
    for (int64_t s = 0; s < shards; s++) {
        int64_t length = 0;
        const unsigned char *bytes =
            ra_safetensors_bytes(ra_checkpoint_shard(weights->checkpoint, s), &length);
        hash_part(state, bytes, length);
    }
    XXH128_hash_t hash = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    free(config_bytes);
    RA_TRY(ra_model_weights_verify(weights));
    snprintf(weights->digest, sizeof(weights->digest), "xxh3:%016llx%016llx",
             (unsigned long long)hash.high64, (unsigned long long)hash.low64);
    *digest_p = weights->digest;
    return RA_OK;
}

ra_status_t ra_model_weights_verify(const ra_model_weights_t *weights)
{
    return weights->random != NULL ? RA_OK : ra_checkpoint_verify(weights->checkpoint);
}
