/**
 * @file  cli/score_pack.h
 * @brief Documents that go through the model together: short ones in input order, a long one alone.
 */
#ifndef RA_CLI_SCORE_PACK_H
#define RA_CLI_SCORE_PACK_H

#include "base/status.h"
#include "cli/input_rows.h"
#include "model/session.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_pack {
    int64_t limit; /**< tokens; a document beyond it is a pack of its own */
    ra_row_t *row; /**< [count], owned */
    int64_t count, capacity;
    int64_t tokens; /**< BOS included */
} ra_pack_t;

/** Whether @a row may join what is in the pack. Always, when it is empty. */
bool ra_pack_fits(const ra_pack_t *pack, const ra_row_t *row);
/** Take over a tokenized @a row. @retval RA_ERR_NOMEM the row stays the caller's. */
ra_status_t ra_pack_add(ra_pack_t *pack, ra_row_t *row);
/** Release the rows; the pack can be filled again. */
void ra_pack_clear(ra_pack_t *pack);
void ra_pack_free(ra_pack_t *pack);

/**
 * What becomes of one document.
 * @param logprob  ln p of its last tokens: count with a BOS, else count - 1; valid when status is
 * OK.
 * @param seconds  Its share of the pass, by tokens.
 */
typedef ra_status_t (*ra_pack_emit_func_t)(void *arg, ra_row_t *row, ra_status_t status,
                                           const float *logprob, double seconds);

/**
 * Score the pack in one pass, give each document to @a emit in input order, and clear it. A
 * document with nothing to score does not reach the model.
 * @return The first error of the pass or of @a emit; documents after it are not emitted.
 */
ra_status_t ra_pack_run(ra_pack_t *pack, ra_session_t *session, ra_pack_emit_func_t emit,
                        void *arg);

#endif
