#include "base/checked.h"
#include "base/log.h"
#include "moe/moe_plan.h"
#include <inttypes.h>
#include <stdlib.h>

static const ra_moe_device_ops_t *const devices[] = {
    [RA_DEVICE_CPU] = &ra_moe_cpu_ops,
#if RA_HAVE_CUDA
    [RA_DEVICE_CUDA] = &ra_moe_cuda_ops,
#endif
};

static ra_status_t find_ops(ra_device_kind_t kind, const ra_moe_device_ops_t **ops_p)
{
    if ((size_t)kind >= RA_ARRAY_LEN(devices)) {
        return ra_fail(RA_ERR_UNSUPPORTED, "moe", "no experts for this device in this build");
    }
    *ops_p = devices[kind];
    return RA_OK;
}

void ra_moe_expert_range(int32_t experts, int ranks, int rank, int32_t *first_p, int32_t *last_p)
{
    *first_p = (int32_t)((int64_t)experts * rank / ranks);
    *last_p = (int32_t)((int64_t)experts * (rank + 1) / ranks);
}

static ra_status_t check_dtype(ra_device_kind_t kind, ra_dtype_t x_dtype)
{
    if (x_dtype == RA_F32 || (x_dtype == RA_BF16 && kind == RA_DEVICE_CUDA)) {
        return RA_OK;
    }
    return ra_fail(RA_ERR_UNSUPPORTED, "moe", "activations of %s on this device",
                   ra_dtype_name(x_dtype));
}

/* ---- weights ------------------------------------------------------------------------------- */

static ra_status_t check_matrix(const ra_tensor_t *tensor, int64_t out, int64_t in,
                                const char *what, int32_t expert)
{
    if (tensor->data == NULL || tensor->rank != 2 || tensor->extent[0] != out ||
        tensor->extent[1] != in || tensor->stride[0] != in || tensor->stride[1] != 1) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "%s %d is [%" PRId64 ", %" PRId64 "] of rank %d, not [%" PRId64 ", %" PRId64
                       "] contiguous",
                       what, expert, tensor->extent[0], tensor->extent[1], tensor->rank, out, in);
    }
    if (tensor->dtype != RA_BF16 && tensor->dtype != RA_F32) {
        return ra_fail(RA_ERR_UNSUPPORTED, "moe", "%s %d is of %s, not BF16 or F32", what, expert,
                       ra_dtype_name(tensor->dtype));
    }
    return RA_OK;
}

