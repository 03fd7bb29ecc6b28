/**
 * @file  base/tensor.h
 * @brief A strided view of memory somebody else owns. No maths.
 */
#ifndef RA_BASE_TENSOR_H
#define RA_BASE_TENSOR_H

#include "base/dtype.h"
#include <stdint.h>

enum { RA_TENSOR_MAX_RANK = 8 };

/** View by value; owns nothing. extent and stride count elements, outermost first. */
typedef struct ra_tensor {
    void *data;
    ra_dtype_t dtype;
    int32_t rank;
    int64_t extent[RA_TENSOR_MAX_RANK];
    int64_t stride[RA_TENSOR_MAX_RANK];
} ra_tensor_t;

/** Contiguous row-major view. The caller has checked that the product of extents fits int64_t. */
static inline ra_tensor_t ra_tensor_view(void *data, ra_dtype_t dtype, int32_t rank,
                                         const int64_t *extent)
{
    ra_tensor_t view = {.data = data, .dtype = dtype, .rank = rank};
    int64_t stride = 1;
    for (int32_t i = rank - 1; i >= 0; i--) {
        view.extent[i] = extent[i];
        view.stride[i] = stride;
        stride *= extent[i];
    }
    return view;
}

/** Number of elements; 1 for rank 0. */
static inline int64_t ra_tensor_count(const ra_tensor_t *view)
{
    int64_t count = 1;
    for (int32_t i = 0; i < view->rank; i++) {
        count *= view->extent[i];
    }
    return count;
}

#endif
