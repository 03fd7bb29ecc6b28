/**
 * @file  tests/test_support.h
 * @brief What every test needs: cmocka, a seeded generator, poisoning, comparison with a place.
 */
#ifndef RA_TESTS_TEST_SUPPORT_H
#define RA_TESTS_TEST_SUPPORT_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

/** splitmix64: the same numbers everywhere for the same seed. */
static inline uint64_t test_random_u64(uint64_t *seed)
{
    uint64_t z = (*seed += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/** Uniform in [low, high). */
static inline float test_random(uint64_t *seed, float low, float high)
{
    return low + (high - low) * (float)((double)(test_random_u64(seed) >> 11) * 0x1p-53);
}

static inline void test_fill(float *values, int64_t n, uint64_t *seed, float low, float high)
{
    for (int64_t i = 0; i < n; i++) {
        values[i] = test_random(seed, low, high);
    }
}

/** Fill with NaN, so that an output never written is seen. */
static inline void test_poison(float *values, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        values[i] = NAN;
    }
}

/** Fail with the first index where |got - want| > absolute + relative * |want|. */
static inline void test_near(const float *got, const double *want, int64_t n, double absolute,
                             double relative, const char *what)
{
    for (int64_t i = 0; i < n; i++) {
        double bound = absolute + relative * fabs(want[i]);
        if (!(fabs((double)got[i] - want[i]) <= bound) && !(isinf(want[i]) && got[i] == want[i])) {
            fail_msg("%s [%lld]: got %.9g, want %.9g, bound %.3g", what, (long long)i,
                     (double)got[i], want[i], bound);
        }
    }
}

#endif
