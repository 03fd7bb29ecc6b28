/**
 * @file  base/simd.h
 * @brief One vector of floats as wide as the instruction set being compiled for.
 *
 * For sources listed in ra_isa_sources(): RA_ISA (generic, avx2, avx512) picks the type.
 * RA_VF_WIDTH floats in a `vf`, a lane mask in a `vm`. Loads and stores need no alignment; the _n
 * forms touch the first n lanes only (1 <= n <= RA_VF_WIDTH; other lanes read as 0).
 *
 * vf_fma(a, b, c) = a b + c is fused on avx2 and avx512 and two roundings on generic, so bits agree
 * between machines of one instruction set, not between instruction sets. vf_max(a, b) returns b
 * when either is NaN.
 */
#ifndef RA_BASE_SIMD_H
#define RA_BASE_SIMD_H

#include "base/cpu_isa.h"
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define RA_ISA_RANK_generic 0
#define RA_ISA_RANK_avx2    1
#define RA_ISA_RANK_avx512  2
/** 0, 1 or 2: which instruction set this source is compiled for. */
#define RA_ISA_RANK RA_ISA_CONCAT(RA_ISA_RANK, RA_ISA)

#define RA_INLINE static inline __attribute__((always_inline, unused))
#if defined(RA_NO_UNROLL)
#define RA_UNROLL /* an instrumented register tile takes minutes to compile unrolled */
#elif defined(__clang__)
#define RA_UNROLL _Pragma("unroll")
#else
#define RA_UNROLL _Pragma("GCC unroll 16")
#endif

#if RA_ISA_RANK == 2

#include <immintrin.h>

#define RA_VF_WIDTH 16
typedef __m512 vf;
typedef __mmask16 vm;

RA_INLINE __mmask16 vf_first_n(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

RA_INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

RA_INLINE vf vf_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(vf_first_n(n), p);
}

RA_INLINE void vf_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}

RA_INLINE void vf_store_n(float *p, vf a, int n)
{
    _mm512_mask_storeu_ps(p, vf_first_n(n), a);
}

RA_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

RA_INLINE vf vf_set1(float a)
{
    return _mm512_set1_ps(a);
}

RA_INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}

RA_INLINE vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}

RA_INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}

RA_INLINE vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}

RA_INLINE vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}

RA_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/** *a * b + c. The compiler alone would make the broadcast an instruction of its own. */
RA_INLINE vf vf_fma_at(const float *a, vf b, vf c)
{
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
}

RA_INLINE float vf_hmax(vf a)
{
    return _mm512_reduce_max_ps(a);
}

RA_INLINE float vf_hsum(vf a)
{
    return _mm512_reduce_add_ps(a);
}

/** Lanes 0, 1, 2, ... as floats. */
RA_INLINE vf vf_lane(void)
{
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/** a >= b, false for NaN. */
RA_INLINE vm vf_ge(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}

/** !(a < b): true for NaN. */
RA_INLINE vm vf_not_less(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
}

RA_INLINE vm vm_and(vm a, vm b)
{
    return a & b;
}

/** Whether a > b in any lane. */
RA_INLINE bool vf_any_greater(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}

/** mask ? a : b, lane by lane. */
RA_INLINE vf vf_select(vm mask, vf a, vf b)
{
    return _mm512_mask_blend_ps(mask, b, a);
}

/** keep ? p * 2^n : 0, where n holds a small integer as a float wherever keep is set. */
RA_INLINE vf vf_exp_scale(vf p, vf n, vm keep)
{
    return _mm512_maskz_scalef_ps(keep, p, n);
}

/** a - floor(a), which may round to 1; infinite a gives 0. */
RA_INLINE vf vf_above_floor(vf a)
{
    return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/** keep ? p * 2^floor(a) : 0, where a >= -126 wherever keep is set. */
RA_INLINE vf vf_exp_floor(vf p, vf a, vm keep)
{
    return _mm512_maskz_scalef_ps(keep, p, a);
}

#elif RA_ISA_RANK == 1

#include <immintrin.h>

#define RA_VF_WIDTH 8
typedef __m256 vf;
typedef __m256 vm;

RA_INLINE __m256i vf_first_n(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

RA_INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

RA_INLINE vf vf_load_n(const float *p, int n)
{
    return _mm256_maskload_ps(p, vf_first_n(n));
}

RA_INLINE void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}

RA_INLINE void vf_store_n(float *p, vf a, int n)
{
    _mm256_maskstore_ps(p, vf_first_n(n), a);
}

RA_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

RA_INLINE vf vf_set1(float a)
{
    return _mm256_set1_ps(a);
}

RA_INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}

RA_INLINE vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}

