#include "base/cpu_isa.h"
#include "moe/router.h"
#include "tests/moe/moe_ref.h"
#include "tests/moe/random_replay.h"
#include "tests/test_support.h"
#include <stdlib.h>
#include <string.h>

enum { MAX_EXPERTS = 256, MAX_TOP_K = 8 };

static const ra_router_t routers[] = {
    {16, 4, 4, 2, true, 2.5F}, {32, 8, 8, 4, true, 2.5F},  {8, 2, 1, 1, true, 1},
    {8, 2, 8, 3, true, 1},     {256, 8, 8, 4, true, 2.5F}, {6, 6, 1, 1, false, 0.5F},
    {5, 1, 1, 1, true, 1},     {8, 4, 4, 2, true, 1},
};

static void route(const ra_router_t *router, const float *logits, const float *bias,
                  int32_t *expert, float *weight, float *gap)
{
    memset(expert, 0x7f, (size_t)router->top_k * sizeof(*expert));
    test_poison(weight, router->top_k);
    test_poison(gap, 1);
    ra_router_select(router, 1, logits, bias, expert, weight, gap);
    for (int32_t j = 1; j < router->top_k; j++) {
        assert_true(expert[j] > expert[j - 1]);
    }
    assert_true(expert[0] >= 0 && expert[router->top_k - 1] < router->experts);
}

/* Near a tie fp32 may choose otherwise than double; such rows are counted, not compared. */
static void compare(const ra_router_t *router, float low_bias, float high_bias)
{
    uint64_t seed = 7;
    int rows = 200, compared = 0;
    for (int row = 0; row < rows; row++) {
        float logits[MAX_EXPERTS], bias[MAX_EXPERTS], weight[MAX_TOP_K], gap;
        double wide[MAX_EXPERTS], want[MAX_EXPERTS];
        int32_t expert[MAX_TOP_K];
        test_fill(logits, router->experts, &seed, -4, 4);
        test_fill(bias, router->experts, &seed, low_bias, high_bias);
        for (int e = 0; e < router->experts; e++) {
            wide[e] = (double)logits[e];
        }
        double want_gap = moe_ref_route(router, wide, bias, want);
        route(router, logits, bias, expert, weight, &gap);
        if (want_gap < 2e-6) {
            continue;
        }
        compared++;
        for (int j = 0; j < router->top_k; j++) {
            /* a chosen expert has a positive weight in the oracle; a few fp32 roundings */
            assert_true(want[expert[j]] > 0);
            assert_true(fabs((double)weight[j] - want[expert[j]]) <= 1e-6 * want[expert[j]] + 1e-9);
        }
        assert_true((isinf(want_gap) && isinf(gap)) || fabs((double)gap - want_gap) < 1e-6);
    }
    assert_true(compared > rows * 9 / 10);
}

