/*
 * moe/experts_simt.cu - grouped products of any size in fp32 multiply-adds: the exact fp32 path,
 * and bf16 sizes that the Hopper kernel refuses. Contract in moe/experts_cuda.h.
 *
 * A block computes a tile's rows x 64 columns; a thread ROWS x 4 of them, twice with swiglu. Sums
 * run in ascending k.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "moe/experts_cuda.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace
{

const char subsystem[] = "moe";

constexpr int BM = RA_MOE_TILE_ROWS, BN = 64, BK = 16, THREADS = 256;
constexpr int ROWS = BM / 16; /* of a thread */

struct operands_t {
    float x[BK][BM + 4];
    float w[2][BK][BN + 4];
};

template <class T>
__device__ void load_slices(const ra_moe_cuda_gemm_t &c, const ra_moe_tile_t &t, int64_t column,
                            int64_t at, int parts, operands_t *to)
{
    const int64_t wk = c.k * c.repeat;
    const T *x = static_cast<const T *>(c.x);
    const T *w = static_cast<const T *>(c.weight) + (int64_t)t.group * parts * c.n * wk;
    for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
        const int r = i / BK, k = i % BK;
        int64_t row = r < t.rows ? t.row + r : -1;
        if (row >= 0 && c.source)
            row = c.source[row];
        to->x[k][r] = row >= 0 && at + k < wk ? (float)x[row * c.x_stride + (at + k) % c.k] : 0.0f;
    }
    for (int i = threadIdx.x; i < parts * BN * BK; i += THREADS) {
        const int part = i / (BN * BK), n = i / BK % BN, k = i % BK;
        const bool inside = column + n < c.n && at + k < wk;
        to->w[part][k][n] = inside ? (float)w[(part * c.n + column + n) * wk + at + k] : 0.0f;
    }
}

template <class TX, class TY, bool SWIGLU>
__global__ void __launch_bounds__(THREADS) simt_kernel(const ra_moe_cuda_gemm_t c)
{
    __shared__ operands_t shared;
    constexpr int PARTS = SWIGLU ? 2 : 1;
    const int64_t column = (int64_t)blockIdx.x * BN, wk = c.k * c.repeat;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int64_t count = c.tiles ? *c.tile_count : (c.x_rows + BM - 1) / BM;
    for (int64_t m = blockIdx.y; m < count; m += gridDim.y) {
        ra_moe_tile_t t = {(int32_t)(m * BM), (int32_t)min((int64_t)BM, c.x_rows - m * BM), 0, 0};
        if (c.tiles)
            t = c.tiles[m];
        float d[PARTS][ROWS][4] = {};
        for (int64_t at = 0; at < wk; at += BK) {
            __syncthreads();
            load_slices<TX>(c, t, column, at, PARTS, &shared);
            __syncthreads();
            for (int k = 0; k < BK; k++)
#pragma unroll
                for (int p = 0; p < PARTS; p++)
#pragma unroll
                    for (int i = 0; i < ROWS; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            d[p][i][j] = __fmaf_rn(shared.x[k][ty + 16 * i],
                                                   shared.w[p][k][tx + 16 * j], d[p][i][j]);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int r = ty + 16 * i;
                const int64_t n = column + tx + 16 * j;
                if (r >= t.rows || n >= c.n)
                    continue;
                float value = d[0][i][j];
                if (SWIGLU)
                    value = value / (1.0f + expf(-value)) * d[PARTS - 1][i][j];
                static_cast<TY *>(c.y)[(t.row + r) * c.y_stride + n] = (TY)value;
            }
        }
    }
}

template <class TX, class TY>
void launch(const ra_moe_cuda_gemm_t &c, dim3 grid, struct CUstream_st *stream)
{
    if (c.swiglu)
        simt_kernel<TX, TY, true><<<grid, THREADS, 0, stream>>>(c);
    else
        simt_kernel<TX, TY, false><<<grid, THREADS, 0, stream>>>(c);
}

} // namespace

ra_status_t ra_moe_simt_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream)
{
    ra_moe_cuda_gemm_t c = *call;
    c.repeat = c.repeat > 1 ? c.repeat : 1;
    const int64_t m_tiles = c.tiles ? c.max_tiles : (c.x_rows + BM - 1) / BM;
    const int64_t n_tiles = (c.n + BN - 1) / BN;
    if (m_tiles == 0 || n_tiles == 0)
        return RA_OK;
    const dim3 grid((unsigned)n_tiles, (unsigned)(m_tiles < 65535 ? m_tiles : 65535));
    if (c.dtype == RA_F32 && c.y_dtype == RA_F32)
        launch<float, float>(c, grid, stream);
    else if (c.dtype == RA_BF16 && c.y_dtype == RA_BF16)
        launch<__nv_bfloat16, __nv_bfloat16>(c, grid, stream);
    else if (c.dtype == RA_BF16 && c.y_dtype == RA_F32)
        launch<__nv_bfloat16, float>(c, grid, stream);
    else
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "expert products of %d to %d", c.dtype,
                       c.y_dtype);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "expert product launch: %s",
                       cudaGetErrorString(error));
    return RA_OK;
}

ra_status_t ra_moe_cuda_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream)
{
    const ra_status_t status = ra_moe_sm90_gemm(call, stream);
    return status == RA_ERR_UNSUPPORTED ? ra_moe_simt_gemm(call, stream) : status;
}
