#include "base/checked.h"
#include "model/file_io.h"
#include "model/kv_file.h"
#include "model/kv_names.h"
#include "model/mapped_file.h"
#include "model/npy.h"
#include "model/safetensors_write.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

enum { CHUNK_ELEMENTS = 8192 };

typedef struct kv_shard {
    ra_kv_range_t range;
    char name[RA_KV_NAME_BYTES];
    ra_safetensors_writer_t *file;
} kv_shard_t;

struct ra_kv_writer {
    const ra_model_config_t *config;
    char *directory;
    char *model_digest, *tokenizer_digest;
    int32_t *tokens; /* all of the prefix */
    int64_t token_count, cached, tile;
    ra_dtype_t dtype;
    kv_shard_t *shards; /* ascending ranges */
    int64_t shard_count;
    ra_safetensors_writer_t *states; /* NULL without linear layers or cached tokens */
    ra_safetensors_writer_t *next;   /* NULL with tail ids or without cached tokens */
    int64_t *slot; /* [layers]: index of "k" (v follows) in a shard, or of "state" in states */
};

void ra_kv_digest(const void *bytes, int64_t length, char out[RA_KV_DIGEST_BYTES])
{
    XXH128_hash_t hash = XXH3_128bits(length > 0 ? bytes : "", (size_t)length);
    snprintf(out, RA_KV_DIGEST_BYTES, "xxh3:%016llx%016llx", (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
}

static ra_status_t no_memory(const char *directory)
{
    return ra_fail(RA_ERR_NOMEM, "kv", "%s: no memory to write the cache", directory);
}

static int compare_ranges(const void *left, const void *right)
{
    const kv_shard_t *a = left, *b = right;
    return (a->range.begin > b->range.begin) - (a->range.begin < b->range.begin);
}

/* Ranges, clipped to the cached tokens, sorted, checked to cover all tokens. */
static ra_status_t take_ranges(ra_kv_writer_t *writer, const ra_kv_params_t *params)
{
    writer->shards = calloc((size_t)params->range_count + 1, sizeof(*writer->shards));
    if (writer->shards == NULL) {
        return no_memory(writer->directory);
    }
    int64_t used = 0, at = 0;
    for (int64_t i = 0; i < params->range_count; i++) {
        if (params->ranges[i].begin < params->ranges[i].end) {
            writer->shards[used++].range = params->ranges[i];
        }
    }
    qsort(writer->shards, (size_t)used, sizeof(*writer->shards), compare_ranges);
    for (int64_t i = 0; i < used; i++) {
        ra_kv_range_t *range = &writer->shards[i].range;
        if (range->begin != at) {
            return ra_fail(RA_ERR_INVALID, "kv", "%s: ranges leave or overlap token %lld",
                           writer->directory, (long long)at);
        }
        at = range->end;
        range->end = ra_min_i64(range->end, writer->cached);
        writer->shard_count += range->begin < writer->cached;
    }
    if (at != params->token_count) {
        return ra_fail(RA_ERR_INVALID, "kv", "%s: ranges end at token %lld of %lld",
                       writer->directory, (long long)at, (long long)params->token_count);
    }
    for (int64_t i = 0; i < writer->shard_count; i++) {
        ra_kv_shard_name(i, writer->shard_count, writer->shards[i].name);
    }
    return RA_OK;
}

static ra_status_t declare_layers(ra_kv_writer_t *writer, kv_shard_t *shard)
{
    const ra_model_config_t *config = writer->config;
    for (int64_t l = 0; l < config->layers; l++) {
        char name[RA_KV_NAME_BYTES];
        int64_t index = 0;
        if (config->layer[l].mixer != RA_MIXER_SOFTMAX) {
            continue;
        }
        int64_t extent[3] = {shard->range.end - shard->range.begin, config->layer[l].kv_heads,
                             config->head_dim};
        ra_kv_tensor_name(l, "k", name);
        RA_TRY(ra_safetensors_writer_declare(shard->file, name, writer->dtype, 3, extent,
                                             &writer->slot[l]));
        ra_kv_tensor_name(l, "v", name);
        RA_TRY(ra_safetensors_writer_declare(shard->file, name, writer->dtype, 3, extent, &index));
    }
    return RA_OK;
}

static ra_status_t begin_file(ra_kv_writer_t *writer, ra_safetensors_writer_t *file,
                              const char *token_range)
{
    RA_TRY(ra_safetensors_writer_metadata(file, "format", RA_KV_FORMAT));
    RA_TRY(ra_safetensors_writer_metadata(file, "token_range", token_range));
    RA_TRY(ra_safetensors_writer_metadata(file, "model_digest", writer->model_digest));
    return ra_safetensors_writer_begin(file);
}

static ra_status_t create_shard(ra_kv_writer_t *writer, kv_shard_t *shard)
{
    char path[RA_PATH_MAX], text[64];
    RA_TRY(ra_path_join(writer->directory, shard->name, path));
    RA_TRY(ra_safetensors_writer_create(path, &shard->file));
    RA_TRY(declare_layers(writer, shard));
    snprintf(text, sizeof(text), "[%lld, %lld]", (long long)shard->range.begin,
             (long long)shard->range.end);
    return begin_file(writer, shard->file, text);
}

static ra_status_t create_states(ra_kv_writer_t *writer)
{
    const ra_model_config_t *config = writer->config;
    char path[RA_PATH_MAX], text[64];
    RA_TRY(ra_path_join(writer->directory, RA_KV_STATES, path));
    RA_TRY(ra_safetensors_writer_create(path, &writer->states));
    for (int64_t l = 0; l < config->layers; l++) {
        char name[RA_KV_NAME_BYTES];
        int64_t extent[3] = {config->heads, config->head_dim, config->head_dim};
        if (config->layer[l].mixer == RA_MIXER_LINEAR) {
            ra_kv_tensor_name(l, "state", name);
            RA_TRY(ra_safetensors_writer_declare(writer->states, name, RA_F32, 3, extent,
                                                 &writer->slot[l]));
        }
    }
    snprintf(text, sizeof(text), "[0, %lld]", (long long)writer->cached);
    return begin_file(writer, writer->states, text);
}

static ra_status_t create_next(ra_kv_writer_t *writer)
{
    char path[RA_PATH_MAX], text[64];
    int64_t index, extent[1] = {writer->config->vocab_size};
    RA_TRY(ra_path_join(writer->directory, RA_KV_NEXT, path));
    RA_TRY(ra_safetensors_writer_create(path, &writer->next));
    RA_TRY(ra_safetensors_writer_declare(writer->next, "logprob", RA_F32, 1, extent, &index));
    snprintf(text, sizeof(text), "[%lld, %lld]", (long long)writer->cached,
             (long long)writer->cached + 1);
    return begin_file(writer, writer->next, text);
}

static bool has_linear(const ra_model_config_t *config)
{
    for (int64_t l = 0; l < config->layers; l++) {
        if (config->layer[l].mixer == RA_MIXER_LINEAR) {
            return true;
        }
    }
    return false;
}

static ra_status_t create_files(ra_kv_writer_t *writer)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_directory_make(writer->directory));
    RA_TRY(ra_path_join(writer->directory, RA_KV_INDEX, path));
    if (access(path, F_OK) == 0 || errno != ENOENT) {
        return ra_fail(RA_ERR_USAGE, "kv",
                       "%s: holds a cache already; remove it or choose another "
                       "directory",
                       path);
    }
    for (int64_t i = 0; i < writer->shard_count; i++) {
        RA_TRY(create_shard(writer, &writer->shards[i]));
    }
    if (writer->cached > 0 && has_linear(writer->config)) {
        RA_TRY(create_states(writer));
    }
    return writer->cached > 0 && writer->cached == writer->token_count ? create_next(writer)
                                                                       : RA_OK;
}

