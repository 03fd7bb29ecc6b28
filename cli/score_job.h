/**
 * @file  cli/score_job.h
 * @brief The score job: rows in, packs through the model, results committed in input order.
 */
#ifndef RA_CLI_SCORE_JOB_H
#define RA_CLI_SCORE_JOB_H

#include "base/settings.h"
#include "base/status.h"

/**
 * Run a job to its end or to the first reason to stop.
 * @retval RA_ERR_PARTIAL  finished, some rows failed
 * @retval RA_ERR_INPUT    model or input rejected, or too many rows failed
 * @retval RA_ERR_STOPPED, RA_ERR_INTERRUPTED  by a signal; what was committed stays
 * @retval others          see cli/job_dir.h, model/session.h
 */
ra_status_t ra_score_job_run(const ra_settings_t *settings);

#endif
