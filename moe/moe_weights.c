#include "base/log.h"
#include "moe/moe_plan.h"
#include <inttypes.h>
#include <stdlib.h>

static ra_status_t prepare(const ra_gemm_kernel_t *kernel, const ra_tensor_t *tensor, int64_t out,
                           int64_t in, const char *what, int32_t expert, ra_gemm_weight_t **to)
{
    if (tensor->data == NULL || tensor->rank != 2 || tensor->extent[0] != out ||
        tensor->extent[1] != in) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "%s %d is [%" PRId64 ", %" PRId64 "] of rank %d, not [%" PRId64 ", %" PRId64
                       "]",
                       what, expert, tensor->extent[0], tensor->extent[1], tensor->rank, out, in);
    }
    return ra_gemm_weight_create(kernel, tensor, to);
}

static ra_status_t copy_bias(const ra_tensor_t *from, int32_t experts, float *bias)
{
    if (from->data == NULL) {
        return RA_OK;
    }
    if (ra_tensor_count(from) != experts || (from->dtype != RA_F32 && from->dtype != RA_BF16)) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "expert bias has %" PRId64 " elements of %s, not %d of F32 or BF16",
                       ra_tensor_count(from), ra_dtype_name(from->dtype), experts);
    }
    for (int32_t e = 0; e < experts; e++) {
        bias[e] = from->dtype == RA_F32 ? ((const float *)from->data)[e]
                                        : ra_bf16_to_f32(((const uint16_t *)from->data)[e]);
    }
    return RA_OK;
}

static ra_status_t prepare_experts(const ra_gemm_kernel_t *kernel, const ra_moe_tensors_t *from,
                                   ra_moe_weights_t *to)
{
    const int64_t hidden = to->shape.hidden, width = to->shape.expert_width;
    for (int32_t e = to->first; e < to->last; e++) {
        int32_t at = e - to->first;
        RA_TRY(prepare(kernel, &from->gate[e], width, hidden, "gate of expert", e, &to->gate[at]));
        RA_TRY(prepare(kernel, &from->up[e], width, hidden, "up of expert", e, &to->up[at]));
        RA_TRY(prepare(kernel, &from->down[e], hidden, width, "down of expert", e, &to->down[at]));
    }
    const int64_t shared = to->shape.shared_width;
    if (shared == 0) {
        return RA_OK;
    }
    RA_TRY(prepare(kernel, &from->shared_gate, shared, hidden, "gate of shared expert", 0,
                   &to->shared_gate));
    RA_TRY(prepare(kernel, &from->shared_up, shared, hidden, "up of shared expert", 0,
                   &to->shared_up));
    return prepare(kernel, &from->shared_down, hidden, shared, "down of shared expert", 0,
                   &to->shared_down);
}

ra_status_t ra_moe_weights_create(const ra_gemm_kernel_t *kernel, const ra_moe_shape_t *shape,
                                  const ra_moe_tensors_t *tensors, int32_t first, int32_t last,
                                  ra_moe_weights_t **weights_p)
{
    RA_TRY(ra_router_check(&shape->router));
    int32_t experts = shape->router.experts;
    if (first < 0 || last < first || last > experts) {
        return ra_fail(RA_ERR_INVALID, "moe", "experts [%d, %d) of %d", first, last, experts);
    }
    ra_status_t status = RA_ERR_NOMEM;
    size_t held = (size_t)(last - first) + 1; /* never an allocation of nothing */
    ra_moe_weights_t *weights = calloc(1, sizeof(*weights));
    if (weights == NULL) {
        goto fail;
    }
    *weights = (ra_moe_weights_t){.shape = *shape,
                                  .first = first,
                                  .last = last,
                                  .bias = calloc((size_t)experts, sizeof(float)),
                                  .gate = calloc(held, sizeof(ra_gemm_weight_t *)),
                                  .up = calloc(held, sizeof(ra_gemm_weight_t *)),
                                  .down = calloc(held, sizeof(ra_gemm_weight_t *))};
    if (weights->bias == NULL || weights->gate == NULL || weights->up == NULL ||
        weights->down == NULL) {
        ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate handles of %d experts", last - first);
        goto fail;
    }
    RA_TRY_GOTO(copy_bias(&tensors->expert_bias, experts, weights->bias), fail);
    RA_TRY_GOTO(
        prepare(kernel, &tensors->router, experts, shape->hidden, "router", 0, &weights->router),
        fail);
    RA_TRY_GOTO(prepare_experts(kernel, tensors, weights), fail);
    *weights_p = weights;
    return RA_OK;
fail:
    ra_moe_weights_destroy(weights);
    return status;
}

void ra_moe_weights_destroy(ra_moe_weights_t *weights)
{
    if (weights == NULL) {
        return;
    }
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
    free(weights->bias);
    free(weights);
}
