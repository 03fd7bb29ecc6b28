/* moe/exchange_cuda.cu - contract in moe/exchange_cuda.h. */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "moe/exchange_cuda.h"
#include <cuda_runtime.h>

namespace
{

const char subsystem[] = "moe";

constexpr int SCAN_THREADS = 1024, COPY_THREADS = 256;

/* First expert of a rank, as ra_moe_expert_range(). */
__device__ __forceinline__ int first_expert(const ra_moe_cuda_visits_t &v, int rank)
{
    return (int)((int64_t)v.experts * rank / v.ranks);
}

/* One rank a block; tokens in the upper and slots in the lower half of one sum. */
__global__ void __launch_bounds__(SCAN_THREADS) visits_kernel(const ra_moe_cuda_visits_t v)
{
    __shared__ unsigned long long sums[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int first = first_expert(v, v.rank_begin + blockIdx.x);
    const int last = first_expert(v, v.rank_begin + blockIdx.x + 1);
    unsigned long long carry = 0;
    for (int64_t at = 0; at < v.rows; at += SCAN_THREADS) {
        const int64_t t = at + threadIdx.x;
        int count = 0;
        if (t < v.rows)
            for (int j = 0; j < v.top_k; j++) {
                const int e = v.expert[t * v.top_k + j];
                count += e >= first && e < last;
            }
        const unsigned long long mine =
            (unsigned long long)(count > 0) << 32 | (unsigned long long)count;
        unsigned long long sum = mine;
        for (int d = 1; d < 32; d *= 2) {
            const unsigned long long other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
            sum += lane >= d ? other : 0;
        }
        __syncthreads(); /* the sums of the last round have been read */
        if (lane == 31)
            sums[warp] = sum;
        __syncthreads();
        unsigned long long below = carry;
        for (int w = 0; w < SCAN_THREADS / 32; w++) {
            below += w < warp ? sums[w] : 0;
            carry += sums[w];
        }
        if (t < v.rows) {
            const unsigned long long before = below + sum - mine;
            v.tokens_before[blockIdx.x * v.rows + t] = (int32_t)(before >> 32);
            v.slots_before[blockIdx.x * v.rows + t] = (int32_t)before;
        }
    }
    if (threadIdx.x == 0) {
        v.totals[blockIdx.x] = (int32_t)(carry >> 32);
        v.totals[v.rank_count + blockIdx.x] = (int32_t)carry;
    }
}

/* Bytes of a row by the block, 16 at a time where rows allow. */
__device__ __forceinline__ void copy_row(const char *from, char *to, int64_t bytes)
{
    if (((uintptr_t)from | (uintptr_t)to | (uintptr_t)bytes) % 16 == 0) {
        for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x)
            reinterpret_cast<uint4 *>(to)[i] = __ldg(reinterpret_cast<const uint4 *>(from) + i);
    } else {
        for (int64_t i = threadIdx.x; i < bytes / 2; i += blockDim.x)
            reinterpret_cast<uint16_t *>(to)[i] = reinterpret_cast<const uint16_t *>(from)[i];
    }
}

__global__ void __launch_bounds__(COPY_THREADS)
    pack_kernel(const ra_moe_cuda_visits_t v, const char *x, int64_t row_bytes, int64_t x_bytes,
                char *send, int32_t *send_expert, int32_t *result_at)
{
    const int64_t t = blockIdx.x;
    const int32_t *expert = v.expert + t * v.top_k;
    int64_t tokens = 0, slots = 0; /* of the ranks before */
    for (int p = 0, j = 0; p < v.ranks; p++) {
        const int last = first_expert(v, p + 1), begin = j;
        while (j < v.top_k && expert[j] < last)
            j++;
        if (j > begin) {
            const int64_t row = tokens + v.tokens_before[p * v.rows + t];
            const int64_t result = slots + v.slots_before[p * v.rows + t];
            copy_row(x + t * x_bytes, send + row * row_bytes, row_bytes);
            for (int i = threadIdx.x; i < v.top_k; i += blockDim.x)
                send_expert[row * v.top_k + i] = expert[i];
            for (int i = begin + threadIdx.x; i < j; i += blockDim.x)
                result_at[t * v.top_k + i] = (int32_t)(result + i - begin);
        }
        tokens += v.totals[p];
        slots += v.totals[v.rank_count + p];
    }
}

__global__ void __launch_bounds__(COPY_THREADS)
    unsort_kernel(const ra_moe_cuda_visits_t v, const int32_t *position, const char *out,
                  int64_t row_bytes, char *back)
{
    int64_t to = v.slots_before[blockIdx.x];
    for (int j = 0; j < v.top_k; j++) {
        const int64_t from = position[(int64_t)blockIdx.x * v.top_k + j];
        if (from >= 0)
            copy_row(out + from * row_bytes, back + to++ * row_bytes, row_bytes);
    }
}

ra_status_t check(const char *what)
{
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "%s launch: %s", what, cudaGetErrorString(error));
    return RA_OK;
}

int64_t bytes_of(ra_dtype_t dtype, int64_t elements)
{
    return elements * (dtype == RA_F32 ? 4 : 2);
}

} // namespace

ra_status_t ra_moe_cuda_visits(const ra_moe_cuda_visits_t *visits, struct CUstream_st *stream)
{
    visits_kernel<<<(unsigned)visits->rank_count, SCAN_THREADS, 0, stream>>>(*visits);
    return check("visits");
}

ra_status_t ra_moe_cuda_pack(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype, const void *x,
                             int64_t hidden, int64_t x_stride, void *send, int32_t *send_expert,
                             int32_t *result_at, struct CUstream_st *stream)
{
    if (visits->rows == 0)
        return RA_OK;
    pack_kernel<<<(unsigned)visits->rows, COPY_THREADS, 0, stream>>>(
        *visits, static_cast<const char *>(x), bytes_of(dtype, hidden), bytes_of(dtype, x_stride),
        static_cast<char *>(send), send_expert, result_at);
    return check("packing");
}

ra_status_t ra_moe_cuda_unsort(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype,
                               const int32_t *position, const void *out, int64_t hidden, void *back,
                               struct CUstream_st *stream)
{
    if (visits->rows == 0)
        return RA_OK;
    unsort_kernel<<<(unsigned)visits->rows, COPY_THREADS, 0, stream>>>(
        *visits, position, static_cast<const char *>(out), bytes_of(dtype, hidden),
        static_cast<char *>(back));
    return check("returning");
}
