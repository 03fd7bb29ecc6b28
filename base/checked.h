/**
 * @file  base/checked.h
 * @brief Checked 64-bit arithmetic for sizes, offsets and token counts.
 *
 * tokens x heads x head_dim and tokens x vocab pass 2^31 in ordinary use and can pass 2^63 in a
 * hostile file, so every product of untrusted extents goes through here.
 */
#ifndef RA_BASE_CHECKED_H
#define RA_BASE_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

/** *out = a * b. @return false on overflow or a negative operand (out untouched). */
static inline bool ra_mul_ok(int64_t a, int64_t b, int64_t *out)
{
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) {
        return false;
    }
    *out = product;
    return true;
}

/** *out = a + b. @return false on overflow or a negative operand (out untouched). */
static inline bool ra_add_ok(int64_t a, int64_t b, int64_t *out)
{
    int64_t sum;
    if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum)) {
        return false;
    }
    *out = sum;
    return true;
}

static inline int64_t ra_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t ra_max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/** Smallest multiple count: ceil(a / b) for a >= 0, b > 0. */
static inline int64_t ra_ceil_div(int64_t a, int64_t b)
{
    return a / b + (a % b != 0);
}

#endif
