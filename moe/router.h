/**
 * @file  moe/router.h
 * @brief Which experts a token visits and with which weights: sigmoid scores, group-limited top-k.
 *
 *     s_e = sigmoid(logit_e)                  fp32
 *     c_e = s_e + bias_e                      for choosing only; may be negative
 *     group score = sum of the two largest c_e of a group (experts / groups consecutive experts;
 *                   the one c_e of a group of one)
 *     keep the top_groups best groups, then the top_k largest c_e in them; ties to the lowest index
 *     w_e = s_e / (sum of the chosen s + 1e-20) * scale     with normalise; else s_e * scale
 *
 * Weights use the UNBIASED scores; the sum runs in ascending expert id.
 *
 * A NaN logit ranks below everything, and all weights of its row become NaN: the choice is defined
 * and the result is visibly non-finite. Infinite logits are ordinary (score 0 or 1).
 *
 * Source    DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (auxiliary-loss-free bias, group limit).
 */
#ifndef RA_MOE_ROUTER_H
#define RA_MOE_ROUTER_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum { RA_ROUTER_MAX_EXPERTS = 4096, RA_ROUTER_MAX_TOP_K = 64 };

typedef struct ra_router {
    int32_t experts;
    int32_t top_k;
    int32_t groups;     /**< 1: no group limit */
    int32_t top_groups; /**< groups kept */
    bool normalise;     /**< divide by the sum of the chosen scores */
    float scale;        /**< routed_scaling_factor */
} ra_router_t;

/** @retval RA_ERR_SHAPE  impossible numbers; the message says which. */
ra_status_t ra_router_check(const ra_router_t *router);

/**
 * Choose for each of @a rows rows.
 * @param logits    [rows, experts], contiguous.
 * @param bias      [experts] or NULL.
 * @param expert_p  [rows, top_k] chosen experts, ascending in each row.
 * @param weight_p  [rows, top_k] their weights.
 * @param gap_p     [rows] or NULL: how far the choice is from changing, the smaller of (last chosen
 * c minus best c not chosen inside the kept groups) and (last kept minus best dropped group score);
 * +inf when nothing was left out, 0 for a row with NaN.
 */
void ra_router_select(const ra_router_t *router, int64_t rows, const float *logits,
                      const float *bias, int32_t *expert_p, float *weight_p, float *gap_p);

#endif