RA_INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}

RA_INLINE vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}

RA_INLINE vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}

RA_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

RA_INLINE vf vf_fma_at(const float *a, vf b, vf c)
{
    return vf_fma(vf_set1(*a), b, c);
}

RA_INLINE float vf_hmax(vf a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

RA_INLINE float vf_hsum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

RA_INLINE vf vf_lane(void)
{
    return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
}

RA_INLINE vm vf_ge(vf a, vf b)
{
    return _mm256_cmp_ps(a, b, _CMP_GE_OQ);
}

RA_INLINE vm vf_not_less(vf a, vf b)
{
    return _mm256_cmp_ps(a, b, _CMP_NLT_UQ);
}

RA_INLINE vm vm_and(vm a, vm b)
{
    return _mm256_and_ps(a, b);
}

RA_INLINE bool vf_any_greater(vf a, vf b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

RA_INLINE vf vf_select(vm mask, vf a, vf b)
{
    return _mm256_blendv_ps(b, a, mask);
}

/* Two factors: 2^128 is no float. */
RA_INLINE vf vf_exp_scale(vf p, vf n, vm keep)
{
    __m256i bias = _mm256_set1_epi32(127), whole = _mm256_cvtps_epi32(n);
    __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i high = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    p = _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
    return _mm256_and_ps(keep, p);
}

RA_INLINE vf vf_above_floor(vf a)
{
    return _mm256_sub_ps(a, _mm256_floor_ps(a));
}

RA_INLINE vf vf_exp_floor(vf p, vf a, vm keep)
{
    __m256i floor = _mm256_cvtps_epi32(_mm256_floor_ps(a));
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(floor, _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(bits)));
}

#else

#define RA_VF_WIDTH 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));

RA_INLINE vf vf_load(const float *p)
{
    vf a;
    memcpy(&a, p, sizeof(a));
    return a;
}

RA_INLINE vf vf_load_n(const float *p, int n)
{
    vf a = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < n; i++) {
        a[i] = p[i];
    }
    return a;
}

RA_INLINE void vf_store(float *p, vf a)
{
    memcpy(p, &a, sizeof(a));
}

RA_INLINE void vf_store_n(float *p, vf a, int n)
{
    for (int i = 0; i < n; i++) {
        p[i] = a[i];
    }
}

RA_INLINE vf vf_load_bf16(const uint16_t *p)
{
    uint32_t wide[RA_VF_WIDTH];
    for (int i = 0; i < RA_VF_WIDTH; i++) {
        wide[i] = (uint32_t)p[i] << 16;
    }
    vf a;
    memcpy(&a, wide, sizeof(a));
    return a;
}

RA_INLINE vf vf_set1(float a)
{
    return (vf){a, a, a, a};
}

RA_INLINE vf vf_add(vf a, vf b)
{
    return a + b;
}

RA_INLINE vf vf_sub(vf a, vf b)
{
    return a - b;
}

RA_INLINE vf vf_mul(vf a, vf b)
{
    return a * b;
}

RA_INLINE vf vf_div(vf a, vf b)
{
    return a / b;
}

RA_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return a * b + c;
}

RA_INLINE vf vf_fma_at(const float *a, vf b, vf c)
{
    return vf_fma(vf_set1(*a), b, c);
}

RA_INLINE vm vf_ge(vf a, vf b)
{
    return a >= b;
}

RA_INLINE vm vf_not_less(vf a, vf b)
{
    return ~(a < b);
}

RA_INLINE vm vm_and(vm a, vm b)
{
    return a & b;
}

RA_INLINE bool vf_any_greater(vf a, vf b)
{
    vm greater = a > b;
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}

RA_INLINE vf vf_select(vm mask, vf a, vf b)
{
    return (vf)((mask & (vm)a) | (~mask & (vm)b));
}

RA_INLINE vf vf_max(vf a, vf b)
{
    return vf_select(a > b, a, b);
}

RA_INLINE float vf_hmax(vf a)
{
    float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}

RA_INLINE float vf_hsum(vf a)
{
    return (a[0] + a[2]) + (a[1] + a[3]);
}

