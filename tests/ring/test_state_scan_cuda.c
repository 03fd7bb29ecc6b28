/*
 * The state scan on GPUs against the recurrence in double over whole documents: 1 to 4 ranks, which
 * share a GPU where there are fewer, both kernels and layouts, continued documents, final states;
 * and the promises about bits. Skips without a GPU.
 */
#include "tests/ring/state_scan_case.h"

static const pack_t packs[] = {
    {1, {1}, {{0, 1013}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 526}, {64, 64}, {128, 331}, {0, 3}}},
};

static void compare_everywhere(scan_case_t c)
{
    c.gpu = true;
    scan_check_everywhere(c, packs, RA_ARRAY_LEN(packs));
}

static void bf16_scans_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .layers = 3});
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .at_tile = true});
}

static void fp32_scans_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 32, .layers = 2});
    compare_everywhere((scan_case_t){.dim = 32, .at_tile = true, .over_v = true});
}

static void reproducible_scans_are_exact_too(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .reproducible = true});
    compare_everywhere((scan_case_t){
        .dim = 64, .dtype = RA_BF16, .reproducible = true, .at_tile = true, .over_v = true});
    compare_everywhere((scan_case_t){.dim = 32, .reproducible = true, .layers = 2});
}

static void reproducible_bits_do_not_depend_on_ranks(void **state)
{
    (void)state;
    skip_without_gpu();
    for (int i = 0; i < 2; i++) {
        scan_case_t c = {.gpu = true,
                         .dim = i == 0 ? 64 : 32,
                         .dtype = i == 0 ? RA_BF16 : RA_F32,
                         .pack = packs[1],
                         .reproducible = true,
                         .ranks = 1};
        scan_case_t one = c;
        scan_result_t want = scan_case_run(&one);
        for (c.ranks = 2; c.ranks <= 4; c.ranks++) {
            scan_result_t got = scan_case_run(&c);
            for (int64_t d = 0; d < c.pack.count; d++) {
                scan_check_same_bits(&got, d, &want);
            }
            scan_result_free(&got);
        }
        scan_result_free(&want);
    }
}

static void scans_over_nccl_are_exact(void **state)
{
    (void)state;
    skip_without_gpus(2);
    for (int i = 0; i < 3; i++) {
        scan_case_t c = {.pack = packs[1],
                         .gpu = true,
                         .ranks = 2,
                         .dim = 64,
                         .dtype = RA_BF16,
                         .kind = layout_kinds[i % 2],
                         .reproducible = i == 2,
                         .transport = "nccl",
                         .layers = 2};
        double *want = scan_oracle(&c);
        scan_result_t result = scan_case_run(&c);
        scan_check_near(&result, want);
        scan_result_free(&result);
        free(want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_scans_are_exact_on_any_ring),
        cmocka_unit_test(fp32_scans_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_scans_are_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks),
        cmocka_unit_test(scans_over_nccl_are_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
