/**
 * @file  base/gemm_tile.h
 * @brief The register-tiled product that GEMM, softmax and linear kernels share.
 *
 *     C[i][j] (+)= sum_k A[i][k] * B[k][j]     0 <= i < rows, 0 <= j < cols, 0 <= k < depth
 *
 * For sources of ra_isa_sources(). A panel of at most RA_TILE_COLS columns is held in registers for
 * a few rows at a time: 6 x 4 vectors on avx512 (24 accumulators, 4 of B, 1 of A), 6 x 2 on avx2.
 *
 * Numerics  Every C[i][j] is one chain of vf_fma over ascending k, starting from 0; accumulating
 * adds its end to C, so that a long sum in pieces rounds against the pieces and not against the
 * sum. The bits depend on row i of A, column j of B, the depth of each call and nothing else:
 * neither on rows nor on cols.
 */
#ifndef RA_BASE_GEMM_TILE_H
#define RA_BASE_GEMM_TILE_H

#include "base/simd.h"
#include <stdbool.h>
#include <stddef.h>

#define RA_TILE_VECS (RA_ISA_RANK == 2 ? 4 : 2)
/** Columns of a full panel. */
#define RA_TILE_COLS (RA_TILE_VECS * RA_VF_WIDTH)

/** Columns of B that a panel of @a cols columns reads: rounded up to whole vectors. */
#define RA_TILE_PADDED(cols) (((cols) + RA_VF_WIDTH - 1) / RA_VF_WIDTH * RA_VF_WIDTH)

/** Where one product reads and writes; strides in elements. */
typedef struct ra_tile {
    int64_t rows, cols, depth; /**< cols <= RA_TILE_COLS */
    const float *a;            /**< A[i][k] at a + i * a_row + k */
    int64_t a_row;
    const void *b;  /**< B[k][0 .. RA_TILE_PADDED(cols)) at b + k * b_step, all readable */
    int64_t b_step; /**< elements */
    float *c;       /**< C[i][0 .. cols) at c + i * c_row; nothing beyond is touched */
    int64_t c_row;
    bool accumulate;
} ra_tile_t;

/* One block of `mr` rows and `nv` vectors; mr, nv and bf16 are constants at every call. */
RA_INLINE void ra_tile_block(const ra_tile_t *t, int64_t row, const int mr, const int nv,
                             const bool bf16)
{
    vf acc[12][4];
    float *c = t->c + row * t->c_row;
    int last = (int)t->cols - (nv - 1) * RA_VF_WIDTH;
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc[i][j] = vf_zero();
        }
    }

    const float *a[12];
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        a[i] = t->a + (row + i) * t->a_row;
    }
    const float *b = t->b;
    const uint16_t *b16 = t->b;
    const int64_t b_step = t->b_step, depth = t->depth;
    for (int64_t k = 0; k < depth; k++) {
        vf bv[4];
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            bv[j] = bf16 ? vf_load_bf16(b16 + j * RA_VF_WIDTH) : vf_load(b + j * RA_VF_WIDTH);
        }
        b += b_step;
        b16 += b_step;
        RA_UNROLL
        for (int i = 0; i < mr; i++) {
            vf av = vf_set1(a[i][k]);
            RA_UNROLL
            for (int j = 0; j < nv; j++) {
                acc[i][j] = vf_fma(av, bv[j], acc[i][j]);
            }
        }
    }

    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            float *to = c + i * t->c_row + j * RA_VF_WIDTH;
            bool partial = j == nv - 1 && last < RA_VF_WIDTH;
            if (t->accumulate) {
                acc[i][j] = vf_add(acc[i][j], partial ? vf_load_n(to, last) : vf_load(to));
            }
            if (partial) {
                vf_store_n(to, acc[i][j], last);
            } else {
                vf_store(to, acc[i][j]);
            }
        }
    }
}

RA_INLINE void ra_tile_rows(const ra_tile_t *t, const int nv, const bool bf16)
{
    int64_t row = 0;
    /* One or two vectors need more rows to keep both FMA units busy. */
    for (; RA_ISA_RANK == 2 && nv <= 2 && row + 12 <= t->rows; row += 12) {
        ra_tile_block(t, row, 12, nv, bf16);
    }
    for (; row + 6 <= t->rows; row += 6) {
        ra_tile_block(t, row, 6, nv, bf16);
    }
    if (row + 4 <= t->rows) {
        ra_tile_block(t, row, 4, nv, bf16);
        row += 4;
    }
    if (row + 2 <= t->rows) {
        ra_tile_block(t, row, 2, nv, bf16);
        row += 2;
    }
    if (row < t->rows) {
        ra_tile_block(t, row, 1, nv, bf16);
    }
}

RA_INLINE void ra_tile_any(const ra_tile_t *t, const bool bf16)
{
    if (t->cols <= RA_VF_WIDTH) {
        ra_tile_rows(t, 1, bf16);
    } else if (RA_TILE_VECS == 2 || t->cols <= 2 * RA_VF_WIDTH) {
        ra_tile_rows(t, 2, bf16);
    } else if (t->cols <= 3 * RA_VF_WIDTH) {
        ra_tile_rows(t, 3, bf16);
    } else {
        ra_tile_rows(t, 4, bf16);
    }
}

/** The product with B in fp32. */
static __attribute__((unused, noinline)) void ra_tile_f32(const ra_tile_t *t)
{
    ra_tile_any(t, false);
}

/** The same with B in bf16, widened in registers: for few rows, where widening first costs more. */
static __attribute__((unused, noinline)) void ra_tile_bf16(const ra_tile_t *t)
{
    ra_tile_any(t, true);
}

#endif
