/*
 * The state scan against the recurrence in double over whole documents: packs, layouts, rank
 * counts, continuation, final states; and the promises about bits.
 */
#include "tests/ring/state_scan_case.h"

static const pack_t packs[] = {
    {1, {1}, {{0, 237}}},
    {1, {2}, {{0, 1}}},
    {2, {3, 4}, {{48, 129}, {0, 77}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {16, 16}, {32, 131}, {0, 3}}},
};

static void compare_everywhere(scan_case_t c)
{
    scan_check_everywhere(c, packs, RA_ARRAY_LEN(packs));
}

static void constant_decay_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){0});
    compare_everywhere((scan_case_t){.at_tile = true, .transport = "local-copy"});
    compare_everywhere((scan_case_t){.at_tile = true, .transport = "local-order"});
}

static void decay_per_token_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.per_token = true});
}

static void output_may_replace_values(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.over_v = true, .at_tile = true});
    compare_everywhere((scan_case_t){.over_v = true, .reproducible = true});
}

static void a_plan_serves_many_layers(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.layers = 3});
    compare_everywhere((scan_case_t){.layers = 3, .reproducible = true});
}

static void reproducible_scans_are_exact_too(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.reproducible = true, .per_token = true});
    compare_everywhere((scan_case_t){.reproducible = true, .at_tile = true});
}

static void reproducible_bits_do_not_depend_on_ranks_or_neighbours(void **state)
{
    (void)state;
    for (int per_token = 0; per_token < 2; per_token++) {
        scan_case_t whole = {.ranks = 1, .reproducible = true, .per_token = per_token};
        whole.pack = (pack_t){3, {1, 6, 8}, {{0, 237}, {0, 226}, {32, 131}}};
        scan_result_t want = scan_case_run(&whole);
        const pack_t others[] = {
            whole.pack, {1, {6}, {{0, 226}}}, {3, {8, 2, 1}, {{32, 131}, {0, 5}, {0, 237}}}};
        for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
            for (int ranks = 1; ranks <= 8; ranks++) {
                scan_case_t c = whole;
                c.pack = others[p];
                c.ranks = ranks;
                const char *transports[] = {"local-copy", "local", "local-order"};
                c.transport = transports[ranks % 3];
                scan_result_t got = scan_case_run(&c);
                for (int64_t d = 0; d < c.pack.count; d++) {
                    if (c.pack.name[d] != 2) {
                        scan_check_same_bits(&got, d, &want);
                    }
                }
                scan_result_free(&got);
            }
        }
        scan_result_free(&want);
    }
}

static void a_continued_document_has_the_bits_of_one_go(void **state)
{
    (void)state;
    scan_case_t whole = {.ranks = 1, .reproducible = true};
    whole.pack = (pack_t){2, {1, 6}, {{0, 237}, {0, 226}}};
    scan_result_t want = scan_case_run(&whole);
    const int64_t cuts[][2] = {{1, 15}, {16, 17}, {112, 208}, {236, 225}};
    for (size_t i = 0; i < RA_ARRAY_LEN(cuts); i++) {
        for (int ranks = 1; ranks <= 7; ranks += 2) {
            scan_case_t head = {.ranks = ranks, .reproducible = true, .at_tile = true};
            head.pack = (pack_t){2, {1, 6}, {{0, cuts[i][0]}, {0, cuts[i][1]}}};
            scan_result_t before = scan_case_run(&head);
            scan_case_t tail = {.ranks = 8 - ranks, .reproducible = true, .before = &before};
            tail.pack = whole.pack;
            for (int64_t d = 0; d < 2; d++) {
                int64_t cached = cuts[i][d] / scan_case_tile(&tail) * scan_case_tile(&tail);
                tail.pack.documents[d].first = cached;
                tail.pack.documents[d].count -= cached;
            }
            scan_result_t got = scan_case_run(&tail);
            for (int64_t d = 0; d < 2; d++) {
                scan_check_same_bits(&got, d, &want);
            }
            scan_result_free(&got);
            scan_result_free(&before);
        }
    }
    scan_result_free(&want);
}

