#include "base/checked.h"
#include "base/tensor.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include "model/kv_file.h"
#include "model/kv_names.h"
#include "model/npy.h"
#include "model/safetensors.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { INDEX_MAX_BYTES = 256 << 20, SHARDS_MAX = 3000 };

typedef struct kv_shard {
    ra_kv_range_t range;
    ra_safetensors_t *file;
    const unsigned char **data; /* [2 * layers]: k and v of a layer, NULL for linear ones */
} kv_shard_t;

struct ra_kv_reader {
    const ra_model_config_t *config;
    const char *directory;
    char index[RA_PATH_MAX]; /* path of kv.index.json, for messages */
    ra_dtype_t dtype;
    int64_t tile, tokens, tail_count;
    int32_t *ids, *tail;
    kv_shard_t *shards;
    int64_t shard_count;
    ra_safetensors_t *states_file;
    float *states; /* [linear layers][heads, D, D], aligned whatever the file */
    ra_safetensors_t *next_file;
    float *next;         /* [vocab], NULL with tail ids */
    int64_t *state_slot; /* [layers]: which state, -1 for softmax layers */
    int64_t linear_layers;
};

static ra_status_t no_memory(const ra_kv_reader_t *reader)
{
    return ra_fail(RA_ERR_NOMEM, "kv", "%s: no memory to open it", reader->index);
}

/* The string at `key` must be `want`. */
static ra_status_t expect_text(const ra_kv_reader_t *reader, ra_status_t failure, const cJSON *node,
                               const char *key, const char *want)
{
    const char *have = NULL;
    RA_TRY(ra_json_string(reader->index, node, key, &have));
    if (strcmp(have, want) != 0) {
        return ra_fail(failure, "kv", "%s: key \"%s\" is \"%s\", expected \"%s\"", reader->index,
                       key, have, want);
    }
    return RA_OK;
}

static ra_status_t expect_number(const ra_kv_reader_t *reader, const cJSON *node, const char *key,
                                 double want)
{
    double have = 0;
    RA_TRY(ra_json_double(reader->index, node, key, -1e300, 1e300, &have));
    if (have != want) {
        return ra_fail(RA_ERR_USAGE, "kv",
                       "%s: rope: key \"%s\" is %.17g, the model's config says %.17g",
                       reader->index, key, have, want);
    }
    return RA_OK;
}

static ra_status_t check_model(const ra_kv_reader_t *reader, const cJSON *root,
                               const char *model_digest, const char *tokenizer_digest)
{
    const char *tokenizer = NULL;
    RA_TRY(expect_text(reader, RA_ERR_INPUT, root, "format", RA_KV_FORMAT));
    RA_TRY(expect_text(reader, RA_ERR_USAGE, root, "model_type", ra_model_type(reader->config)));
    RA_TRY(expect_text(reader, RA_ERR_USAGE, root, "model_digest", model_digest));
    RA_TRY(ra_json_string(reader->index, root, "tokenizer_digest", &tokenizer));
    if (tokenizer[0] != '\0' && tokenizer_digest[0] != '\0') {
        RA_TRY(expect_text(reader, RA_ERR_USAGE, root, "tokenizer_digest", tokenizer_digest));
    }
    RA_TRY(expect_text(reader, RA_ERR_USAGE, root, "decay_factor",
                       reader->config->decay_factor == RA_DECAY_B ? "B" : "A"));
    RA_TRY(expect_text(reader, RA_ERR_INPUT, root, "layout", RA_KV_TENSOR_AXES));
    RA_TRY(expect_text(reader, RA_ERR_INPUT, root, "order", "logical"));
    return expect_text(reader, RA_ERR_INPUT, root, "token_ids", RA_KV_TOKENS);
}

