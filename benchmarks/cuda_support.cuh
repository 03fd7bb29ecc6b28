/**
 * @file  benchmarks/cuda_support.cuh
 * @brief What the CUDA benchmarks and checks share: failing loudly, device arrays, random normals,
 *        event timing. Arrays start as 0xFF bytes, which is NaN in every float type.
 */
#ifndef RA_BENCHMARKS_CUDA_SUPPORT_CUH
#define RA_BENCHMARKS_CUDA_SUPPORT_CUH

extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <vector>

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error_));        \
            exit(6);                                                                               \
        }                                                                                          \
    } while (0)

#define RA(call)                                                                                   \
    do {                                                                                           \
        if ((call) != RA_OK)                                                                       \
            exit(6);                                                                               \
    } while (0)

template <class T> struct device_t {
    T *data = nullptr;
    size_t count;
    explicit device_t(size_t n) : count(n)
    {
        CUDA(cudaMalloc(&data, (n ? n : 1) * sizeof(T)));
        CUDA(cudaMemset(data, 0xFF, (n ? n : 1) * sizeof(T))); /* 0xFF..: NaN in every type */
    }
    device_t(const device_t &) = delete;
    ~device_t()
    {
        cudaFree(data);
    }
    void put(const void *host)
    {
        CUDA(cudaMemcpy(data, host, count * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() const
    {
        std::vector<T> host(count);
        CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
    void poison()
    {
        CUDA(cudaMemset(data, 0xFF, count * sizeof(T)));
    }
};

static __global__ void fill_normal(__nv_bfloat16 *x, int64_t n, uint32_t seed, float spread)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t z = ((uint64_t)seed << 40) + (uint64_t)i * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        float u = ((uint32_t)(z >> 40) + 1) * 0x1p-24f, v = (uint32_t)(z & 0xFFFFFF) * 0x1p-24f;
        x[i] = __float2bfloat16(spread * sqrtf(-2.0f * __logf(u)) * __cosf(6.2831853f * v));
    }
}

static inline void fill(device_t<__nv_bfloat16> &x, uint32_t seed, float spread = 1.0f)
{
    fill_normal<<<1024, 256>>>(x.data, (int64_t)x.count, seed, spread);
    CUDA(cudaGetLastError());
}

struct stopwatch_t {
    cudaStream_t stream;
    cudaEvent_t begin, end;
    stopwatch_t()
    {
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
        CUDA(cudaDeviceSynchronize());
    }
    template <class F> float ms(F work)
    {
        float t;
        CUDA(cudaEventRecord(begin, stream));
        work();
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&t, begin, end));
        return t;
    }
};

template <class T> double median(std::vector<T> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

#endif
