/** @file benchmarks/bench_peak.h  @brief The FMA loop, one function for each instruction set. */
#ifndef RA_BENCHMARKS_BENCH_PEAK_H
#define RA_BENCHMARKS_BENCH_PEAK_H

#include <stdint.h>

/** Run @a steps rounds of independent multiply-adds; returns their flops. The sink keeps them. */
typedef double bench_peak_func_t(int64_t steps, float *sink);

bench_peak_func_t bench_peak_generic;
#if defined(__x86_64__)
bench_peak_func_t bench_peak_avx2, bench_peak_avx512;
#endif

#endif
