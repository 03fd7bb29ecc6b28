/*
 * Grouped products on Hopper: contract in moe/experts_cuda.h.
 *
 * A CTA (one a multiprocessor, persistent) works on tiles of 128 rows x 256 weight rows. Warpgroup
 * 0 feeds a ring of k-slices of 64 columns, weights by the copy engine and rows of x by the copy
 * engine or, when gathered, by 16-byte copies of its 128 threads; each further warpgroup multiplies
 * 64 rows. With swiglu the 256 weight rows are 128 gates and their 128 ups, so that both meet in
 * one thread. A tile of fewer rows leaves warpgroups idle, and the others the whole tensor cores.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "base/cuda_attribute.h"
#include "base/sm90_product.cuh"
#include "base/tensor_map.cuh"
#include "moe/experts_cuda.h"

namespace
{

enum store_t { STORE_SWIGLU, STORE_BF16, STORE_F32 };

constexpr int BM = RA_MOE_TILE_ROWS, BN = 256, BK = 64, STAGES = 4, CONSUMERS = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int BOX = 64 * BK * 2; /* bytes of a box of 64 rows */
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, OUT_BYTES = 2 * BOX;
constexpr int SHARED_BYTES = STAGES * (A_BYTES + B_BYTES) + CONSUMERS * OUT_BYTES + 2 * STAGES * 8;
constexpr int PRODUCER_REGS = 40, CONSUMER_REGS = 232;
static_assert(BM == CONSUMERS * RA_MOE_ROW_PAD, "a warpgroup stores one pad unit");

struct params_t {
    const ra_moe_tile_t *tiles;
    const int32_t *tile_count;
    const int32_t *source;
    const uint4 *x;
    uint32_t x_chunks; /* 16-byte pieces between rows of x */
    float *y;
    int64_t y_stride;
    int32_t rows; /* without tiles */
    int32_t n, n_tiles, k, k_blocks, repeat;
};

struct shared_t {
    uint32_t a, b, out, full, empty;
    __device__ explicit shared_t(const unsigned char *base)
    {
        a = ra_smem_addr(base);
        b = a + STAGES * A_BYTES;
        out = b + STAGES * B_BYTES;
        full = out + CONSUMERS * OUT_BYTES;
        empty = full + STAGES * 8;
    }
};

struct work_t {
    int row, rows, group, n;
};

__device__ __forceinline__ int count_items(const params_t &p)
{
    return p.n_tiles * (p.tiles ? __ldg(p.tile_count) : (p.rows + BM - 1) / BM);
}

/* Asked for one item ahead. Neighbours in time share rows of x. */
__device__ __forceinline__ work_t work_at(const params_t &p, int item, int total)
{
    const int m = item / p.n_tiles, n = item - m * p.n_tiles;
    if (item >= total)
        return work_t{0, 0, 0, 0};
    if (!p.tiles)
        return work_t{m * BM, min(BM, p.rows - m * BM), 0, n};
    const int4 t = __ldg(reinterpret_cast<const int4 *>(p.tiles + m));
    return work_t{t.x, t.y, t.z, n};
}

