/*
 * Any bytes as one of the JSON files: the first byte chooses which.
 *   'j' a JSON text alone   'c' config.json   'i' model.safetensors.index.json   'k' kv.index.json
 * The last two are files by nature, so each process keeps a directory with the files around them.
 */
#include "model/checkpoint.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include "model/kv_file.h"
#include "model/model_config.h"
#include "model/safetensors_write.h"
#include "tests/fuzz/fuzz_support.h"
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static const char tiny_config[] =
    "{\"model_type\":\"bailing_moe_linear\",\"hidden_size\":8,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\"layer_group_size\":2,"
    "\"first_k_dense_replace\":1,\"intermediate_size\":8,\"moe_intermediate_size\":4,"
    "\"num_experts\":4,\"num_experts_per_tok\":2,\"norm_topk_prob\":true,"
    "\"routed_scaling_factor\":1.0,\"moe_router_enable_expert_bias\":true,\"use_qk_norm\":true,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-6,\"vocab_size\":16}";

/* in memory where there is such a place: a file system would set the pace */
static char directory[] = "/dev/shm/fuzz_json-XXXXXX";
static const char on_disk[] = "/tmp/fuzz_json-XXXXXX";
static ra_model_config_t *config;

static void must(ra_status_t status)
{
    if (status != RA_OK) {
        fprintf(stderr, "fuzz_json: %s\n", ra_last_error());
        abort();
    }
}

static void remove_directory(void)
{
    static const char *const names[] = {"a.safetensors",
                                        "b.safetensors",
                                        "model.safetensors.index.json",
                                        "kv.index.json",
                                        "kv-00001-of-00001.safetensors",
                                        "states.safetensors",
                                        "tokens.u32.npy"};
    char path[RA_PATH_MAX];
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        must(ra_path_join(directory, names[i], path));
        unlink(path);
    }
    rmdir(directory);
}

static void write_shard(const char *name, const char *tensor)
{
    char path[RA_PATH_MAX];
    ra_safetensors_writer_t *writer = NULL;
    int64_t extent = 2, index = 0;
    float values[2] = {1.0f, 2.0f};
    must(ra_path_join(directory, name, path));
    must(ra_safetensors_writer_create(path, &writer));
    must(ra_safetensors_writer_declare(writer, tensor, RA_F32, 1, &extent, &index));
    must(ra_safetensors_writer_begin(writer));
    must(ra_safetensors_writer_put(writer, index, 0, values, 8));
    must(ra_safetensors_writer_commit(writer));
    ra_safetensors_writer_destroy(writer);
}

static void write_cache(void)
{
    static const int32_t tokens[5] = {1, 2, 3, 4, 5};
    static const ra_kv_range_t range = {0, 5};
    float k[20] = {0}, state[32] = {0};
    ra_kv_writer_t *writer = NULL;
    ra_kv_params_t params = {.config = config,
                             .model_digest = "xxh3:0",
                             .tokenizer_digest = "",
                             .tokens = tokens,
                             .token_count = 5,
                             .tile = 2,
                             .dtype = RA_F32,
                             .ranges = &range,
                             .range_count = 1};
    must(ra_kv_writer_create(directory, &params, &writer));
    must(ra_kv_writer_put(writer, 1, 0, 5, k, k));
    must(ra_kv_writer_put_state(writer, 0, state));
    must(ra_kv_writer_commit(writer));
    ra_kv_writer_destroy(writer);
}

static void prepare(void)
{
    if (config != NULL) {
        return;
    }
    must(ra_model_config_parse("tiny", tiny_config, sizeof(tiny_config) - 1, RA_DECAY_A, &config));
    if (mkdtemp(directory) == NULL) {
        memcpy(directory, on_disk, sizeof(on_disk));
        if (mkdtemp(directory) == NULL) {
            abort();
        }
    }
    atexit(remove_directory);
    write_shard("a.safetensors", "one");
    write_shard("b.safetensors", "two");
    write_cache();
}

static void put_file(const char *name, const uint8_t *data, size_t size)
{
    char path[RA_PATH_MAX];
    must(ra_path_join(directory, name, path));
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) {
        abort();
    }
    close(fd);
}

static ra_status_t try_config(const uint8_t *data, size_t size)
{
    ra_model_config_t *parsed = NULL;
    ra_status_t status = ra_model_config_parse("config.json", (const char *)data, (int64_t)size,
                                               RA_DECAY_B, &parsed);
    if (status == RA_OK) {
        double inv_freq[512];
        ra_rope_inv_freq(&parsed->rope, inv_freq);
        for (int64_t i = 0; i < parsed->layers * parsed->heads; i++) {
            if (!(parsed->log_decay[i] <= 0.0f)) {
                abort();
            }
        }
    }
    ra_model_config_destroy(parsed);
    return status;
}

static ra_status_t try_index(const uint8_t *data, size_t size)
{
    ra_checkpoint_t *checkpoint = NULL;
    put_file("model.safetensors.index.json", data, size);
    ra_status_t status = ra_checkpoint_open(directory, &checkpoint);
    ra_checkpoint_close(checkpoint);
    return status;
}

static ra_status_t try_kv_index(const uint8_t *data, size_t size)
{
    ra_kv_reader_t *reader = NULL;
    put_file("kv.index.json", data, size);
    ra_status_t status = ra_kv_reader_open(directory, config, "xxh3:0", "", &reader);
    if (status == RA_OK) {
        const int32_t *ids = NULL;
        float k[64], v[64];
        int64_t tokens = ra_kv_reader_tokens(reader, &ids);
        ra_kv_reader_tail(reader, &ids);
        must(ra_kv_reader_get(reader, 1, 0, tokens < 16 ? tokens : 16, k, v));
    }
    ra_kv_reader_close(reader);
    return status;
}

static ra_status_t try_json(const uint8_t *data, size_t size)
{
    cJSON *root = NULL;
    ra_status_t status = ra_json_parse("text.json", (const char *)data, (int64_t)size, &root);
    if (status == RA_OK) {
        char *text = cJSON_PrintUnformatted(root);
        cJSON_Delete(root);
        root = NULL;
        /* what was accepted is accepted again; a number may have become null by overflow */
        must(ra_json_parse("again.json", text, (int64_t)strlen(text), &root));
        cJSON_free(text);
    }
    cJSON_Delete(root);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_quiet();
    prepare();
    if (size == 0) {
        return 0;
    }
    ra_status_t status = RA_OK;
    switch (data[0]) {
    case 'j':
        status = try_json(data + 1, size - 1);
        break;
    case 'c':
        status = try_config(data + 1, size - 1);
        break;
    case 'i':
        status = try_index(data + 1, size - 1);
        break;
    case 'k':
        status = try_kv_index(data + 1, size - 1);
        break;
    default:
        break;
    }
    fuzz_check_refusal(status);
    return 0;
}
