/**
 * @file  base/fma_peak.h
 * @brief Independent multiply-adds on registers: what the floating-point units can do at most.
 */
#ifndef RA_BASE_FMA_PEAK_H
#define RA_BASE_FMA_PEAK_H

#include "base/cpu_isa.h"
#include <stddef.h>
#include <stdint.h>

/** Run @a steps rounds; returns their flops. The sink keeps the compiler from dropping them. */
typedef double ra_fma_func_t(int64_t steps, float *sink);

ra_fma_func_t ra_fma_loop_generic;
#if defined(__x86_64__)
ra_fma_func_t ra_fma_loop_avx2, ra_fma_loop_avx512;
#endif

static inline double ra_fma_loop(ra_cpu_isa_t isa, int64_t steps, float *sink)
{
    RA_ISA_TABLE(ra_fma_func_t, ra_fma_loop);
    return ra_fma_loop_table[isa](steps, sink);
}

#endif
