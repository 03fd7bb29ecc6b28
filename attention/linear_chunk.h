/**
 * @file  attention/linear_chunk.h
 * @brief Linear attention with decay over segments of tokens, chunk by chunk, with carried fp32
 * state.
 *
 *     S_t = e^{g_t} S_{t-1} + k_t v_t^T          S [Dk, Dv], row = key index, plain and post-update
 *     o_t = scale * S_t^T q_t                    token t sees itself with weight 1
 *
 * g_t <= 0 is a LOG-decay: constant per head (lightning attention, simple GLA) or per head and
 * token (SSD / Mamba-2). A segment of tokens is the affine map S_out = e^{G} S_in + B, G = sum g_t;
 * segments compose associatively, which is what ring/state_scan uses. A document start is simply a
 * segment whose incoming state is zero.
 *
 * Chunk form (C tokens, b_i = sum_{m<=i} g_m local to the chunk), every exponent <= 0:
 *     P_ij = (q_i . k_j) e^{b_i - b_j}   j <= i
 *     o_i  = scale * ( e^{b_i} S^T q_i + sum_j P_ij v_j )
 *     S'   = e^{b_C} S + sum_j k_j (e^{b_C - b_j} v_j)^T
 *
 * Memory    q, k, v, o, states and per-token decays lie on the stream's device; a constant decay is
 * host memory, as is the list of segments. Both may go once the call has returned.
 *
 * Numerics  fp32 accumulation and state. Bits of a segment depend on its tokens and its incoming
 * state only; chunks are cut from the segment's own start. CPU rows take F32; what the CUDA rows
 * do is in linear_cuda.h.
 *
 * Source    arXiv 2401.04658 (lightning attention-2), 2312.06635 (GLA), 2405.21060 (SSD).
 */
#ifndef RA_ATTENTION_LINEAR_CHUNK_H
#define RA_ATTENTION_LINEAR_CHUNK_H

#include "base/device.h"
#include "base/dtype.h"
#include <stdint.h>

/** Tokens [row_begin, row_begin + row_count) of one document. */
typedef struct ra_linear_segment {
    int64_t row_begin, row_count;
    const float *state_in; /**< [H, Dk, Dv], or NULL for zero */
    float *state_out;      /**< [H, Dk, Dv], or NULL when not wanted; may equal state_in */
} ra_linear_segment_t;

typedef struct ra_linear_args {
    int32_t heads, key_dim, value_dim;
    ra_dtype_t dtype; /**< of q, k, v and o: F32, on CUDA also BF16 */
    float scale;
    const void *q, *k;                    /**< [rows, H, Dk] */
    const void *v;                        /**< [rows, H, Dv] */
    int64_t q_stride, k_stride, v_stride; /**< elements between rows */
    const float *log_decay; /**< [H] constant, or [rows, H] when log_decay_stride > 0; <= 0 */
    int64_t log_decay_stride;
    void *o; /**< [rows, H, Dv]; may be exactly v (same pointer and stride) */
    int64_t o_stride;
    const ra_linear_segment_t *segments; /**< disjoint rows */
    int64_t segment_count;
    /** Optional, on the device: used by the calls of one stream in turn. Without enough of it
     * (ra_linear_scratch_bytes()) a GPU row takes memory that it keeps to the process's end. */
    void *scratch;
    int64_t scratch_bytes;
} ra_linear_args_t;

typedef struct ra_linear_kernel ra_linear_kernel_t; /**< a row of the table in linear_kernels.c */

/**
 * As ra_softmax_select(); heads, key_dim, value_dim, dtype and log_decay_stride matter. Dims are to
 * 256 on GPUs, any on the CPU.
 * @retval RA_ERR_SHAPE  heads or a dim below 1.
 */
ra_status_t ra_linear_select(const char *name, ra_device_kind_t device,
                             const ra_linear_args_t *shape, const ra_linear_kernel_t **kernel_p);
const char *ra_linear_kernel_name(const ra_linear_kernel_t *kernel);

/** Scratch of a call on these rows; sizes, dtype and the segments' row counts matter. */
int64_t ra_linear_scratch_bytes(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args);

/**
 * Outputs o and, where asked, the state after each segment.
 * @retval RA_ERR_SHAPE    strides below a row.
 * @retval RA_ERR_INVALID  a constant log-decay that is not <= 0 (those of tokens are not read).
 * @retval RA_ERR_NOMEM    scratch. RA_ERR_UNSUPPORTED, RA_ERR_DEVICE: as in linear_cuda.h.
 */
ra_status_t ra_linear_forward(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args,
                              ra_stream_t *stream);
/** Only state_out of each segment (q and o are not touched). The state half of the same arithmetic,
 * and the same errors. */
ra_status_t ra_linear_summarise(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args,
                                ra_stream_t *stream);
/**
 * Carry a state over a segment: after <- e^{G} before + after, G [H] the segment's total log-decay.
 * (S_out = A S_in + B with B in @a after.) States [H, Dk, Dv], state_per_head = Dk Dv; before NULL
 * counts as zero. All three arrays lie on the stream's device.
 */
ra_status_t ra_linear_carry(int32_t heads, int64_t state_per_head, const float *total_log_decay,
                            const float *before, float *after, ra_stream_t *stream);

#endif
