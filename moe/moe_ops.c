#include "base/cpu_isa.h"
#include "moe/moe_simd.h"
#include <stddef.h>

const ra_moe_ops_t *ra_moe_ops(void)
{
#if defined(__x86_64__)
    static const ra_moe_ops_t *const table[RA_CPU_ISA_COUNT] = {
        &ra_moe_ops_generic, &ra_moe_ops_avx2, &ra_moe_ops_avx512};
#else
    static const ra_moe_ops_t *const table[RA_CPU_ISA_COUNT] = {&ra_moe_ops_generic};
#endif
    return table[ra_cpu_isa()];
}
