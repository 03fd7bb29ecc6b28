/* moe/moe_simd.c - contract in moe/moe_simd.h; compiled once an instruction set. */
#include "moe/moe_simd.h"

#include "base/checked.h"
#include "base/simd.h"

RA_INLINE vf load(const float *p, int n)
{
    return n == RA_VF_WIDTH ? vf_load(p) : vf_load_n(p, n);
}

RA_INLINE void store(float *p, vf a, int n)
{
    if (n == RA_VF_WIDTH) {
        vf_store(p, a);
    } else {
        vf_store_n(p, a, n);
    }
}

/* Lanes of the vector at `at`; the last one of a row may be short. */
RA_INLINE int lanes(int64_t at, int64_t count)
{
    return (int)ra_min_i64(count - at, RA_VF_WIDTH);
}

/* 1 + e^{-x}; +inf for large negative x, whose reciprocal is 0. */
RA_INLINE vf denominator(vf x)
{
    return vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x)));
}

static void sigmoid(const float *x, int64_t count, float *y)
{
    for (int64_t at = 0; at < count; at += RA_VF_WIDTH) {
        int n = lanes(at, count);
        store(y + at, vf_div(vf_set1(1.0f), denominator(load(x + at, n))), n);
    }
}

static void swiglu(float *gate, const float *up, int64_t count)
{
    for (int64_t at = 0; at < count; at += RA_VF_WIDTH) {
        int n = lanes(at, count);
        vf a = load(gate + at, n);
        store(gate + at, vf_mul(vf_div(a, denominator(a)), load(up + at, n)), n);
    }
}

static void combine(const float *const *rows, const float *weights, int32_t slots,
                    const float *last, int accumulate, int64_t count, float *y)
{
    for (int64_t at = 0; at < count; at += RA_VF_WIDTH) {
        int n = lanes(at, count);
        vf sum = vf_zero();
        for (int32_t slot = 0; slot < slots; slot++) {
            sum = vf_fma(vf_set1(weights[slot]), load(rows[slot] + at, n), sum);
        }
        if (last != NULL) {
            sum = vf_add(sum, load(last + at, n));
        }
        store(y + at, accumulate ? vf_add(load(y + at, n), sum) : sum, n);
    }
}

const ra_moe_ops_t RA_ISA_FN(ra_moe_ops) = {
    .sigmoid = sigmoid, .swiglu = swiglu, .combine = combine};