static ra_status_t check_rope(const ra_kv_reader_t *reader, const cJSON *root)
{
    const ra_rope_config_t *rope = &reader->config->rope;
    const cJSON *node = ra_json_member(root, "rope");
    bool yarn = rope->scaling == RA_ROPE_YARN, applied = false;
    RA_TRY(ra_json_expect_object(reader->index, "rope", node));
    RA_TRY(ra_json_bool(reader->index, node, "applied", &applied));
    if (!applied) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: rope: key \"applied\" is false; true is allowed",
                       reader->index);
    }
    RA_TRY(expect_text(reader, RA_ERR_USAGE, node, "scaling", yarn ? "yarn" : "none"));
    RA_TRY(expect_number(reader, node, "theta", rope->theta));
    RA_TRY(expect_number(reader, node, "rotary_dim", (double)rope->rotary_dim));
    RA_TRY(expect_number(reader, node, "factor", rope->factor));
    RA_TRY(expect_number(reader, node, "attention_factor", rope->attention_factor));
    if (yarn) {
        RA_TRY(expect_number(reader, node, "original_max_position_embeddings",
                             (double)rope->original_max_positions));
        RA_TRY(expect_number(reader, node, "beta_fast", rope->beta_fast));
        RA_TRY(expect_number(reader, node, "beta_slow", rope->beta_slow));
    }
    return RA_OK;
}

static ra_status_t expect_array(const ra_kv_reader_t *reader, const char *key, const cJSON *node)
{
    if (!cJSON_IsArray(node)) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: key \"%s\" must be an array", reader->index, key);
    }
    return RA_OK;
}

static ra_status_t check_layers(const ra_kv_reader_t *reader, const cJSON *root)
{
    const cJSON *layers = ra_json_member(root, "layers"), *node;
    int64_t l = 0;
    RA_TRY(expect_array(reader, "layers", layers));
    cJSON_ArrayForEach(node, layers)
    {
        int64_t at = 0, window = 0;
        RA_TRY(ra_json_int(reader->index, node, "i", l, l, &at));
        if (l >= reader->config->layers) {
            break;
        }
        const ra_layer_config_t *layer = &reader->config->layer[l];
        const char *kind = layer->mixer == RA_MIXER_LINEAR ? "linear"
                           : layer->window > 0             ? "swa"
                                                           : "full";
        RA_TRY(expect_text(reader, RA_ERR_USAGE, node, "kind", kind));
        RA_TRY(ra_json_int_or(reader->index, node, "window", layer->window, layer->window, 0,
                              &window));
        l++;
    }
    if (l != reader->config->layers || cJSON_GetArraySize(layers) != l) {
        return ra_fail(RA_ERR_USAGE, "kv", "%s: %d layers, the model has %lld", reader->index,
                       cJSON_GetArraySize(layers), (long long)reader->config->layers);
    }
    return RA_OK;
}

static ra_status_t check_id(const ra_kv_reader_t *reader, const char *where, int64_t i, int64_t id)
{
    if (id < 0 || id >= reader->config->vocab_size) {
        return ra_fail(RA_ERR_INPUT, "kv",
                       "%s: %s %lld is %lld; ids below vocab_size %lld are "
                       "allowed",
                       reader->index, where, (long long)i, (long long)id,
                       (long long)reader->config->vocab_size);
    }
    return RA_OK;
}

static ra_status_t read_tail(ra_kv_reader_t *reader, const cJSON *root)
{
    const cJSON *tail = ra_json_member(root, "tail_token_ids"), *node;
    RA_TRY(expect_array(reader, "tail_token_ids", tail));
    int64_t count = cJSON_GetArraySize(tail);
    if (count >= reader->tile) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: tail_token_ids holds %lld ids, a tile is %lld",
                       reader->index, (long long)count, (long long)reader->tile);
    }
    reader->tail = malloc(((size_t)count + 1) * sizeof(*reader->tail));
    if (reader->tail == NULL) {
        return no_memory(reader);
    }
    cJSON_ArrayForEach(node, tail)
    {
        double value = cJSON_IsNumber(node) ? node->valuedouble : -1.0;
        int64_t id = value >= 0 && value < 2147483648.0 ? (int64_t)value : -1;
        id = (double)id == value ? id : -1;
        RA_TRY(check_id(reader, "tail_token_ids", reader->tail_count, id));
        reader->tail[reader->tail_count++] = (int32_t)id;
    }
    return RA_OK;
}