template <bool GATHER, store_t STORE>
__device__ __forceinline__ void produce(const params_t &p, const CUtensorMap *x_map,
                                        const CUtensorMap *w_map, const shared_t &shared)
{
    const int thread = threadIdx.x, chunk = thread & 7, first = thread >> 3;
    const uint32_t place = first * 128 + ((chunk ^ (first & 7)) << 4);
    const int total = count_items(p);
    ra_slot<STAGES> slot;
    work_t next = work_at(p, blockIdx.x, total);
    for (int item = blockIdx.x; item < total; item += gridDim.x) {
        const work_t t = next;
        next = work_at(p, item + gridDim.x, total);
        const int boxes = (t.rows + 63) / 64;
        uint32_t from[BM / 16], live = 0;
        if (GATHER) {
#pragma unroll
            for (int i = 0; i < BM / 16; i++) {
                int row = i < 4 * boxes ? __ldg(p.source + t.row + first + 16 * i) : -1;
                live |= (row >= 0 ? 1u : 0u) << i;
                from[i] = (uint32_t)max(row, 0) * p.x_chunks + chunk;
            }
        }
        int a_block = 0;
#pragma unroll 1
        for (int kb = 0; kb < p.k_blocks * p.repeat; kb++) {
            const uint32_t full = shared.full + 8 * slot.index;
            const uint32_t a = shared.a + slot.index * A_BYTES, b = shared.b + slot.index * B_BYTES;
            ra_mbar_wait(shared.empty + 8 * slot.index, slot.lap ^ 1);
            if (thread == 0) {
                ra_mbar_arrive_expect(full, B_BYTES + (GATHER ? 0 : boxes * BOX));
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = STORE == STORE_SWIGLU ? t.n * 128 : t.n * 256 + 128 * h;
                    const int part = STORE == STORE_SWIGLU ? h : 0;
                    ra_tma_load_4d(b + h * (B_BYTES / 2), w_map, full, kb * BK, row, part, t.group,
                                   ra_l2_evict_normal());
                }
                if (!GATHER)
                    for (int h = 0; h < boxes; h++)
                        ra_tma_load_4d(a + h * BOX, x_map, full, a_block * BK, t.row + 64 * h, 0, 0,
                                       ra_l2_evict_normal());
            }
            if (GATHER) {
                const bool inside = a_block * BK + chunk * 8 < p.k;
                const uint4 *x = p.x + a_block * 8;
#pragma unroll
                for (int i = 0; i < BM / 16; i++) {
                    if (i < 4 * boxes) {
                        const bool read = inside && (live >> i & 1);
                        ra_cp_async_16(a + place + i * 2048, read ? x + from[i] : p.x,
                                       read ? 16 : 0);
                    }
                }
                ra_cp_async_arrive(full);
            }
            a_block = a_block + 1 == p.k_blocks ? 0 : a_block + 1;
            slot.next();
        }
    }
}

__device__ __forceinline__ float swiglu(float gate, float up)
{
    return __fdividef(gate, 1.0f + ra_exp2(gate * -1.4426950408889634f)) * up;
}

/* 64 x 128 values of the warpgroup to global memory, by way of its staging area. */
template <store_t STORE, int FIRST>
__device__ __forceinline__ void store_block(const float (&d)[128], const CUtensorMap *y_map,
                                            uint32_t out, int bar, int row, int col, int n)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool storer = (threadIdx.x & 127) == 0;
    const uint32_t line = out + (16 * warp + (lane & 15)) * 128, mine = lane >> 4,
                   swizzle = lane & 7;
    if (storer)
        ra_bulk_wait_read<0>();
    ra_bar_sync(bar, 128);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = 8 * j + 2 * i;
            if (STORE == STORE_SWIGLU)
                pairs[i] = ra_pack_bf16(swiglu(d[at], d[64 + at]), swiglu(d[at + 1], d[65 + at]));
            else
                pairs[i] = ra_pack_bf16(d[FIRST + at], d[FIRST + at + 1]);
        }
        const uint32_t chunk = (2 * j & 7) + mine;
        ra_stmatrix_x4(line + (j >> 2) * BOX + ((chunk ^ swizzle) << 4), pairs[0], pairs[1],
                       pairs[2], pairs[3]);
    }
    ra_fence_proxy_async_shared();
    ra_bar_sync(bar, 128);
    if (storer) {
        ra_tma_store_2d(y_map, out, col, row);
        if (col + 64 < n)
            ra_tma_store_2d(y_map, out + BOX, col + 64, row);
        ra_bulk_commit();
    }
}

__device__ __forceinline__ void store_f32(const params_t &p, const float (&d)[128], int row,
                                          int row_end, int col)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    row += 16 * warp + (lane >> 2);
    col += 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int r = row + 8 * (i & 1), c = col + 8 * (i >> 1);
        if (r < row_end && c < p.n)
            *reinterpret_cast<float2 *>(p.y + r * p.y_stride + c) =
                make_float2(d[2 * i], d[2 * i + 1]);
    }
}

