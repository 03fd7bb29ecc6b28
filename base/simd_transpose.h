/**
 * @file  base/simd_transpose.h
 * @brief Transpose a matrix of floats with the vectors of base/simd.h. Moves bits, never rounds.
 *
 * For sources of ra_isa_sources(). Squares of RA_VF_WIDTH go through registers, edges one by one.
 */
#ifndef RA_BASE_SIMD_TRANSPOSE_H
#define RA_BASE_SIMD_TRANSPOSE_H

#include "base/simd.h"

#if RA_ISA_RANK == 2

/* One square: pairs of floats, pairs of doubles, then 128-bit quarters twice. */
RA_INLINE void ra_transpose_square(const float *from, int64_t from_step, float *to, int64_t to_step)
{
    vf r[16], s[16];
    RA_UNROLL
    for (int i = 0; i < 16; i++) {
        r[i] = vf_load(from + i * from_step);
    }
    RA_UNROLL
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    RA_UNROLL
    for (int i = 0; i < 16; i += 4) {
        RA_UNROLL
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(s[i + j]), high = _mm512_castps_pd(s[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    RA_UNROLL
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    RA_UNROLL
    for (int i = 0; i < 4; i++) {
        vf_store(to + i * to_step, _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88));
        vf_store(to + (i + 8) * to_step, _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd));
        vf_store(to + (i + 4) * to_step, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88));
        vf_store(to + (i + 12) * to_step, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd));
    }
}

#elif RA_ISA_RANK == 1

RA_INLINE void ra_transpose_square(const float *from, int64_t from_step, float *to, int64_t to_step)
{
    vf r[8], s[8];
    RA_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i] = vf_load(from + i * from_step);
    }
    RA_UNROLL
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    RA_UNROLL
    for (int i = 0; i < 8; i += 4) {
        RA_UNROLL
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
        }
    }
    RA_UNROLL
    for (int i = 0; i < 4; i++) {
        vf_store(to + i * to_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        vf_store(to + (i + 4) * to_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

#else

RA_INLINE void ra_transpose_square(const float *from, int64_t from_step, float *to, int64_t to_step)
{
    for (int i = 0; i < RA_VF_WIDTH; i++) {
        for (int j = 0; j < RA_VF_WIDTH; j++) {
            to[j * to_step + i] = from[i * from_step + j];
        }
    }
}

#endif

/** to[j][i] = from[i][j] for 0 <= i < rows, 0 <= j < cols; steps are floats between rows. */
RA_INLINE void ra_transpose(const float *from, int64_t from_step, int64_t rows, int64_t cols,
                            float *to, int64_t to_step)
{
    int64_t whole_rows = rows - rows % RA_VF_WIDTH, whole_cols = cols - cols % RA_VF_WIDTH;
    for (int64_t i = 0; i < whole_rows; i += RA_VF_WIDTH) {
        for (int64_t j = 0; j < whole_cols; j += RA_VF_WIDTH) {
            ra_transpose_square(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; j++) {
            to[j * to_step + i] = from[i * from_step + j];
        }
    }
}

#endif
