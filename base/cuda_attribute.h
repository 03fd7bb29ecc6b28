/** @file base/cuda_attribute.h  @brief What the calling thread's CUDA device is. */
#ifndef RA_BASE_CUDA_ATTRIBUTE_H
#define RA_BASE_CUDA_ATTRIBUTE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>

/** Attribute of the calling thread's device; 0 where CUDA cannot say. */
static inline int ra_cuda_attribute(enum cudaDeviceAttr attribute)
{
    int device = 0, value = 0;
    bool known = cudaGetDevice(&device) == cudaSuccess &&
                 cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    return known ? value : 0;
}

/** Kernels of sm_90a run on compute capability 9 alone. */
static inline bool ra_cuda_is_sm90(void)
{
    return ra_cuda_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

#endif