static void bits_never_depend_on_neighbours(void **state)
{
    (void)state;
    for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
        for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
            scan_case_t many = {.ranks = rank_counts[n], .kind = layout_kinds[k], .pack = packs[3]};
            scan_result_t want = scan_case_run(&many);
            for (int64_t d = 0; d < many.pack.count; d++) {
                scan_case_t alone = many;
                alone.pack = pack_alone(&many.pack, d);
                scan_result_t got = scan_case_run(&alone);
                scan_check_same_bits(&got, 0, &want);
                scan_result_free(&got);
            }
            scan_result_free(&want);
        }
    }
}

static void ranks_that_share_a_pool_get_the_same_bits(void **state)
{
    (void)state;
    ra_pool_t *pool = NULL;
    assert_int_equal(ra_pool_create(3, &pool), RA_OK);
    for (int reproducible = 0; reproducible < 2; reproducible++) {
        scan_case_t c = {.pack = packs[3], .ranks = 4, .reproducible = reproducible, .layers = 2};
        scan_result_t want = scan_case_run(&c);
        scan_case_t shared = c;
        shared.pool = pool;
        scan_result_t got = scan_case_run(&shared);
        for (int64_t d = 0; d < c.pack.count; d++) {
            scan_check_same_bits(&got, d, &want);
        }
        scan_result_free(&want);
        scan_result_free(&got);
    }
    ra_pool_destroy(pool);
}

static void whole_documents_exchange_nothing(void **state)
{
    (void)state;
    scan_case_t c = {.pack = {4, {1, 2, 3, 4}, {{0, 60}, {0, 50}, {0, 40}, {0, 64}}}, .ranks = 4};
    scan_result_t result = scan_case_run(&c);
    assert_int_equal(result.received_bytes, 0);
    scan_result_free(&result);
}

static ra_status_t fail_half_way(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 1) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 1 does not take part");
    }
    ra_status_t status = scan_rank_run(comm, stream, arg);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_missing_rank_ends_the_scan_on_all_others(void **state)
{
    (void)state;
    for (int reproducible = 0; reproducible < 2; reproducible++) {
        scan_case_t c = {
            .pack = {1, {1}, {{0, 256}}}, .ranks = 4, .reproducible = reproducible == 1};
        scan_result_t result = scan_result_make(&c);
        assert_int_equal(scan_ranks_run(&result, fail_half_way), RA_ERR_INPUT);
        scan_result_free(&result);
    }
}

static ra_status_t make_bad_plans(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    ra_document_t document = {0, 100};
    ra_layout_t *zigzag = NULL;
    RA_TRY(ra_layout_create(&document, 1, 16, 2, RA_LAYOUT_ZIGZAG, &zigzag));
    ra_state_scan_params_t good = {.layout = zigzag, .heads = 2, .key_dim = 32, .value_dim = 32};
    ra_state_scan_params_t bad[] = {good, good, good};
    ra_status_t want[] = {RA_ERR_UNSUPPORTED, RA_ERR_INVALID, RA_ERR_UNSUPPORTED};
    bad[0].reproducible = true;
    bad[1].key_dim = 0;
    bad[2].kernel = "abacus";
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        ra_state_scan_t *plan = NULL;
        RANK_CHECK(comm, ra_state_scan_create(comm, stream, &bad[i], &plan) == want[i]);
        RANK_CHECK(comm, plan == NULL);
    }
    ra_layout_destroy(zigzag);
    return RA_OK;
}

static void plans_that_cannot_work_are_refused(void **state)
{
    (void)state;
    assert_int_equal(cpu_ranks_run("local", 2, NULL, make_bad_plans, NULL), RA_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(constant_decay_is_exact_on_any_ring),
        cmocka_unit_test(decay_per_token_is_exact_on_any_ring),
        cmocka_unit_test(output_may_replace_values),
        cmocka_unit_test(a_plan_serves_many_layers),
        cmocka_unit_test(reproducible_scans_are_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_or_neighbours),
        cmocka_unit_test(a_continued_document_has_the_bits_of_one_go),
        cmocka_unit_test(bits_never_depend_on_neighbours),
        cmocka_unit_test(ranks_that_share_a_pool_get_the_same_bits),
        cmocka_unit_test(whole_documents_exchange_nothing),
        cmocka_unit_test(a_missing_rank_ends_the_scan_on_all_others),
        cmocka_unit_test(plans_that_cannot_work_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
