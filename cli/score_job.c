#include "cli/score_job.h"

#include "base/clock.h"
#include "base/log.h"
#include "cli/command.h"
#include "cli/error_policy.h"
#include "cli/job_dir.h"
#include "cli/model_choice.h"
#include "cli/progress.h"
#include "cli/row_tokens.h"
#include "cli/score_pack.h"
#include "cli/signals.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct job {
    const ra_settings_t *settings;
    char model_dir[RA_PATH_MAX];
    ra_rows_t *rows;
    ra_job_dir_t *dir; /* NULL: rows go to stdout */
    ra_session_t *session;
    ra_row_encoder_t encoder;
    ra_error_policy_t errors;
    ra_row_policy_t policy;
    ra_pack_t pack;
    ra_progress_t *progress;
    ra_summary_t summary;
    bool token_files;
    bool warned_beyond;
    ra_status_t halt; /* RA_OK, or why the job ends after the documents that are finished */
} job_t;

/* A stream to compose a row in; *line is its text once it is closed, and the caller frees it. */
static FILE *open_line(char **line, size_t *bytes)
{
    *line = NULL;
    FILE *out = open_memstream(line, bytes);
    if (out == NULL) {
        ra_fail(RA_ERR_NOMEM, "score", "cannot compose a row");
    }
    return out;
}

static ra_status_t fail_row(job_t *job, ra_row_t *row)
{
    char *line;
    size_t bytes;
    ra_status_t verdict = ra_error_policy_failed(&job->errors, job->rows, row);
    if (job->dir != NULL) {
        FILE *out = open_line(&line, &bytes);
        if (out == NULL) {
            return RA_ERR_NOMEM;
        }
        ra_error_write_row(out, row, verdict != RA_OK);
        fclose(out);
        ra_status_t status = ra_job_dir_commit_error(job->dir, line, (int64_t)bytes);
        free(line);
        RA_TRY(status);
    }
    if (job->halt == RA_OK) {
        job->halt = verdict;
    }
    return RA_OK;
}

static void warn_beyond(job_t *job, const ra_row_t *row)
{
    int64_t tokens = row->count + row->has_bos;
    if (tokens > job->policy.max_positions && !job->warned_beyond) {
        char place[700];
        ra_row_place(job->rows, row, place, sizeof(place));
        ra_log(RA_LOG_WARN, "score",
               "%s: %lld tokens are more than the model's max_position_embeddings %lld; this and "
               "later such rows are flagged beyond_max_positions",
               place, (long long)tokens, (long long)job->policy.max_positions);
        job->warned_beyond = true;
    }
}

static ra_status_t commit_row(job_t *job, const ra_row_t *row, const ra_score_t *score,
                              const float *logprob, double seconds)
{
    char *line, token_file[64];
    size_t bytes;
    ra_status_t status = RA_OK;
    FILE *out = open_line(&line, &bytes);
    if (out == NULL) {
        return RA_ERR_NOMEM;
    }
    ra_job_dir_token_file(row->id, token_file);
    ra_score_write_row(out, row, score, &job->policy, job->token_files ? token_file : NULL,
                       seconds);
    if (fclose(out) != 0) {
        status = ra_fail(RA_ERR_NOMEM, "score", "cannot compose a row");
    } else if (job->dir == NULL) {
        fwrite(line, 1, bytes, stdout);
        status = ra_flush_stdout();
    } else {
        static const float nothing;
        const float *values = logprob != NULL ? logprob : &nothing;
        status = ra_job_dir_commit(job->dir, row->id, job->token_files ? values : NULL,
                                   score->scored, line, (int64_t)bytes);
    }
    free(line);
    return status;
}

static ra_status_t emit(void *arg, ra_row_t *row, ra_status_t status, const float *logprob,
                        double seconds)
{
    job_t *job = arg;
    ra_score_t score;
    bool finite = status == RA_OK && ra_score_sum(row, logprob, &score);

    if (status == RA_ERR_INPUT) {
        ra_row_fail(row, RA_ROW_BAD_TOKEN, "a token id is not below vocab_size");
        return fail_row(job, row);
    }
    if (status == RA_ERR_NONFINITE || (status == RA_OK && !finite)) {
        ra_row_fail(row, RA_ROW_NONFINITE, "the model's result is not a finite number");
        return fail_row(job, row);
    }
    RA_TRY(status);
    RA_TRY(commit_row(job, row, &score, logprob, seconds));
    job->summary.tokens_now += score.tokens;
    return ra_summary_add(&job->summary, &score);
}

