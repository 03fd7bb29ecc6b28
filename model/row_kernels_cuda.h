/**
 * @file  model/row_kernels_cuda.h
 * @brief Internal to model/: the CUDA bodies behind model/layer_ops.h.
 *
 * Each queues its rows on @a stream of the current device; @a args points to the structure of
 * row_kernels.h that belongs to the name. Nothing is allocated or waited for. Rows whose strides
 * and addresses allow 16-byte accesses take a vector path, all others a scalar one; a row's bits
 * depend on its values and on the path only.
 */
#ifndef RA_MODEL_ROW_KERNELS_CUDA_H
#define RA_MODEL_ROW_KERNELS_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"
#include <stdint.h>

struct CUstream_st;

ra_status_t ra_embed_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_rms_norm_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_rope_table_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_head_rope_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_copy_rows_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_group_gate_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_silu_mul_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_fill_cuda(const void *args, int64_t n, struct CUstream_st *stream);
ra_status_t ra_min_rows_cuda(const void *args, int64_t n, struct CUstream_st *stream);
ra_status_t ra_lse_reset_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_lse_fold_cuda(const void *args, int64_t rows, struct CUstream_st *stream);
ra_status_t ra_log_prob_cuda(const void *args, int64_t n, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
