#include "base/log.h"
#include "cli/command.h"
#include "cli/error_policy.h"
#include "cli/json_write.h"
#include "cli/model_choice.h"
#include "cli/row_tokens.h"
#include "cli/signals.h"
#include "model/model_tensors.h"
#include <string.h>

/* What was found; printed as text or JSON at the end. */
typedef struct findings {
    char model_dir[RA_PATH_MAX];
    ra_model_config_t *config;
    ra_model_weights_t *weights;
    const char *model_digest;
    ra_row_encoder_t encoder;
    int64_t linear_layers, softmax_layers, moe_layers;
    int64_t tokenizer_size; /* -1: no tokenizer */
    int64_t bos;            /* -1: none */
    int64_t rows, rows_failed, tokens, longest;
    int warnings;
    ra_status_t data_status;
} findings_t;

static void warn(findings_t *found, const char *text)
{
    ra_log(RA_LOG_WARN, "validate", "%s", text);
    found->warnings++;
}

static void count_layers(findings_t *found)
{
    for (int64_t l = 0; l < found->config->layers; l++) {
        const ra_layer_config_t *layer = &found->config->layer[l];
        found->linear_layers += layer->mixer == RA_MIXER_LINEAR;
        found->softmax_layers += layer->mixer == RA_MIXER_SOFTMAX;
        found->moe_layers += layer->feed_forward == RA_FFN_MOE;
    }
}

static ra_status_t check_bos(findings_t *found)
{
    ra_bos_t bos;
    RA_TRY(ra_model_bos(found->config, found->model_dir, &bos));
    found->bos = bos.id;
    if (bos.id < 0 && bos.token[0] != '\0' && found->encoder.tokenizer != NULL) {
        found->bos = ra_tokenizer_token_id(found->encoder.tokenizer, bos.token);
    }
    return RA_OK;
}

static ra_status_t check_model(const ra_settings_t *settings, findings_t *found)
{
    char text[256];
    RA_TRY(ra_model_choose(settings, found->model_dir));
    RA_TRY(ra_model_config_load(found->model_dir, ra_decay_factor_of(settings), &found->config));
    RA_TRY(ra_model_weights_open(found->model_dir, found->config, &found->weights));
    RA_TRY(ra_model_digest(found->weights, &found->model_digest));
    RA_TRY(ra_row_encoder_open(&found->encoder, found->model_dir, found->config, false));
    count_layers(found);
    RA_TRY(check_bos(found));

    found->tokenizer_size = -1;
    if (found->encoder.tokenizer == NULL) {
        warn(found, "no tokenizer.json: only token input can be scored");
        return RA_OK;
    }
    found->tokenizer_size = ra_tokenizer_vocab_size(found->encoder.tokenizer);
    if (found->tokenizer_size > found->config->vocab_size) {
        snprintf(text, sizeof(text),
                 "the tokenizer has ids up to %lld, but vocab_size is %lld: rows that use the ids "
                 "beyond it will fail",
                 (long long)found->tokenizer_size - 1, (long long)found->config->vocab_size);
        warn(found, text);
    }
    return RA_OK;
}

static ra_status_t check_row(findings_t *found, ra_error_policy_t *errors, const ra_rows_t *rows,
                             ra_row_t *row)
{
    errors->rows_read++;
    RA_TRY(ra_row_tokenize(row, &found->encoder));
    if (row->error != RA_ROW_NONE) {
        return ra_error_policy_failed(errors, rows, row);
    }
    found->tokens += row->count;
    found->longest = row->count > found->longest ? row->count : found->longest;
    return RA_OK;
}

static ra_status_t check_data(const ra_settings_t *settings, findings_t *found, ra_rows_t *rows)
{
    ra_error_policy_t errors;
    ra_status_t status = RA_OK;
    bool end = false;
    ra_error_policy_init(&errors, settings);
    while (status == RA_OK) {
        ra_row_t row;
        RA_TRY(ra_signals_status());
        RA_TRY(ra_rows_next(rows, &row, &end));
        if (end) {
            break;
        }
        status = check_row(found, &errors, rows, &row);
        ra_row_free(&row);
    }
    found->rows = errors.rows_read;
    found->rows_failed = errors.rows_failed;
    if (found->longest > found->config->max_position_embeddings) {
        warn(found, "a document has more tokens than max_position_embeddings; its row will be "
                    "flagged beyond_max_positions");
    }
    return status == RA_OK ? ra_error_policy_result(&errors) : status;
}

