/**
 * @file  tests/cuda_support.h
 * @brief Device memory by the CUDA runtime, for tests of single kernels, and who can run them.
 */
#ifndef RA_TESTS_CUDA_SUPPORT_H
#define RA_TESTS_CUDA_SUPPORT_H

#include "tests/gpu_support.h"
#include <cuda_runtime_api.h>

static inline void cuda_ok(cudaError_t error)
{
    if (error != cudaSuccess) {
        fail_msg("%s", cudaGetErrorString(error));
    }
}

/** Major compute capability of GPU 0; 0 without one. */
static inline int cuda_major_version(void)
{
    int major = 0;
    if (gpu_count() > 0) {
        cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    }
    return major;
}

/** Kernels of sm_90a run on compute capability 9 alone. */
static inline void skip_without_hopper(void)
{
    if (cuda_major_version() != 9) {
        print_message("no GPU of compute capability 9: nothing was run\n");
        skip();
    }
}

/** Device memory, poisoned with NaN of every type, or a copy of host memory. */
static inline void *device_array(size_t bytes, const void *from)
{
    void *memory = NULL;
    cuda_ok(cudaMalloc(&memory, bytes > 0 ? bytes : 1));
    cuda_ok(cudaMemset(memory, 0xFF, bytes > 0 ? bytes : 1));
    if (from != NULL) {
        cuda_ok(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
    }
    return memory;
}

/** Copies and frees. */
static inline void *host_array(void *memory, size_t bytes)
{
    void *host = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(host);
    cuda_ok(cudaMemcpy(host, memory, bytes, cudaMemcpyDeviceToHost));
    cuda_ok(cudaFree(memory));
    return host;
}

#endif
