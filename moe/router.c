#include "moe/router.h"

#include "base/log.h"
#include "moe/moe_simd.h"
#include <math.h>
#include <string.h>

/* A candidate of a top-k search. */
typedef struct best {
    float key;
    int32_t index;
} best_t;

ra_status_t ra_router_check(const ra_router_t *r)
{
    if (r->experts < 1 || r->experts > RA_ROUTER_MAX_EXPERTS || r->top_k < 1 ||
        r->top_k > RA_ROUTER_MAX_TOP_K) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "router with %d experts, %d a token; possible are 1..%d and 1..%d",
                       r->experts, r->top_k, RA_ROUTER_MAX_EXPERTS, RA_ROUTER_MAX_TOP_K);
    }
    if (r->groups < 1 || r->experts % r->groups != 0 || r->top_groups < 1 ||
        r->top_groups > r->groups) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "router keeps %d of %d groups of %d experts; groups must divide the experts "
                       "and 1..groups can be kept",
                       r->top_groups, r->groups, r->experts);
    }
    int32_t candidates = r->experts / r->groups * r->top_groups;
    if (r->top_k > candidates) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "router picks %d experts a token from %d in the %d kept groups", r->top_k,
                       candidates, r->top_groups);
    }
    return RA_OK;
}

/* Keep the `room` largest in descending order; among equals the earlier one stays in front. */
static int32_t insert(best_t *list, int32_t held, int32_t room, float key, int32_t index)
{
    if (held == room && !(key > list[room - 1].key)) {
        return held;
    }
    int32_t at = held < room ? held : room - 1;
    for (; at > 0 && key > list[at - 1].key; at--) {
        list[at] = list[at - 1];
    }
    list[at] = (best_t){.key = key, .index = index};
    return held < room ? held + 1 : held;
}

/* Distance between the last kept and the first left out of a list of want + 1; two at -inf tie. */
static float margin(const best_t *list, int32_t held, int32_t want)
{
    if (held <= want) {
        return INFINITY;
    }
    float distance = list[want - 1].key - list[want].key;
    return isnan(distance) ? 0 : distance;
}

static float group_score(const float *key, int32_t size)
{
    float first = -INFINITY, second = -INFINITY;
    for (int32_t e = 0; e < size; e++) {
        if (key[e] > first) {
            second = first;
            first = key[e];
        } else if (key[e] > second) {
            second = key[e];
        }
    }
    return size == 1 ? first : first + second;
}

/* Sets kept[g]; returns how far the choice of groups is from changing. */
static float keep_groups(const ra_router_t *router, const float *key, bool *kept)
{
    best_t list[RA_ROUTER_MAX_EXPERTS + 1];
    int32_t size = router->experts / router->groups, held = 0;
    memset(kept, 0, (size_t)router->groups * sizeof(*kept));
    for (int32_t g = 0; g < router->groups; g++) {
        float score = router->groups == router->top_groups ? 0 : group_score(key + g * size, size);
        held = insert(list, held, router->top_groups + 1, score, g);
    }
    for (int32_t g = 0; g < router->top_groups; g++) {
        kept[list[g].index] = true;
    }
    return margin(list, held, router->top_groups);
}

static void sort_ascending(int32_t *values, int32_t count)
{
    for (int32_t i = 1; i < count; i++) {
        int32_t value = values[i], at = i;
        for (; at > 0 && values[at - 1] > value; at--) {
            values[at] = values[at - 1];
        }
        values[at] = value;
    }
}

/* key: scores for choosing, free of NaN. Returns the routing gap. */
static float choose(const ra_router_t *router, const float *key, int32_t *expert)
{
    bool kept[RA_ROUTER_MAX_EXPERTS];
    best_t list[RA_ROUTER_MAX_TOP_K + 1];
    int32_t size = router->experts / router->groups, held = 0;
    float gap = keep_groups(router, key, kept);
    for (int32_t e = 0; e < router->experts; e++) {
        if (kept[e / size]) {
            held = insert(list, held, router->top_k + 1, key[e], e);
        }
    }
    for (int32_t slot = 0; slot < router->top_k; slot++) {
        expert[slot] = list[slot].index;
    }
    sort_ascending(expert, router->top_k);
    return fminf(gap, margin(list, held, router->top_k));
}

/* weight: scores of the chosen in, weights out. */
static void weigh(const ra_router_t *router, float *weight)
{
    float sum = 0;
    for (int32_t slot = 0; slot < router->top_k; slot++) {
        sum += weight[slot];
    }
    sum += 1e-20F;
    for (int32_t slot = 0; slot < router->top_k; slot++) {
        weight[slot] = (router->normalise ? weight[slot] / sum : weight[slot]) * router->scale;
    }
}

/* key = score + bias with NaN as -inf. @return whether there was one. */
static bool bias_scores(const float *score, const float *bias, int32_t experts, float *key)
{
    bool has_nan = false;
    for (int32_t e = 0; e < experts; e++) {
        float c = bias != NULL ? score[e] + bias[e] : score[e];
        has_nan |= isnan(c) != 0;
        key[e] = isnan(c) ? -INFINITY : c;
    }
    return has_nan;
}

void ra_router_select(const ra_router_t *router, int64_t rows, const float *logits,
                      const float *bias, int32_t *expert_p, float *weight_p, float *gap_p)
{
    float score[RA_ROUTER_MAX_EXPERTS], key[RA_ROUTER_MAX_EXPERTS];
    const ra_moe_ops_t *ops = ra_moe_ops();
    for (int64_t row = 0; row < rows; row++) {
        int32_t *expert = expert_p + row * router->top_k;
        float *weight = weight_p + row * router->top_k;
        ops->sigmoid(logits + row * router->experts, router->experts, score);
        bool has_nan = bias_scores(score, bias, router->experts, key);
        float gap = choose(router, key, expert);
        for (int32_t slot = 0; slot < router->top_k; slot++) {
            weight[slot] = has_nan ? NAN : score[expert[slot]];
        }
        weigh(router, weight);
        if (gap_p != NULL) {
            gap_p[row] = has_nan ? 0 : gap;
        }
    }
}

void ra_router_replay(const ra_router_t *router, const ra_router_replay_t *replay, int64_t rows,
                      const float *logits, int32_t *expert, float *weight)
{
    const int32_t k = router->top_k;
    const size_t bytes = (size_t)k * sizeof(*expert);
    for (int64_t row = 0; row < rows; row++, expert += k, weight += k, logits += router->experts) {
        ra_router_replay_t at = ra_router_replay_at(replay, row * replay->stride);
        if (at.chosen != NULL) {
            memcpy(at.chosen, expert, bytes);
        }
        if (at.forced == NULL || at.forced[0] < 0) {
            continue;
        }
        memcpy(expert, at.forced, bytes);
        if (isnan(weight[0])) { /* the whole row is */
            continue;
        }
        for (int32_t slot = 0; slot < k; slot++) {
            weight[slot] = logits[expert[slot]];
        }
        ra_moe_ops()->sigmoid(weight, k, weight);
        weigh(router, weight);
    }
}
