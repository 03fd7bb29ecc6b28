/**
 * @file  moe/experts_cuda.h
 * @brief Steps of a mixture-of-experts layer on a CUDA device, as launches. Internal to moe/.
 *
 * Everything is queued on the caller's stream and nothing is read back. Pointers are device memory
 * of the current device. Order of a layer:
 *
 *     logits  = x Wr^T                         ra_moe_cuda_gemm()
 *     choices                                  ra_moe_cuda_select(), ra_moe_cuda_replay()
 *     slots by expert                          ra_moe_cuda_sort()
 *     inner   = SiLU(x Wgate^T) * (x Wup^T)    ra_moe_cuda_gemm(), gathers rows of x
 *     out     = inner Wdown^T                  ra_moe_cuda_gemm()
 *     y (+)= sum of weight * out + shared      ra_moe_cuda_combine()
 *
 * A slot is one (token, expert) pair. Slots are kept by expert and inside an expert by token; each
 * expert's rows begin at a multiple of RA_MOE_ROW_PAD, so that whole half tiles can be stored: rows
 * between an expert's last slot and the next expert hold finite rubbish. Tiles of the products
 * never cross experts.
 *
 * Numerics  bf16 products with fp32 sums (tensor cores), or fp32 throughout. A row's bits depend on
 * that row and the weights only: not on the number, order or routing of other rows. Repeats are
 * bit-equal.
 */
#ifndef RA_MOE_EXPERTS_CUDA_H
#define RA_MOE_EXPERTS_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "base/dtype.h"
#include "base/status.h"
#include "moe/router.h"
#include <stdbool.h>
#include <stdint.h>

struct CUstream_st;

enum { RA_MOE_TILE_ROWS = 128, RA_MOE_ROW_PAD = 64 };

/** Rows [row, row + rows) of one group (expert); rows <= RA_MOE_TILE_ROWS. */
typedef struct ra_moe_tile {
    int32_t row, rows, group, unused;
} ra_moe_tile_t;

/**
 * The choices of ra_router_select(), row by row on the device: the same experts, weights and gap
 * bit for bit, given the same logits and a CPU of the avx2 or avx512 row of base/cpu_isa.h (the
 * generic row rounds the sigmoid's exponential twice, which may differ in the last bits).
 * Arguments as there; logits are [rows, experts], contiguous, and so are the results.
 */
ra_status_t ra_moe_cuda_select(const ra_router_t *router, int64_t rows, const float *logits,
                               const float *bias, int32_t *expert_p, float *weight_p, float *gap_p,
                               struct CUstream_st *stream);

/** ra_router_replay() on the device, bit for bit under the same condition; does nothing without
 * arrays. */
ra_status_t ra_moe_cuda_replay(const ra_router_t *router, const ra_router_replay_t *replay,
                               int64_t rows, const float *logits, int32_t *expert, float *weight,
                               struct CUstream_st *stream);

/** Slots of [first, last) among the choices of some tokens, by expert. */
typedef struct ra_moe_cuda_sort {
    const int32_t *expert; /**< [rows, top_k], ascending in a row; others than [first, last) and -1
                                are passed over */
    int64_t rows;
    int32_t top_k, first, last;
    int32_t *position;    /**< out [rows, top_k]: row of the slot; -1 when passed over */
    int32_t *source;      /**< out [ra_moe_cuda_sorted_rows()]: token; -1 between experts */
    ra_moe_tile_t *tiles; /**< out [ra_moe_cuda_tiles()]; group = expert - first */
    int32_t *tile_count;  /**< out [1] */
    int32_t *scratch;     /**< [ra_moe_cuda_sort_scratch()] */
} ra_moe_cuda_sort_t;

/** Rows that @a slots slots of @a experts experts can take, gaps included. */
int64_t ra_moe_cuda_sorted_rows(int64_t slots, int32_t experts);
/** Tiles they can take. */
int64_t ra_moe_cuda_tiles(int64_t slots, int32_t experts);
/** int32s of scratch. */
int64_t ra_moe_cuda_sort_scratch(int64_t rows, int32_t experts);
ra_status_t ra_moe_cuda_sort(const ra_moe_cuda_sort_t *sort, struct CUstream_st *stream);

/**
 * y[r] = x[source[r]] W_g^T for the rows r of each tile, g its group; with @a swiglu
 * y[r] = SiLU(x W_gate^T) * (x W_up^T). x and W have one dtype, BF16 or F32.
 */
typedef struct ra_moe_cuda_gemm {
    ra_dtype_t dtype;   /**< of x and the weights */
    ra_dtype_t y_dtype; /**< F32, or BF16 with BF16 operands */
    const void *x;      /**< [x_rows, k] */
    int64_t x_rows, x_stride;
    const int32_t *source; /**< [y_rows] row of x, -1: row of zeros; NULL: row r of x */
    const void *weight; /**< [groups, n, repeat k]; with swiglu [groups, 2 n, k]: gate, then up */
    int32_t groups;
    int32_t repeat; /**< x is used this many times along W's rows: a weight in parts; 0 as 1 */
    bool swiglu;
    int64_t n, k;
    const ra_moe_tile_t *tiles; /**< NULL: one group, rows [0, x_rows) */
    const int32_t *tile_count;
    int64_t max_tiles;
    void *y; /**< [y_rows, n]; with tiles whole multiples of RA_MOE_ROW_PAD rows */
    int64_t y_rows, y_stride;
} ra_moe_cuda_gemm_t;

/** Run on the Hopper kernel where that takes the call, else on the portable one. */
ra_status_t ra_moe_cuda_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream);
/**
 * Hopper alone: bf16 operands, n, k and strides multiples of 8, k of 64 with repeat, 16-byte
 * aligned pointers. @retval RA_ERR_UNSUPPORTED  otherwise, without a message.
 */
ra_status_t ra_moe_sm90_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream);
/** Any sizes; fp32 fused multiply-adds in ascending k. */
ra_status_t ra_moe_simt_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream);

/** y[t] (+)= ((w_0 out[position_0] + w_1 out[position_1]) + ...) + shared[t], fp32. */
typedef struct ra_moe_cuda_combine {
    ra_dtype_t dtype; /**< of out and shared */
    int64_t rows, hidden;
    int32_t top_k;
    const int32_t *position; /**< [rows, top_k] rows of out */
    const float *weight;     /**< [rows, top_k] */
    const void *out;         /**< [, hidden] contiguous */
    const void *shared;      /**< [rows, hidden] contiguous; NULL: none */
    bool accumulate;
    float *y;
    int64_t y_stride;
} ra_moe_cuda_combine_t;

ra_status_t ra_moe_cuda_combine(const ra_moe_cuda_combine_t *call, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