template <bool GATHER, store_t STORE>
__device__ __forceinline__ void consume(const params_t &p, const CUtensorMap *y_map,
                                        const shared_t &shared, int wg)
{
    const uint32_t a0 = ra_desc_k_major(shared.a + wg * BOX), b0 = ra_desc_k_major(shared.b);
    const uint32_t out = shared.out + wg * OUT_BYTES;
    const int total = count_items(p), steps = p.k_blocks * p.repeat;
    ra_slot<STAGES> slot;
    work_t next = work_at(p, blockIdx.x, total);
    for (int item = blockIdx.x; item < total; item += gridDim.x) {
        const work_t t = next;
        next = work_at(p, item + gridDim.x, total);
        if (64 * wg >= t.rows) {
            ra_skip_stages(steps, shared.full, shared.empty, slot);
            continue;
        }
        float d[128];
        ra_multiply_stages<A_BYTES, B_BYTES, GATHER>(d, steps, shared.full, shared.empty, a0, b0,
                                                     slot);
        const int row = t.row + 64 * wg;
        if (STORE == STORE_SWIGLU) {
            store_block<STORE, 0>(d, y_map, out, 1 + wg, row, t.n * 128, p.n);
        } else if (STORE == STORE_BF16) {
            store_block<STORE, 0>(d, y_map, out, 1 + wg, row, t.n * 256, p.n);
            if (t.n * 256 + 128 < p.n)
                store_block<STORE, 64>(d, y_map, out, 1 + wg, row, t.n * 256 + 128, p.n);
        } else {
            store_f32(p, d, row, t.row + t.rows, t.n * 256);
        }
    }
    if (STORE != STORE_F32 && (threadIdx.x & 127) == 0)
        ra_bulk_wait<0>();
}

template <bool GATHER, store_t STORE>
__global__ void __launch_bounds__(THREADS, 1)
    gemm_kernel(const __grid_constant__ params_t p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ CUtensorMap y_map)
{
    extern __shared__ __align__(1024) unsigned char base[];
    const shared_t shared(base);
    const int warpgroup = __shfl_sync(0xFFFFFFFF, (int)threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
        ra_tma_prefetch_map(&x_map);
        ra_tma_prefetch_map(&w_map);
        ra_tma_prefetch_map(&y_map);
        for (int s = 0; s < STAGES; s++) {
            ra_mbar_init(shared.full + 8 * s, GATHER ? 129 : 1);
            ra_mbar_init(shared.empty + 8 * s, 4 * CONSUMERS);
        }
        ra_mbar_init_fence();
    }
    __syncthreads();
    if (warpgroup == 0) {
        ra_regs_shrink<PRODUCER_REGS>();
        if (GATHER || threadIdx.x == 0)
            produce<GATHER, STORE>(p, &x_map, &w_map, shared);
    } else {
        ra_regs_grow<CONSUMER_REGS>();
        consume<GATHER, STORE>(p, &y_map, shared, warpgroup - 1);
    }
}

/* ---- host side ----------------------------------------------------------------------------- */

const char subsystem[] = "moe";

typedef void (*kernel_t)(params_t, CUtensorMap, CUtensorMap, CUtensorMap);

kernel_t kernel_of(bool gather, store_t store)
{
    static const kernel_t table[2][3] = {
        {gemm_kernel<false, STORE_SWIGLU>, gemm_kernel<false, STORE_BF16>,
         gemm_kernel<false, STORE_F32>},
        {gemm_kernel<true, STORE_SWIGLU>, gemm_kernel<true, STORE_BF16>,
         gemm_kernel<true, STORE_F32>},
    };
    return table[gather][store];
}

bool misaligned(const void *pointer, int64_t stride_bytes)
{
    return ((uintptr_t)pointer | (uintptr_t)stride_bytes) % 16 != 0;
}