static ra_status_t check_tensors(const ra_moe_shape_t *shape, const ra_moe_tensors_t *tensors,
                                 int32_t first, int32_t last)
{
    const int64_t hidden = shape->hidden, width = shape->expert_width, shared = shape->shared_width;
    RA_TRY(check_matrix(&tensors->router, shape->router.experts, hidden, "router", 0));
    for (int32_t e = first; e < last; e++) {
        RA_TRY(check_matrix(&tensors->gate[e], width, hidden, "gate of expert", e));
        RA_TRY(check_matrix(&tensors->up[e], width, hidden, "up of expert", e));
        RA_TRY(check_matrix(&tensors->down[e], hidden, width, "down of expert", e));
    }
    if (shared == 0) {
        return RA_OK;
    }
    RA_TRY(check_matrix(&tensors->shared_gate, shared, hidden, "gate of shared expert", 0));
    RA_TRY(check_matrix(&tensors->shared_up, shared, hidden, "up of shared expert", 0));
    return check_matrix(&tensors->shared_down, hidden, shared, "down of shared expert", 0);
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

ra_status_t ra_moe_weights_create(const ra_gemm_kernel_t *kernel, const ra_moe_shape_t *shape,
                                  const ra_moe_tensors_t *tensors, int32_t first, int32_t last,
                                  ra_dtype_t x_dtype, ra_stream_t *stream,
                                  ra_moe_weights_t **weights_p)
{
    const ra_moe_device_ops_t *ops = NULL;
    RA_TRY(ra_router_check(&shape->router));
    int32_t experts = shape->router.experts;
    if (first < 0 || last < first || last > experts) {
        return ra_fail(RA_ERR_INVALID, "moe", "experts [%d, %d) of %d", first, last, experts);
    }
    RA_TRY(check_dtype(ra_stream_kind(stream), x_dtype));
    RA_TRY(find_ops(ra_stream_kind(stream), &ops));
    RA_TRY(check_tensors(shape, tensors, first, last));
    ra_moe_weights_t *weights = calloc(1, sizeof(*weights));
    float *bias = calloc((size_t)experts, sizeof(*bias));
    if (weights == NULL || bias == NULL) {
        free(weights);
        free(bias);
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate handles of %d experts", experts);
    }
    *weights = (ra_moe_weights_t){.ops = ops,
                                  .shape = *shape,
                                  .x_dtype = x_dtype,
                                  .first = first,
                                  .last = last,
                                  .bias = bias};
    ra_status_t status;
    RA_TRY_GOTO(copy_bias(&tensors->expert_bias, experts, bias), fail);
    RA_TRY_GOTO(ops->prepare(kernel, tensors, stream, weights), fail);
    *weights_p = weights;
    return RA_OK;
fail:
    ra_moe_weights_destroy(weights);
    return status;
}

void ra_moe_weights_destroy(ra_moe_weights_t *weights)
{
    if (weights != NULL) {
        weights->ops->release(weights);
        free(weights->bias);
        free(weights);
    }
}

/* ---- plan ---------------------------------------------------------------------------------- */

ra_status_t ra_moe_plan_create(const ra_moe_shape_t *shape, int64_t tile_rows, ra_dtype_t x_dtype,
                               ra_device_t *device, ra_comm_t *comm, ra_moe_plan_t **plan_p)
{
    const ra_moe_device_ops_t *ops = NULL;
    RA_TRY(ra_router_check(&shape->router));
    if (shape->hidden < 1 || shape->expert_width < 1 || shape->shared_width < 0 || tile_rows < 0 ||
        tile_rows > INT32_MAX) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "hidden %" PRId64 ", expert width %" PRId64 ", shared width %" PRId64
                       ", tile of %" PRId64 " rows",
                       shape->hidden, shape->expert_width, shape->shared_width, tile_rows);
    }
    RA_TRY(check_dtype(ra_device_kind(device), x_dtype));
    RA_TRY(find_ops(ra_device_kind(device), &ops));
    ra_moe_plan_t *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate a plan");
    }
    bool exchanges = comm != NULL && ra_comm_size(comm) > 1;
    plan->ops = ops;
    plan->shape = *shape;
    plan->x_dtype = x_dtype;
    plan->device = device;
    plan->comm = exchanges ? comm : NULL;
    plan->ranks = exchanges ? ra_comm_size(comm) : 1;
    plan->rank = exchanges ? ra_comm_rank(comm) : 0;
    ra_moe_expert_range(shape->router.experts, plan->ranks, plan->rank, &plan->first, &plan->last);

    /* All rows of a round may choose the experts of one rank. */
    int64_t in_flight = tile_rows > 0 ? tile_rows : ops->default_tile_rows;
    plan->tile_rows = ra_max_i64(in_flight / plan->ranks, 1);
    plan->max_slots =
        plan->tile_rows * plan->ranks * ra_min_i64(shape->router.top_k, plan->last - plan->first);
    ra_status_t status = ops->allocate(plan);
    if (status != RA_OK) {
        ra_moe_plan_destroy(plan);
        return status;
    }
    *plan_p = plan;
    return RA_OK;
}

void ra_moe_plan_destroy(ra_moe_plan_t *plan)
{
    if (plan != NULL) {
        plan->ops->free(plan);
        free(plan);
    }
}

int64_t ra_moe_plan_bytes(const ra_moe_plan_t *plan)
{
    return plan->bytes;
}

/* ---- forward ------------------------------------------------------------------------------- */

ra_status_t ra_moe_agree_on_rounds(ra_moe_plan_t *plan, int64_t rows, int64_t *rounds_p)
{
    int64_t most = rows;
    if (plan->comm != NULL) {
        RA_TRY(ra_comm_allgather(plan->comm, &rows, sizeof(rows), plan->rank_rows));
        for (int p = 0; p < plan->ranks; p++) {
            most = ra_max_i64(most, plan->rank_rows[p]);
        }
    }
    *rounds_p = ra_ceil_div(most, plan->tile_rows);
    return RA_OK;
}

static bool same_shape(const ra_moe_shape_t *a, const ra_moe_shape_t *b)
{
    return a->hidden == b->hidden && a->expert_width == b->expert_width &&
           a->shared_width == b->shared_width && a->router.experts == b->router.experts;
}

ra_status_t ra_moe_forward(ra_moe_plan_t *plan, const ra_moe_args_t *args, ra_stream_t *stream)
{
    const ra_moe_weights_t *weights = args->weights;
    if (!same_shape(&plan->shape, &weights->shape) || plan->ops != weights->ops ||
        plan->x_dtype != weights->x_dtype || weights->first > plan->first ||
        weights->last < plan->last) {
        return ra_fail(RA_ERR_INVALID, "moe",
                       "rank %d of %d runs experts [%d, %d) of %d, hidden %" PRId64
                       ", %s; its weights hold [%d, %d) of %d, hidden %" PRId64 ", %s",
                       plan->rank, plan->ranks, plan->first, plan->last, plan->shape.router.experts,
                       plan->shape.hidden, ra_dtype_name(plan->x_dtype), weights->first,
                       weights->last, weights->shape.router.experts, weights->shape.hidden,
                       ra_dtype_name(weights->x_dtype));
    }
    return plan->ops->forward(plan, args, stream);
}
