/*
 * LM head and log-sum-exp on Hopper: contract in model/head_cuda.h.
 *
 * A CTA (one a multiprocessor, persistent) works on tiles of 128 rows x 256 vocabulary entries.
 * Warpgroup 0 feeds a ring of k-slices of 64 channels through the copy engine. Two more warpgroups
 * multiply 64 rows each, and reduce their logits in registers to a maximum and a sum a row; the one
 * that is ahead reduces while the other multiplies. A second kernel folds the tiles' parts.
 */
#include "model/head_cuda.h"

#include "base/cuda_attribute.h"
#include "base/sm90_product.cuh"
#include "base/tensor_map.cuh"

namespace
{

constexpr int BM = 128, BN = 256, BK = 64, STAGES = 4, CONSUMERS = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, WG_BYTES = 64 * BK * 2;
constexpr int SHARED_BYTES = STAGES * (A_BYTES + B_BYTES) + 2 * STAGES * 8;
constexpr int PRODUCER_REGS = 40, CONSUMER_REGS = 232;
constexpr int GROUP = 16; /* tiles of rows that sweep the vocabulary together: 16 of rows by 8 of
                             entries are what 132 CTAs hold, and the least they fetch */
constexpr int FOLD_THREADS = 64;
constexpr float LOG2_E = 1.4426950408889634f;

struct params_t {
    const int32_t *target;
    float2 *parts; /* [n_tiles][rows] maximum and sum */
    float *picked;
    int64_t first;
    int32_t rows, columns, m_tiles, n_tiles, k_blocks;
};

struct shared_t {
    uint32_t a, b, full, empty;
    __device__ explicit shared_t(const unsigned char *base)
    {
        a = ra_smem_addr(base);
        b = a + STAGES * A_BYTES;
        full = b + STAGES * B_BYTES;
        empty = full + STAGES * 8;
    }
};

struct work_t {
    int row, column; /* first ones of the CTA's tile */
};

__device__ __forceinline__ work_t work_at(const params_t &p, int item)
{
    const int group = item / (GROUP * p.n_tiles), sub = item - group * GROUP * p.n_tiles;
    const int tiles = min(GROUP, p.m_tiles - group * GROUP), n = sub / tiles;
    return {(group * GROUP + sub - n * tiles) * BM, n * BN};
}

__device__ __forceinline__ void produce(const params_t &p, const CUtensorMap *x_map,
                                        const CUtensorMap *w_map, const shared_t &shared)
{
    ra_slot<STAGES> slot;
    for (int item = blockIdx.x; item < p.m_tiles * p.n_tiles; item += gridDim.x) {
        const work_t t = work_at(p, item);
#pragma unroll 1
        for (int kb = 0; kb < p.k_blocks; kb++) {
            const uint32_t full = shared.full + 8 * slot.index;
            ra_mbar_wait(shared.empty + 8 * slot.index, slot.lap ^ 1);
            ra_mbar_arrive_expect(full, A_BYTES + B_BYTES);
            ra_tma_load_4d(shared.b + slot.index * B_BYTES, w_map, full, kb * BK, t.column, 0, 0,
                           ra_l2_evict_normal());
            ra_tma_load_4d(shared.a + slot.index * A_BYTES, x_map, full, kb * BK, t.row, 0, 0,
                           ra_l2_evict_normal());
            slot.next();
        }
    }
}

/* Maximum and sum over the 64 logits of row half H that this thread holds and those of the three
 * lanes beside it. The sum's terms are 2^(z log2 e - s) with s = m log2 e rounded, one operation
 * each; what the rounding took is put back at the end. */
template <int H> __device__ __forceinline__ float2 reduce_row(const float (&d)[128])
{
    float m = -INFINITY, l = 0;
#pragma unroll
    for (int i = 0; i < 128; i += 4)
        m = fmaxf(m, fmaxf(d[i + 2 * H], d[i + 2 * H + 1]));
    m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 2));
    const float from = m == -INFINITY ? 0.0f : m, s = from * LOG2_E;
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
        even += ra_exp2(fmaf(d[i + 2 * H], LOG2_E, -s));
        odd += ra_exp2(fmaf(d[i + 2 * H + 1], LOG2_E, -s));
    }
    l = (even + odd) * ra_exp2(-fmaf(from, LOG2_E, -s));
    l += __shfl_xor_sync(0xFFFFFFFF, l, 1);
    l += __shfl_xor_sync(0xFFFFFFFF, l, 2);
    return make_float2(m, l);
}

