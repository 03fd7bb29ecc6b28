/**
 * @file  model/row_vectors.cuh
 * @brief Internal to model/: what the CUDA row kernels share. A thread moves eight elements at a
 *        time (16 bytes of bf16, 32 of fp32) and computes in fp32.
 */
#ifndef RA_MODEL_ROW_VECTORS_CUH
#define RA_MODEL_ROW_VECTORS_CUH

#include <cuda_bf16.h>
#include <stdint.h>

namespace ra_row
{

typedef __nv_bfloat16 bf16;

constexpr int VECTOR = 8; /* elements a thread moves at once */
constexpr unsigned ALL_LANES = 0xffffffffu;

struct vector_t {
    float x[VECTOR];
};

__device__ __forceinline__ float widen(float x)
{
    return x;
}

__device__ __forceinline__ float widen(bf16 x)
{
    return __bfloat162float(x);
}

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* A vector as it lies in memory: what to hold while other work goes on. */
__device__ __forceinline__ vector_t load_raw(const float *from)
{
    const float4 a = reinterpret_cast<const float4 *>(from)[0];
    const float4 b = reinterpret_cast<const float4 *>(from)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ uint4 load_raw(const bf16 *from)
{
    return *reinterpret_cast<const uint4 *>(from);
}

__device__ __forceinline__ vector_t widen(const vector_t &raw)
{
    return raw;
}

__device__ __forceinline__ vector_t widen(const uint4 &raw)
{
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
    vector_t v;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v.x[2 * i] = __uint_as_float(word[i] << 16);
        v.x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
    return v;
}

template <class T> __device__ __forceinline__ vector_t load(const T *from)
{
    return widen(load_raw(from));
}

__device__ __forceinline__ void store(float *to, const vector_t &v)
{
    reinterpret_cast<float4 *>(to)[0] = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(v.x[4], v.x[5], v.x[6], v.x[7]);
}

__device__ __forceinline__ void store(bf16 *to, const vector_t &v)
{
    __nv_bfloat162 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pair[i] = __floats2bfloat162_rn(v.x[2 * i], v.x[2 * i + 1]);
    }
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(pair);
}

__device__ __forceinline__ float sum_of_squares(const vector_t &v)
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        sum = fmaf(v.x[i], v.x[i], sum);
    }
    return sum;
}

/* Sum over LANES neighbours (a power of two); all of them get it. */
template <int LANES> __device__ __forceinline__ float sum_lanes(float x)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}

/* 1 / sqrt(sum share + eps), share = 1 / number of channels */
__device__ __forceinline__ float inverse_rms(float sum, float share, float eps)
{
    return rsqrtf(fmaf(sum, share, eps));
}

__device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

/* Whether rows of T at @a base may be read eight elements at a time. */
template <class T> bool vectors_fit(const void *base, int64_t stride)
{
    return (uintptr_t)base % 16 == 0 && stride * (int64_t)sizeof(T) % 16 == 0;
}

/* Call launch(first row, rows) for batches of rows with at most 2^30 units of work, so that a
 * kernel counts units in 32 bits. */
template <class Launch> void in_batches(int64_t rows, int64_t units_a_row, const Launch &launch)
{
    const int64_t fit = ((int64_t)1 << 30) / (units_a_row > 0 ? units_a_row : 1);
    const int64_t most = fit > 0 ? fit : 1;
    for (int64_t begin = 0; begin < rows; begin += most) {
        launch(begin, (int)(rows - begin < most ? rows - begin : most));
    }
}

inline unsigned blocks_for(int64_t units, int64_t units_a_block)
{
    return (unsigned)((units + units_a_block - 1) / units_a_block);
}

} // namespace ra_row

#endif
