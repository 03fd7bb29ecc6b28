/**
 * @file  base/gemm.h
 * @brief y = x W^T for weights stored [out, in], one or many products in a call.
 *
 *     y[r][n] = sum_k x[r][k] * W[n][k]          fp32 accumulation
 *     cpu   x fp32, W bf16 or fp32, y fp32
 *     cuda  x bf16 or fp32, W made to x's dtype when prepared, y bf16 or fp32; fp32 is not tf32
 *
 * Kernels are rows of one table (gemm.c):
 *   openblas         the library's sgemm, one thread a call, weights widened block by block;
 *   packed           this project's register-tiled kernel, row-invariant. Few rows (a short
 *                    document, an expert with one token) take a path that reads the weights once;
 *   cublaslt         cuBLASLt's own choice for each shape;
 *   cublaslt-pinned  one cuBLASLt algorithm for each weight, row-invariant.
 * Row-invariant: the bits of an output row depend on its input row and the weights only, never on
 * the number of rows, their order or position. This is the one kernel family in base/, because moe/
 * and model/ both need it.
 */
#ifndef RA_BASE_GEMM_H
#define RA_BASE_GEMM_H

#include "base/device.h"
#include "base/tensor.h"
#include <stdbool.h>

typedef struct ra_gemm_kernel ra_gemm_kernel_t; /**< a row of the table */
typedef struct ra_gemm_weight ra_gemm_weight_t; /**< a weight prepared for one kernel */

/**
 * Choose a row.
 * @param name           "auto" or a row's name.
 * @param device         Where x, y and the products are.
 * @param row_invariant  Only rows with that promise ("--reproducible").
 * @retval RA_ERR_USAGE  Unknown name, or the named row lacks the promise or the device.
 */
ra_status_t ra_gemm_select(const char *name, ra_device_kind_t device, bool row_invariant,
                           const ra_gemm_kernel_t **kernel_p);
const char *ra_gemm_kernel_name(const ra_gemm_kernel_t *kernel);

/**
 * Prepare W [out, in] (contiguous rows in host memory, BF16 or F32) for @a kernel. Thread safe for
 * concurrent use once made.
 * @param x_dtype  of the products' x; CPU rows take F32 only.
 * @param stream   CPU rows: unused, may be NULL, and W's memory must outlive the handle (a kernel
 *                 may keep reading it). CUDA rows: its device gets a copy in x_dtype; W may go
 *                 after ra_stream_sync().
 * @retval RA_ERR_SHAPE        not such a matrix.
 * @retval RA_ERR_UNSUPPORTED  the row takes no x of that type.
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_gemm_weight_create(const ra_gemm_kernel_t *kernel, const ra_tensor_t *w,
                                  ra_dtype_t x_dtype, ra_stream_t *stream,
                                  ra_gemm_weight_t **weight_p);
/** Accepts NULL. */
void ra_gemm_weight_destroy(ra_gemm_weight_t *weight);
int64_t ra_gemm_weight_out(const ra_gemm_weight_t *weight);
int64_t ra_gemm_weight_in(const ra_gemm_weight_t *weight);
/** W [out, in] of a CUDA row on its device, and its type; NULL for a CPU row. For kernels that do
 * more than a product. */
const void *ra_gemm_weight_on_device(const ra_gemm_weight_t *weight, ra_dtype_t *dtype_p);

/** One product. Strides count elements between rows; rows may be 0. x and y do not overlap. */
typedef struct ra_gemm_job {
    const ra_gemm_weight_t *weight;
    const void *x;    /**< [rows, in] */
    int64_t x_stride; /**< >= in */
    int64_t rows;
    void *y;          /**< [rows, out] */
    int64_t y_stride; /**< >= out */
    ra_dtype_t x_dtype, y_dtype;
} ra_gemm_job_t;

/**
 * Run @a count independent products (all experts of a layer, or one): on the CPU shared over the
 * stream's threads, on a GPU queued one after another. The weights of a call are of one device.
 * @param accumulate  y += x W^T instead of y = x W^T, in the type of y.
 * @retval RA_ERR_NOMEM  scratch cannot be allocated.
 * @retval RA_ERR_INVALID, RA_ERR_UNSUPPORTED, RA_ERR_DEVICE  CUDA: x is not of the type the weight
 *         was prepared for; the library has no algorithm for the shape; it failed.
 */
ra_status_t ra_gemm(const ra_gemm_job_t *jobs, int64_t count, bool accumulate, ra_stream_t *stream);

#endif