ra_status_t ra_kv_writer_create(const char *directory, const ra_kv_params_t *params,
                                ra_kv_writer_t **writer_p)
{
    if (params->tile < 1 || (params->dtype != RA_F32 && params->dtype != RA_BF16)) {
        return ra_fail(RA_ERR_INVALID, "kv", "%s: tile %lld, dtype %s", directory,
                       (long long)params->tile, ra_dtype_name(params->dtype));
    }
    ra_kv_writer_t *writer = calloc(1, sizeof(*writer));
    if (writer == NULL) {
        return no_memory(directory);
    }
    writer->config = params->config;
    writer->token_count = params->token_count;
    writer->tile = params->tile;
    writer->cached = params->token_count / params->tile * params->tile;
    writer->dtype = params->dtype;
    writer->directory = strdup(directory);
    writer->model_digest = strdup(params->model_digest);
    writer->tokenizer_digest = strdup(params->tokenizer_digest);
    writer->tokens = malloc(((size_t)params->token_count + 1) * sizeof(*writer->tokens));
    writer->slot = calloc((size_t)params->config->layers, sizeof(*writer->slot));
    ra_status_t status = RA_OK;
    if (writer->directory == NULL || writer->model_digest == NULL ||
        writer->tokenizer_digest == NULL || writer->tokens == NULL || writer->slot == NULL) {
        status = no_memory(directory);
        goto failed;
    }
    memcpy(writer->tokens, params->tokens, (size_t)params->token_count * sizeof(*writer->tokens));
    RA_TRY_GOTO(take_ranges(writer, params), failed);
    RA_TRY_GOTO(create_files(writer), failed);
    *writer_p = writer;
    return RA_OK;
failed:
    ra_kv_writer_destroy(writer);
    return status;
}