RA_INLINE vf vf_lane(void)
{
    return (vf){0.0f, 1.0f, 2.0f, 3.0f};
}

/* Adding 1.5 * 2^23 leaves the integer in the low mantissa bits; two factors as 2^128 is no float.
 */
RA_INLINE vf vf_exp_scale(vf p, vf n, vm keep)
{
    vm magic_bits = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
    vm whole = (vm)(n + (vf)magic_bits) - magic_bits;
    vm half = whole >> 1, rest = whole - half;
    return (vf)(keep & (vm)(p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23)));
}

/* Adding and subtracting 1.5 * 2^23 rounds to nearest. */
RA_INLINE vf generic_floor(vf a)
{
    vf magic = {0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f}, one = {1.0f, 1.0f, 1.0f, 1.0f};
    vf nearest = (a + magic) - magic;
    return nearest - (vf)((vm)one & (nearest > a));
}

RA_INLINE vf vf_above_floor(vf a)
{
    return a - generic_floor(a);
}

RA_INLINE vf vf_exp_floor(vf p, vf a, vm keep)
{
    typedef uint32_t bits __attribute__((vector_size(16)));
    vm floor = __builtin_convertvector(vf_select(keep, generic_floor(a), a - a), vm);
    return (vf)(keep & (vm)(p * (vf)(((bits)floor + 127) << 23)));
}

#endif

RA_INLINE vf vf_zero(void)
{
    return vf_set1(0.0f);
}

/**
 * e^x for x < 88.7, within 1.3 ulp. exp(0) = 1 exactly; below -87.33 (where results would be
 * denormal) and at -inf exactly 0; NaN stays NaN.
 *
 * x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two parts (Cody & Waite); e^r = 1 + r + r^2 g(r), g the
 * polynomial that agrees with its function at the Chebyshev points (relative error of e^r 8e-9).
 */
RA_INLINE vf vf_exp_below_88(vf x)
{
    const vf magic = vf_set1(0x1.8p23f); /* adding and subtracting it rounds to an integer */

    vm keep = vf_not_less(x, vf_set1(-87.336544f));
    vf n = vf_sub(vf_fma(x, vf_set1(0x1.715476p+0f), magic), magic);
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(0.00139262131f);
    p = vf_fma(p, r, vf_set1(0.00836320315f));
    p = vf_fma(p, r, vf_set1(0.0416665561f));
    p = vf_fma(p, r, vf_set1(0.166665763f));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_exp_scale(p, n, keep);
}

/**
 * e^x for x <= 0, in fewer operations: within 2e-7 + 8e-8 |x| relative. exp(0) = 1 exactly; below
 * -87.34 and at -inf exactly 0; NaN stays NaN.
 *
 * y = x log2 e = n + r, n = floor(y); 2^r = 1 + r g(r) on [0, 1], g of least largest relative error
 * (1.5e-7 with rounded coefficients and steps).
 * Of n <= 8 vectors side by side: one after the other they wait for their own multiply-adds.
 */
RA_INLINE void vf_exp_negative_each(vf *x, const int n)
{
    static const float g[6] = {0x1.e974fap-10f, 0x1.277856p-7f, 0x1.c91ce6p-5f,
                               0x1.ebdb56p-3f,  0x1.62e4bap-1f, 1.0f};

    vf r[8], p[8];

    RA_UNROLL
    for (int i = 0; i < n; i++) {
        x[i] = vf_mul(x[i], vf_set1(0x1.715476p+0f));
    }
    RA_UNROLL
    for (int i = 0; i < n; i++) {
        r[i] = vf_above_floor(x[i]);
        p[i] = vf_set1(g[0]);
    }
    RA_UNROLL
    for (int k = 1; k < 6; k++) {
        RA_UNROLL
        for (int i = 0; i < n; i++) {
            p[i] = vf_fma(p[i], r[i], vf_set1(g[k]));
        }
    }
    RA_UNROLL
    for (int i = 0; i < n; i++) {
        x[i] = vf_exp_floor(p[i], x[i], vf_not_less(x[i], vf_set1(-126.0f)));
    }
}

/** The same as vf_exp_below_88() for every x: +inf above 88.73. */
RA_INLINE vf vf_exp(vf x)
{
    vf high = vf_set1(89.0f);
    return vf_exp_below_88(vf_select(vf_ge(x, high), high, x));
}

#endif
