#include "base/clock.h"
#include "base/log.h"
#include "cli/command.h"
#include "cli/json_write.h"
#include "cli/model_choice.h"
#include "cli/row_tokens.h"
#include "cli/signals.h"
#include "model/kv_file.h"
#include "model/npy.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct prefill {
    const ra_settings_t *settings;
    const char *out_dir; /* or NULL */
    ra_session_t *session;
    ra_row_encoder_t encoder;
    ra_kv_reader_t *prefix; /* or NULL */
    ra_row_t row;
    float *logprob; /* or NULL */
    int64_t logprob_count;
    ra_prefill_result_t result;
    double seconds;
} prefill_t;

/* The one document of the input. */
static ra_status_t read_document(ra_rows_t *rows, const ra_row_encoder_t *encoder, ra_row_t *row)
{
    char place[700];
    ra_row_t second;
    bool end;
    RA_TRY(ra_rows_next(rows, row, &end));
    if (end) {
        return ra_fail(RA_ERR_INPUT, "prefill", "%s holds no document", ra_rows_name(rows));
    }
    RA_TRY(ra_row_tokenize(row, encoder));
    if (row->error != RA_ROW_NONE) {
        ra_row_place(rows, row, place, sizeof(place));
        return ra_fail(RA_ERR_INPUT, "prefill", "%s: %s (%s)", place, row->message,
                       ra_row_error_code(row->error));
    }
    RA_TRY(ra_rows_next(rows, &second, &end));
    ra_row_free(&second);
    if (!end) {
        return ra_fail(RA_ERR_USAGE, "prefill",
                       "%s holds more than one document; prefill takes one", ra_rows_name(rows));
    }
    return RA_OK;
}

static const char *tokenizer_digest(const prefill_t *prefill)
{
    const ra_tokenizer_t *tokenizer = prefill->encoder.tokenizer;
    return tokenizer != NULL ? ra_tokenizer_digest(tokenizer) : "";
}

static ra_status_t open_prefix(prefill_t *prefill, const char *dir, bool with_bos)
{
    if (with_bos) {
        return ra_fail(RA_ERR_USAGE, "prefill",
                       "--bos once with --continue: a BOS belongs before the first token only");
    }
    return ra_kv_reader_open(dir, ra_session_config(prefill->session),
                             ra_session_model_digest(prefill->session), tokenizer_digest(prefill),
                             &prefill->prefix);
}

static ra_status_t run(prefill_t *prefill)
{
    const ra_settings_t *settings = prefill->settings;
    int64_t count = prefill->row.count + prefill->row.has_bos;
    int64_t vocab = ra_session_config(prefill->session)->vocab_size;
    int64_t top_k = ra_settings_int(settings, RA_SET_TOP_K);

    prefill->result.top_k = (int32_t)(top_k < vocab ? top_k : vocab);
    prefill->result.top_id = calloc((size_t)prefill->result.top_k, sizeof(int32_t));
    prefill->result.top_logprob = calloc((size_t)prefill->result.top_k, sizeof(float));
    prefill->logprob_count = prefill->prefix != NULL ? count : count - 1;
    if (strcmp(ra_settings_text(settings, RA_SET_TOKEN_LOGPROBS), "npy") == 0) {
        prefill->logprob = calloc((size_t)count, sizeof(float));
        if (prefill->logprob == NULL) {
            return ra_fail(RA_ERR_NOMEM, "prefill", "cannot hold %lld results", (long long)count);
        }
    }
    if (prefill->result.top_id == NULL || prefill->result.top_logprob == NULL) {
        return ra_fail(RA_ERR_NOMEM, "prefill", "cannot hold the top %lld", (long long)top_k);
    }
    ra_sequence_t document = {
        .tokens = prefill->row.tokens, .count = count, .logprob = prefill->logprob};
    double start = ra_clock_s();
    ra_signals_watch(prefill->session);
    RA_TRY(ra_session_prefill(prefill->session, prefill->prefix, &document, prefill->out_dir,
                              ra_settings_text(settings, RA_SET_KV_DTYPE),
                              tokenizer_digest(prefill), &prefill->result));
    prefill->seconds = ra_clock_s() - start;
    if (document.status != RA_OK) {
        return ra_fail(document.status, "prefill", "%s: %s", prefill->row.id,
                       ra_status_text(document.status));
    }
    if (prefill->logprob != NULL) {
        char path[RA_PATH_MAX];
        RA_TRY(ra_path_join(prefill->out_dir, "logprobs.npy", path));
        return ra_npy_write_f32(path, prefill->logprob, prefill->logprob_count);
    }
    return RA_OK;
}

