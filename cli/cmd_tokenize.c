#include "base/log.h"
#include "cli/command.h"
#include "cli/error_policy.h"
#include "cli/model_choice.h"
#include "cli/row_tokens.h"
#include "cli/signals.h"
#include <string.h>

static ra_status_t print_row(const ra_row_t *row, bool json)
{
    char id[512];
    if (json) {
        fputs("{\"id\":", stdout);
        ra_row_write_id(stdout, row);
        fputs(",\"tokens\":[", stdout);
    } else {
        ra_log_escape(row->id, id, sizeof(id));
        printf("%s: %lld tokens:", id, (long long)row->count);
    }
    for (int64_t i = 0; i < row->count; i++) {
        printf(json ? (i > 0 ? ",%d" : "%d") : " %d", row->tokens[i]);
    }
    fputs(json ? "]}\n" : "\n", stdout);
    return ferror(stdout) ? ra_flush_stdout() : RA_OK;
}

static ra_status_t tokenize_rows(ra_rows_t *rows, const ra_row_encoder_t *encoder,
                                 ra_error_policy_t *errors, bool json)
{
    for (;;) {
        ra_row_t row;
        bool end;
        RA_TRY(ra_signals_status());
        RA_TRY(ra_rows_next(rows, &row, &end));
        if (end) {
            return ra_error_policy_result(errors);
        }
        errors->rows_read++;
        ra_status_t status = ra_row_tokenize(&row, encoder);
        if (status == RA_OK && row.error != RA_ROW_NONE) {
            status = ra_error_policy_failed(errors, rows, &row);
        } else if (status == RA_OK) {
            status = print_row(&row, json);
        }
        ra_row_free(&row);
        RA_TRY(status);
    }
}

ra_status_t ra_cmd_tokenize(const ra_settings_t *settings)
{
    char model_dir[RA_PATH_MAX];
    ra_rows_t *rows = NULL;
    ra_row_encoder_t encoder = {.bos = -1};
    ra_error_policy_t errors;
    const char *input = ra_settings_text_or_null(settings, RA_SET_INPUT);

    if (input == NULL) {
        return ra_fail(RA_ERR_USAGE, "tokenize", "--in FILE is missing");
    }
    ra_error_policy_init(&errors, settings);
    RA_TRY(ra_model_choose(settings, model_dir));
    RA_TRY(ra_rows_open(input, ra_settings_int(settings, RA_SET_MAX_DOC_BYTES), &rows));
    ra_status_t status = ra_tokenizer_open(model_dir, &encoder.tokenizer);
    if (status == RA_OK) {
        status = tokenize_rows(rows, &encoder, &errors, ra_settings_bool(settings, RA_SET_JSON));
    }
    ra_row_encoder_close(&encoder);
    ra_rows_close(rows);
    ra_status_t flushed = ra_flush_stdout();
    return status == RA_OK || status == RA_ERR_PARTIAL ? (flushed != RA_OK ? flushed : status)
                                                       : status;
}