bool takes(const ra_moe_cuda_gemm_t *call)
{
    const int64_t y_bytes = call->y_dtype == RA_F32 ? 4 : 2;
    return call->dtype == RA_BF16 && call->n % 8 == 0 && call->k % 8 == 0 &&
           (call->repeat <= 1 || call->k % BK == 0) && !(call->swiglu && call->y_dtype == RA_F32) &&
           call->n <= INT32_MAX - BN && call->k <= INT32_MAX - BK && call->x_rows < INT32_MAX &&
           call->x_rows * call->x_stride / 8 <= UINT32_MAX && call->y_rows < INT32_MAX &&
           !misaligned(call->x, call->x_stride * 2) && !misaligned(call->weight, 0) &&
           !misaligned(call->y, call->y_stride * y_bytes);
}

ra_status_t make_maps(const ra_moe_cuda_gemm_t *call, CUtensorMap *x, CUtensorMap *w,
                      CUtensorMap *y)
{
    const int64_t wk = call->k * (call->repeat > 1 ? call->repeat : 1),
                  parts = call->swiglu ? 2 : 1;
    RA_TRY(ra_tensor_map_bf16<4>(subsystem, call->x, {call->k, call->x_rows, 1, 1},
                                 {call->x_stride * 2, 16, 16}, {BK, 64, 1, 1},
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, x));
    RA_TRY(ra_tensor_map_bf16<4>(subsystem, call->weight, {wk, call->n, parts, call->groups},
                                 {wk * 2, call->n * wk * 2, parts * call->n * wk * 2},
                                 {BK, BN / 2, 1, 1}, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, w));
    if (call->y_dtype == RA_F32) {
        *y = *x;
        return RA_OK;
    }
    return ra_tensor_map_bf16<2>(subsystem, call->y, {call->n, call->y_rows}, {call->y_stride * 2},
                                 {64, 64}, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, y);
}

} // namespace

ra_status_t ra_moe_sm90_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream)
{
    if (!ra_cuda_is_sm90() || !takes(call))
        return RA_ERR_UNSUPPORTED;
    const store_t store = call->swiglu               ? STORE_SWIGLU
                          : call->y_dtype == RA_BF16 ? STORE_BF16
                                                     : STORE_F32;
    const int columns = call->swiglu ? BN / 2 : BN;
    const int64_t m_tiles = call->tiles ? call->max_tiles : (call->x_rows + BM - 1) / BM;
    params_t p = {};
    p.tiles = call->tiles;
    p.tile_count = call->tile_count;
    p.source = call->source;
    p.x = static_cast<const uint4 *>(call->x);
    p.x_chunks = (uint32_t)(call->x_stride / 8);
    p.y = static_cast<float *>(call->y);
    p.y_stride = call->y_stride;
    p.rows = (int32_t)call->x_rows;
    p.n = (int32_t)call->n;
    p.n_tiles = (int32_t)((call->n + columns - 1) / columns);
    p.k = (int32_t)call->k;
    p.k_blocks = (int32_t)((call->k + BK - 1) / BK);
    p.repeat = call->repeat > 1 ? call->repeat : 1;
    const int64_t total = m_tiles * p.n_tiles;
    if (total == 0)
        return RA_OK;
    if (total > INT32_MAX)
        return RA_ERR_UNSUPPORTED;
    CUtensorMap x_map, w_map, y_map;
    RA_TRY(make_maps(call, &x_map, &w_map, &y_map));
    const kernel_t kernel = kernel_of(call->source != nullptr, store);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error == cudaSuccess) {
        const int processors = ra_cuda_attribute(cudaDevAttrMultiProcessorCount);
        const unsigned grid = (unsigned)(total < processors ? total : processors);
        kernel<<<grid, THREADS, SHARED_BYTES, stream>>>(p, x_map, w_map, y_map);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "expert product launch, %d bytes shared: %s",
                       SHARED_BYTES, cudaGetErrorString(error));
    return RA_OK;
}
