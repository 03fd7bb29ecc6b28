/*
 * A session without a model: stands in for model/session.c where a test is about jobs, not numbers.
 * A document's log-probabilities depend on its own tokens only. Token 4095 makes the document
 * non-finite by status, 4094 by a NaN among its values. FAKE_SESSION_DELAY_US slows every document
 * down, in small naps that a request to stop ends.
 */
#include "base/status.h"
#include "model/model_config.h"
#include "model/session.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKEN_STATUS_NONFINITE = 4095, TOKEN_NAN = 4094 };

struct ra_session {
    ra_session_options_t options;
    ra_model_config_t *config;
    atomic_int stop;
    long delay_us;
};

void ra_session_options_default(ra_session_options_t *options)
{
    *options = (ra_session_options_t){.device = "cpu", .ranks = 1, .tile = 256};
}

ra_status_t ra_session_open(const ra_session_options_t *options, ra_session_t **session_p)
{
    ra_session_t *session = calloc(1, sizeof(*session));
    const char *delay = getenv("FAKE_SESSION_DELAY_US");
    if (session == NULL) {
        return RA_ERR_NOMEM;
    }
    session->options = *options;
    session->delay_us = delay != NULL ? atol(delay) : 0;
    ra_status_t status = ra_model_config_load(options->model_dir, RA_DECAY_A, &session->config);
    if (status != RA_OK) {
        free(session);
        return status;
    }
    *session_p = session;
    return RA_OK;
}

void ra_session_close(ra_session_t *session)
{
    if (session != NULL) {
        ra_model_config_destroy(session->config);
        free(session);
    }
}

const ra_model_config_t *ra_session_config(const ra_session_t *session)
{
    return session->config;
}

const char *ra_session_model_digest(const ra_session_t *session)
{
    (void)session;
    return "xxh3:00000000000000000000000000000000";
}

const ra_session_options_t *ra_session_options(const ra_session_t *session)
{
    return &session->options;
}

static ra_status_t nap(ra_session_t *session)
{
    for (long left = session->delay_us; left > 0; left -= 100) {
        if (atomic_load(&session->stop)) {
            return RA_ERR_STOPPED;
        }
        usleep(100);
    }
    return atomic_load(&session->stop) ? RA_ERR_STOPPED : RA_OK;
}

static void invent(ra_sequence_t *document)
{
    uint64_t hash = 0x9e3779b97f4a7c15u;
    document->status = RA_OK;
    for (int64_t t = 0; t < document->count; t++) {
        hash = (hash ^ (uint64_t)document->tokens[t]) * 0xbf58476d1ce4e5b9u;
        hash ^= hash >> 29;
        if (t > 0 && document->logprob != NULL) {
            document->logprob[t - 1] = -(float)((double)(hash >> 40) * 0x1p-22);
        }
        if (document->tokens[t] == TOKEN_STATUS_NONFINITE) {
            document->status = RA_ERR_NONFINITE;
        }
        if (t > 0 && document->tokens[t] == TOKEN_NAN) {
            document->logprob[t - 1] = NAN;
        }
    }
}

ra_status_t ra_session_score(ra_session_t *session, ra_sequence_t *documents, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        RA_TRY(nap(session));
        invent(&documents[i]);
    }
    return RA_OK;
}

ra_status_t ra_session_prefill(ra_session_t *session, const struct ra_kv_reader *prefix,
                               ra_sequence_t *document, const char *out_dir, const char *kv_dtype,
                               const char *tokenizer_digest, ra_prefill_result_t *result)
{
    (void)prefix, (void)out_dir, (void)kv_dtype, (void)tokenizer_digest;
    RA_TRY(nap(session));
    invent(document);
    result->tokens = document->count;
    for (int32_t i = 0; i < result->top_k; i++) {
        result->top_id[i] = i + 1;
        result->top_logprob[i] = -1.0f - (float)i;
    }
    return RA_OK;
}

void ra_session_stop(ra_session_t *session)
{
    atomic_store(&session->stop, 1);
}

double ra_session_progress(const ra_session_t *session)
{
    (void)session;
    return 0;
}
