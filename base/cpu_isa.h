/**
 * @file  base/cpu_isa.h
 * @brief Which instruction set the CPU kernels use, chosen once at run time.
 *
 * Kernel sources written against base/simd.h are compiled once for each row here (see
 * ra_isa_sources() in the root CMakeLists.txt) with RA_ISA naming the row; a symbol declared
 * through RA_ISA_FN(name) becomes name_generic, name_avx2, name_avx512.
 */
#ifndef RA_BASE_CPU_ISA_H
#define RA_BASE_CPU_ISA_H

typedef enum ra_cpu_isa {
    RA_CPU_GENERIC = 0, /**< portable C */
    RA_CPU_AVX2,        /**< AVX2 + FMA, 8 floats */
    RA_CPU_AVX512,      /**< AVX-512 F/DQ/BW/VL, 16 floats */
    RA_CPU_ISA_COUNT
} ra_cpu_isa_t;

/** Best instruction set of this CPU that was built, or the one forced. Thread safe, cheap. */
ra_cpu_isa_t ra_cpu_isa(void);
/** Force a lower one (tests, comparisons). @return 0, or -1 when this CPU or build lacks it. */
int ra_cpu_isa_force(ra_cpu_isa_t isa);
const char *ra_cpu_isa_name(ra_cpu_isa_t isa);

#define RA_ISA_CONCAT_(name, isa) name##_##isa
#define RA_ISA_CONCAT(name, isa)  RA_ISA_CONCAT_(name, isa)
#define RA_ISA_FN(name)           RA_ISA_CONCAT(name, RA_ISA)

/** Declare the variants of one kernel function and a table to index by ra_cpu_isa(). */
#if defined(__x86_64__)
#define RA_ISA_TABLE(type, name)                                                                   \
    static type *const name##_table[RA_CPU_ISA_COUNT] = {name##_generic, name##_avx2, name##_avx512}
#else
#define RA_ISA_TABLE(type, name)                                                                   \
    static type *const name##_table[RA_CPU_ISA_COUNT] = {name##_generic, NULL, NULL}
#endif

#endif