static ra_status_t read_ids(ra_kv_reader_t *reader)
{
    char path[RA_PATH_MAX];
    int64_t count = 0;
    RA_TRY(ra_path_join(reader->directory, RA_KV_TOKENS, path));
    if (access(path, F_OK) != 0) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: cannot be opened: %s", path, strerror(errno));
    }
    RA_TRY(ra_tokens_read_file(path, 8 * reader->tokens + 4096, &reader->ids, &count));
    if (count != reader->tokens) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: %lld ids, %s says %lld tokens", path,
                       (long long)count, RA_KV_INDEX, (long long)reader->tokens);
    }
    for (int64_t i = 0; i < count; i++) {
        RA_TRY(check_id(reader, "token", i, reader->ids[i]));
    }
    return RA_OK;
}

/* Open {"file", "bytes", "digest"} and hold the file to both. */
static ra_status_t open_described(const ra_kv_reader_t *reader, const cJSON *node,
                                  ra_safetensors_t **file_p)
{
    const char *name = NULL, *digest = NULL;
    char path[RA_PATH_MAX], have[RA_KV_DIGEST_BYTES];
    int64_t bytes = 0, length = 0;
    RA_TRY(ra_json_string(reader->index, node, "file", &name));
    RA_TRY(ra_json_string(reader->index, node, "digest", &digest));
    RA_TRY(ra_json_int(reader->index, node, "bytes", 0, RA_JSON_MAX_INT, &bytes));
    if (!ra_file_name_plain(name, ".safetensors")) {
        return ra_fail(RA_ERR_INPUT, "kv",
                       "%s: file \"%s\" is not allowed; a name matches "
                       "[A-Za-z0-9._-]+.safetensors, without directories",
                       reader->index, name);
    }
    RA_TRY(ra_path_join(reader->directory, name, path));
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: cannot be opened: %s", path, strerror(errno));
    }
    ra_safetensors_t *file = NULL;
    RA_TRY(ra_safetensors_adopt(fd, path, &file));
    const unsigned char *data = ra_safetensors_bytes(file, &length);
    ra_kv_digest(data, length, have);
    if (length != bytes || strcmp(have, digest) != 0) {
        ra_safetensors_close(file);
        return ra_fail(RA_ERR_INTEGRITY, "kv",
                       "%s: %lld bytes with digest %s, %s says %lld bytes with digest %s", path,
                       (long long)length, have, RA_KV_INDEX, (long long)bytes, digest);
    }
    *file_p = file;
    return RA_OK;
}

/* Data of a tensor that must be there with this dtype and shape. */
static ra_status_t expect_tensor(const ra_safetensors_t *file, int64_t layer, const char *part,
                                 ra_dtype_t dtype, const int64_t extent[3],
                                 const unsigned char **data_p)
{
    char name[RA_KV_NAME_BYTES];
    ra_kv_tensor_name(layer, part, name);
    const ra_safetensors_entry_t *entry = ra_safetensors_find(file, name);
    if (entry == NULL) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: tensor \"%s\" is missing",
                       ra_safetensors_path(file), name);
    }
    const ra_tensor_t *view = &entry->view;
    if (view->dtype != dtype || view->rank != 3 || view->extent[0] != extent[0] ||
        view->extent[1] != extent[1] || view->extent[2] != extent[2]) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: tensor \"%s\": not %s of shape [%lld, %lld, %lld]",
                       ra_safetensors_path(file), name, ra_dtype_name(dtype), (long long)extent[0],
                       (long long)extent[1], (long long)extent[2]);
    }
    *data_p = view->data;
    return RA_OK;
}

static ra_status_t expect_count(const ra_safetensors_t *file, int64_t want)
{
    if (ra_safetensors_count(file) != want) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: %lld tensors, expected %lld",
                       ra_safetensors_path(file), (long long)ra_safetensors_count(file),
                       (long long)want);
    }
    return RA_OK;
}

