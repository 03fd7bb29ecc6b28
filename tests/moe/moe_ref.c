#include "tests/moe/moe_ref.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

/* Whether `index` is among the `want` largest of values (ties: lower index first), by counting. */
static bool among_largest(const double *values, int32_t count, int32_t index, int32_t want)
{
    int32_t ahead = 0;
    for (int32_t i = 0; i < count; i++) {
        ahead += values[i] > values[index] || (values[i] == values[index] && i < index);
    }
    return ahead < want;
}

/* Smallest chosen minus largest not chosen. */
static double margin(const double *values, const bool *eligible, const bool *chosen, int32_t count)
{
    double in = INFINITY, out = -INFINITY;
    for (int32_t i = 0; i < count; i++) {
        if (eligible == NULL || eligible[i]) {
            in = chosen[i] ? fmin(in, values[i]) : in;
            out = chosen[i] ? out : fmax(out, values[i]);
        }
    }
    return in - out;
}

static double group_score(const double *values, int32_t count)
{
    double sum = 0;
    for (int32_t i = 0; i < count; i++) {
        sum += among_largest(values, count, i, 2) ? values[i] : 0;
    }
    return sum;
}

double moe_ref_route(const ra_router_t *router, const double *logits, const float *bias,
                     double *weight)
{
    int32_t experts = router->experts, size = experts / router->groups;
    double *score = calloc((size_t)experts, sizeof(double));
    double *biased = calloc((size_t)experts, sizeof(double));
    double *group = malloc((size_t)router->groups * sizeof(double));
    bool *kept = malloc((size_t)router->groups * sizeof(bool));
    bool *eligible = malloc((size_t)experts * sizeof(bool));
    bool *chosen = malloc((size_t)experts * sizeof(bool));
    for (int32_t e = 0; e < experts; e++) {
        score[e] = 1 / (1 + exp(-logits[e]));
        biased[e] = score[e] + (bias != NULL ? (double)bias[e] : 0);
    }
    for (int32_t g = 0; g < router->groups; g++) {
        group[g] = group_score(biased + g * size, size);
    }
    for (int32_t g = 0; g < router->groups; g++) {
        kept[g] = among_largest(group, router->groups, g, router->top_groups);
    }
    for (int32_t e = 0; e < experts; e++) {
        eligible[e] = kept[e / size];
        biased[e] = eligible[e] ? biased[e] : -INFINITY;
    }
    double sum = 1e-20;
    for (int32_t e = 0; e < experts; e++) {
        chosen[e] = eligible[e] && among_largest(biased, experts, e, router->top_k);
        sum += chosen[e] ? score[e] : 0;
    }
    for (int32_t e = 0; e < experts; e++) {
        double one = router->normalise ? score[e] / sum : score[e];
        weight[e] = chosen[e] ? one * (double)router->scale : 0;
    }
    double gap =
        fmin(margin(group, NULL, kept, router->groups), margin(biased, eligible, chosen, experts));
    free(score);
    free(biased);
    free(group);
    free(kept);
    free(eligible);
    free(chosen);
    return gap;
}

void moe_ref_weigh(const ra_router_t *router, const double *logits, const int32_t *expert,
                   double *weight)
{
    double sum = 1e-20;
    for (int32_t j = 0; j < router->top_k; j++) {
        sum += 1 / (1 + exp(-logits[expert[j]]));
    }
    for (int32_t e = 0; e < router->experts; e++) {
        weight[e] = 0;
    }
    for (int32_t j = 0; j < router->top_k; j++) {
        double score = 1 / (1 + exp(-logits[expert[j]]));
        weight[expert[j]] = (router->normalise ? score / sum : score) * (double)router->scale;
    }
}

static double dot(const float *w, const float *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)w[i] * (double)x[i];
    }
    return sum;
}

/* y += factor * down (silu(gate x) * (up x)) */
static void feed_forward(const float *gate, const float *up, const float *down, int64_t width,
                         int64_t hidden, const float *x, double factor, double *y)
{
    for (int64_t i = 0; i < width; i++) {
        double a = dot(gate + i * hidden, x, hidden);
        double inner = a / (1 + exp(-a)) * dot(up + i * hidden, x, hidden);
        for (int64_t d = 0; d < hidden; d++) {
            y[d] += factor * inner * (double)down[d * width + i];
        }
    }
}

double moe_ref_row(const moe_ref_layer_t *layer, const float *x, double *y)
{
    return moe_ref_row_forced(layer, x, NULL, y);
}

double moe_ref_row_forced(const moe_ref_layer_t *layer, const float *x, const int32_t *expert,
                          double *y)
{
    const ra_moe_shape_t *shape = &layer->shape;
    int64_t hidden = shape->hidden, width = shape->expert_width, experts = shape->router.experts;
    double *logits = calloc((size_t)experts, sizeof(double));
    double *weight = calloc((size_t)experts, sizeof(double));
    for (int64_t e = 0; e < experts; e++) {
        logits[e] = dot(layer->router + e * hidden, x, hidden);
    }
    double gap = moe_ref_route(&shape->router, logits, layer->bias, weight);
    if (expert != NULL && expert[0] >= 0) {
        moe_ref_weigh(&shape->router, logits, expert, weight);
    }
    for (int64_t d = 0; d < hidden; d++) {
        y[d] = 0;
    }
    for (int64_t e = 0; e < experts; e++) {
        int64_t at = e * width * hidden;
        if (weight[e] != 0) {
            feed_forward(layer->gate + at, layer->up + at, layer->down + at, width, hidden, x,
                         weight[e], y);
        }
    }
    feed_forward(layer->shared_gate, layer->shared_up, layer->shared_down, shape->shared_width,
                 hidden, x, 1, y);
    free(logits);
    free(weight);
    return gap;
}
