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

/**
 * Routing replay: choices written down, and choices given in place of the router's own (so that two
 * programs, or two precisions, run the same experts). Row r of an array begins at r * stride.
 */
typedef struct ra_router_replay {
    /** [rows, top_k] experts to run: in [0, experts), ascending, distinct, which the caller has
     * checked; any groups. A row whose first entry is -1 keeps the router's choice. NULL: all do.
     */
    const int32_t *forced;
    int32_t *chosen; /**< out [rows, top_k]: the router's own choice, forced or not; NULL: none */
    int64_t stride;
} ra_router_replay_t;

/** The replay of what begins @a elements further. */
static inline ra_router_replay_t ra_router_replay_at(const ra_router_replay_t *replay,
                                                     int64_t elements)
{
    ra_router_replay_t at = *replay;
    at.forced = at.forced != NULL ? at.forced + elements : NULL;
    at.chosen = at.chosen != NULL ? at.chosen + elements : NULL;
    return at;
}

/**
 * Apply @a replay to the choices that ra_router_select() made of the same logits: write them to
 * chosen, then put forced experts and their weights w_e, of the formula above with the forced ones
 * as "the chosen", in their place. A row with a NaN logit keeps its NaN weights; the gap stays that
 * of the own choice.
 */
void ra_router_replay(const ra_router_t *router, const ra_router_replay_t *replay, int64_t rows,
                      const float *logits, int32_t *expert, float *weight);

#endif
