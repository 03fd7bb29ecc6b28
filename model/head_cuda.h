/**
 * @file  model/head_cuda.h
 * @brief Internal to model/: LM head and log-sum-exp in one CUDA kernel, logits never in memory.
 *
 *     z = x W^T of vocabulary entries [first, first + columns);  m, l, picked as ra_op_lse_fold()
 *
 * Why    At 131,072 tokens and 157,184 entries logits in fp32 are 82 GB to write and 82 GB to read,
 *        a quarter of the product's own time.
 * Numerics    bf16 operands, fp32 sums over the channels in one fixed order; every tile of 256
 *        entries has its own maximum, and tiles are folded in order. The bits of a row depend on
 *        its values alone.
 */
#ifndef RA_MODEL_HEAD_CUDA_H
#define RA_MODEL_HEAD_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

struct CUstream_st;

typedef struct ra_head_fold {
    const void *x; /**< bf16 [rows, channels] */
    int64_t x_stride, rows, channels;
    const void *weight; /**< bf16 [columns, channels], contiguous */
    int64_t columns, first;
    const int32_t *target; /**< [rows], or NULL */
    float *m, *l, *picked; /**< [rows] running parts */
    void *parts;           /**< scratch, ra_head_sm90_parts() bytes */
} ra_head_fold_t;

/** Bytes of scratch; less than fp32 logits of the same shape. */
int64_t ra_head_sm90_parts(int64_t rows, int64_t columns);

/** Whether the kernel takes the call (all but rows and outputs matter): compute capability 9.0 of
 * the current device, 64 columns at least, addresses, strides and channels that are multiples of 8
 * elements. Otherwise multiply and fold. */
bool ra_head_sm90_takes(const ra_head_fold_t *call);

/**
 * Queue one block of the vocabulary on @a stream of the current device.
 * @retval RA_ERR_UNSUPPORTED  (silently) the kernel does not take it.
 */
ra_status_t ra_head_sm90_fold(const ra_head_fold_t *call, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
