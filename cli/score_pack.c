#include "cli/score_pack.h"

#include "base/checked.h"
#include "base/clock.h"
#include <stdlib.h>
#include <string.h>

static int64_t model_tokens(const ra_row_t *row)
{
    return row->count + row->has_bos;
}

bool ra_pack_fits(const ra_pack_t *pack, const ra_row_t *row)
{
    return pack->count == 0 || pack->tokens + model_tokens(row) <= pack->limit;
}

ra_status_t ra_pack_add(ra_pack_t *pack, ra_row_t *row)
{
    if (pack->count == pack->capacity) {
        int64_t capacity = pack->capacity * 2 + 16;
        ra_row_t *grown = realloc(pack->row, (size_t)capacity * sizeof(*grown));
        if (grown == NULL) {
            return ra_fail(RA_ERR_NOMEM, "score", "cannot pack %lld documents",
                           (long long)capacity);
        }
        pack->row = grown;
        pack->capacity = capacity;
    }
    pack->row[pack->count++] = *row;
    pack->tokens += model_tokens(row);
    *row = (ra_row_t){0};
    return RA_OK;
}

void ra_pack_clear(ra_pack_t *pack)
{
    for (int64_t i = 0; i < pack->count; i++) {
        ra_row_free(&pack->row[i]);
    }
    pack->count = pack->tokens = 0;
}

void ra_pack_free(ra_pack_t *pack)
{
    ra_pack_clear(pack);
    free(pack->row);
    pack->row = NULL;
    pack->capacity = 0;
}

/* Sequences with something to score, in order; returns how many. */
static int64_t list_sequences(const ra_pack_t *pack, ra_sequence_t *sequence, float *logprob)
{
    int64_t n = 0;
    for (int64_t i = 0; i < pack->count; i++) {
        const ra_row_t *row = &pack->row[i];
        if (model_tokens(row) > 1) {
            sequence[n++] = (ra_sequence_t){
                .tokens = row->tokens, .count = model_tokens(row), .logprob = logprob};
            logprob += model_tokens(row) - 1;
        }
    }
    return n;
}

static ra_status_t emit_all(ra_pack_t *pack, const ra_sequence_t *sequence, double seconds,
                            ra_pack_emit_func_t emit, void *arg)
{
    for (int64_t i = 0; i < pack->count; i++) {
        ra_row_t *row = &pack->row[i];
        double share = seconds * (double)model_tokens(row) / (double)pack->tokens;
        if (model_tokens(row) > 1) {
            RA_TRY(emit(arg, row, sequence->status, sequence->logprob, share));
            sequence++;
        } else {
            RA_TRY(emit(arg, row, RA_OK, NULL, share));
        }
    }
    return RA_OK;
}

ra_status_t ra_pack_run(ra_pack_t *pack, ra_session_t *session, ra_pack_emit_func_t emit, void *arg)
{
    if (pack->count == 0) {
        return RA_OK;
    }
    ra_status_t status = RA_OK;
    ra_sequence_t *sequence = calloc((size_t)pack->count, sizeof(*sequence));
    float *logprob = malloc((size_t)pack->tokens * sizeof(*logprob));
    if (sequence == NULL || logprob == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "score", "cannot hold the results of %lld tokens",
                         (long long)pack->tokens);
        goto out;
    }
    double start = ra_clock_s();
    int64_t count = list_sequences(pack, sequence, logprob);
    if (count > 0) {
        RA_TRY_GOTO(ra_session_score(session, sequence, count), out);
    }
    status = emit_all(pack, sequence, ra_clock_s() - start, emit, arg);
out:
    free(sequence);
    free(logprob);
    ra_pack_clear(pack);
    return status;
}
