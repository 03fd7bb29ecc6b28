/**
 * @file  model/layer_ops.h
 * @brief The small row-wise operations between the GEMMs of a layer, on every device.
 *
 * The stream's device runs them (NULL: the CPU, on the caller's thread). Every array is in that
 * device's memory unless an operation says otherwise; on a GPU a call only queues work.
 *
 * Activations ("act") are [rows, channels] with a row stride in elements and one element type: F32
 * on the CPU, F32 or BF16 on a GPU. The residual stream, norm weights, rotary tables, logits and
 * parts of sums are fp32 everywhere, and so is all arithmetic; an activation is rounded once, when
 * it is written. rows may be 0. Every row is computed on its own and in one fixed order, so its
 * bits do not depend on the other rows or on threads. CPU kernels are written once against
 * base/simd.h and chosen by base/cpu_isa.h; CUDA kernels are in row_, norm_ and
 * lse_kernels_cuda.cu.
 *
 * All functions: @retval RA_ERR_UNSUPPORTED an element type that the device has no kernel for;
 * RA_ERR_DEVICE a launch failed.
 */
#ifndef RA_MODEL_LAYER_OPS_H
#define RA_MODEL_LAYER_OPS_H

#include "base/gemm.h"
#include "base/tensor.h"
#include <stdbool.h>
#include <stdint.h>

/** x[r] = row tokens[r] of table [vocab, channels] (BF16 or F32). */
ra_status_t ra_op_embed(const ra_tensor_t *table, const int32_t *tokens, int64_t rows, float *x,
                        int64_t x_stride, ra_stream_t *stream);

/** y = x / sqrt(mean(x^2) + eps) * weight, y of type act. (RMSNorm, arXiv 1910.07467) */
ra_status_t ra_op_rms_norm(const float *x, int64_t x_stride, int64_t rows, int64_t channels,
                           const float *weight, double eps, void *y, int64_t y_stride,
                           ra_dtype_t act, ra_stream_t *stream);

/**
 * Rotary table of given positions: for pair i < R/2, cos and sin of position * inv_freq[i], times
 * attention_factor. The angle is formed in double: an fp32 product is off by 4e-3 rad at position
 * 60,000, which shows as 1e-3 in log-probabilities.
 * @param inv_freq  [R/2] in host memory, read before the call returns.
 * @param table     [rows, R]: R/2 cosines, then R/2 sines.
 */
ra_status_t ra_op_rope_table(const int64_t *positions, int64_t rows, const double *inv_freq,
                             int64_t rotary_dim, double attention_factor, float *table,
                             ra_stream_t *stream);

/** Some heads of every row, [rows, heads, D]; y may equal x. Without norm and rotation: a copy. */
typedef struct ra_op_heads {
    const void *x;
    void *y;
    int64_t x_stride, y_stride;
    int64_t heads;
    const float *weight; /**< [D] of the norm, or NULL: none */
    bool rotate;
} ra_op_heads_t;

enum { RA_OP_HEADS_MAX = 4 };

/**
 * Per-head RMSNorm, then rotation of the first R channels of each head in half-split pairs
 * (i, i + R/2):  y_i = x_i c - x_{i+R/2} s,  y_{i+R/2} = x_{i+R/2} c + x_i s.
 * @param parts  At most RA_OP_HEADS_MAX groups of heads (q, k, v), done together.
 * @param table  [rows, R] of ra_op_rope_table().
 */
ra_status_t ra_op_head_norm_rope(const ra_op_heads_t *parts, int count, int64_t rows,
                                 int64_t head_dim, double eps, const float *table,
                                 int64_t rotary_dim, ra_dtype_t act, ra_stream_t *stream);

/** Copy [rows, channels] between strides and, on a GPU, between F32 and BF16. */
ra_status_t ra_op_copy_rows(const void *x, int64_t x_stride, ra_dtype_t x_dtype, int64_t rows,
                            int64_t channels, void *y, int64_t y_stride, ra_dtype_t y_dtype,
                            ra_stream_t *stream);

/**
 * o = RMSNorm of each of `groups` equal groups of channels * weight * sigmoid(gate), in place; o
 * and gate act. (Output gate of lightning attention layers.)
 */
ra_status_t ra_op_group_norm_gate(void *o, int64_t o_stride, int64_t rows, int64_t channels,
                                  int64_t groups, const float *weight, double eps, const void *gate,
                                  int64_t gate_stride, ra_dtype_t act, ra_stream_t *stream);

/** gate = silu(gate) * up, in place, both act; silu(a) = a / (1 + e^-a). */
ra_status_t ra_op_silu_mul(void *gate, int64_t gate_stride, const void *up, int64_t up_stride,
                           int64_t rows, int64_t channels, ra_dtype_t act, ra_stream_t *stream);

/** x[i] = value for i < n. */
ra_status_t ra_op_fill(float *x, int64_t n, float value, ra_stream_t *stream);

/** least[i] = min(least[i], x[i]) for i < n. */
ra_status_t ra_op_min_rows(const float *x, int64_t n, float *least, ra_stream_t *stream);

/** Parts of a log-sum-exp over nothing: m = -inf, l = 0; picked = 0. */
ra_status_t ra_op_lse_reset(float *m, float *l, float *picked, int64_t rows, ra_stream_t *stream);

/**
 * Fold logits of vocabulary entries [first, first + columns) into running log-sum-exp parts and
 * pick the target's logit:  m' = max(m, max_j z_j), l' = l e^{m-m'} + sum_j e^{z_j - m'}.
 * @param logits  [rows, columns] fp32 with a row stride: in bf16 a logit of 20 is off by up to
 *                0.06, and so would be its log-probability.
 * @param target  [rows] token ids, or NULL: none; picked[r] = z of the target when it lies in this
 *                range.
 * @param m, l    [rows] running parts, start at ra_op_lse_reset().
 */
ra_status_t ra_op_lse_fold(const float *logits, int64_t stride, int64_t rows, int64_t columns,
                           int64_t first, const int32_t *target, float *m, float *l, float *picked,
                           ra_stream_t *stream);

/**
 * Multiply rows with a block of the LM head and fold the logits as ra_op_lse_fold() does. On a GPU
 * with a kernel for it (model/head_cuda.h) logits never reach memory.
 * @param job    y is scratch of ra_op_head_scratch() bytes, y_stride = out.
 */
ra_status_t ra_op_head_fold(const ra_gemm_job_t *job, int64_t first, const int32_t *target,
                            float *m, float *l, float *picked, ra_stream_t *stream);
/** Bytes at job->y for calls of at most job->rows rows: fp32 logits, or what the kernel that keeps
 * them out of memory needs. Depends on job->x, so that must be known; job->y need not be. */
int64_t ra_op_head_scratch(const ra_gemm_job_t *job);

/**
 * logprob[i] = logit[i] - m - ln l in double, rounded once; 0 where target[i] < 0. logprob may
 * equal logit.
 * @param target       [n], or NULL: every entry is wanted.
 * @param part_stride  1: m and l are [n]; 0: one m and one l for all (a row of the vocabulary).
 */
ra_status_t ra_op_log_prob(const float *logit, const int32_t *target, const float *m,
                           const float *l, int64_t part_stride, int64_t n, float *logprob,
                           ra_stream_t *stream);

#endif
