/**
 * @file  cli/error_policy.h
 * @brief What bad rows do to a job: --on-error and --max-errors.
 *
 * A bad row fails alone. The job ends early with exit code 4 when more rows failed than
 * --max-errors allows: a count, or a percentage of the rows read so far. A percentage counts from
 * the 100th row on, so that one bad row of three is one bad row and not a third of the corpus.
 */
#ifndef RA_CLI_ERROR_POLICY_H
#define RA_CLI_ERROR_POLICY_H

#include "base/settings.h"
#include "cli/input_rows.h"
#include <stdbool.h>
#include <stdint.h>

enum { RA_PERCENT_FROM_ROWS = 100 };

typedef struct ra_error_policy {
    bool stop; /**< --on-error stop */
    bool by_percent;
    double percent;
    int64_t count;

    int64_t rows_read, rows_failed;
} ra_error_policy_t;

void ra_error_policy_init(ra_error_policy_t *policy, const ra_settings_t *settings);

/**
 * Count a failed row, say so on stderr (place, id, cause) and decide.
 * @return RA_OK: go on. RA_ERR_INPUT: end the job, after committing what is finished.
 */
ra_status_t ra_error_policy_failed(ra_error_policy_t *policy, const ra_rows_t *rows,
                                   const ra_row_t *row);
/** RA_OK, or RA_ERR_PARTIAL when rows failed: the status of a job that reached the end. */
ra_status_t ra_error_policy_result(const ra_error_policy_t *policy);

/** {"id","line","offset","code","message","action"} and a newline. */
void ra_error_write_row(FILE *out, const ra_row_t *row, bool stopped);

#endif
