/**
 * @file  model/row_kernels.h
 * @brief Internal to model/: the vectorised bodies behind model/layer_ops.h, one set an instruction
 * set.
 *
 * Each body handles rows [begin, end); layer_ops.c shares rows over the pool.
 */
#ifndef RA_MODEL_ROW_KERNELS_H
#define RA_MODEL_ROW_KERNELS_H

#include "base/cpu_isa.h"
#include <stdint.h>

typedef struct ra_rms_norm_args {
    const float *x, *weight;
    float *y;
    int64_t x_stride, y_stride, channels;
    float eps;
} ra_rms_norm_args_t;

typedef struct ra_head_rope_args {
    const float *x, *weight, *table;
    float *y;
    int64_t x_stride, y_stride, heads, head_dim, rotary_dim;
    float eps;
} ra_head_rope_args_t;

typedef struct ra_group_gate_args {
    float *o;
    const float *weight, *gate;
    int64_t o_stride, gate_stride, channels, groups;
    float eps;
} ra_group_gate_args_t;

typedef struct ra_lse_fold_args {
    const float *logits;
    int64_t stride, columns, first;
    const int32_t *target;
    float *m, *l, *picked;
} ra_lse_fold_args_t;

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
