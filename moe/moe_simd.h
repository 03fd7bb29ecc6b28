/**
 * @file  moe/moe_simd.h
 * @brief Elementwise kernels of the room, one row of functions an instruction set.
 *
 * For this room, and for the dense feed-forward layers of model/.
 *
 * Every element is computed alone, so its bits depend on its own operands only.
 */
#ifndef RA_MOE_MOE_SIMD_H
#define RA_MOE_MOE_SIMD_H

#include <stdint.h>

typedef struct ra_moe_ops {
    /** y_i = 1 / (1 + e^{-x_i}); NaN stays NaN. */
    void (*sigmoid)(const float *x, int64_t count, float *y);
    /** gate_i <- SiLU(gate_i) * up_i, SiLU(a) = a / (1 + e^{-a}). */
    void (*swiglu)(float *gate, const float *up, int64_t count);
    /**
     * y_i (+)= ((w_0 row_0_i + w_1 row_1_i) + ...) + last_i, slots in the order given.
     * @param last  NULL: nothing is added.
     */
    void (*combine)(const float *const *rows, const float *weights, int32_t slots,
                    const float *last, int accumulate, int64_t count, float *y);
} ra_moe_ops_t;

extern const ra_moe_ops_t ra_moe_ops_generic;
#if defined(__x86_64__)
extern const ra_moe_ops_t ra_moe_ops_avx2, ra_moe_ops_avx512;
#endif

/** The row for ra_cpu_isa(). */
const ra_moe_ops_t *ra_moe_ops(void);

#endif