static ra_status_t open_shard(ra_kv_reader_t *reader, const cJSON *node, int64_t begin,
                              kv_shard_t *shard)
{
    const ra_model_config_t *config = reader->config;
    const cJSON *range = ra_json_member(node, "token_range");
    if (!cJSON_IsArray(range) || cJSON_GetArraySize(range) != 2 || !cJSON_IsNumber(range->child) ||
        !cJSON_IsNumber(range->child->next) || range->child->valuedouble != (double)begin ||
        !(range->child->next->valuedouble > (double)begin) ||
        !(range->child->next->valuedouble <= (double)reader->tokens)) {
        return ra_fail(RA_ERR_INPUT, "kv",
                       "%s: shards: \"token_range\" must be [%lld, end], end at most %lld: ranges "
                       "follow each other",
                       reader->index, (long long)begin, (long long)reader->tokens);
    }
    shard->range = (ra_kv_range_t){begin, (int64_t)range->child->next->valuedouble};
    shard->data = calloc((size_t)config->layers, 2 * sizeof(*shard->data));
    if (shard->data == NULL) {
        return no_memory(reader);
    }
    RA_TRY(open_described(reader, node, &shard->file));
    for (int64_t l = 0; l < config->layers; l++) {
        if (config->layer[l].mixer != RA_MIXER_SOFTMAX) {
            continue;
        }
        int64_t extent[3] = {shard->range.end - begin, config->layer[l].kv_heads, config->head_dim};
        RA_TRY(expect_tensor(shard->file, l, "k", reader->dtype, extent, &shard->data[2 * l]));
        RA_TRY(expect_tensor(shard->file, l, "v", reader->dtype, extent, &shard->data[2 * l + 1]));
    }
    return expect_count(shard->file, 2 * (config->layers - reader->linear_layers));
}

static ra_status_t open_shards(ra_kv_reader_t *reader, const cJSON *root)
{
    const cJSON *shards = ra_json_member(root, "shards"), *node;
    int64_t at = 0;
    RA_TRY(expect_array(reader, "shards", shards));
    int64_t count = cJSON_GetArraySize(shards);
    if (count > SHARDS_MAX) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: %lld shards; at most %d are allowed", reader->index,
                       (long long)count, SHARDS_MAX);
    }
    reader->shards = calloc((size_t)count + 1, sizeof(*reader->shards));
    if (reader->shards == NULL) {
        return no_memory(reader);
    }
    cJSON_ArrayForEach(node, shards)
    {
        kv_shard_t *shard = &reader->shards[reader->shard_count++];
        RA_TRY(open_shard(reader, node, at, shard));
        at = shard->range.end;
    }
    if (at != reader->tokens) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: the shards end at token %lld of %lld",
                       reader->index, (long long)at, (long long)reader->tokens);
    }
    return RA_OK;
}

static ra_status_t open_states(ra_kv_reader_t *reader, const cJSON *root)
{
    const ra_model_config_t *config = reader->config;
    const cJSON *node = ra_json_member(root, "states");
    if (reader->tokens == 0 || reader->linear_layers == 0) {
        return RA_OK;
    }
    RA_TRY(ra_json_expect_object(reader->index, "states", node));
    RA_TRY(open_described(reader, node, &reader->states_file));
    int64_t extent[3] = {config->heads, config->head_dim, config->head_dim};
    int64_t size = extent[0] * extent[1] * extent[2];
    RA_TRY(expect_count(reader->states_file, reader->linear_layers));
    reader->states = calloc((size_t)reader->linear_layers, (size_t)size * sizeof(float));
    if (reader->states == NULL) {
        return no_memory(reader);
    }
    for (int64_t l = 0; l < config->layers; l++) {
        const unsigned char *data = NULL;
        if (config->layer[l].mixer == RA_MIXER_LINEAR) {
            RA_TRY(expect_tensor(reader->states_file, l, "state", RA_F32, extent, &data));
            memcpy(reader->states + reader->state_slot[l] * size, data,
                   (size_t)size * sizeof(float));
        }
    }
    return RA_OK;
}