static void print_json(const findings_t *found, bool with_data)
{
    const ra_model_config_t *config = found->config;
    char dir[RA_PATH_MAX];
    ra_log_escape(found->model_dir, dir, sizeof(dir));
    fputs("{\"model_dir\":", stdout);
    ra_json_write_string(stdout, dir);
    printf(",\"model_type\":\"%s\",\"model\":\"%s\",\"parameters\":%lld,\"weight_bytes\":%lld,"
           "\"layers\":%lld,\"linear_layers\":%lld,\"softmax_layers\":%lld,\"moe_layers\":%lld,"
           "\"experts\":%lld,\"vocab_size\":%lld,\"max_position_embeddings\":%lld,"
           "\"rope_scaling\":\"%s\",\"decay_factor\":\"%s\",\"tokenizer\":",
           ra_model_type(config), found->model_digest,
           (long long)ra_model_parameters(found->weights),
           (long long)ra_model_weight_bytes(found->weights), (long long)config->layers,
           (long long)found->linear_layers, (long long)found->softmax_layers,
           (long long)found->moe_layers, (long long)config->experts, (long long)config->vocab_size,
           (long long)config->max_position_embeddings,
           config->rope.scaling == RA_ROPE_YARN ? "yarn" : "none",
           config->decay_factor == RA_DECAY_B ? "B" : "A");
    const ra_tokenizer_t *tokenizer = found->encoder.tokenizer;
    ra_json_write_string(stdout, tokenizer != NULL ? ra_tokenizer_digest(tokenizer) : NULL);
    fputs(",\"tokenizer_ids\":", stdout);
    ra_json_write_count(stdout, found->tokenizer_size);
    fputs(",\"bos_token_id\":", stdout);
    ra_json_write_count(stdout, found->bos);
    if (with_data) {
        printf(",\"rows\":%lld,\"rows_failed\":%lld,\"tokens\":%lld,\"longest\":%lld",
               (long long)found->rows, (long long)found->rows_failed, (long long)found->tokens,
               (long long)found->longest);
    }
    printf(",\"warnings\":%d,\"result\":\"%s\"}\n", found->warnings,
           found->data_status == RA_OK ? "valid" : "data has errors");
}

static void print_text(const findings_t *found, bool with_data)
{
    const ra_model_config_t *config = found->config;
    char dir[RA_PATH_MAX];
    ra_log_escape(found->model_dir, dir, sizeof(dir));
    printf("model      %s  (%s, %s)\n", dir, ra_model_type(config), found->model_digest);
    printf("weights    %lld parameters, %.1f MiB, every tensor present and of the right shape\n",
           (long long)ra_model_parameters(found->weights),
           (double)ra_model_weight_bytes(found->weights) / 1048576);
    printf("layers     %lld: %lld linear, %lld softmax; %lld with %lld experts, %lld a token\n",
           (long long)config->layers, (long long)found->linear_layers,
           (long long)found->softmax_layers, (long long)found->moe_layers,
           (long long)config->experts, (long long)config->experts_per_token);
    printf("decay      layer factor %s\n", config->decay_factor == RA_DECAY_B
                                               ? "B: f(l) = 1 - (l-1)/(L-1) + 1e-5"
                                               : "A: f(l) = 1 - l/(L-1) + 1e-5");
    printf("positions  up to %lld, rope scaling %s\n", (long long)config->max_position_embeddings,
           config->rope.scaling == RA_ROPE_YARN ? "yarn" : "none");
    if (found->encoder.tokenizer != NULL) {
        printf("tokenizer  %lld ids for vocab_size %lld  (%s)\n", (long long)found->tokenizer_size,
               (long long)config->vocab_size, ra_tokenizer_digest(found->encoder.tokenizer));
    } else {
        printf("tokenizer  none\n");
    }
    if (found->bos >= 0) {
        printf("bos        %lld\n", (long long)found->bos);
    } else {
        printf("bos        none: --bos once is not possible\n");
    }
    if (with_data) {
        printf("data       %lld rows, %lld bad, %lld tokens, longest document %lld\n",
               (long long)found->rows, (long long)found->rows_failed, (long long)found->tokens,
               (long long)found->longest);
    }
    printf("result: %s, %d warning%s\n", found->data_status == RA_OK ? "valid" : "data has errors",
           found->warnings, found->warnings == 1 ? "" : "s");
}

static ra_status_t validate(const ra_settings_t *settings, findings_t *found, ra_rows_t *rows)
{
    RA_TRY(check_model(settings, found));
    if (rows != NULL) {
        found->data_status = check_data(settings, found, rows);
    }
    if (ra_settings_bool(settings, RA_SET_JSON)) {
        print_json(found, rows != NULL);
    } else {
        print_text(found, rows != NULL);
    }
    RA_TRY(ra_flush_stdout());
    return found->data_status;
}

ra_status_t ra_cmd_validate(const ra_settings_t *settings)
{
    findings_t found = {.tokenizer_size = -1, .bos = -1, .encoder = {.bos = -1}};
    ra_rows_t *rows = NULL;
    const char *input = ra_settings_text_or_null(settings, RA_SET_INPUT);
    if (input != NULL) {
        RA_TRY(ra_rows_open(input, ra_settings_int(settings, RA_SET_MAX_DOC_BYTES), &rows));
    }
    ra_status_t status = validate(settings, &found, rows);
    ra_row_encoder_close(&found.encoder);
    ra_model_weights_destroy(found.weights);
    ra_model_config_destroy(found.config);
    ra_rows_close(rows);
    return status;
}
