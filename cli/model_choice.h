/**
 * @file  cli/model_choice.h
 * @brief Which model directory a command works on, and a session opened with its settings.
 */
#ifndef RA_CLI_MODEL_CHOICE_H
#define RA_CLI_MODEL_CHOICE_H

#include "base/settings.h"
#include "model/file_io.h"
#include "model/model_config.h"
#include "model/session.h"

/**
 * --model, or the shipped one: share/ringattn/models/ring-tiny-linear beside the folder of the
 * executable, then configs/models/ring-tiny-linear of the source tree it was built from.
 * @retval RA_ERR_USAGE  none is found, or --model is not a directory
 */
ra_status_t ra_model_choose(const ra_settings_t *settings, char out[RA_PATH_MAX]);

ra_decay_factor_t ra_decay_factor_of(const ra_settings_t *settings);

/**
 * Refuse what cannot run here, before anything is opened.
 * @retval RA_ERR_USAGE        a launcher started several processes (cli/launcher.h)
 * @retval RA_ERR_UNSUPPORTED  --device cuda where the build or the machine has none
 */
ra_status_t ra_run_check(const ra_settings_t *settings);

/** Open a session with what --ranks, --layout and the like say. Errors: ra_session_open(). */
ra_status_t ra_session_open_chosen(const ra_settings_t *settings, const char *model_dir,
                                   ra_session_t **session_p);

#endif
