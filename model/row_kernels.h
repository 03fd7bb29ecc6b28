/**
 * @file  model/row_kernels.h
 * @brief Internal to model/: the arguments of the bodies behind model/layer_ops.h on every device,
 * and the vectorised CPU bodies, one set an instruction set.
 *
 * Each CPU body handles rows [begin, end); layer_ops.c shares rows over the pool.
 */
#ifndef RA_MODEL_ROW_KERNELS_H
#define RA_MODEL_ROW_KERNELS_H

#include "base/cpu_isa.h"
#include "base/dtype.h"
#include "model/layer_ops.h"
#include <stdint.h>

typedef struct ra_embed_args {
    const void *table;
    const int32_t *tokens;
    float *x;
    int64_t channels, x_stride;
    ra_dtype_t table_dtype;
} ra_embed_args_t;

typedef struct ra_rms_norm_args {
    const float *x, *weight;
    void *y;
    int64_t x_stride, y_stride, channels;
    float eps;
    ra_dtype_t act;
} ra_rms_norm_args_t;

typedef struct ra_rope_table_args {
    const int64_t *positions;
    const double *inv_freq; /* host memory */
    int64_t rotary_dim;
    double attention_factor;
    float *table;
} ra_rope_table_args_t;

typedef struct ra_head_rope_args {
    const ra_op_heads_t *parts;
    int count;
    const float *table;
    int64_t head_dim, rotary_dim;
    float eps;
    ra_dtype_t act;
} ra_head_rope_args_t;

typedef struct ra_copy_rows_args {
    const void *x;
    void *y;
    int64_t x_stride, y_stride, channels;
    ra_dtype_t x_dtype, y_dtype;
} ra_copy_rows_args_t;

typedef struct ra_group_gate_args {
    void *o;
    const float *weight;
    const void *gate;
    int64_t o_stride, gate_stride, channels, groups;
    float eps;
    ra_dtype_t act;
} ra_group_gate_args_t;

typedef struct ra_silu_mul_args {
    void *gate;
    const void *up;
    int64_t gate_stride, up_stride, channels;
    ra_dtype_t act;
} ra_silu_mul_args_t;

typedef struct ra_fill_args {
    float *x;
    float value;
} ra_fill_args_t;

typedef struct ra_min_rows_args {
    const float *x;
    float *least;
} ra_min_rows_args_t;

typedef struct ra_lse_reset_args {
    float *m, *l, *picked;
} ra_lse_reset_args_t;

typedef struct ra_lse_fold_args {
    const float *logits;
    int64_t stride, columns, first;
    const int32_t *target; /* may be NULL */
    float *m, *l, *picked;
} ra_lse_fold_args_t;

typedef struct ra_log_prob_args {
    const float *logit, *m, *l;
    const int32_t *target; /* may be NULL */
    int64_t part_stride;
    float *logprob;
} ra_log_prob_args_t;

typedef struct ra_row_kernels {
    void (*rms_norm)(const ra_rms_norm_args_t *args, int64_t begin, int64_t end);
    void (*head_rope)(const ra_head_rope_args_t *args, int64_t begin, int64_t end);
    void (*group_gate)(const ra_group_gate_args_t *args, int64_t begin, int64_t end);
    void (*lse_fold)(const ra_lse_fold_args_t *args, int64_t begin, int64_t end);
} ra_row_kernels_t;

extern const ra_row_kernels_t ra_row_kernels_generic;
#if defined(__x86_64__)
extern const ra_row_kernels_t ra_row_kernels_avx2, ra_row_kernels_avx512;
#endif

#endif
