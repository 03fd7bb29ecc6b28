#include "tests/moe/moe_layer.h"

#include <stdlib.h>

float *moe_random_floats(int64_t n, uint64_t *seed, float size)
{
    float *values = malloc((size_t)(n > 0 ? n : 1) * sizeof(*values));
    assert_non_null(values);
    test_fill(values, n, seed, -size, size);
    return values;
}

/* The array itself, or its values rounded to bf16 and a copy in that type. */
static void *typed(moe_layer_t *layer, float *values, int64_t n, ra_dtype_t dtype)
{
    if (dtype == RA_F32) {
        return values;
    }
    uint16_t *copy = malloc((size_t)(n > 0 ? n : 1) * sizeof(*copy));
    assert_non_null(copy);
    for (int64_t i = 0; i < n; i++) {
        copy[i] = ra_bf16_from_f32(values[i]);
        values[i] = ra_bf16_to_f32(copy[i]);
    }
    layer->copies[layer->copy_count++] = copy;
    return copy;
}

static ra_tensor_t matrix(void *data, ra_dtype_t dtype, int64_t at, int64_t out, int64_t in)
{
    char *from = (char *)data + at * out * in * (dtype == RA_F32 ? 4 : 2);
    return ra_tensor_view(from, dtype, 2, (int64_t[]){out, in});
}

moe_layer_t *moe_layer_create(const ra_moe_shape_t *shape, ra_dtype_t dtype,
                              ra_dtype_t router_dtype)
{
    uint64_t seed = 11;
    moe_layer_t *layer = calloc(1, sizeof(*layer));
    assert_non_null(layer);
    moe_ref_layer_t *ref = &layer->ref;
    int64_t hidden = shape->hidden, width = shape->expert_width, experts = shape->router.experts;
    int64_t shared = shape->shared_width, all = experts * width * hidden;
    *ref = (moe_ref_layer_t){.shape = *shape,
                             .router = moe_random_floats(experts * hidden, &seed, 0.4F),
                             .bias = moe_random_floats(experts, &seed, 0.1F),
                             .gate = moe_random_floats(all, &seed, 0.3F),
                             .up = moe_random_floats(all, &seed, 0.3F),
                             .down = moe_random_floats(all, &seed, 0.3F),
                             .shared_gate = moe_random_floats(shared * hidden, &seed, 0.3F),
                             .shared_up = moe_random_floats(shared * hidden, &seed, 0.3F),
                             .shared_down = moe_random_floats(shared * hidden, &seed, 0.3F)};
    void *gate = typed(layer, ref->gate, all, dtype), *up = typed(layer, ref->up, all, dtype);
    void *down = typed(layer, ref->down, all, dtype);
    void *router = typed(layer, ref->router, experts * hidden, router_dtype);
    void *shared_gate = typed(layer, ref->shared_gate, shared * hidden, dtype);
    void *shared_up = typed(layer, ref->shared_up, shared * hidden, dtype);
    void *shared_down = typed(layer, ref->shared_down, shared * hidden, dtype);
    for (int64_t e = 0; e < experts; e++) {
        layer->gate[e] = matrix(gate, dtype, e, width, hidden);
        layer->up[e] = matrix(up, dtype, e, width, hidden);
        layer->down[e] = matrix(down, dtype, e, hidden, width);
    }
    layer->tensors =
        (ra_moe_tensors_t){.router = matrix(router, router_dtype, 0, experts, hidden),
                           .expert_bias = ra_tensor_view(ref->bias, RA_F32, 1, &experts),
                           .gate = layer->gate,
                           .up = layer->up,
                           .down = layer->down,
                           .shared_gate = matrix(shared_gate, dtype, 0, shared, hidden),
                           .shared_up = matrix(shared_up, dtype, 0, shared, hidden),
                           .shared_down = matrix(shared_down, dtype, 0, hidden, shared)};
    return layer;
}

void moe_layer_destroy(moe_layer_t *layer)
{
    moe_ref_layer_t *ref = &layer->ref;
    free(ref->router);
    free(ref->bias);
    free(ref->gate);
    free(ref->up);
    free(ref->down);
    free(ref->shared_gate);
    free(ref->shared_up);
    free(ref->shared_down);
    for (int i = 0; i < layer->copy_count; i++) {
        free(layer->copies[i]);
    }
    free(layer);
}