static ra_status_t open_next(ra_kv_reader_t *reader, const cJSON *root)
{
    const cJSON *node = ra_json_member(root, "next");
    int64_t vocab = reader->config->vocab_size;
    if (reader->tokens == 0 || reader->tail_count > 0) {
        return RA_OK;
    }
    RA_TRY(ra_json_expect_object(reader->index, "next", node));
    RA_TRY(open_described(reader, node, &reader->next_file));
    const ra_safetensors_entry_t *entry = ra_safetensors_find(reader->next_file, "logprob");
    if (entry == NULL || entry->view.dtype != RA_F32 || entry->view.rank != 1 ||
        entry->view.extent[0] != vocab) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: tensor \"logprob\" must be F32 [%lld]",
                       ra_safetensors_path(reader->next_file), (long long)vocab);
    }
    reader->next = malloc((size_t)vocab * sizeof(*reader->next));
    if (reader->next == NULL) {
        return no_memory(reader);
    }
    memcpy(reader->next, entry->view.data, (size_t)vocab * sizeof(*reader->next));
    return RA_OK;
}

static ra_status_t read_sizes(ra_kv_reader_t *reader, const cJSON *root)
{
    const char *dtype = NULL;
    RA_TRY(ra_json_string(reader->index, root, "dtype", &dtype));
    if (ra_dtype_parse(dtype, &reader->dtype) != 0 ||
        (reader->dtype != RA_F32 && reader->dtype != RA_BF16)) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: key \"dtype\" is \"%s\"; F32 and BF16 are allowed",
                       reader->index, dtype);
    }
    RA_TRY(ra_json_int(reader->index, root, "tile", 1, (int64_t)1 << 30, &reader->tile));
    RA_TRY(ra_json_int(reader->index, root, "tokens", 0, (int64_t)1 << 40, &reader->tokens));
    if (reader->tokens % reader->tile != 0) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: tokens %lld is not a multiple of tile %lld",
                       reader->index, (long long)reader->tokens, (long long)reader->tile);
    }
    return RA_OK;
}

static ra_status_t read_index(ra_kv_reader_t *reader, const cJSON *root, const char *model_digest,
                              const char *tokenizer_digest)
{
    if (!cJSON_IsObject(root)) {
        return ra_fail(RA_ERR_INPUT, "kv", "%s: not a JSON object", reader->index);
    }
    RA_TRY(check_model(reader, root, model_digest, tokenizer_digest));
    RA_TRY(check_rope(reader, root));
    RA_TRY(check_layers(reader, root));
    RA_TRY(read_sizes(reader, root));
    RA_TRY(read_tail(reader, root));
    RA_TRY(read_ids(reader));
    RA_TRY(open_shards(reader, root));
    RA_TRY(open_states(reader, root));
    return open_next(reader, root);
}

static ra_status_t number_states(ra_kv_reader_t *reader)
{
    const ra_model_config_t *config = reader->config;
    reader->state_slot = malloc((size_t)config->layers * sizeof(*reader->state_slot));
    if (reader->state_slot == NULL) {
        return no_memory(reader);
    }
    for (int64_t l = 0; l < config->layers; l++) {
        bool linear = config->layer[l].mixer == RA_MIXER_LINEAR;
        reader->state_slot[l] = linear ? reader->linear_layers++ : -1;
    }
    return RA_OK;
}

ra_status_t ra_kv_reader_open(const char *directory, const ra_model_config_t *config,
                              const char *model_digest, const char *tokenizer_digest,
                              ra_kv_reader_t **reader_p)
{
    ra_kv_reader_t *reader = calloc(1, sizeof(*reader));
    cJSON *root = NULL;
    if (reader == NULL) {
        return ra_fail(RA_ERR_NOMEM, "kv", "%s: no memory to open it", directory);
    }
    reader->config = config;
    reader->directory = directory;
    ra_status_t status;
    RA_TRY_GOTO(ra_path_join(directory, RA_KV_INDEX, reader->index), done);
    RA_TRY_GOTO(number_states(reader), done);
    RA_TRY_GOTO(ra_json_read_file(reader->index, INDEX_MAX_BYTES, &root), done);
    RA_TRY_GOTO(read_index(reader, root, model_digest, tokenizer_digest), done);
done:
    cJSON_Delete(root);
    if (status != RA_OK) {
        ra_kv_reader_close(reader);
        return status;
    }
    reader->directory = NULL; /* the caller's; not needed any more */
    *reader_p = reader;
    return RA_OK;
}

