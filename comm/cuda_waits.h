/**
 * @file  comm/cuda_waits.h
 * @brief How long a compute stream stands still for transfers. Internal to comm/; built with
 * RA_CUDA.
 *
 * Two timed events round each wait; their distances are added up when somebody asks. One thread.
 */
#ifndef RA_COMM_CUDA_WAITS_H
#define RA_COMM_CUDA_WAITS_H

#include "base/status.h"
#include <stdbool.h>

struct CUstream_st;

/** Zero to start with. */
typedef struct ra_cuda_waits {
    bool on;
    int count, capacity; /**< pairs of events */
    struct ra_cuda_wait_pair *pairs;
    double seconds; /**< of pairs that were added up */
} ra_cuda_waits_t;

/** Forget everything; measure from now on, or not. */
ra_status_t ra_cuda_waits_set(ra_cuda_waits_t *waits, bool on);
/** Before and after a wait is queued on @a stream; nothing when off. */
ra_status_t ra_cuda_waits_begin(ra_cuda_waits_t *waits, struct CUstream_st *stream);
ra_status_t ra_cuda_waits_end(ra_cuda_waits_t *waits, struct CUstream_st *stream);
/** The stream has been synchronised. */
ra_status_t ra_cuda_waits_sum(ra_cuda_waits_t *waits, double *seconds_p);
void ra_cuda_waits_clear(ra_cuda_waits_t *waits);

#endif
