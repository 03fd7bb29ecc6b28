/**
 * @file  cli/command.h
 * @brief The commands of `ringattn`: one table (command.c), one file each.
 */
#ifndef RA_CLI_COMMAND_H
#define RA_CLI_COMMAND_H

#include "base/settings.h"
#include "base/status.h"

typedef struct ra_command {
    const char *name;
    int bit;              /**< RA_FOR_* */
    const char *synopsis; /**< what follows "ringattn" */
    const char *doc;      /**< one line */
    const char *more;     /**< example and remarks for --help */
    ra_status_t (*run)(const ra_settings_t *settings);
} ra_command_t;

ra_status_t ra_cmd_score(const ra_settings_t *settings);
ra_status_t ra_cmd_prefill(const ra_settings_t *settings);
ra_status_t ra_cmd_tokenize(const ra_settings_t *settings);
ra_status_t ra_cmd_validate(const ra_settings_t *settings);
ra_status_t ra_cmd_doctor(const ra_settings_t *settings);
ra_status_t ra_cmd_config(const ra_settings_t *settings);
ra_status_t ra_cmd_version(const ra_settings_t *settings);

/** Command called @a name, or NULL. */
const ra_command_t *ra_command_find(const char *name);
/** Run a command line; returns the exit code of the process. */
int ra_command_main(int argc, char **argv);

/** What a command prints went through. @retval RA_ERR_OUTPUT with the cause */
ra_status_t ra_flush_stdout(void);

#endif
