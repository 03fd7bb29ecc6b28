/**
 * @file  model/layer_ops.h
 * @brief The small row-wise operations between the GEMMs of a layer.
 *
 * All activations are fp32, [rows, channels] with a row stride in floats. Every row is computed on
 * its own and in one fixed order, so its bits do not depend on the other rows or on threads. The
 * kernels are written once against base/simd.h and chosen by base/cpu_isa.h; oracles are in
 * layer_ops_ref.c.
 */
#ifndef RA_MODEL_LAYER_OPS_H
#define RA_MODEL_LAYER_OPS_H

#include "base/device.h"
#include "base/tensor.h"
#include <stdint.h>

/** x[r] = row tokens[r] of table [vocab, channels] (BF16 or F32). */
void ra_op_embed(const ra_tensor_t *table, const int32_t *tokens, int64_t rows, float *x,
                 int64_t x_stride, ra_stream_t *stream);

/** y = x / sqrt(mean(x^2) + eps) * weight. y may equal x. (RMSNorm, arXiv 1910.07467) */
void ra_op_rms_norm(const float *x, int64_t x_stride, int64_t rows, int64_t channels,
                    const float *weight, double eps, float *y, int64_t y_stride,
                    ra_stream_t *stream);

/**
 * Rotary table of given positions: for pair i < R/2, cos and sin of position * inv_freq[i], times
 * attention_factor. The angle is formed in double: an fp32 product is off by 4e-3 rad at position
 * 60,000, which shows as 1e-3 in log-probabilities.
 * @param table  [rows, R]: R/2 cosines, then R/2 sines.
 */
void ra_op_rope_table(const int64_t *positions, int64_t rows, const double *inv_freq,
                      int64_t rotary_dim, double attention_factor, float *table,
                      ra_stream_t *stream);

/**
 * Per-head RMSNorm (weight [D], NULL: none), then rotation of the first R channels of each head in
 * half-split pairs (i, i + R/2):  y_i = x_i c - x_{i+R/2} s,  y_{i+R/2} = x_{i+R/2} c + x_i s.
 * @param x, y  [rows, heads, D]; y may equal x.
 */
void ra_op_head_norm_rope(const float *x, int64_t x_stride, int64_t rows, int64_t heads,
                          int64_t head_dim, const float *weight, double eps, const float *table,
                          int64_t rotary_dim, float *y, int64_t y_stride, ra_stream_t *stream);

/** Copy [rows, channels] between strides. */
void ra_op_copy_rows(const float *x, int64_t x_stride, int64_t rows, int64_t channels, float *y,
                     int64_t y_stride, ra_stream_t *stream);

/**
 * o = RMSNorm of each of `groups` equal groups of channels * weight * sigmoid(gate), in place.
 * (Output gate of lightning attention layers.)
 */
void ra_op_group_norm_gate(float *o, int64_t o_stride, int64_t rows, int64_t channels,
                           int64_t groups, const float *weight, double eps, const float *gate,
                           int64_t gate_stride, ra_stream_t *stream);

/** gate = silu(gate) * up, in place; silu(a) = a / (1 + e^-a). */
void ra_op_silu_mul(float *gate, int64_t gate_stride, const float *up, int64_t up_stride,
                    int64_t rows, int64_t channels, ra_stream_t *stream);

/**
 * Fold logits of vocabulary entries [first, first + columns) into running log-sum-exp parts and
 * pick the target's logit:  m' = max(m, max_j z_j), l' = l e^{m-m'} + sum_j e^{z_j - m'}.
 * @param target  [rows] token ids; picked[r] = z of the target when it lies in this range.
 * @param m, l    [rows] running parts, start at (-inf, 0). ln p(target) = picked - m - ln l.
 */
void ra_op_lse_fold(const float *logits, int64_t stride, int64_t rows, int64_t columns,
                    int64_t first, const int32_t *target, float *m, float *l, float *picked,
                    ra_stream_t *stream);

#endif
