/**
 * @file  cli/score_summary.h
 * @brief Both aggregates of a corpus: weighted by tokens, and over documents (mean, median).
 *
 *     token ppl         = exp(sum of nll / sum of scored tokens)
 *     mean document ppl = mean of the documents' ppl; median likewise
 *     bits per byte     = sum of nll / (sum of bytes ln 2), over documents given as text
 *
 * Documents are added in the order of scores.jsonl, so a resumed job has the sums of an
 * uninterrupted one. Documents with nothing scored count, but have no ppl.
 */
#ifndef RA_CLI_SCORE_SUMMARY_H
#define RA_CLI_SCORE_SUMMARY_H

#include "base/status.h"
#include "cli/score_row.h"
#include <stdint.h>
#include <stdio.h>

typedef struct ra_summary {
    int64_t documents, tokens, scored;
    double nll;
    int64_t text_bytes, text_scored;
    double text_nll;
    int64_t ppl_count, ppl_capacity;
    double *ppl; /**< of each document that has one, in order */

    int64_t failed;     /**< rows of this attempt that failed */
    int64_t rows_read;  /**< by this attempt */
    double seconds;     /**< of this attempt */
    int64_t tokens_now; /**< scored by this attempt */
} ra_summary_t;

/** @retval RA_ERR_NOMEM */
ra_status_t ra_summary_add(ra_summary_t *summary, const ra_score_t *score);
void ra_summary_free(ra_summary_t *summary);

double ra_summary_token_ppl(const ra_summary_t *summary);
double ra_summary_mean_ppl(const ra_summary_t *summary);
double ra_summary_median_ppl(const ra_summary_t *summary);
double ra_summary_bits_per_byte(const ra_summary_t *summary);

/** One JSON object and a newline. */
void ra_summary_write_json(FILE *out, const ra_summary_t *summary);
/** A few lines for people. */
void ra_summary_write_text(FILE *out, const ra_summary_t *summary);

#endif