static ra_status_t run_pack(job_t *job)
{
    RA_TRY(ra_signals_status());
    ra_progress_pass(job->progress, job->pack.tokens, ra_rows_bytes_read(job->rows));
    ra_status_t status = ra_pack_run(&job->pack, job->session, emit, job);
    if (job->dir != NULL) {
        ra_status_t synced = ra_job_dir_sync(job->dir);
        status = status == RA_OK ? synced : status;
    }
    ra_progress_pass_done(job->progress, job->summary.documents, job->errors.rows_failed);
    return status;
}

/* True when an earlier attempt has scored the row; a row that changed since is marked. */
static bool is_done(job_t *job, ra_row_t *row)
{
    ra_digest_t before;
    if (job->dir == NULL || row->error != RA_ROW_NONE ||
        !ra_job_dir_has(job->dir, row->id, &before)) {
        return false;
    }
    if (before.low == row->digest.low && before.high == row->digest.high) {
        return true;
    }
    ra_row_fail(row, RA_ROW_CHANGED, "scored before with other contents; its first row stays");
    return false;
}

static ra_status_t take_row(job_t *job, ra_row_t *row)
{
    job->errors.rows_read++;
    if (is_done(job, row)) {
        ra_progress_skip(job->progress, ra_rows_bytes_read(job->rows));
        return RA_OK;
    }
    RA_TRY(ra_row_tokenize(row, &job->encoder));
    if (row->error != RA_ROW_NONE) {
        return fail_row(job, row);
    }
    warn_beyond(job, row);
    if (!ra_pack_fits(&job->pack, row)) {
        RA_TRY(run_pack(job));
        if (job->halt != RA_OK) {
            return RA_OK;
        }
    }
    return ra_pack_add(&job->pack, row);
}

static ra_status_t run_rows(job_t *job)
{
    bool end = false;
    while (job->halt == RA_OK) {
        ra_row_t row;
        RA_TRY(ra_signals_status());
        RA_TRY(ra_rows_next(job->rows, &row, &end));
        if (end) {
            break;
        }
        ra_status_t status = take_row(job, &row);
        ra_row_free(&row);
        RA_TRY(status);
        if (job->pack.tokens >= job->pack.limit) {
            RA_TRY(run_pack(job));
        }
    }
    RA_TRY(run_pack(job));
    return job->halt;
}

static ra_status_t report(job_t *job)
{
    bool json = ra_settings_bool(job->settings, RA_SET_JSON);
    if (job->dir == NULL) {
        ra_summary_write_text(stderr, &job->summary);
        return RA_OK;
    }
    char *line;
    size_t bytes;
    FILE *out = open_line(&line, &bytes);
    if (out == NULL) {
        return RA_ERR_NOMEM;
    }
    ra_summary_write_json(out, &job->summary);
    fclose(out);
    ra_status_t status = ra_job_dir_write_summary(job->dir, line, (int64_t)bytes);
    if (json) {
        fwrite(line, 1, bytes, stdout);
    } else {
        ra_summary_write_text(stdout, &job->summary);
    }
    free(line);
    return status == RA_OK ? ra_flush_stdout() : status;
}

