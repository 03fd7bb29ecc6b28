#include "model/model_config.h"
#include <math.h>

/* Entry h of the ALiBi schedule of `heads` heads, a power of two. */
static float schedule(int64_t heads, int64_t h)
{
    return (float)exp2(-8.0 * (double)(h + 1) / (double)heads);
}

void ra_decay_slopes(int64_t heads, int64_t l, int64_t layers, ra_decay_factor_t factor,
                     float *slopes)
{
    double depth = (double)(factor == RA_DECAY_B ? l - 1 : l);
    double scale = layers > 1 ? 1.0 - depth / (double)(layers - 1) + 1e-5 : 1.0 + 1e-5;
    int64_t power = 1;
    while (2 * power <= heads) {
        power *= 2;
    }
    for (int64_t h = 0; h < heads; h++) {
        float base = h < power ? schedule(power, h) : schedule(2 * power, 2 * (h - power));
        slopes[h] = base * (float)scale;
    }
}
