/** @file base/gemm_ref.h  @brief The oracle of base/gemm.h in double; for tests and benchmarks. */
#ifndef RA_BASE_GEMM_REF_H
#define RA_BASE_GEMM_REF_H

#include "base/tensor.h"

/** y[r][n] = sum_k x[r][k] W[n][k], W [out, in] BF16 or F32, y [rows, out] contiguous. */
void ra_gemm_ref(const ra_tensor_t *w, const float *x, int64_t x_stride, int64_t rows, double *y);

#endif
