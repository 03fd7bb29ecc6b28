#include "cli/launcher.h"

#include "base/settings.h"
#include <stdlib.h>

/* How launchers tell a process about the others. PMIx gives a rank but no size: rank 1 says enough.
 */
static const struct {
    const char *size; /* variable with the number of processes, or NULL */
    const char *rank; /* variable that must be set, too */
    const char *launcher;
} launchers[] = {
    {"SLURM_NTASKS", "SLURM_PROCID", "srun"},
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"},
    {"OMPI_COMM_WORLD_SIZE", NULL, "mpirun (Open MPI)"},
    {"PMI_SIZE", NULL, "mpiexec (PMI)"},
    {"MV2_COMM_WORLD_SIZE", NULL, "mpirun (MVAPICH)"},
    {NULL, "PMIX_RANK", "a PMIx launcher"},
};

static long number_of(const char *variable)
{
    const char *text = variable != NULL ? ra_environment(variable) : NULL;
    return text != NULL ? strtol(text, NULL, 10) : -1;
}

ra_status_t ra_launcher_check(void)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(launchers); i++) {
        long size = number_of(launchers[i].size), rank = number_of(launchers[i].rank);
        bool rank_missing = launchers[i].rank != NULL && rank < 0;
        bool several = launchers[i].size != NULL ? size > 1 : rank > 0;
        if (several && !rank_missing) {
            return ra_fail(
                RA_ERR_USAGE, "launcher",
                "started by %s as one of several processes (%s=%ld), but a command's ranks are "
                "threads of one process; start one and give it --ranks N",
                launchers[i].launcher,
                launchers[i].size != NULL ? launchers[i].size : launchers[i].rank,
                launchers[i].size != NULL ? size : rank);
        }
    }
    return RA_OK;
}
