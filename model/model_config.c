#include "model/model_config.h"

#include "model/families.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CONFIG_MAX_BYTES = 16 << 20, TOKENIZER_CONFIG_MAX_BYTES = 64 << 20 };

ra_status_t ra_config_refuse_true(const char *file, const cJSON *root, const char *key,
                                  const char *meaning)
{
    bool value = false;
    RA_TRY(ra_json_bool_or(file, root, key, false, &value));
    if (value) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: key \"%s\" is true: %s is not implemented; false is allowed", file, key,
                       meaning);
    }
    return RA_OK;
}

ra_status_t ra_config_divides(const char *file, const char *key, int64_t a, const char *by_key,
                              int64_t b)
{
    if (a % b != 0) {
        return ra_fail(RA_ERR_INPUT, "config", "%s: %s %lld is not a multiple of %s %lld", file,
                       key, (long long)a, by_key, (long long)b);
    }
    return RA_OK;
}

static ra_status_t refuse_quantised(const char *file, const cJSON *root)
{
    static const char *const keys[] = {"quantization_config", "quantization"};
    for (size_t i = 0; i < RA_ARRAY_LEN(keys); i++) {
        const cJSON *node = ra_json_member(root, keys[i]);
        if (node != NULL) {
            const char *method = "unknown";
            if (cJSON_IsObject(node)) {
                RA_TRY(ra_json_string_or(file, node, "quant_method", method, &method));
            }
            return ra_fail(RA_ERR_INPUT, "config",
                           "%s: key \"%s\" (method %s): quantised weights are not implemented; "
                           "use the BF16, F16 or F32 checkpoint",
                           file, keys[i], method);
        }
    }
    return RA_OK;
}

static ra_status_t find_family(const char *file, const cJSON *root, const ra_family_t **family_p)
{
    const char *type = NULL;
    RA_TRY(ra_json_string(file, root, "model_type", &type));
    const ra_family_t *family = ra_family_find(type);
    if (family == NULL) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: key \"model_type\" is \"%s\"; known families: %s", file, type,
                       ra_family_names());
    }
    *family_p = family;
    return RA_OK;
}

static ra_status_t allocate_layers(ra_model_config_t *config)
{
    config->layer = calloc((size_t)config->layers, sizeof(*config->layer));
    config->log_decay = calloc((size_t)(config->layers * config->heads), sizeof(float));
    if (config->layer == NULL || config->log_decay == NULL) {
        return ra_fail(RA_ERR_NOMEM, "config", "%s: no memory for %lld layers", config->path,
                       (long long)config->layers);
    }
    return RA_OK;
}

static void fill_log_decay(ra_model_config_t *config)
{
    for (int64_t l = 0; l < config->layers; l++) {
        float *row = config->log_decay + l * config->heads;
        if (config->layer[l].mixer != RA_MIXER_LINEAR) {
            continue;
        }
        ra_decay_slopes(config->heads, l, config->layers, config->decay_factor, row);
        for (int64_t h = 0; h < config->heads; h++) {
            row[h] = -row[h];
        }
    }
}

static ra_status_t build(const char *name, const cJSON *root, ra_decay_factor_t decay_factor,
                         ra_model_config_t *config)
{
    if (!cJSON_IsObject(root)) {
        return ra_fail(RA_ERR_INPUT, "config", "%s: not a JSON object", name);
    }
    snprintf(config->path, sizeof(config->path), "%s", name);
    config->decay_factor = decay_factor;
    RA_TRY(find_family(name, root, &config->family));
    RA_TRY(refuse_quantised(name, root));
    RA_TRY(config->family->read(name, root, config));
    RA_TRY(ra_json_int_or(name, root, "bos_token_id", 0, config->vocab_size - 1, -1,
                          &config->bos_token_id));
    RA_TRY(allocate_layers(config));
    RA_TRY(config->family->read_layers(name, root, config));
    fill_log_decay(config);
    return RA_OK;
}

ra_status_t ra_model_config_parse(const char *name, const char *bytes, int64_t length,
                                  ra_decay_factor_t decay_factor, ra_model_config_t **config_p)
{
    cJSON *root = NULL;
    RA_TRY(ra_json_parse(name, bytes, length, &root));
    ra_model_config_t *config = calloc(1, sizeof(*config));
    ra_status_t status = config != NULL
                             ? build(name, root, decay_factor, config)
                             : ra_fail(RA_ERR_NOMEM, "config", "%s: no memory for it", name);
    cJSON_Delete(root);
    if (status != RA_OK) {
        ra_model_config_destroy(config);
        return status;
    }
    *config_p = config;
    return RA_OK;
}

ra_status_t ra_model_config_load(const char *model_dir, ra_decay_factor_t decay_factor,
                                 ra_model_config_t **config_p)
{
    char path[RA_PATH_MAX];
    char *bytes = NULL;
    int64_t length = 0;
    RA_TRY(ra_path_join(model_dir, "config.json", path));
    RA_TRY(ra_file_read(path, CONFIG_MAX_BYTES, &bytes, &length));
    ra_status_t status = ra_model_config_parse(path, bytes, length, decay_factor, config_p);
    free(bytes);
    return status;
}

void ra_model_config_destroy(ra_model_config_t *config)
{
    if (config == NULL) {
        return;
    }
    free(config->layer);
    free(config->log_decay);
    free(config);
}

const float *ra_model_log_decay(const ra_model_config_t *config, int64_t l)
{
    return config->log_decay + l * config->heads;
}

const char *ra_model_type(const ra_model_config_t *config)
{
    return config->family->model_type;
}

static ra_status_t read_bos_token(const char *path, const cJSON *root, ra_bos_t *bos)
{
    const cJSON *node = ra_json_member(root, "bos_token");
    const char *token = NULL;
    if (node == NULL) {
        return RA_OK;
    }
    if (cJSON_IsObject(node)) {
        RA_TRY(ra_json_string(path, node, "content", &token));
    } else {
        RA_TRY(ra_json_string(path, root, "bos_token", &token));
    }
    if (strlen(token) >= sizeof(bos->token)) {
        return ra_fail(RA_ERR_INPUT, "config", "%s: key \"bos_token\" has more than %zu bytes",
                       path, sizeof(bos->token) - 1);
    }
    snprintf(bos->token, sizeof(bos->token), "%s", token);
    return RA_OK;
}

ra_status_t ra_model_bos(const ra_model_config_t *config, const char *model_dir, ra_bos_t *bos)
{
    char path[RA_PATH_MAX];
    cJSON *root = NULL;
    *bos = (ra_bos_t){.id = config->bos_token_id};
    if (bos->id >= 0) {
        return RA_OK;
    }
    RA_TRY(ra_path_join(model_dir, "tokenizer_config.json", path));
    if (access(path, F_OK) != 0 && errno == ENOENT) {
        return RA_OK;
    }
    RA_TRY(ra_json_read_file(path, TOKENIZER_CONFIG_MAX_BYTES, &root));
    ra_status_t status = read_bos_token(path, root, bos);
    cJSON_Delete(root);
    return status;
}
