/** @file tests/moe/moe_ref.h  @brief Oracle of moe/: router and dense expert loop in double. */
#ifndef RA_TESTS_MOE_MOE_REF_H
#define RA_TESTS_MOE_MOE_REF_H

#include "moe/moe.h"

/** One row. weight [E] is 0 for experts not chosen. @return the routing gap. */
double moe_ref_route(const ra_router_t *router, const double *logits, const float *bias,
                     double *weight);

/** One row whose experts are given: weight [E] from their scores, 0 for the others. */
void moe_ref_weigh(const ra_router_t *router, const double *logits, const int32_t *expert,
                   double *weight);

/** Weights of a layer as plain fp32 arrays. */
typedef struct moe_ref_layer {
    ra_moe_shape_t shape;
    float *router, *bias;    /**< [E, hidden], [E] */
    float *gate, *up, *down; /**< [E, width, hidden] twice, [E, hidden, width] */
    float *shared_gate, *shared_up, *shared_down; /**< [shared_width, hidden] twice, ... */
} moe_ref_layer_t;

/** y [hidden] for one row x [hidden]; every expert is computed. @return the routing gap. */
double moe_ref_row(const moe_ref_layer_t *layer, const float *x, double *y);
/** The same with @a expert [k] instead of the router's choice; NULL or -1 first: the router's. */
double moe_ref_row_forced(const moe_ref_layer_t *layer, const float *x, const int32_t *expert,
                          double *y);

#endif
