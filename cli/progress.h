/**
 * @file  cli/progress.h
 * @brief How far a job is, on stderr: one line rewritten on a terminal, else a line every 10 s.
 *
 * A thread of its own shows it, so that a document of an hour is not silent: within a pass the
 * share done comes from the session. The same thread repeats a request to stop (cli/signals.h).
 */
#ifndef RA_CLI_PROGRESS_H
#define RA_CLI_PROGRESS_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

struct ra_session; /* model/session.h */

typedef struct ra_progress ra_progress_t;

/**
 * @param shown        False: nothing is printed.
 * @param bytes_total  Of the input, for the percentage and the time left; 0: unknown.
 */
ra_status_t ra_progress_start(bool shown, int64_t bytes_total, const struct ra_session *session,
                              ra_progress_t **progress_p);
/** Stop showing. Accepts NULL. */
void ra_progress_stop(ra_progress_t *progress);

/** Documents that an earlier attempt did, passed over now; input read up to @a bytes. */
void ra_progress_skip(ra_progress_t *progress, int64_t bytes);
/** A pass begins over @a tokens tokens, from input read up to @a bytes. */
void ra_progress_pass(ra_progress_t *progress, int64_t tokens, int64_t bytes);
/** It ended; @a documents are done in all by now, @a failed rows failed. */
void ra_progress_pass_done(ra_progress_t *progress, int64_t documents, int64_t failed);

#endif
