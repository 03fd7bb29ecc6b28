/**
 * @file  comm/nccl_staging.h
 * @brief Pairs of pinned and device memory through which NCCL moves host memory. Internal to comm/.
 *
 * Blocks are kept for reuse, in sizes of powers of two. One thread, one device (the current one).
 */
#ifndef RA_COMM_NCCL_STAGING_H
#define RA_COMM_NCCL_STAGING_H

#include "base/status.h"
#include <stdint.h>

typedef struct ra_nccl_staging ra_nccl_staging_t;
typedef struct ra_nccl_block ra_nccl_block_t;

ra_status_t ra_nccl_staging_create(ra_nccl_staging_t **staging_p);
/** Accepts NULL. Blocks that were not given back are freed too. */
void ra_nccl_staging_destroy(ra_nccl_staging_t *staging);
/** A block of at least @a bytes on either side. */
ra_status_t ra_nccl_staging_take(ra_nccl_staging_t *staging, int64_t bytes,
                                 ra_nccl_block_t **block_p);
/** Nothing queued uses the block any more, or only work queued before its next use. */
void ra_nccl_staging_give(ra_nccl_block_t *block);
char *ra_nccl_block_host(const ra_nccl_block_t *block);
char *ra_nccl_block_device(const ra_nccl_block_t *block);

#endif
