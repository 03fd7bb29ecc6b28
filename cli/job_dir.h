/**
 * @file  cli/job_dir.h
 * @brief The output directory of a score job: what is in it is complete, whenever the power failed.
 *
 *   job.json      what the job is: model, tokenizer and policy; written first, never changed
 *   scores.jsonl  one row a document, in input order
 *   errors.jsonl  one row a failed input row, of the last attempt (failed rows are tried again)
 *   tok/          <XXH3-128 of the id, hex>.npy, the log-probabilities of a document
 *   summary.json  written when an attempt reaches the end of the input
 *   .lock         locked (flock) by the process that writes, with its number inside
 *
 * A document is committed by: its .npy written under a temporary name, fsynced, renamed, directory
 * fsynced; then its row by one write(); the rows of a pass by one fdatasync(). A crash leaves at
 * most one torn last line, which the next start drops, and a .npy without a row, which is written
 * again.
 */
#ifndef RA_CLI_JOB_DIR_H
#define RA_CLI_JOB_DIR_H

#include "base/status.h"
#include "cli/id_map.h"
#include "cli/score_row.h"
#include "cli/score_summary.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_job_dir ra_job_dir_t;

/** What makes two jobs the same job. The number of ranks and threads does not belong to it. */
typedef struct ra_job_identity {
    const char *model_digest;
    const char *tokenizer_digest; /**< NULL: none */
    const char *bos;
    const char *token_logprobs;
    const char *decay_factor;
    bool reproducible;
    int64_t tile;
} ra_job_identity_t;

/**
 * Create or open @a path and lock it.
 * @param stop_at_commit  Test hook: kill the process at this point inside commits (1, 2, ...);
 *                        0: never.
 * @retval RA_ERR_OUTPUT  cannot be created or written; another process still holds the lock after
 * two seconds (the message gives its number)
 */
ra_status_t ra_job_dir_open(const char *path, int64_t stop_at_commit, ra_job_dir_t **job_p);
/** Unlock. Accepts NULL. */
void ra_job_dir_close(ra_job_dir_t *job);

/**
 * Begin or go on: write job.json, or compare it; drop a torn last line; read which documents are
 * done, adding each to @a summary in file order.
 * @param model_dir, input  Noted in job.json for readers, not compared.
 * @retval RA_ERR_USAGE      the directory holds another job (the message says what differs)
 * @retval RA_ERR_INTEGRITY  job.json is broken or missing beside results; a row is broken or twice
 *                           there; a .npy of a row is missing
 * @retval RA_ERR_OUTPUT
 */
ra_status_t ra_job_dir_begin(ra_job_dir_t *job, const ra_job_identity_t *identity,
                             const char *model_dir, const char *input, ra_summary_t *summary);

/** The number of this attempt (1 for the first). */
int ra_job_dir_attempt(const ra_job_dir_t *job);
/** True when @a id is done; *document_p is the digest of its contents then. */
bool ra_job_dir_has(const ra_job_dir_t *job, const char *id, ra_digest_t *document_p);

/** "tok/<hex>.npy" of an id. */
void ra_job_dir_token_file(const char *id, char out[64]);
/**
 * Commit one document.
 * @param logprob  [count], written to its token file; NULL: none is wanted.
 * @param line     The row with its newline.
 * @retval RA_ERR_OUTPUT
 */
ra_status_t ra_job_dir_commit(ra_job_dir_t *job, const char *id, const float *logprob,
                              int64_t count, const char *line, int64_t bytes);
/** Append one line to errors.jsonl. */
ra_status_t ra_job_dir_commit_error(ra_job_dir_t *job, const char *line, int64_t bytes);
/** Put the rows and errors so far on the disk; after each pass. @retval RA_ERR_OUTPUT */
ra_status_t ra_job_dir_sync(ra_job_dir_t *job);
/** Replace summary.json. */
ra_status_t ra_job_dir_write_summary(ra_job_dir_t *job, const char *json, int64_t bytes);

#endif
