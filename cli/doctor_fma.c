#include "base/simd.h"
#include "cli/doctor.h"

/* Ten chains: more than the latency (4 cycles) times the units (2) of current cores. */
enum { CHAINS = 10 };

double RA_ISA_FN(ra_fma_loop)(int64_t steps, float *sink)
{
    vf sum[CHAINS];
    for (int i = 0; i < CHAINS; i++) {
        sum[i] = vf_set1((float)(i + 1));
    }
    vf factor = vf_set1(0.9995f), term = vf_set1(0.0007f);
    for (int64_t step = 0; step < steps; step++) {
        RA_UNROLL
        for (int i = 0; i < CHAINS; i++) {
            sum[i] = vf_fma(sum[i], factor, term);
        }
    }
    float total = 0;
    for (int i = 0; i < CHAINS; i++) {
        total += vf_hsum(sum[i]);
    }
    *sink = total;
    return 2.0 * CHAINS * RA_VF_WIDTH * (double)steps;
}
