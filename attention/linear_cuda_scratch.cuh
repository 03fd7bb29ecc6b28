/**
 * @file  attention/linear_cuda_scratch.cuh
 * @brief Working memory of one call and tables on the device, both in stream order and without
 *        waiting. Internal to the CUDA linear attention kernels.
 *
 * A table travels as kernel parameters, so the caller's copy may go at once and no pinned memory is
 * needed. Memory comes from a pool of this file's own that keeps what it has.
 */
#ifndef RA_ATTENTION_LINEAR_CUDA_SCRATCH_CUH
#define RA_ATTENTION_LINEAR_CUDA_SCRATCH_CUH

#include <cuda_runtime.h>
#include <mutex>
#include <stdint.h>
#include <string.h>

namespace ra_linear
{

struct parcel_t {
    uint32_t word[896];
};

static __global__ void unpack(const __grid_constant__ parcel_t parcel, uint32_t *to, int words)
{
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        to[i] = parcel.word[i];
}

/** Copy @a bytes (a multiple of 4) of host memory to the device in stream order. */
static inline cudaError_t upload(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    parcel_t parcel;
    const size_t most = sizeof(parcel.word);
    for (size_t at = 0; at < bytes; at += most) {
        const size_t part = bytes - at < most ? bytes - at : most;
        memcpy(parcel.word, static_cast<const char *>(from) + at, part);
        unpack<<<1, 256, 0, stream>>>(
            parcel, reinterpret_cast<uint32_t *>(static_cast<char *>(to) + at), (int)(part / 4));
    }
    return cudaGetLastError();
}

/* The current device's pool, made at its first use and kept to the end of the process. */
static inline cudaError_t pool_of_device(cudaMemPool_t *pool_p)
{
    enum { DEVICES = 64 };
    static std::mutex lock;
    static cudaMemPool_t pools[DEVICES];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
        return error;
    if (device >= DEVICES)
        return cudaErrorInvalidDevice;
    std::lock_guard<std::mutex> hold(lock);
    if (!pools[device]) {
        cudaMemPoolProps props = {};
        props.allocType = cudaMemAllocationTypePinned;
        props.location.type = cudaMemLocationTypeDevice;
        props.location.id = device;
        error = cudaMemPoolCreate(&pools[device], &props);
        if (error != cudaSuccess)
            return error;
        uint64_t keep = UINT64_MAX;
        error = cudaMemPoolSetAttribute(pools[device], cudaMemPoolAttrReleaseThreshold, &keep);
    }
    *pool_p = pools[device];
    return error;
}

/** Memory that is free again when the work queued before the destructor is done. */
struct scratch_t {
    void *data = nullptr;
    cudaStream_t stream;
    explicit scratch_t(cudaStream_t s) : stream(s)
    {
    }
    scratch_t(const scratch_t &) = delete;
    ~scratch_t()
    {
        if (data)
            cudaFreeAsync(data, stream);
    }
    cudaError_t take(size_t bytes)
    {
        cudaMemPool_t pool;
        cudaError_t error = pool_of_device(&pool);
        return error == cudaSuccess ? cudaMallocFromPoolAsync(&data, bytes, pool, stream) : error;
    }
};

} // namespace ra_linear

#endif
