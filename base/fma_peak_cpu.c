#include "base/fma_peak.h"

#include "base/simd.h"

/* Twelve chains cover 4 cycles of latency on 2 units, and still fit 16 registers. */
enum { CHAINS = 12 };

double RA_ISA_FN(ra_fma_loop)(int64_t steps, float *sink)
{
    vf chain[CHAINS];
    vf scale = vf_set1(0.999f), add = vf_set1(1e-3f);
    for (int i = 0; i < CHAINS; i++) {
        chain[i] = vf_set1((float)i);
    }
    for (int64_t step = 0; step < steps; step++) {
        RA_UNROLL
        for (int i = 0; i < CHAINS; i++) {
            chain[i] = vf_fma(chain[i], scale, add);
        }
    }
    for (int i = 1; i < CHAINS; i++) {
        chain[0] = vf_add(chain[0], chain[i]);
    }
    *sink = vf_hsum(chain[0]);
    return 2.0 * CHAINS * RA_VF_WIDTH * (double)steps;
}
