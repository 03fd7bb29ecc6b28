/**
 * @file  cli/job_resume.h
 * @brief What a start finds in a job's directory: which job it is, and what is done.
 */
#ifndef RA_CLI_JOB_RESUME_H
#define RA_CLI_JOB_RESUME_H

#include "cli/job_dir.h"

typedef struct ra_job_done {
    ra_id_map_t ids; /**< id -> digest of the document's contents */
    int64_t count;
    int last_attempt; /**< highest "attempt" of a row, 0 without rows */
} ra_job_done_t;

/** Write DIR/job.json, or compare it with @a identity where it exists. Errors: ra_job_dir_begin().
 */
ra_status_t ra_job_note_or_compare(const char *dir, const ra_job_identity_t *identity,
                                   const char *model_dir, const char *input);

/** Remove the temporary files that a crash left in @a dir. @retval RA_ERR_OUTPUT */
ra_status_t ra_job_remove_temporaries(const char *dir);

/**
 * Read every row of scores.jsonl, cutting a torn last line off.
 * @param with_tokens  Each row's token file must exist.
 */
ra_status_t ra_job_read_done(const char *dir, int scores_fd, bool with_tokens, ra_job_done_t *done,
                             ra_summary_t *summary);

#endif
