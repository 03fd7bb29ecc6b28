/**
 * @file  moe/exchange_cuda.h
 * @brief Tokens to the ranks that run their experts, and results back: packing on a CUDA device.
 *        Internal to moe/.
 *
 * Rank r of N runs the experts of ra_moe_expert_range(E, N, r). A token visits a rank once when the
 * rank runs any of its experts. Tokens travel by rank and inside a rank by token; their results by
 * rank, token and expert. Everything is queued on the caller's stream; pointers are device memory.
 */
#ifndef RA_MOE_EXCHANGE_CUDA_H
#define RA_MOE_EXCHANGE_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "base/dtype.h"
#include "base/status.h"
#include <stdint.h>

struct CUstream_st;

/** Choices of some tokens, seen by ranks. */
typedef struct ra_moe_cuda_visits {
    const int32_t *expert; /**< [rows, top_k], ascending in a row */
    int64_t rows;
    int32_t top_k, experts, ranks;
    int32_t rank_begin, rank_count; /**< ranks looked at; P = rank_count */
    int32_t *tokens_before;         /**< [P, rows] out: earlier tokens that visit the rank */
    int32_t *slots_before;          /**< [P, rows] out: experts of earlier tokens there */
    int32_t *totals;                /**< [2, P] out: tokens, then slots */
} ra_moe_cuda_visits_t;

ra_status_t ra_moe_cuda_visits(const ra_moe_cuda_visits_t *visits, struct CUstream_st *stream);

/**
 * Lay out what leaves: row and choices of each token for each rank it visits, and where its results
 * will be. Of visits with rank_begin 0, rank_count ranks.
 * @param x          [rows, hidden] of @a dtype, rows x_stride elements apart.
 * @param send       [tokens, hidden]
 * @param send_expert  [tokens, top_k]
 * @param result_at  [rows, top_k] row among the returned results.
 */
ra_status_t ra_moe_cuda_pack(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype, const void *x,
                             int64_t hidden, int64_t x_stride, void *send, int32_t *send_expert,
                             int32_t *result_at, struct CUstream_st *stream);

/**
 * Results in the order of the visitors: rows of @a out at @a position [rows, top_k] (-1: not ours)
 * to @a back [slots, hidden]. Of visits with one rank.
 */
ra_status_t ra_moe_cuda_unsort(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype,
                               const int32_t *position, const void *out, int64_t hidden, void *back,
                               struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
