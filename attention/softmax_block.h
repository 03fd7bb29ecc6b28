/**
 * @file  attention/softmax_block.h
 * @brief Exact softmax attention of some rows over one block of keys, folded into a carried state.
 *
 * This folder has no notion of ranks. A caller holding only part of the keys folds block after
 * block into (m, l, O) and normalises once at the end; ring/ is that caller.
 *
 *     s_rj = scale * q_r . k_j + bias_j                     for keys j visible to row r
 *     m'   = max(m, max_j s_rj)
 *     l'   = l e^{m - m'} + sum_j e^{s_rj - m'}
 *     O'   = O e^{m - m'} + sum_j e^{s_rj - m'} v_j
 *     finish:  O <- O / l,  lse = m + ln l                  (no key seen: O = 0, lse = -inf)
 *
 * Visible: key_pos[j] in [row_lo[r], row_hi[r]) and, where given, key_score[h][j] >=
 * row_threshold[h][r]. Causal, full, sliding-window and packed-document masks are all intervals;
 * the threshold is dynamic mask attention (arXiv 2412.11834), ties broken by the caller through
 * key_score.
 *
 * Memory    q, k, v, states, scores, thresholds and biases lie on the stream's device; positions,
 * intervals, groups and spans are host memory that may go once the call has returned.
 *
 * Symbols   rows R, keys J, query heads H, key/value heads G (H a multiple of G; head h reads kv
 * head h / (H/G)), head_dim D.
 *
 * Numerics  fp32 state, natural logarithm; CPU rows in fp32 ("ref" in double), GPUs as in
 * softmax_cuda.h. A row's bits depend on its own q, mask and the sequence of spans folded into it,
 * never on which other rows are in the call, on threads, or on how many calls the same sequence of
 * spans is spread over.
 *
 * Source    Milakov & Gimelshein, arXiv 1805.02867; Rabe & Staats, arXiv 2112.05682; Liu et al.,
 * arXiv 2310.01889.
 */
#ifndef RA_ATTENTION_SOFTMAX_BLOCK_H
#define RA_ATTENTION_SOFTMAX_BLOCK_H

#include "base/device.h"
#include "base/dtype.h"
#include <stdint.h>

/** Keys [key_begin, key_begin + key_count) of the block. */
typedef struct ra_key_span {
    int64_t key_begin, key_count;
} ra_key_span_t;

/**
 * Rows [row_begin, row_begin + row_count) fold spans [span_begin, span_begin + span_count) in that
 * order. Groups of one call have disjoint rows. Rows outside every group keep their state.
 */
typedef struct ra_row_group {
    int64_t row_begin, row_count;
    int64_t span_begin, span_count;
} ra_row_group_t;

/** Which keys a row sees. Arrays are borrowed; optional ones may be NULL. */
typedef struct ra_attention_mask {
    const int64_t *row_lo, *row_hi; /**< [R] visible interval of each row */
    const int64_t *key_pos;         /**< [J] position of each key, ascending within every span */
    const float *key_score;         /**< optional [H, J] */
    const float *row_threshold;     /**< optional [H, R], given together with key_score */
    const float *key_bias;          /**< optional [J], added to the scaled score */
} ra_attention_mask_t;

/** Carried state. Set to (-inf, 0, 0) by ra_softmax_reset(). */
typedef struct ra_softmax_state {
    float *m;         /**< [H, R] running maximum of scaled scores */
    float *l;         /**< [H, R] running sum */
    float *o;         /**< [R, H, D] unnormalised output, row r at o + r * o_stride */
    int64_t o_stride; /**< floats between rows, >= H * D */
} ra_softmax_state_t;

typedef struct ra_softmax_block {
    int64_t rows, keys;
    int32_t heads, kv_heads, head_dim;
    float scale;
    ra_dtype_t dtype;      /**< of q, k and v: F32, on a GPU also BF16 */
    const void *q, *k, *v; /**< q [R, H, D]; k, v [J, G, D]; heads and D contiguous */
    int64_t q_stride, k_stride, v_stride; /**< elements between rows */
    ra_attention_mask_t mask;
    const ra_row_group_t *groups;
    int64_t group_count;
    const ra_key_span_t *spans;
} ra_softmax_block_t;

typedef struct ra_softmax_kernel
    ra_softmax_kernel_t; /**< a row of the table in softmax_kernels.c */

/**
 * Choose a kernel once, when a plan is made.
 * @param name  "auto" or a row's name ("cpu", "ref", "sm90", "cuda").
 * @param device  its kind; of GPUs the calling thread's current one is asked.
 * @param shape heads, kv_heads, head_dim (to 256; "ref" any), scale, dtype and which optional mask
 *              arrays are non-NULL matter.
 * @retval RA_ERR_UNSUPPORTED  no row fits; the message says what was asked.
 */
ra_status_t ra_softmax_select(const char *name, ra_device_kind_t device,
                              const ra_softmax_block_t *shape,
                              const ra_softmax_kernel_t **kernel_p);
const char *ra_softmax_kernel_name(const ra_softmax_kernel_t *kernel);

/** m = -inf, l = 0, O = 0 for all rows. */
ra_status_t ra_softmax_reset(int64_t rows, int32_t heads, int32_t head_dim,
                             const ra_softmax_state_t *state, ra_stream_t *stream);
/**
 * Fold one block. Strides are at least a row; the CPU rows check nothing else either.
 * @retval RA_ERR_NOMEM        scratch or a tile list.
 * @retval RA_ERR_SHAPE        GPU: a group or span leaves the block.
 * @retval RA_ERR_UNSUPPORTED  GPU: a position >= 2^31 - 1, or rows that are not aligned as
 *                             softmax_cuda.h asks.
 * @retval RA_ERR_DEVICE       GPU: the launch failed.
 */
ra_status_t ra_softmax_fold(const ra_softmax_kernel_t *kernel, const ra_softmax_block_t *block,
                            const ra_softmax_state_t *state, ra_stream_t *stream);
/** O <- O / l in place and, where @a lse [H, R] is not NULL, lse = m + ln l. */
ra_status_t ra_softmax_finish(int64_t rows, int32_t heads, int32_t head_dim,
                              const ra_softmax_state_t *state, float *lse, ra_stream_t *stream);

#endif
