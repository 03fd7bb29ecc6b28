#include "base/gemm_ref.h"

void ra_gemm_ref(const ra_tensor_t *w, const float *x, int64_t x_stride, int64_t rows, double *y)
{
    int64_t out = w->extent[0], in = w->extent[1];
    const uint16_t *w16 = w->data;
    const float *w32 = w->data;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < out; n++) {
            double sum = 0.0;
            for (int64_t k = 0; k < in; k++) {
                int64_t i = n * in + k;
                double weight = w->dtype == RA_BF16 ? ra_bf16_to_f32(w16[i]) : w32[i];
                sum += (double)x[r * x_stride + k] * weight;
            }
            y[r * out + n] = sum;
        }
    }
}