void ra_kv_reader_close(ra_kv_reader_t *reader)
{
    if (reader == NULL) {
        return;
    }
    for (int64_t i = 0; i < reader->shard_count; i++) {
        ra_safetensors_close(reader->shards[i].file);
        free(reader->shards[i].data);
    }
    free(reader->shards);
    ra_safetensors_close(reader->states_file);
    free(reader->states);
    ra_safetensors_close(reader->next_file);
    free(reader->next);
    free(reader->state_slot);
    free(reader->ids);
    free(reader->tail);
    free(reader);
}

int64_t ra_kv_reader_tile(const ra_kv_reader_t *reader)
{
    return reader->tile;
}

ra_dtype_t ra_kv_reader_dtype(const ra_kv_reader_t *reader)
{
    return reader->dtype;
}

int64_t ra_kv_reader_tokens(const ra_kv_reader_t *reader, const int32_t **ids_p)
{
    *ids_p = reader->ids;
    return reader->tokens;
}

int64_t ra_kv_reader_tail(const ra_kv_reader_t *reader, const int32_t **ids_p)
{
    *ids_p = reader->tail;
    return reader->tail_count;
}

/* Elements [at, at + count) of a tensor as fp32; memcpy because a file may misalign them. */
static void widen(ra_dtype_t dtype, const unsigned char *data, int64_t at, int64_t count,
                  float *values)
{
    if (dtype == RA_F32) {
        memcpy(values, data + 4 * at, (size_t)count * sizeof(*values));
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, data + 2 * (at + i), sizeof(bits));
        values[i] = ra_bf16_to_f32(bits);
    }
}

ra_status_t ra_kv_reader_get(const ra_kv_reader_t *reader, int64_t l, int64_t begin, int64_t count,
                             float *k, float *v)
{
    const ra_model_config_t *config = reader->config;
    if (l < 0 || l >= config->layers || config->layer[l].mixer != RA_MIXER_SOFTMAX || begin < 0 ||
        count < 0 || begin > reader->tokens - count) {
        return ra_fail(RA_ERR_INVALID, "kv", "%s: keys of layer %lld, %lld tokens at %lld",
                       reader->index, (long long)l, (long long)count, (long long)begin);
    }
    int64_t row = config->layer[l].kv_heads * config->head_dim;
    for (int64_t i = 0; i < reader->shard_count; i++) {
        const kv_shard_t *shard = &reader->shards[i];
        int64_t first = ra_max_i64(begin, shard->range.begin);
        int64_t last = ra_min_i64(begin + count, shard->range.end);
        if (first < last) {
            int64_t from = (first - shard->range.begin) * row, n = (last - first) * row;
            widen(reader->dtype, shard->data[2 * l], from, n, k + (first - begin) * row);
            widen(reader->dtype, shard->data[2 * l + 1], from, n, v + (first - begin) * row);
        }
    }
    return RA_OK;
}

const float *ra_kv_reader_state(const ra_kv_reader_t *reader, int64_t l)
{
    const ra_model_config_t *config = reader->config;
    if (reader->states == NULL || reader->state_slot[l] < 0) {
        return NULL;
    }
    int64_t size = config->heads * config->head_dim * config->head_dim;
    return reader->states + reader->state_slot[l] * size;
}

const float *ra_kv_reader_next(const ra_kv_reader_t *reader)
{
    return reader->next;
}

ra_status_t ra_kv_reader_verify(const ra_kv_reader_t *reader)
{
    for (int64_t i = 0; i < reader->shard_count; i++) {
        RA_TRY(ra_safetensors_verify(reader->shards[i].file));
    }
    return reader->states_file != NULL ? ra_safetensors_verify(reader->states_file) : RA_OK;
}