/* The target's logit, when this thread holds it: column `at` of the tile's `columns`, or none. */
template <int H>
__device__ __forceinline__ void pick(const params_t &p, const float (&d)[128], int row, int64_t at,
                                     int columns)
{
    const int lane = threadIdx.x & 31;
    if (at < 0 || at >= columns || ((int)at >> 1 & 3) != (lane & 3))
        return;
    float found = 0;
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
        found = 2 * i + 2 * (lane & 3) == (int)at ? d[i + 2 * H] : found;
        found = 2 * i + 2 * (lane & 3) + 1 == (int)at ? d[i + 2 * H + 1] : found;
    }
    p.picked[row] = found;
}

/* Columns beyond the vocabulary take no part. */
__device__ __forceinline__ void mask_tail(float (&d)[128], int columns)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 128; i++) {
        if (8 * (i >> 2) + 2 * (lane & 3) + (i & 1) >= columns)
            d[i] = -INFINITY;
    }
}

__device__ __forceinline__ int64_t target_of(const params_t &p, int row)
{
    return p.target != nullptr && row < p.rows ? __ldg(p.target + row) - p.first : -1;
}

__device__ __forceinline__ void consume(const params_t &p, const shared_t &shared, int wg)
{
    const uint32_t a0 = ra_desc_k_major(shared.a + wg * WG_BYTES), b0 = ra_desc_k_major(shared.b);
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    ra_slot<STAGES> slot;
    for (int item = blockIdx.x; item < p.m_tiles * p.n_tiles; item += gridDim.x) {
        const work_t t = work_at(p, item);
        const int row = t.row + 64 * wg + 16 * warp + (lane >> 2);
        if (t.row + 64 * wg >= p.rows) {
            ra_skip_stages(p.k_blocks, shared.full, shared.empty, slot);
            continue;
        }
        const int64_t at0 = target_of(p, row), at1 = target_of(p, row + 8);
        float d[128];
        ra_multiply_stages<A_BYTES, B_BYTES, false>(d, p.k_blocks, shared.full, shared.empty, a0,
                                                    b0, slot);
        const int columns = min(BN, p.columns - t.column);
        pick<0>(p, d, row, at0 - t.column, columns);
        pick<1>(p, d, row + 8, at1 - t.column, columns);
        if (columns < BN)
            mask_tail(d, columns);
        const float2 upper = reduce_row<0>(d), lower = reduce_row<1>(d);
        float2 *parts = p.parts + (int64_t)(t.column / BN) * p.rows;
        if ((lane & 3) == 0 && row < p.rows)
            parts[row] = upper;
        if ((lane & 3) == 1 && row + 8 < p.rows)
            parts[row + 8] = lower;
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    head_kernel(const __grid_constant__ params_t p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map)
{
    extern __shared__ __align__(1024) unsigned char base[];
    const shared_t shared(base);
    const int warpgroup = __shfl_sync(0xFFFFFFFF, (int)threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
        ra_tma_prefetch_map(&x_map);
        ra_tma_prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            ra_mbar_init(shared.full + 8 * s, 1);
            ra_mbar_init(shared.empty + 8 * s, 4 * CONSUMERS);
        }
        ra_mbar_init_fence();
    }
    __syncthreads();
    if (warpgroup == 0) {
        ra_regs_shrink<PRODUCER_REGS>();
        if (threadIdx.x == 0)
            produce(p, &x_map, &w_map, shared);
    } else {
        ra_regs_grow<CONSUMER_REGS>();
        consume(p, shared, warpgroup - 1);
    }
}

/* A thread a row: fold the tiles' parts into the running ones, in order. */
__global__ __launch_bounds__(FOLD_THREADS) void fold_parts(const float2 *parts, int rows, int tiles,
                                                           float *m, float *l)
{
    const int row = blockIdx.x * FOLD_THREADS + threadIdx.x;
    if (row >= rows)
        return;
    float best = m[row], sum = 0;
    const float before = best;
#pragma unroll 8
    for (int n = 0; n < tiles; n++)
        best = fmaxf(best, parts[(int64_t)n * rows + row].x);
    const float from = best == -INFINITY ? 0.0f : best;
    sum = before == -INFINITY ? l[row] : l[row] * ra_exp2((before - from) * LOG2_E);
#pragma unroll 8
    for (int n = 0; n < tiles; n++) {
        const float2 part = parts[(int64_t)n * rows + row];
        sum += part.x == -INFINITY ? part.y : part.y * ra_exp2((part.x - from) * LOG2_E);
    }
    m[row] = best;
    l[row] = sum;
}

/* ---- host side ----------------------------------------------------------------------------- */

const char subsystem[] = "model";

bool misaligned(const void *pointer, int64_t elements)
{
    return (uintptr_t)pointer % 16 != 0 || elements % 8 != 0;
}

bool fits(const ra_head_fold_t *call)
{
    return call->columns >= 64 && call->columns <= INT32_MAX - BN && call->channels > 0 &&
           call->channels <= INT32_MAX - BK && call->rows <= INT32_MAX - BM &&
           (call->rows / BM + 1) * (call->columns / BN + 1) <= INT32_MAX / 2 &&
           !misaligned(call->x, call->x_stride) && !misaligned(call->weight, call->channels) &&
           (uintptr_t)call->parts % 8 == 0;
}

ra_status_t launch(const ra_head_fold_t *call, int processors, cudaStream_t stream)
{
    params_t p = {};
    p.target = call->target;
    p.parts = static_cast<float2 *>(call->parts);
    p.picked = call->picked;
    p.first = call->first;
    p.rows = (int32_t)call->rows;
    p.columns = (int32_t)call->columns;
    p.m_tiles = (int32_t)((call->rows + BM - 1) / BM);
    p.n_tiles = (int32_t)((call->columns + BN - 1) / BN);
    p.k_blocks = (int32_t)((call->channels + BK - 1) / BK);
    CUtensorMap x_map, w_map;
    RA_TRY(ra_tensor_map_bf16<4>(subsystem, call->x, {call->channels, call->rows, 1, 1},
                                 {call->x_stride * 2, 16, 16}, {BK, BM, 1, 1},
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &x_map));
    RA_TRY(ra_tensor_map_bf16<4>(subsystem, call->weight, {call->channels, call->columns, 1, 1},
                                 {call->channels * 2, 16, 16}, {BK, BN, 1, 1},
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &w_map));
    const int items = p.m_tiles * p.n_tiles;
    const unsigned grid = (unsigned)(items < processors ? items : processors);
    cudaError_t error = cudaFuncSetAttribute(
        head_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error == cudaSuccess) {
        head_kernel<<<grid, THREADS, SHARED_BYTES, stream>>>(p, x_map, w_map);
        fold_parts<<<(unsigned)((p.rows + FOLD_THREADS - 1) / FOLD_THREADS), FOLD_THREADS, 0,
                     stream>>>(p.parts, p.rows, p.n_tiles, call->m, call->l);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "LM head launch, %d bytes shared: %s",
                       SHARED_BYTES, cudaGetErrorString(error));
    return RA_OK;
}

} // namespace

int64_t ra_head_sm90_parts(int64_t rows, int64_t columns)
{
    return rows * ((columns + BN - 1) / BN) * (int64_t)sizeof(float2);
}

bool ra_head_sm90_takes(const ra_head_fold_t *call)
{
    return ra_cuda_is_sm90() && fits(call);
}

ra_status_t ra_head_sm90_fold(const ra_head_fold_t *call, struct CUstream_st *stream)
{
    if (!ra_head_sm90_takes(call))
        return RA_ERR_UNSUPPORTED;
    return call->rows == 0
               ? RA_OK
               : launch(call, ra_cuda_attribute(cudaDevAttrMultiProcessorCount), stream);
}
