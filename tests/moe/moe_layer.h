/** @file tests/moe/moe_layer.h  @brief A random layer: oracle's arrays and the tensors moe/ takes.
 */
#ifndef RA_TESTS_MOE_MOE_LAYER_H
#define RA_TESTS_MOE_MOE_LAYER_H

#include "tests/moe/moe_ref.h"
#include "tests/test_support.h"

enum { MOE_LAYER_MAX_EXPERTS = 64 };

typedef struct moe_layer {
    moe_ref_layer_t ref; /**< fp32 values of the tensors */
    ra_tensor_t gate[MOE_LAYER_MAX_EXPERTS], up[MOE_LAYER_MAX_EXPERTS], down[MOE_LAYER_MAX_EXPERTS];
    ra_moe_tensors_t tensors;
    void *copies[8]; /**< bf16 arrays */
    int copy_count;
} moe_layer_t;

float *moe_random_floats(int64_t n, uint64_t *seed, float size);
/** @param dtype  of the matrices, router_dtype of the router. */
moe_layer_t *moe_layer_create(const ra_moe_shape_t *shape, ra_dtype_t dtype,
                              ra_dtype_t router_dtype);
void moe_layer_destroy(moe_layer_t *layer);

#endif