void ra_kv_writer_destroy(ra_kv_writer_t *writer)
{
    if (writer == NULL) {
        return;
    }
    for (int64_t i = 0; i < writer->shard_count; i++) {
        ra_safetensors_writer_destroy(writer->shards[i].file);
    }
    ra_safetensors_writer_destroy(writer->states);
    ra_safetensors_writer_destroy(writer->next);
    free(writer->shards);
    free(writer->slot);
    free(writer->tokens);
    free(writer->model_digest);
    free(writer->tokenizer_digest);
    free(writer->directory);
    free(writer);
}

int64_t ra_kv_writer_tokens(const ra_kv_writer_t *writer)
{
    return writer->cached;
}

/* Put fp32 values at element `at` of a tensor, in the cache's dtype. */
static ra_status_t put_values(const ra_kv_writer_t *writer, ra_safetensors_writer_t *file,
                              int64_t tensor, int64_t at, const float *values, int64_t count)
{
    if (writer->dtype == RA_F32) {
        return ra_safetensors_writer_put(file, tensor, 4 * at, values, 4 * count);
    }
    uint16_t chunk[CHUNK_ELEMENTS];
    for (int64_t done = 0; done < count; done += CHUNK_ELEMENTS) {
        int64_t n = ra_min_i64(CHUNK_ELEMENTS, count - done);
        for (int64_t i = 0; i < n; i++) {
            chunk[i] = ra_bf16_from_f32(values[done + i]);
        }
        RA_TRY(ra_safetensors_writer_put(file, tensor, 2 * (at + done), chunk, 2 * n));
    }
    return RA_OK;
}

ra_status_t ra_kv_writer_put(ra_kv_writer_t *writer, int64_t l, int64_t begin, int64_t count,
                             const float *k, const float *v)
{
    const ra_model_config_t *config = writer->config;
    if (l < 0 || l >= config->layers || config->layer[l].mixer != RA_MIXER_SOFTMAX || begin < 0 ||
        count < 0 || begin > writer->token_count - count) {
        return ra_fail(RA_ERR_INVALID, "kv", "%s: keys of layer %lld, %lld tokens at %lld",
                       writer->directory, (long long)l, (long long)count, (long long)begin);
    }
    int64_t row = config->layer[l].kv_heads * config->head_dim;
    for (int64_t i = 0; i < writer->shard_count; i++) {
        const kv_shard_t *shard = &writer->shards[i];
        int64_t first = ra_max_i64(begin, shard->range.begin);
        int64_t last = ra_min_i64(begin + count, shard->range.end);
        if (first >= last) {
            continue;
        }
        int64_t from = (first - begin) * row, n = (last - first) * row;
        int64_t to = (first - shard->range.begin) * row;
        RA_TRY(put_values(writer, shard->file, writer->slot[l], to, k + from, n));
        RA_TRY(put_values(writer, shard->file, writer->slot[l] + 1, to, v + from, n));
    }
    return RA_OK;
}

ra_status_t ra_kv_writer_put_state(ra_kv_writer_t *writer, int64_t l, const float *state)
{
    const ra_model_config_t *config = writer->config;
    if (l < 0 || l >= config->layers || config->layer[l].mixer != RA_MIXER_LINEAR) {
        return ra_fail(RA_ERR_INVALID, "kv", "%s: state of layer %lld", writer->directory,
                       (long long)l);
    }
    if (writer->states == NULL) {
        return RA_OK; /* nothing is cached */
    }
    int64_t bytes = 4 * config->heads * config->head_dim * config->head_dim;
    return ra_safetensors_writer_put(writer->states, writer->slot[l], 0, state, bytes);
}

ra_status_t ra_kv_writer_put_next(ra_kv_writer_t *writer, const float *logprob)
{
    if (writer->next == NULL) {
        return RA_OK;
    }
    return ra_safetensors_writer_put(writer->next, 0, 0, logprob, 4 * writer->config->vocab_size);
}

