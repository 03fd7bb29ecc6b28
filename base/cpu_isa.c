#include "base/cpu_isa.h"

#include <stdatomic.h>

static atomic_int forced_isa = -1;

static ra_cpu_isa_t detect(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        return RA_CPU_AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return RA_CPU_AVX2;
    }
#endif
    return RA_CPU_GENERIC;
}

ra_cpu_isa_t ra_cpu_isa(void)
{
    int forced = atomic_load_explicit(&forced_isa, memory_order_relaxed);
    return forced >= 0 ? (ra_cpu_isa_t)forced : detect();
}

int ra_cpu_isa_force(ra_cpu_isa_t isa)
{
    if (isa > detect()) {
        return -1;
    }
    atomic_store(&forced_isa, (int)isa);
    return 0;
}

const char *ra_cpu_isa_name(ra_cpu_isa_t isa)
{
    static const char *const names[RA_CPU_ISA_COUNT] = {"generic", "avx2", "avx512"};
    return names[isa];
}
