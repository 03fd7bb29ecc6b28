/* The router's CUDA kernels against the CPU router. */
#include "moe/experts_cuda.h"
#include "tests/cuda_support.h"
#include "tests/moe/random_replay.h"
#include <string.h>

static const ra_router_t routers[] = {{256, 8, 8, 4, true, 2.5F}, {16, 4, 4, 2, true, 2.5F},
                                      {8, 2, 8, 3, true, 1},      {6, 6, 1, 1, false, 0.5F},
                                      {5, 1, 1, 1, true, 1},      {384, 12, 3, 2, true, 1},
                                      {4096, 64, 64, 9, true, 1}, {100, 7, 50, 20, false, 2.5F}};

/* Logits of every kind: spread, coarse (many ties), huge, infinite, NaN. */
static float some_logit(uint64_t *seed, int64_t row)
{
    float x = test_random(seed, -6, 6);
    switch (row % 8) {
    case 1:
        return roundf(x);
    case 2:
        return 0;
    case 3:
        return x * 30;
    case 4:
        return test_random(seed, 0, 1) < 0.01F ? NAN : x;
    case 5:
        return test_random(seed, 0, 1) < 0.2F ? INFINITY : roundf(x) / 2;
    case 6:
        return test_random(seed, 0, 1) < 0.7F ? -INFINITY : x;
    default:
        return x;
    }
}

static void assert_same_choices(const ra_router_t *router, int64_t rows, const int32_t *expert,
                                const float *weight, const int32_t *want_expert,
                                const float *want_weight)
{
    const int64_t k = router->top_k;
    for (int64_t i = 0; i < rows * k; i++) {
        bool nan = isnan(want_weight[i]) && isnan(weight[i]);
        if (expert[i] != want_expert[i] || (!nan && memcmp(weight + i, want_weight + i, 4) != 0)) {
            fail_msg("%d experts, row %d slot %d: expert %d weight %.9g, CPU %d %.9g",
                     router->experts, (int)(i / k), (int)(i % k), expert[i], (double)weight[i],
                     want_expert[i], (double)want_weight[i]);
        }
    }
}

static void compare_choices(const ra_router_t *router, bool with_bias)
{
    const int64_t rows = 400, experts = router->experts, k = router->top_k;
    uint64_t seed = 3;
    float *logits = malloc((size_t)(rows * experts) * 4), *bias = malloc((size_t)experts * 4);
    for (int64_t i = 0; i < rows * experts; i++) {
        logits[i] = some_logit(&seed, i / experts);
    }
    test_fill(bias, experts, &seed, -0.2F, 0.1F);
    size_t slot_bytes = (size_t)(rows * k) * 4;
    int32_t *want_expert = malloc(slot_bytes);
    float *want_weight = malloc(slot_bytes), *want_gap = malloc((size_t)rows * 4);
    ra_router_select(router, rows, logits, with_bias ? bias : NULL, want_expert, want_weight,
                     want_gap);
    float *d_logits = device_array((size_t)(rows * experts) * 4, logits);
    float *d_bias = device_array((size_t)experts * 4, bias);
    int32_t *expert = device_array(slot_bytes, NULL);
    float *weight = device_array(slot_bytes, NULL), *gap = device_array((size_t)rows * 4, NULL);
    assert_int_equal(ra_moe_cuda_select(router, rows, d_logits, with_bias ? d_bias : NULL, expert,
                                        weight, gap, NULL),
                     RA_OK);
    expert = host_array(expert, slot_bytes);
    weight = host_array(weight, slot_bytes);
    gap = host_array(gap, (size_t)rows * 4);
    assert_same_choices(router, rows, expert, weight, want_expert, want_weight);
    for (int64_t r = 0; r < rows; r++) {
        if (!(gap[r] == want_gap[r])) {
            fail_msg("%d experts, gap of row %d: %.9g, CPU %.9g", router->experts, (int)r,
                     (double)gap[r], (double)want_gap[r]);
        }
    }
    cudaFree(d_logits);
    cudaFree(d_bias);
    free(logits);
    free(bias);
    free(want_expert);
    free(want_weight);
    free(want_gap);
    free(expert);
    free(weight);
    free(gap);
}

static void choices_and_weights_are_those_of_the_cpu_bit_for_bit(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t i = 0; i < sizeof(routers) / sizeof(routers[0]); i++) {
        compare_choices(&routers[i], false);
        compare_choices(&routers[i], true);
    }
}

/* Select, then replay, on both. @param arrays  1: forced, 2: chosen. */
static void compare_replay(const ra_router_t *router, int arrays)
{
    const int64_t rows = 400, experts = router->experts, k = router->top_k;
    const size_t slot_bytes = (size_t)(rows * k) * 4;
    uint64_t seed = 3;
    ra_router_replay_t all = random_replay_create(router, rows), here = all, there = all;
    const size_t replay_bytes = random_replay_bytes(&all, rows);
    float *logits = malloc((size_t)(rows * experts) * 4), *want_weight = malloc(slot_bytes);
    int32_t *want_expert = malloc(slot_bytes);
    for (int64_t i = 0; i < rows * experts; i++) {
        logits[i] = some_logit(&seed, i / experts);
    }
    float *d_logits = device_array((size_t)(rows * experts) * 4, logits);
    float *weight = device_array(slot_bytes, NULL);
    int32_t *expert = device_array(slot_bytes, NULL),
            *forced = device_array(replay_bytes, all.forced);
    int32_t *chosen = device_array(replay_bytes, all.chosen);
    here.forced = arrays & 1 ? all.forced : NULL;
    here.chosen = arrays & 2 ? all.chosen : NULL;
    there.forced = arrays & 1 ? forced : NULL;
    there.chosen = arrays & 2 ? chosen : NULL;
    ra_router_select(router, rows, logits, NULL, want_expert, want_weight, NULL);
    ra_router_replay(router, &here, rows, logits, want_expert, want_weight);
    assert_int_equal(ra_moe_cuda_select(router, rows, d_logits, NULL, expert, weight, NULL, NULL),
                     RA_OK);
    assert_int_equal(ra_moe_cuda_replay(router, &there, rows, d_logits, expert, weight, NULL),
                     RA_OK);
    expert = host_array(expert, slot_bytes);
    weight = host_array(weight, slot_bytes);
    chosen = host_array(chosen, replay_bytes);
    assert_same_choices(router, rows, expert, weight, want_expert, want_weight);
    assert_memory_equal(chosen, all.chosen, replay_bytes);
    cudaFree(d_logits);
    cudaFree(forced);
    random_replay_destroy(&all);
    free(logits);
    free(want_expert);
    free(want_weight);
    free(expert);
    free(weight);
    free(chosen);
}

static void replayed_choices_and_weights_are_those_of_the_cpu_bit_for_bit(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t i = 0; i < sizeof(routers) / sizeof(routers[0]); i++) {
        for (int arrays = 0; arrays < 4; arrays++) {
            compare_replay(&routers[i], arrays);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(choices_and_weights_are_those_of_the_cpu_bit_for_bit),
        cmocka_unit_test(replayed_choices_and_weights_are_those_of_the_cpu_bit_for_bit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