/* {"file", "bytes", "digest"} of a file already in place; read back, so that the digest is of what
 * the disk holds. NULL when memory is exhausted. */
static ra_status_t describe_file(const ra_kv_writer_t *writer, const char *name, cJSON **object_p)
{
    char path[RA_PATH_MAX], digest[RA_KV_DIGEST_BYTES];
    ra_mapped_file_t *mapped = NULL;
    RA_TRY(ra_path_join(writer->directory, name, path));
    RA_TRY(ra_mapped_file_open(path, &mapped));
    int64_t length = ra_mapped_file_length(mapped);
    ra_kv_digest(ra_mapped_file_bytes(mapped), length, digest);
    ra_status_t status = ra_mapped_file_verify(mapped);
    ra_mapped_file_close(mapped);
    if (status != RA_OK) {
        return status;
    }
    cJSON *object = cJSON_CreateObject();
    if (object == NULL || cJSON_AddStringToObject(object, "file", name) == NULL ||
        cJSON_AddNumberToObject(object, "bytes", (double)length) == NULL ||
        cJSON_AddStringToObject(object, "digest", digest) == NULL) {
        cJSON_Delete(object);
        return no_memory(writer->directory);
    }
    *object_p = object;
    return RA_OK;
}

/* Give `item` to `object`; frees it when that fails. */
static bool give(cJSON *object, const char *key, cJSON *item)
{
    if (item != NULL && cJSON_AddItemToObject(object, key, item)) {
        return true;
    }
    cJSON_Delete(item);
    return false;
}

static bool give_to_array(cJSON *array, cJSON *item)
{
    if (item != NULL && cJSON_AddItemToArray(array, item)) {
        return true;
    }
    cJSON_Delete(item);
    return false;
}

static bool add_number(cJSON *object, const char *key, double value)
{
    return cJSON_AddNumberToObject(object, key, value) != NULL;
}

static bool add_string(cJSON *object, const char *key, const char *value)
{
    return cJSON_AddStringToObject(object, key, value) != NULL;
}

static cJSON *describe_layer(const ra_layer_config_t *layer, int64_t l)
{
    static const char *const kv[] = {"k", "v"};
    static const char *const state[] = {"state"};
    bool linear = layer->mixer == RA_MIXER_LINEAR;
    const char *kind = linear ? "linear" : layer->window > 0 ? "swa" : "full";
    cJSON *object = cJSON_CreateObject();
    bool ok = object != NULL && add_number(object, "i", (double)l) &&
              add_string(object, "kind", kind) &&
              give(object, "tensors", cJSON_CreateStringArray(linear ? state : kv, linear ? 1 : 2));
    if (ok && layer->window > 0) {
        ok = add_number(object, "window", (double)layer->window);
    }
    if (!ok) {
        cJSON_Delete(object);
        return NULL;
    }
    return object;
}

static cJSON *describe_layers(const ra_model_config_t *config)
{
    cJSON *array = cJSON_CreateArray();
    for (int64_t l = 0; array != NULL && l < config->layers; l++) {
        if (!give_to_array(array, describe_layer(&config->layer[l], l))) {
            cJSON_Delete(array);
            array = NULL;
        }
    }
    return array;
}

static cJSON *describe_rope(const ra_rope_config_t *rope)
{
    cJSON *object = cJSON_CreateObject();
    bool yarn = rope->scaling == RA_ROPE_YARN;
    bool ok = object != NULL && add_number(object, "theta", rope->theta) &&
              add_number(object, "rotary_dim", (double)rope->rotary_dim) &&
              add_string(object, "scaling", yarn ? "yarn" : "none") &&
              add_number(object, "factor", rope->factor) &&
              add_number(object, "attention_factor", rope->attention_factor);
    if (ok && yarn) {
        ok = add_number(object, "original_max_position_embeddings",
                        (double)rope->original_max_positions) &&
             add_number(object, "beta_fast", rope->beta_fast) &&
             add_number(object, "beta_slow", rope->beta_slow);
    }
    if (!ok || cJSON_AddTrueToObject(object, "applied") == NULL) {
        cJSON_Delete(object);
        return NULL;
    }
    return object;
}

static cJSON *describe_producer(void)
{
    cJSON *object = cJSON_CreateObject();
    if (object == NULL || !add_string(object, "name", "ringattn")) {
        cJSON_Delete(object);
        return NULL;
    }
    return object;
}

