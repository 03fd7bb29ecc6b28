/**
 * @file  attention/softmax_product.h
 * @brief The register-tiled product of the "cpu" softmax row.
 *
 *     C[i][j] (+)= sum_k A[i][k] * B[k][j]     0 <= i < rows, 0 <= j < vecs * RA_VF_WIDTH
 *
 * For sources of ra_isa_sources(). A tile is RA_PRODUCT_ROWS rows by at most two vectors of
 * columns: 12 x 2 on avx512, 6 x 2 on avx2. Two of three elements of A are broadcast by the
 * multiply-adds that use them (vf_fma_at), so that a step of k is 24 of those, two loads and four
 * broadcasts. A core whose other hardware thread is busy issues about three instructions a cycle,
 * which separate broadcasts, 1.5 instructions a multiply-add, use up; broadcasting all in the
 * multiply-adds crowds the load ports instead. Strides are constants, because only an address
 * without an index register stays one instruction with its multiply-add.
 *
 * Numerics  As base/gemm_tile.h: a chain of vf_fma over ascending k from 0, whose end is stored or
 * added to C. The bits depend on row i of A, column j of B and the depth.
 */
#ifndef RA_ATTENTION_SOFTMAX_PRODUCT_H
#define RA_ATTENTION_SOFTMAX_PRODUCT_H

#include "base/simd.h"
#include <stdbool.h>

#define RA_PRODUCT_ROWS (RA_ISA_RANK == 2 ? 12 : 6)
/** Columns of a panel of B. */
#define RA_PRODUCT_COLS (2 * RA_VF_WIDTH)

/** Where a product reads and writes; C's rows are c_row floats apart. */
typedef struct ra_product {
    int64_t rows, vecs, depth; /**< rows <= RA_PRODUCT_ROWS, vecs 1 or 2 */
    const float *a, *b;        /**< B[k] at b + k * RA_PRODUCT_COLS */
    float *c;
    int64_t c_row;
} ra_product_t;

/* acc[i][j] += sum of `steps` products. A[i][k] at a + i * a_row + k * a_step. */
RA_INLINE void ra_product_steps(vf acc[12][2], const float *a, const float *b, const int64_t a_row,
                                const int64_t a_step, const int mr, const int nv, const int steps)
{
    RA_UNROLL
    for (int k = 0; k < steps; k++) {
        vf bv[2];
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            bv[j] = vf_load(b + k * RA_PRODUCT_COLS + j * RA_VF_WIDTH);
        }
        RA_UNROLL
        for (int i = 0; i < mr; i++) {
            const float *at = a + i * a_row + k * a_step;
            vf av = vf_set1(*at);
            RA_UNROLL
            for (int j = 0; j < nv; j++) {
                acc[i][j] =
                    i % 3 == 2 ? vf_fma(av, bv[j], acc[i][j]) : vf_fma_at(at, bv[j], acc[i][j]);
            }
        }
    }
}

/* All but p are constants at every call. */
RA_INLINE void ra_product_block(const ra_product_t *p, const int64_t row, const int64_t a_row,
                                const int64_t a_step, const bool accumulate, const int mr,
                                const int nv)
{
    enum { STEPS = 4 };
    vf acc[12][2];
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc[i][j] = vf_zero();
        }
    }
    const float *a = p->a + row * a_row, *b = p->b,
                *end = b + p->depth / STEPS * STEPS * RA_PRODUCT_COLS;
    for (; b < end; a += STEPS * a_step, b += STEPS * RA_PRODUCT_COLS) {
        ra_product_steps(acc, a, b, a_row, a_step, mr, nv, STEPS);
    }
    for (int64_t k = p->depth % STEPS; k > 0; k--, a += a_step, b += RA_PRODUCT_COLS) {
        ra_product_steps(acc, a, b, a_row, a_step, mr, nv, 1);
    }
    float *c = p->c + row * p->c_row;
    RA_UNROLL
    for (int i = 0; i < mr; i++, c += p->c_row) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            float *to = c + j * RA_VF_WIDTH;
            vf_store(to, accumulate ? vf_add(acc[i][j], vf_load(to)) : acc[i][j]);
        }
    }
}

RA_INLINE void ra_product_rows(const ra_product_t *p, const int64_t a_row, const int64_t a_step,
                               const bool accumulate, const int nv)
{
    if (p->rows == RA_PRODUCT_ROWS) {
        ra_product_block(p, 0, a_row, a_step, accumulate, RA_PRODUCT_ROWS, nv);
        return;
    }
    int64_t row = 0;
    for (; row + 4 <= p->rows; row += 4) {
        ra_product_block(p, row, a_row, a_step, accumulate, 4, nv);
    }
    for (; row < p->rows; row++) {
        ra_product_block(p, row, a_row, a_step, accumulate, 1, nv);
    }
}

/** The strides of A and whether to add to C are constants of the caller. */
RA_INLINE void ra_product(const ra_product_t *p, const int64_t a_row, const int64_t a_step,
                          const bool accumulate)
{
    if (p->vecs == 1) {
        ra_product_rows(p, a_row, a_step, accumulate, 1);
    } else {
        ra_product_rows(p, a_row, a_step, accumulate, 2);
    }
}

#endif