static void fill_policy(job_t *job)
{
    time_t now = time(NULL);
    struct tm utc;
    ra_row_policy_t *policy = &job->policy;
    const ra_session_options_t *options = ra_session_options(job->session);
    policy->bos = ra_settings_text(job->settings, RA_SET_BOS);
    policy->model_digest = ra_session_model_digest(job->session);
    if (job->encoder.tokenizer != NULL) {
        policy->tokenizer_digest = ra_tokenizer_digest(job->encoder.tokenizer);
    }
    policy->max_positions = ra_session_config(job->session)->max_position_embeddings;
    policy->reproducible = options->reproducible;
    policy->ranks = options->ranks;
    policy->attempt = 1;
    strftime(policy->started, sizeof(policy->started), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
}

static ra_status_t begin_directory(job_t *job, const char *input)
{
    const ra_settings_t *settings = job->settings;
    ra_job_identity_t identity = {
        .model_digest = job->policy.model_digest,
        .tokenizer_digest = job->policy.tokenizer_digest,
        .bos = job->policy.bos,
        .token_logprobs = ra_settings_text(settings, RA_SET_TOKEN_LOGPROBS),
        .decay_factor = ra_settings_text(settings, RA_SET_DECAY_FACTOR),
        .reproducible = job->policy.reproducible,
        .tile = ra_settings_int(settings, RA_SET_TILE),
    };
    RA_TRY(ra_job_dir_begin(job->dir, &identity, job->model_dir, input, &job->summary));
    job->policy.attempt = ra_job_dir_attempt(job->dir);
    return RA_OK;
}

/* Cheap refusals first: nothing is created before the command line is known to make sense. */
static ra_status_t open_job(job_t *job)
{
    const ra_settings_t *settings = job->settings;
    const char *input = ra_settings_text_or_null(settings, RA_SET_INPUT);
    const char *output = ra_settings_text_or_null(settings, RA_SET_OUTPUT);
    bool with_bos = strcmp(ra_settings_text(settings, RA_SET_BOS), "once") == 0;

    RA_TRY(ra_run_check(settings));
    if (input == NULL) {
        return ra_fail(RA_ERR_USAGE, "score", "--in FILE is missing; see ringattn score --help");
    }
    job->token_files = strcmp(ra_settings_text(settings, RA_SET_TOKEN_LOGPROBS), "npy") == 0;
    if (job->token_files && output == NULL) {
        return ra_fail(RA_ERR_USAGE, "score", "--token-logprobs npy needs --out DIR");
    }
    RA_TRY(ra_model_choose(settings, job->model_dir));
    RA_TRY(ra_rows_open(input, ra_settings_int(settings, RA_SET_MAX_DOC_BYTES), &job->rows));
    if (output != NULL) {
        RA_TRY(
            ra_job_dir_open(output, ra_settings_int(settings, RA_SET_STOP_AT_COMMIT), &job->dir));
    }
    RA_TRY(ra_session_open_chosen(settings, job->model_dir, &job->session));
    RA_TRY(ra_row_encoder_open(&job->encoder, job->model_dir, ra_session_config(job->session),
                               with_bos));
    fill_policy(job);
    if (job->dir != NULL) {
        RA_TRY(begin_directory(job, input));
    }
    bool shown = strcmp(ra_settings_text(settings, RA_SET_PROGRESS), "off") != 0;
    return ra_progress_start(shown, ra_rows_bytes_total(job->rows), job->session, &job->progress);
}

static void close_job(job_t *job)
{
    ra_signals_watch(NULL);
    ra_progress_stop(job->progress);
    ra_pack_free(&job->pack);
    ra_summary_free(&job->summary);
    ra_row_encoder_close(&job->encoder);
    ra_session_close(job->session);
    ra_job_dir_close(job->dir);
    ra_rows_close(job->rows);
}

static void say_stopped(const job_t *job)
{
    ra_log(RA_LOG_WARN, "score", "stopped on request with %lld documents done%s",
           (long long)job->summary.documents,
           job->dir != NULL ? "; the same command again goes on from there" : "");
}

ra_status_t ra_score_job_run(const ra_settings_t *settings)
{
    job_t *job = calloc(1, sizeof(*job));
    if (job == NULL) {
        return ra_fail(RA_ERR_NOMEM, "score", "cannot allocate the job");
    }
    job->settings = settings;
    job->pack.limit = ra_settings_int(settings, RA_SET_PACK_TOKENS);
    ra_error_policy_init(&job->errors, settings);

    ra_status_t status = open_job(job);
    if (status == RA_OK) {
        double start = ra_clock_s();
        ra_signals_watch(job->session);
        status = run_rows(job);
        ra_progress_stop(job->progress);
        job->progress = NULL;
        job->summary.seconds = ra_clock_s() - start;
        job->summary.failed = job->errors.rows_failed;
        job->summary.rows_read = job->errors.rows_read;
        if (status == RA_OK) {
            status = report(job);
        } else if (ra_signals_status() != RA_OK) {
            say_stopped(job);
        }
        if (status == RA_OK) {
            status = ra_error_policy_result(&job->errors);
        }
    }
    close_job(job);
    free(job);
    return status;
}
