/**
 * @file  cli/score_row.h
 * @brief One document's result: sums over its log-probabilities, and its row of scores.jsonl.
 *
 *     nll           = -sum of ln p over the scored tokens, in nats, added in double, first to last
 *     nll_per_token = nll / scored
 *     ppl           = exp(nll_per_token)
 *     bits_per_byte = nll / (bytes ln 2)
 *
 * A token's position is its own 0-based index in the document; a BOS that was put first has none.
 * Position buckets: [0, 256), [256, 1024), then every border is four times the one before.
 */
#ifndef RA_CLI_SCORE_ROW_H
#define RA_CLI_SCORE_ROW_H

#include "cli/input_rows.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { RA_SCORE_BUCKETS = 29 }; /**< 256 * 4^28 tokens pass 2^63 */

typedef struct ra_bucket_sum {
    int64_t scored;
    double nll;
} ra_bucket_sum_t;

typedef struct ra_score {
    int64_t tokens; /**< own tokens */
    int64_t scored;
    double nll;
    int64_t bytes; /**< -1: token input */
    ra_bucket_sum_t bucket[RA_SCORE_BUCKETS];
} ra_score_t;

/** Bucket of a position, and the half-open range of a bucket. */
int ra_score_bucket(int64_t position);
void ra_score_bucket_range(int bucket, int64_t *from, int64_t *to);

/**
 * Sum @a logprob, ln p of the last count values of @a row's tokens (count with a BOS, else
 * count-1).
 * @return false when one of them is not finite.
 */
bool ra_score_sum(const ra_row_t *row, const float *logprob, ra_score_t *score);

/** NaN where undefined (nothing scored, no bytes); exp may give infinity. JSON writes both as null.
 */
double ra_score_nll_per_token(const ra_score_t *score);
double ra_score_ppl(const ra_score_t *score);
double ra_score_bits_per_byte(const ra_score_t *score);
/** "by_position" as a JSON array of {"from","to","scored","nll_per_token"}; empty buckets left out.
 */
void ra_score_write_positions(FILE *out, const ra_score_t *score);

/** What is the same for every row of an attempt. */
typedef struct ra_row_policy {
    const char *bos;              /**< "none" or "once" */
    const char *model_digest;     /**< "xxh3:..." */
    const char *tokenizer_digest; /**< or NULL */
    int64_t max_positions;        /**< max_position_embeddings */
    bool reproducible;
    int ranks;
    int attempt;
    char started[32]; /**< ISO 8601, UTC */
} ra_row_policy_t;

/**
 * Write the row, newline included. What may differ from run to run comes last: seconds, ranks,
 * attempt, started.
 * @param token_logprobs  File of the per-token values relative to the output directory, or NULL.
 */
void ra_score_write_row(FILE *out, const ra_row_t *row, const ra_score_t *score,
                        const ra_row_policy_t *policy, const char *token_logprobs, double seconds);

#endif
