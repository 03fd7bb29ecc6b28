/** @file tests/model/golden_support.h  @brief Reference token ids and log-probabilities, session
 * helpers. */
#ifndef RA_TESTS_MODEL_GOLDEN_SUPPORT_H
#define RA_TESTS_MODEL_GOLDEN_SUPPORT_H

#include "model/safetensors.h"
#include "model/session.h"
#include "tests/test_support.h"

#include <stdlib.h>
#include <string.h>

/** Directories of small models with a golden.safetensors of some 300 tokens. */
static const char *const models[] = {"tests/goldens/ring_linear",
                                     "tests/goldens/ring_linear_mini_shape"};
enum { TILE = 16 }; /* so that every rank owns some of them */

/** Two threads, small tiles; otherwise the defaults. */
static inline ra_session_options_t options_of(const char *dir, int ranks)
{
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = dir;
    options.tile = TILE;
    options.threads = 2;
    options.ranks = ranks;
    return options;
}

/** A reference document: ids [count], logprob [count - 1]; views into the open file. */
typedef struct golden {
    ra_safetensors_t *file;
    const int32_t *ids;
    const float *logprob;
    int64_t count;
} golden_t;

/** @param prefix  "" or "kjv-Ge." and so on: tensor names are prefix + "input_ids", "logprob". */
static inline golden_t golden_open(const char *path, const char *prefix)
{
    golden_t golden = {0};
    char name[64];

    assert_int_equal(ra_safetensors_open(path, &golden.file), RA_OK);
    snprintf(name, sizeof(name), "%sinput_ids", prefix);
    const ra_safetensors_entry_t *ids = ra_safetensors_find(golden.file, name);
    snprintf(name, sizeof(name), "%slogprob", prefix);
    const ra_safetensors_entry_t *logprob = ra_safetensors_find(golden.file, name);
    assert_non_null(ids);
    assert_non_null(logprob);
    assert_int_equal(ids->view.dtype, RA_I32);
    assert_int_equal(logprob->view.dtype, RA_F32);
    golden.ids = ids->view.data;
    golden.logprob = logprob->view.data;
    golden.count = ids->view.extent[0];
    assert_int_equal(logprob->view.extent[0], golden.count - 1);
    return golden;
}

static inline ra_session_t *session_open(ra_session_options_t options)
{
    ra_session_t *session = NULL;
    ra_status_t status = ra_session_open(&options, &session);
    if (status != RA_OK) {
        fail_msg("session: %s", ra_last_error());
    }
    return session;
}

/** Score one document of the session; the log-probabilities are the caller's to free. */
static inline float *session_score_one(ra_session_t *session, const int32_t *ids, int64_t count,
                                       float *routing_gap)
{
    float *logprob = malloc((size_t)count * sizeof(*logprob));
    assert_non_null(logprob);
    test_poison(logprob, count);
    ra_sequence_t document = {
        .tokens = ids, .count = count, .logprob = logprob, .routing_gap = routing_gap};
    assert_int_equal(ra_session_score(session, &document, 1), RA_OK);
    assert_int_equal(document.status, RA_OK);
    return logprob;
}

#endif
