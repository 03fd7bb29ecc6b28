/**
 * @file  comm/nccl_end.h
 * @brief Ranks connected by NCCL: threads of this process, or this process as one rank of several.
 *        Internal to comm/transport_nccl.c and comm/nccl_connect.c.
 */
#ifndef RA_COMM_NCCL_END_H
#define RA_COMM_NCCL_END_H

#include "comm/bootstrap.h"
#include "comm/cuda_waits.h"
#include "comm/nccl_staging.h"
#include "comm/transport.h"
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <stdatomic.h>

/** Seconds ranks wait for each other when they connect, and for bytes the host needs. */
#define RA_NCCL_PATIENCE_S 600

typedef struct ra_nccl_end ra_nccl_end_t;

/** What ranks tell each other before they connect. */
typedef struct ra_nccl_card {
    ncclUniqueId id; /**< rank 0's counts */
    cudaUUID_t gpu;
    int device;
} ra_nccl_card_t;

typedef struct ra_nccl_world {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int size, open_ends;
    int arrived;           /**< threads in attach(); guarded by mutex, as cards */
    ra_nccl_card_t *cards; /**< [size] */
    ncclUniqueId id;       /**< threads */
    atomic_bool aborted;
    ra_status_t cause;    /**< guarded by mutex */
    ra_nccl_end_t **ends; /**< [size], NULL where the rank is another process */
    ra_launch_t launch;   /**< processes: size > 1 */
    ra_bootstrap_t *bootstrap;
} ra_nccl_world_t;

struct ra_nccl_end {
    ra_transport_t base;
    ra_nccl_world_t *world;
    int device;
    cudaStream_t compute; /**< borrowed; NULL until attached */
    cudaStream_t queue;
    cudaEvent_t start;     /**< of the last post: waited for at once, so one is enough */
    pthread_mutex_t issue; /**< held while NCCL is called on comm */
    ncclComm_t comm;       /**< guarded by issue; NULL until attached and after an abort */
    ra_nccl_staging_t *staging;
    ra_cuda_waits_t waits;
};

/** RA_OK for ncclSuccess, else an error with NCCL's text and @a what was being done. */
ra_status_t ra_nccl_check(ncclResult_t result, const char *what);
/** RA_ERR_PEER with the cause of the abort. */
ra_status_t ra_nccl_fail_aborted(ra_nccl_world_t *world);

/* Slots of ra_transport_ops_t. */

ra_status_t ra_nccl_open(int size, ra_transport_t **ends_p);
ra_status_t ra_nccl_join(const ra_launch_t *launch, ra_transport_t **end_p);
ra_status_t ra_nccl_attach(ra_transport_t *transport, ra_stream_t *compute);
void ra_nccl_abort(ra_transport_t *transport, ra_status_t cause);
bool ra_nccl_aborted(ra_transport_t *transport);
void ra_nccl_close(ra_transport_t *transport);

#endif
