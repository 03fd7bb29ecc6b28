/*
 * The softmax ring on GPUs against attention in double over whole documents: 1 to 4 ranks, which
 * share a GPU where there are fewer, both kernels, both layouts, packs, windows, prefixes; and the
 * promises about bits. Skips without a GPU.
 */
#include "tests/ring/softmax_ring_case.h"

static const pack_t packs[] = {
    {1, {1}, {{0, 1213}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 803}, {0, 64}, {0, 521}, {0, 3}}},
};

static const pack_t prefixed[] = {
    {1, {1}, {{512, 409}}},
    {3, {5, 6, 8}, {{640, 2}, {0, 530}, {192, 383}}},
};

static void compare_everywhere(ring_case_t c, const pack_t *some, size_t count)
{
    c.gpu = true;
    ring_check_everywhere(c, some, count);
}

static void bf16_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 128, .dtype = RA_BF16, .layers = 3}, packs, 2);
    compare_everywhere((ring_case_t){.dim = 64, .dtype = RA_BF16, .layers = 3}, packs, 2);
}

static void fp32_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 32, .layers = 2}, packs, 2);
    compare_everywhere((ring_case_t){.dim = 48, .full = true}, packs + 1, 1);
}

static void full_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 64, .dtype = RA_BF16, .full = true}, packs, 2);
}

static void blocks_that_go_round_are_exact(void **state)
{
    (void)state;
    skip_without_gpu();
    ring_case_t c = {.dim = 128, .dtype = RA_BF16, .walk = true, .layers = 3};
    compare_everywhere(c, packs, 2);
    compare_everywhere((ring_case_t){.dim = 32, .walk = true, .full = true}, packs + 1, 1);
}

static void some_keys_a_launch_are_exact(void **state)
{
    (void)state;
    skip_without_gpu();
    const int64_t part_keys[] = {64, 200};
    for (size_t p = 0; p < RA_ARRAY_LEN(part_keys); p++) {
        ring_case_t c = {.dim = 128, .dtype = RA_BF16, .layers = 3, .part_keys = part_keys[p]};
        compare_everywhere(c, packs, 2);
        c.walk = true;
        compare_everywhere(c, packs, 1);
    }
    compare_everywhere((ring_case_t){.dim = 64, .dtype = RA_BF16, .part_keys = 100}, prefixed, 2);
    compare_everywhere((ring_case_t){.dim = 32, .full = true, .part_keys = 100}, packs + 1, 1);
}

static void bits_do_not_depend_on_neighbours(void **state)
{
    (void)state;
    skip_without_gpu();
    for (int i = 0; i < 16; i++) {
        ring_case_t c = {.pack = {3, {1, 6, 8}, {{0, 813}, {0, 1526}, {0, 131}}},
                         .gpu = true,
                         .ranks = 1 + i / 4,
                         .dim = 128,
                         .dtype = RA_BF16,
                         .kind = layout_kinds[i % 2],
                         .part_keys = i % 4 / 2 * 100};
        ring_result_t together = ring_case_run(&c);
        for (int64_t d = 0; d < c.pack.count; d++) {
            ring_case_t one = c;
            one.pack = pack_alone(&c.pack, d);
            ring_result_t alone = ring_case_run(&one);
            ring_check_same_bits(&alone, 0, &together);
            ring_result_free(&alone);
        }
        ring_result_free(&together);
    }
}

static void windows_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    int64_t windows[] = {1, 100, 700};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        ring_case_t c = {.dim = 64, .dtype = RA_BF16, .window = windows[w], .layers = 2};
        compare_everywhere(c, packs + 1, 1);
        compare_everywhere(c, prefixed + 1, 1);
    }
    compare_everywhere((ring_case_t){.dim = 32, .window = 100}, prefixed, 2);
}

static void cached_prefixes_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 128, .dtype = RA_BF16, .layers = 2}, prefixed, 2);
    compare_everywhere((ring_case_t){.dim = 32}, prefixed, 2);
}