/* Text of a token, made printable; parts of a character are shown as bytes. */
static void token_text(const prefill_t *prefill, int32_t id, char out[256])
{
    char *bytes = NULL;
    int64_t length;
    out[0] = '\0';
    if (prefill->encoder.tokenizer == NULL) {
        return;
    }
    ra_log_set_quiet(1);
    if (ra_tokenizer_decode(prefill->encoder.tokenizer, &id, 1, &bytes, &length) == RA_OK) {
        ra_log_escape(bytes, out, 256);
        free(bytes);
    }
    ra_log_set_quiet(0);
}

static void print_json(const prefill_t *prefill)
{
    const ra_prefill_result_t *result = &prefill->result;
    char text[256];
    fputs("{\"id\":", stdout);
    ra_row_write_id(stdout, &prefill->row);
    printf(",\"tokens\":%lld,\"cached_tokens\":%lld,\"model\":\"%s\",\"seconds\":%.6f,\"ranks\":%d,"
           "\"top\":[",
           (long long)result->tokens, (long long)result->cached_tokens,
           ra_session_model_digest(prefill->session), prefill->seconds,
           ra_session_options(prefill->session)->ranks);
    for (int i = 0; i < result->top_k; i++) {
        token_text(prefill, result->top_id[i], text);
        printf("%s{\"id\":%d,\"logprob\":", i > 0 ? "," : "", result->top_id[i]);
        ra_json_write_number(stdout, (double)result->top_logprob[i]);
        fputs(",\"text\":", stdout);
        ra_json_write_string(stdout, text);
        fputc('}', stdout);
    }
    fputs("]}\n", stdout);
}

static void print_text(const prefill_t *prefill)
{
    const ra_prefill_result_t *result = &prefill->result;
    char text[256];
    printf("%lld tokens in %.2f s", (long long)result->tokens, prefill->seconds);
    if (prefill->out_dir != NULL) {
        char dir[RA_PATH_MAX];
        ra_log_escape(prefill->out_dir, dir, sizeof(dir));
        printf(", %lld of them cached in %s", (long long)result->cached_tokens, dir);
    }
    printf("\nnext token:\n");
    for (int i = 0; i < result->top_k; i++) {
        token_text(prefill, result->top_id[i], text);
        printf("%4d  id %-8d  ln p %9.4f  p %7.4f  \"%s\"\n", i + 1, result->top_id[i],
               (double)result->top_logprob[i], exp((double)result->top_logprob[i]), text);
    }
}

static ra_status_t work(prefill_t *prefill, ra_rows_t *rows, const char *model_dir)
{
    const ra_settings_t *settings = prefill->settings;
    const char *from = ra_settings_text_or_null(settings, RA_SET_CONTINUE);
    bool with_bos = strcmp(ra_settings_text(settings, RA_SET_BOS), "once") == 0;

    RA_TRY(ra_session_open_chosen(settings, model_dir, &prefill->session));
    RA_TRY(ra_row_encoder_open(&prefill->encoder, model_dir, ra_session_config(prefill->session),
                               with_bos));
    if (from != NULL) {
        RA_TRY(open_prefix(prefill, from, with_bos));
    }
    RA_TRY(read_document(rows, &prefill->encoder, &prefill->row));
    RA_TRY(run(prefill));
    if (ra_settings_bool(settings, RA_SET_JSON)) {
        print_json(prefill);
    } else {
        print_text(prefill);
    }
    return ra_flush_stdout();
}

ra_status_t ra_cmd_prefill(const ra_settings_t *settings)
{
    char model_dir[RA_PATH_MAX];
    const char *input = ra_settings_text_or_null(settings, RA_SET_INPUT);
    prefill_t prefill = {.settings = settings, .encoder = {.bos = -1}};
    ra_rows_t *rows = NULL;

    RA_TRY(ra_run_check(settings));
    prefill.out_dir = ra_settings_text_or_null(settings, RA_SET_OUTPUT);
    if (input == NULL) {
        return ra_fail(RA_ERR_USAGE, "prefill", "--in FILE is missing");
    }
    if (prefill.out_dir == NULL &&
        strcmp(ra_settings_text(settings, RA_SET_TOKEN_LOGPROBS), "npy") == 0) {
        return ra_fail(RA_ERR_USAGE, "prefill", "--token-logprobs npy needs --out DIR");
    }
    RA_TRY(ra_model_choose(settings, model_dir));
    RA_TRY(ra_rows_open(input, ra_settings_int(settings, RA_SET_MAX_DOC_BYTES), &rows));
    ra_status_t status = work(&prefill, rows, model_dir);
    ra_signals_watch(NULL);
    free(prefill.logprob);
    free(prefill.result.top_id);
    free(prefill.result.top_logprob);
    ra_row_free(&prefill.row);
    ra_kv_reader_close(prefill.prefix);
    ra_row_encoder_close(&prefill.encoder);
    ra_session_close(prefill.session);
    ra_rows_close(rows);
    return status;
}
