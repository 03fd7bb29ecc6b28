#include "comm/nccl_staging.h"

#include "base/device_cuda.h"
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdlib.h>

enum { BLOCK_LEAST = 65536 };

struct ra_nccl_block {
    char *host, *device;
    int64_t bytes;
    bool taken;
    ra_nccl_block_t *next;
};

struct ra_nccl_staging {
    ra_nccl_block_t *blocks;
};

ra_status_t ra_nccl_staging_create(ra_nccl_staging_t **staging_p)
{
    ra_nccl_staging_t *staging = calloc(1, sizeof(*staging));
    if (staging == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a staging pool");
    }
    *staging_p = staging;
    return RA_OK;
}

static void block_destroy(ra_nccl_block_t *block)
{
    cudaFreeHost(block->host);
    cudaFree(block->device);
    free(block);
}

void ra_nccl_staging_destroy(ra_nccl_staging_t *staging)
{
    if (staging == NULL) {
        return;
    }
    while (staging->blocks != NULL) {
        ra_nccl_block_t *block = staging->blocks;
        staging->blocks = block->next;
        block_destroy(block);
    }
    free(staging);
}

ra_status_t ra_nccl_staging_take(ra_nccl_staging_t *staging, int64_t bytes,
                                 ra_nccl_block_t **block_p)
{
    for (ra_nccl_block_t *block = staging->blocks; block != NULL; block = block->next) {
        if (!block->taken && block->bytes >= bytes) {
            block->taken = true;
            *block_p = block;
            return RA_OK;
        }
    }
    ra_nccl_block_t *block = calloc(1, sizeof(*block));
    if (block == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a staging block");
    }
    block->bytes = BLOCK_LEAST;
    while (block->bytes < bytes) {
        block->bytes *= 2;
    }
    cudaError_t error = cudaMallocHost((void **)&block->host, (size_t)block->bytes);
    if (error == cudaSuccess) {
        error = cudaMalloc((void **)&block->device, (size_t)block->bytes);
    }
    if (error != cudaSuccess) {
        block_destroy(block);
        return ra_cuda_check(error, "allocating staging memory");
    }
    block->taken = true;
    block->next = staging->blocks;
    staging->blocks = block;
    *block_p = block;
    return RA_OK;
}

void ra_nccl_staging_give(ra_nccl_block_t *block)
{
    block->taken = false;
}

char *ra_nccl_block_host(const ra_nccl_block_t *block)
{
    return block->host;
}

char *ra_nccl_block_device(const ra_nccl_block_t *block)
{
    return block->device;
}