static void reproducible_attention_is_exact_too(void **state)
{
    (void)state;
    skip_without_gpu();
    ring_case_t c = {.dim = 64, .dtype = RA_BF16, .reproducible = true};
    compare_everywhere(c, packs + 1, 1);
    c.window = 100;
    compare_everywhere(c, prefixed, 2);
}

static void check_reproducible(ring_case_t whole)
{
    whole.gpu = true;
    whole.ranks = 1;
    whole.reproducible = true;
    whole.pack = (pack_t){3, {1, 6, 8}, {{0, 813}, {0, 526}, {0, 131}}};
    const pack_t others[] = {
        whole.pack,
        {1, {6}, {{0, 526}}},
        {3, {8, 1, 6}, {{64, 67}, {320, 493}, {512, 14}}},
    };
    ring_result_t want = ring_case_run(&whole);
    for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
        for (int ranks = 1; ranks <= 4; ranks++) {
            ring_case_t c = whole;
            c.pack = others[p];
            c.ranks = ranks;
            ring_result_t got = ring_case_run(&c);
            for (int64_t d = 0; d < c.pack.count; d++) {
                ring_check_same_bits(&got, d, &want);
            }
            ring_result_free(&got);
        }
    }
    ring_result_free(&want);
}

static void reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix(void **state)
{
    (void)state;
    skip_without_gpu();
    const int64_t windows[] = {0, 100};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        check_reproducible((ring_case_t){.dim = 128, .dtype = RA_BF16, .window = windows[w]});
        check_reproducible((ring_case_t){.dim = 64, .dtype = RA_BF16, .window = windows[w]});
        check_reproducible((ring_case_t){.dim = 32, .window = windows[w]});
    }
}

static void rings_over_nccl_are_exact(void **state)
{
    (void)state;
    skip_without_gpus(2);
    const pack_t some[] = {packs[0], packs[1], prefixed[1]};
    for (size_t p = 0; p < RA_ARRAY_LEN(some); p++) {
        for (int i = 0; i < 6; i++) {
            ring_case_t c = {.pack = some[p],
                             .gpu = true,
                             .ranks = 2,
                             .dim = 64,
                             .kind = layout_kinds[i % 2],
                             .dtype = RA_BF16,
                             .window = i / 2 == 1 ? 100 : 0,
                             .walk = i / 2 == 2,
                             .part_keys = i == 1 ? 150 : 0,
                             .transport = "nccl",
                             .layers = 3};
            double *want = ring_oracle(&c);
            ring_result_t result = ring_case_run(&c);
            ring_check_near(&result, want);
            ring_result_free(&result);
            free(want);
        }
    }
}

static void a_missing_rank_ends_the_ring_on_all_others(void **state)
{
    (void)state;
    skip_without_gpu();
    const pack_t tries[] = {{1, {1}, {{0, 1024}}}, {1, {1}, {{1024, 1024}}}};
    for (int i = 0; i < 4; i++) {
        ring_case_t c = {.pack = tries[i % 2],
                         .gpu = true,
                         .ranks = 3,
                         .dim = 64,
                         .dtype = RA_BF16,
                         .kind = RA_LAYOUT_ZIGZAG,
                         .window = i / 2 == 1 ? 900 : 0};
        ring_result_t result = ring_result_make(&c);
        assert_int_equal(ring_ranks_run(&result, ring_rank_run_but_2), RA_ERR_INPUT);
        ring_result_free(&result);
    }
    ra_log_set_quiet(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_attention_is_exact_on_any_ring),
        cmocka_unit_test(fp32_attention_is_exact_on_any_ring),
        cmocka_unit_test(full_attention_is_exact_on_any_ring),
        cmocka_unit_test(blocks_that_go_round_are_exact),
        cmocka_unit_test(some_keys_a_launch_are_exact),
        cmocka_unit_test(bits_do_not_depend_on_neighbours),
        cmocka_unit_test(windows_are_exact_on_any_ring),
        cmocka_unit_test(cached_prefixes_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_attention_is_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix),
        cmocka_unit_test(rings_over_nccl_are_exact),
        cmocka_unit_test(a_missing_rank_ends_the_ring_on_all_others),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
