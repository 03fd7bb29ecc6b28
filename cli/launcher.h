/** @file cli/launcher.h  @brief Whether a launcher (srun, mpirun) started several of us. */
#ifndef RA_CLI_LAUNCHER_H
#define RA_CLI_LAUNCHER_H

#include "base/status.h"

/**
 * Several processes that each run the whole job would do it several times, on top of each other.
 * A command's ranks are threads of one process, also where a transport could connect several.
 * @retval RA_ERR_USAGE  a launcher started more than one process
 */
ra_status_t ra_launcher_check(void);

#endif