static void choices_and_weights_equal_the_oracle(void **unused)
{
    (void)unused;
    ra_cpu_isa_t best = ra_cpu_isa();
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        for (size_t i = 0; i < sizeof(routers) / sizeof(routers[0]); i++) {
            assert_int_equal(ra_router_check(&routers[i]), RA_OK);
            compare(&routers[i], 0, 0);
            compare(&routers[i], -0.2F, 0.2F);
            compare(&routers[i], -3, -2); /* all scores for choosing are negative */
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static void ties_go_to_the_lowest_index(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof(routers) / sizeof(routers[0]); i++) {
        float logits[MAX_EXPERTS] = {0}, weight[MAX_TOP_K], gap;
        int32_t expert[MAX_TOP_K];
        route(&routers[i], logits, NULL, expert, weight, &gap);
        for (int j = 0; j < routers[i].top_k; j++) {
            assert_int_equal(expert[j], j);
        }
        bool all = routers[i].top_k == routers[i].experts;
        assert_true(all ? isinf(gap) : gap == 0);
    }
    /* groups 0 and 2 tie for the last place behind group 3 */
    ra_router_t router = {8, 2, 4, 2, true, 1};
    float logits[8] = {0, 1, -INFINITY, 3, 1, 0, 2, 2}, weight[2], gap;
    float bias[8] = {0};
    int32_t expert[2];
    route(&router, logits, bias, expert, weight, &gap);
    assert_int_equal(expert[0], 6);
    assert_int_equal(expert[1], 7);
    assert_true(gap == 0);
}

static void a_group_outside_the_limit_is_never_chosen(void **unused)
{
    (void)unused;
    /* expert 0 is the best of all but its group has no second; bias makes every score negative */
    ra_router_t router = {8, 2, 2, 1, true, 1};
    float logits[8] = {9, -9, -9, -9, 2, 2, 2, 2}, weight[2], gap;
    float bias[8] = {-5, -5, -5, -5, -5, -5, -5, -5};
    int32_t expert[2];
    route(&router, logits, bias, expert, weight, &gap);
    assert_int_equal(expert[0], 4);
    assert_int_equal(expert[1], 5);
    assert_true(weight[0] == 0.5F && weight[1] == 0.5F);
}

static void a_nan_logit_is_chosen_last_and_seen_in_the_weights(void **unused)
{
    (void)unused;
    ra_router_t router = {8, 2, 1, 1, true, 1};
    float logits[8] = {NAN, -2, -3, -4, -5, -6, -7, -8}, weight[2], gap;
    int32_t expert[2];
    route(&router, logits, NULL, expert, weight, &gap);
    assert_int_equal(expert[0], 1);
    assert_int_equal(expert[1], 2);
    assert_true(isnan(weight[0]) && isnan(weight[1]) && gap == 0);
    for (int e = 0; e < 8; e++) {
        logits[e] = NAN;
    }
    route(&router, logits, NULL, expert, weight, &gap);
    assert_int_equal(expert[0], 0);
    assert_int_equal(expert[1], 1);
    assert_true(isnan(weight[0]) && gap == 0);
}

static void infinite_logits_are_ordinary(void **unused)
{
    (void)unused;
    ra_router_t router = {4, 2, 1, 1, true, 1};
    float logits[4] = {-INFINITY, INFINITY, 0, -INFINITY}, weight[2], gap;
    int32_t expert[2];
    route(&router, logits, NULL, expert, weight, &gap);
    assert_int_equal(expert[0], 1);
    assert_int_equal(expert[1], 2);
    assert_true(fabsf(weight[0] - 2.0F / 3) < 1e-6F && fabsf(weight[1] - 1.0F / 3) < 1e-6F);
}

enum { REPLAY_ROWS = 60 };

/* One router on rows of which every fourth has a NaN logit and every third is not forced. */
static void replay(const ra_router_t *router)
{
    static float logits[REPLAY_ROWS * MAX_EXPERTS];
    const int32_t k = router->top_k, experts = router->experts;
    int32_t own[REPLAY_ROWS * MAX_TOP_K], expert[REPLAY_ROWS * MAX_TOP_K];
    float own_weight[REPLAY_ROWS * MAX_TOP_K], weight[REPLAY_ROWS * MAX_TOP_K];
    ra_router_replay_t both = random_replay_create(router, REPLAY_ROWS);
    uint64_t seed = 21;
    test_fill(logits, REPLAY_ROWS * experts, &seed, -4, 4);
    for (int row = 3; row < REPLAY_ROWS; row += 4) {
        logits[row * experts + row % experts] = NAN;
    }
    ra_router_select(router, REPLAY_ROWS, logits, NULL, own, own_weight, NULL);
    memcpy(expert, own, sizeof(own));
    memcpy(weight, own_weight, sizeof(weight));
    ra_router_replay(router, &both, REPLAY_ROWS, logits, expert, weight);
    for (int64_t row = 0; row < REPLAY_ROWS; row++) {
        bool forced = row % 3 != 2, has_nan = row % 4 == 3;
        double wide[MAX_EXPERTS], want[MAX_EXPERTS];
        const int32_t *ran = forced ? both.forced + row * both.stride : own + row * k;
        const int32_t *chosen = both.chosen + row * both.stride;
        for (int e = 0; e < experts; e++) {
            wide[e] = (double)logits[row * experts + e];
        }
        moe_ref_weigh(router, wide, ran, want);
        assert_memory_equal(chosen, own + row * k, (size_t)k * sizeof(*own));
        assert_int_equal(chosen[k], 0x7f7f7f7f); /* nothing beyond the row is written */
        assert_memory_equal(expert + row * k, ran, (size_t)k * sizeof(*ran));
        for (int32_t j = 0; j < k; j++) {
            double w = (double)weight[row * k + j];
            assert_true(has_nan ? isnan(w) : fabs(w - want[ran[j]]) <= 1e-6 * want[ran[j]]);
        }
    }
    random_replay_destroy(&both);
    /* The own choice forced: the same bits. */
    ra_router_replay_t again = {.forced = own, .stride = k};
    memcpy(weight, own_weight, sizeof(weight));
    ra_router_replay(router, &again, REPLAY_ROWS, logits, expert, weight);
    for (int64_t i = 0; i < REPLAY_ROWS * k; i++) {
        bool nan = isnan(weight[i]) && isnan(own_weight[i]);
        assert_true(expert[i] == own[i] && (nan || weight[i] == own_weight[i]));
    }
}

static void forced_experts_get_the_weights_of_the_oracle(void **unused)
{
    (void)unused;
    ra_cpu_isa_t best = ra_cpu_isa();
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        for (size_t i = 0; i < sizeof(routers) / sizeof(routers[0]); i++) {
            replay(&routers[i]);
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static void impossible_routers_are_refused(void **unused)
{
    (void)unused;
    static const ra_router_t bad[] = {
        {0, 1, 1, 1, true, 1}, {8, 0, 1, 1, true, 1}, {8, 9, 1, 1, true, 1},
        {8, 2, 3, 1, true, 1}, {8, 2, 4, 5, true, 1}, {8, 2, 4, 0, true, 1},
        {8, 3, 4, 1, true, 1}, {8, 2, 0, 1, true, 1}, {1 << 20, 2, 1, 1, true, 1},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        assert_int_equal(ra_router_check(&bad[i]), RA_ERR_SHAPE);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(choices_and_weights_equal_the_oracle),
        cmocka_unit_test(ties_go_to_the_lowest_index),
        cmocka_unit_test(a_group_outside_the_limit_is_never_chosen),
        cmocka_unit_test(a_nan_logit_is_chosen_last_and_seen_in_the_weights),
        cmocka_unit_test(infinite_logits_are_ordinary),
        cmocka_unit_test(forced_experts_get_the_weights_of_the_oracle),
        cmocka_unit_test(impossible_routers_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
