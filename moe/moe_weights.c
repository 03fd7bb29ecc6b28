/* moe/moe_weights.c - a layer's weights on the CPU: one GEMM handle a matrix. */
#include "base/log.h"
#include "moe/moe_plan.h"
#include <stdlib.h>

static ra_status_t prepare(const ra_gemm_kernel_t *kernel, const ra_tensor_t *tensor,
                           ra_gemm_weight_t **to)
{
    return ra_gemm_weight_create(kernel, tensor, RA_F32, NULL, to);
}

ra_status_t ra_moe_cpu_prepare(const ra_gemm_kernel_t *kernel, const ra_moe_tensors_t *from,
                               ra_stream_t *stream, ra_moe_weights_t *to)
{
    (void)stream;
    size_t held = (size_t)(to->last - to->first) + 1; /* never an allocation of nothing */
    to->gate = calloc(held, sizeof(ra_gemm_weight_t *));
    to->up = calloc(held, sizeof(ra_gemm_weight_t *));
    to->down = calloc(held, sizeof(ra_gemm_weight_t *));
    if (to->gate == NULL || to->up == NULL || to->down == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate handles of %zu experts", held);
    }
    RA_TRY(prepare(kernel, &from->router, &to->router));
    for (int32_t e = to->first; e < to->last; e++) {
        int32_t at = e - to->first;
        RA_TRY(prepare(kernel, &from->gate[e], &to->gate[at]));
        RA_TRY(prepare(kernel, &from->up[e], &to->up[at]));
        RA_TRY(prepare(kernel, &from->down[e], &to->down[at]));
    }
    if (to->shape.shared_width == 0) {
        return RA_OK;
    }
    RA_TRY(prepare(kernel, &from->shared_gate, &to->shared_gate));
    RA_TRY(prepare(kernel, &from->shared_up, &to->shared_up));
    return prepare(kernel, &from->shared_down, &to->shared_down);
}

void ra_moe_cpu_release(ra_moe_weights_t *weights)
{
    for (int32_t at = 0; at < weights->last - weights->first; at++) {
        if (weights->gate != NULL && weights->up != NULL && weights->down != NULL) {
            ra_gemm_weight_destroy(weights->gate[at]);
            ra_gemm_weight_destroy(weights->up[at]);
            ra_gemm_weight_destroy(weights->down[at]);
        }
    }
    ra_gemm_weight_destroy(weights->router);
    ra_gemm_weight_destroy(weights->shared_gate);
    ra_gemm_weight_destroy(weights->shared_up);
    ra_gemm_weight_destroy(weights->shared_down);
    free(weights->gate);
    free(weights->up);
    free(weights->down);
}
