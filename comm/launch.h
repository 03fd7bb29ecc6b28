/**
 * @file  comm/launch.h
 * @brief What a launcher (srun, mpirun, torchrun) told this process about itself and the others.
 */
#ifndef RA_COMM_LAUNCH_H
#define RA_COMM_LAUNCH_H

#include "base/status.h"

typedef struct ra_launch {
    int rank, size;
    int local_rank;      /**< among the processes of this host */
    char address[256];   /**< where rank 0 listens: MASTER_ADDR, else this host */
    int port;            /**< MASTER_PORT, else 29517 */
    const char *started; /**< name of the launcher's convention, for messages */
} ra_launch_t;

/** Processes that the launcher started, by what it says; 1 without a launcher. */
int ra_launch_size(void);

/**
 * Read the environment: RANK, WORLD_SIZE (torchrun), OMPI_COMM_WORLD_*, PMI_*, SLURM_*. A process
 * without a launcher is rank 0 of 1.
 * @retval RA_ERR_USAGE  a rank that is not below the size, or processes on several hosts without
 *                       MASTER_ADDR.
 */
ra_status_t ra_launch_find(ra_launch_t *launch);

#endif
