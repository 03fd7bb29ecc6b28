/*
 * CUDA kernels of the LM head's log-sum-exp (model/layer_ops.h). A block walks one row of a block
 * of logits once: a thread keeps a running maximum and sum over its columns, 16 logits between two
 * looks at the maximum, and the threads' parts are combined in one fixed order.
 */
#include "model/row_kernels_cuda.h"

extern "C" { /* C headers without a C++ guard of their own */
#include "base/device_cuda.h"
#include "model/row_kernels.h"
}
#include "model/row_vectors.cuh"
#include <cuda_runtime.h>

namespace
{

using namespace ra_row;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int QUADS = 4; /* 16-byte loads in flight a thread */
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * LOG2_E));
    return y;
}

/* sum_j e^{z_j - m} over what a thread has seen; m = -inf: nothing yet. */
struct part_t {
    float m, l;

    /* Terms are taken relative to the maximum; before any finite one, to zero, so that no
     * difference of infinities arises. NaN passes the maximum and stays in the sum. */
    __device__ __forceinline__ float shift() const
    {
        return m == -INFINITY ? 0.0f : m;
    }
    __device__ __forceinline__ void raise(float best)
    {
        if (best > m) {
            l = m == -INFINITY ? l : l * exp_of(m - best);
            m = best;
        }
    }
    __device__ __forceinline__ void add(float z)
    {
        raise(z);
        l += exp_of(z - shift());
    }
    __device__ __forceinline__ void join(part_t other)
    {
        const float best = fmaxf(m, other.m);
        const float s = best == -INFINITY ? 0.0f : best;
        l = (m == -INFINITY ? l : l * exp_of(m - s)) +
            (other.m == -INFINITY ? other.l : other.l * exp_of(other.m - s));
        m = best;
    }
};

__device__ __forceinline__ void add_quads(part_t *part, const float4 (&quad)[QUADS])
{
    float best = -INFINITY;
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        best = fmaxf(best, fmaxf(fmaxf(quad[k].x, quad[k].y), fmaxf(quad[k].z, quad[k].w)));
    }
    part->raise(best);
    const float s = part->shift();
    float sum = 0;
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        sum += (exp_of(quad[k].x - s) + exp_of(quad[k].y - s)) +
               (exp_of(quad[k].z - s) + exp_of(quad[k].w - s));
    }
    part->l += sum;
}

/* Logits [columns] that start at a multiple of 16 bytes. */
__device__ __forceinline__ part_t fold_wide(const float *z, int64_t columns)
{
    const float4 *quads = reinterpret_cast<const float4 *>(z);
    const int64_t n = columns / 4;
    part_t part = {-INFINITY, 0};
    for (int64_t i = threadIdx.x; i < n; i += QUADS * THREADS) {
        float4 quad[QUADS];
#pragma unroll
        for (int k = 0; k < QUADS; k++) {
            quad[k] = i + k * THREADS < n ? __ldcs(quads + i + k * THREADS)
                                          : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        }
        add_quads(&part, quad);
    }
    if (threadIdx.x < columns % 4) {
        part.add(z[4 * n + threadIdx.x]);
    }
    return part;
}

template <bool WIDE> __global__ __launch_bounds__(THREADS) void lse_fold(ra_lse_fold_args_t p)
{
    __shared__ part_t parts[WARPS];
    const int64_t row = blockIdx.x;
    const float *z = p.logits + row * p.stride;
    part_t part = {-INFINITY, 0};
    if constexpr (WIDE) {
        part = fold_wide(z, p.columns);
    } else {
        for (int64_t i = threadIdx.x; i < p.columns; i += THREADS) {
            part.add(z[i]);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const part_t other = {__shfl_xor_sync(ALL_LANES, part.m, step),
                              __shfl_xor_sync(ALL_LANES, part.l, step)};
        part.join(other);
    }
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = part;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        part_t running = {p.m[row], p.l[row]};
        for (int w = 0; w < WARPS; w++) {
            running.join(parts[w]);
        }
        p.m[row] = running.m;
        p.l[row] = running.l;
        const int64_t target = p.target == nullptr ? -1 : p.target[row] - p.first;
        if (target >= 0 && target < p.columns) {
            p.picked[row] = z[target];
        }
    }
}

__global__ __launch_bounds__(THREADS) void lse_reset(ra_lse_reset_args_t p, int rows)
{
    const int row = (int)blockIdx.x * THREADS + (int)threadIdx.x;
    if (row < rows) {
        p.m[row] = -INFINITY;
        p.l[row] = 0;
        p.picked[row] = 0;
    }
}

__global__ __launch_bounds__(THREADS) void log_prob(ra_log_prob_args_t p, int n)
{
    const int i = (int)blockIdx.x * THREADS + (int)threadIdx.x;
    if (i >= n) {
        return;
    }
    if (p.target != nullptr && p.target[i] < 0) {
        p.logprob[i] = 0;
        return;
    }
    const double m = (double)p.m[i * p.part_stride], l = (double)p.l[i * p.part_stride];
    p.logprob[i] = (float)((double)p.logit[i] - m - log(l));
}

} // namespace

ra_status_t ra_lse_fold_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_lse_fold_args_t *args = static_cast<const ra_lse_fold_args_t *>(arg);
    const bool wide = vectors_fit<float>(args->logits, args->stride);
    in_batches(rows, 1, [&](int64_t begin, int n) {
        ra_lse_fold_args_t p = *args;
        p.logits += begin * p.stride;
        p.target = p.target == nullptr ? nullptr : p.target + begin;
        p.m += begin;
        p.l += begin;
        p.picked += begin;
        if (wide) {
            lse_fold<true><<<(unsigned)n, THREADS, 0, stream>>>(p);
        } else {
            lse_fold<false><<<(unsigned)n, THREADS, 0, stream>>>(p);
        }
    });
    return ra_cuda_check_launch("log-sum-exp");
}

ra_status_t ra_lse_reset_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_lse_reset_args_t *args = static_cast<const ra_lse_reset_args_t *>(arg);
    in_batches(rows, 1, [&](int64_t begin, int n) {
        const ra_lse_reset_args_t p = {args->m + begin, args->l + begin, args->picked + begin};
        lse_reset<<<blocks_for(n, THREADS), THREADS, 0, stream>>>(p, n);
    });
    return ra_cuda_check_launch("log-sum-exp reset");
}

ra_status_t ra_log_prob_cuda(const void *arg, int64_t n, struct CUstream_st *stream)
{
    const ra_log_prob_args_t *args = static_cast<const ra_log_prob_args_t *>(arg);
    in_batches(n, 1, [&](int64_t begin, int count) {
        ra_log_prob_args_t p = *args;
        p.logit += begin;
        p.m += begin * p.part_stride;
        p.l += begin * p.part_stride;
        p.target = p.target == nullptr ? nullptr : p.target + begin;
        p.logprob += begin;
        log_prob<<<blocks_for(count, THREADS), THREADS, 0, stream>>>(p, count);
    });
    return ra_cuda_check_launch("log-probability");
}