static bool add_model(const ra_kv_writer_t *writer, cJSON *root)
{
    const ra_model_config_t *config = writer->config;
    const int32_t *tail = writer->tokens + writer->cached;
    int tail_count = (int)(writer->token_count - writer->cached);
    return add_string(root, "format", RA_KV_FORMAT) &&
           add_string(root, "model_type", ra_model_type(config)) &&
           add_string(root, "model_digest", writer->model_digest) &&
           add_string(root, "tokenizer_digest", writer->tokenizer_digest) &&
           add_string(root, "decay_factor", config->decay_factor == RA_DECAY_B ? "B" : "A") &&
           add_number(root, "tokens", (double)writer->cached) &&
           add_string(root, "token_ids", RA_KV_TOKENS) &&
           give(root, "tail_token_ids", cJSON_CreateIntArray(tail, tail_count)) &&
           add_number(root, "tile", (double)writer->tile) &&
           add_string(root, "dtype", ra_dtype_name(writer->dtype)) &&
           give(root, "layers", describe_layers(config)) &&
           give(root, "rope", describe_rope(&config->rope)) &&
           add_string(root, "layout", RA_KV_TENSOR_AXES) && add_string(root, "order", "logical") &&
           give(root, "producer", describe_producer());
}

static ra_status_t add_shards(const ra_kv_writer_t *writer, cJSON *root)
{
    cJSON *array = cJSON_AddArrayToObject(root, "shards");
    for (int64_t i = 0; array != NULL && i < writer->shard_count; i++) {
        const kv_shard_t *shard = &writer->shards[i];
        double range[2] = {(double)shard->range.begin, (double)shard->range.end};
        cJSON *object = NULL;
        RA_TRY(describe_file(writer, shard->name, &object));
        bool ok = give(object, "token_range", cJSON_CreateDoubleArray(range, 2));
        if (!ok || !give_to_array(array, object)) {
            return no_memory(writer->directory);
        }
    }
    return array != NULL ? RA_OK : no_memory(writer->directory);
}

/* Describe a file under a key; null where the cache has no such file. */
static ra_status_t add_file(const ra_kv_writer_t *writer, cJSON *root, const char *key,
                            const ra_safetensors_writer_t *file, const char *name)
{
    cJSON *object = NULL;
    if (file != NULL) {
        RA_TRY(describe_file(writer, name, &object));
    } else {
        object = cJSON_CreateNull();
    }
    return give(root, key, object) ? RA_OK : no_memory(writer->directory);
}

static ra_status_t write_index(const ra_kv_writer_t *writer)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_path_join(writer->directory, RA_KV_INDEX, path));
    cJSON *root = cJSON_CreateObject();
    char *text = NULL;
    ra_status_t status;
    if (root == NULL || !add_model(writer, root)) {
        status = no_memory(writer->directory);
        goto done;
    }
    RA_TRY_GOTO(add_shards(writer, root), done);
    RA_TRY_GOTO(add_file(writer, root, "states", writer->states, RA_KV_STATES), done);
    RA_TRY_GOTO(add_file(writer, root, "next", writer->next, RA_KV_NEXT), done);
    text = cJSON_Print(root);
    status = text != NULL ? ra_file_write_atomic(path, text, (int64_t)strlen(text))
                          : no_memory(writer->directory);
done:
    cJSON_free(text);
    cJSON_Delete(root);
    return status;
}

static ra_status_t write_tokens(const ra_kv_writer_t *writer)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_path_join(writer->directory, RA_KV_TOKENS, path));
    uint32_t *ids = malloc(((size_t)writer->cached + 1) * sizeof(*ids));
    if (ids == NULL) {
        return no_memory(writer->directory);
    }
    for (int64_t i = 0; i < writer->cached; i++) {
        ids[i] = (uint32_t)writer->tokens[i];
    }
    ra_status_t status = ra_npy_write_u32(path, ids, writer->cached);
    free(ids);
    return status;
}

ra_status_t ra_kv_writer_commit(ra_kv_writer_t *writer)
{
    for (int64_t i = 0; i < writer->shard_count; i++) {
        RA_TRY(ra_safetensors_writer_commit(writer->shards[i].file));
    }
    if (writer->states != NULL) {
        RA_TRY(ra_safetensors_writer_commit(writer->states));
    }
    if (writer->next != NULL) {
        RA_TRY(ra_safetensors_writer_commit(writer->next));
    }
    RA_TRY(write_tokens(writer));
    return write_index(writer);
}
