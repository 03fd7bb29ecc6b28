#include "cli/row_tokens.h"

#include "base/log.h"
#include "model/file_io.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static ra_status_t find_bos(ra_row_encoder_t *encoder, const char *model_dir,
                            const ra_model_config_t *config)
{
    ra_bos_t bos;
    RA_TRY(ra_model_bos(config, model_dir, &bos));
    int64_t id = bos.id;
    if (id < 0 && bos.token[0] != '\0' && encoder->tokenizer != NULL) {
        id = ra_tokenizer_token_id(encoder->tokenizer, bos.token);
    }
    if (id < 0) {
        return ra_fail(RA_ERR_USAGE, "score",
                       "--bos once: neither config.json (bos_token_id) nor tokenizer_config.json "
                       "(bos_token) of %s names a BOS token",
                       model_dir);
    }
    if (id >= config->vocab_size) {
        return ra_fail(RA_ERR_USAGE, "score",
                       "--bos once: BOS id %lld of %s is not below "
                       "vocab_size %lld",
                       (long long)id, model_dir, (long long)config->vocab_size);
    }
    encoder->bos = (int32_t)id;
    return RA_OK;
}

ra_status_t ra_row_encoder_open(ra_row_encoder_t *encoder, const char *model_dir,
                                const ra_model_config_t *config, bool with_bos)
{
    char path[RA_PATH_MAX];
    *encoder = (ra_row_encoder_t){.vocab_size = config->vocab_size, .bos = -1};
    RA_TRY(ra_path_join(model_dir, "tokenizer.json", path));
    if (access(path, F_OK) == 0) {
        RA_TRY(ra_tokenizer_open(model_dir, &encoder->tokenizer));
    }
    return with_bos ? find_bos(encoder, model_dir, config) : RA_OK;
}

void ra_row_encoder_close(ra_row_encoder_t *encoder)
{
    ra_tokenizer_close(encoder->tokenizer);
    encoder->tokenizer = NULL;
}

static ra_status_t encode_text(ra_row_t *row, const ra_row_encoder_t *encoder)
{
    if (encoder->tokenizer == NULL) {
        ra_row_fail(row, RA_ROW_NOT_TOKENIZED, "the model directory has no tokenizer.json");
        return RA_OK;
    }
    ra_log_set_quiet(1);
    ra_status_t status = ra_tokenizer_encode(encoder->tokenizer, row->text, row->counts.bytes,
                                             &row->tokens, &row->count);
    ra_log_set_quiet(0);
    if (status == RA_ERR_NOMEM) {
        return ra_fail(status, "input", "%s", ra_last_error());
    }
    if (status != RA_OK) {
        row->tokens = NULL;
        ra_row_fail(row, RA_ROW_NOT_TOKENIZED, "%s", ra_last_error());
    } else if (row->count == 0) {
        ra_row_fail(row, RA_ROW_NO_TOKENS, "the text has no tokens");
    }
    return RA_OK;
}

ra_status_t ra_row_tokenize(ra_row_t *row, const ra_row_encoder_t *encoder)
{
    if (row->error == RA_ROW_NONE && row->text != NULL) {
        RA_TRY(encode_text(row, encoder));
    }
    if (row->error != RA_ROW_NONE) {
        return RA_OK;
    }
    for (int64_t i = 0; i < row->count; i++) {
        if (row->tokens[i] < 0 ||
            (encoder->vocab_size > 0 && row->tokens[i] >= encoder->vocab_size)) {
            ra_row_fail(row, RA_ROW_BAD_TOKEN, "token %lld is %d, not below vocab_size %lld",
                        (long long)i, row->tokens[i], (long long)encoder->vocab_size);
            return RA_OK;
        }
    }
    if (encoder->bos >= 0) {
        int32_t *longer = realloc(row->tokens, (size_t)(row->count + 1) * sizeof(*longer));
        if (longer == NULL) {
            return ra_fail(RA_ERR_NOMEM, "input", "cannot hold %lld tokens", (long long)row->count);
        }
        memmove(longer + 1, longer, (size_t)row->count * sizeof(*longer));
        longer[0] = encoder->bos;
        row->tokens = longer;
        row->has_bos = true;
    }
    return RA_OK;
}
