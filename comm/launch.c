#include "comm/launch.h"

#include "base/settings.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

enum { DEFAULT_PORT = 29517 };

static const struct {
    const char *rank, *size, *local_rank, *local_size, *started;
} conventions[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "torchrun"},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "Open MPI"},
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI"},
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "srun"},
};

/* -1 when unset or not a number ("2(x4)" of Slurm is its first number). */
static int number_of(const char *variable)
{
    const char *text = ra_environment(variable);
    if (text == NULL) {
        return -1;
    }
    char *end;
    long value = strtol(text, &end, 10);
    return end == text || value < 0 || value > INT_MAX ? -1 : (int)value;
}

static ra_status_t find_address(ra_launch_t *launch, int local_size)
{
    const char *address = ra_environment("MASTER_ADDR");
    int port = number_of("MASTER_PORT");
    launch->port = port > 0 && port < 65536 ? port : DEFAULT_PORT;
    if (address == NULL && local_size != launch->size) {
        return ra_fail(RA_ERR_USAGE, "comm",
                       "%d processes started by %s, not all on this host: set MASTER_ADDR to the "
                       "host of rank 0",
                       launch->size, launch->started);
    }
    snprintf(launch->address, sizeof(launch->address), "%s",
             address != NULL ? address : "127.0.0.1");
    return RA_OK;
}

/* The first convention that gives a rank and a size, or -1. */
static int find_convention(void)
{
    for (int i = 0; i < (int)RA_ARRAY_LEN(conventions); i++) {
        if (number_of(conventions[i].rank) >= 0 && number_of(conventions[i].size) >= 1) {
            return i;
        }
    }
    return -1;
}

int ra_launch_size(void)
{
    int found = find_convention();
    return found < 0 ? 1 : number_of(conventions[found].size);
}

ra_status_t ra_launch_find(ra_launch_t *launch)
{
    int found = find_convention();
    *launch = (ra_launch_t){.size = 1, .port = DEFAULT_PORT, .started = "no launcher"};
    if (found < 0) {
        return RA_OK;
    }
    launch->started = conventions[found].started;
    launch->rank = number_of(conventions[found].rank);
    launch->size = number_of(conventions[found].size);
    int local_rank = number_of(conventions[found].local_rank);
    launch->local_rank = local_rank >= 0 ? local_rank : launch->rank;
    if (launch->rank >= launch->size) {
        return ra_fail(RA_ERR_USAGE, "comm", "%s=%d is not below %s=%d", conventions[found].rank,
                       launch->rank, conventions[found].size, launch->size);
    }
    return launch->size == 1 ? RA_OK
                             : find_address(launch, number_of(conventions[found].local_size));
}
