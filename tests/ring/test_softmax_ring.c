/*
 * The softmax ring against attention in double over whole documents: packs, layouts, rank counts,
 * windows, prefixes, both kinds of transport; and the promises about bits.
 */
#include "tests/ring/softmax_ring_case.h"

static const pack_t packs[] = {
    {1, {1}, {{0, 237}}},
    {1, {2}, {{0, 1}}},
    {2, {3, 4}, {{0, 129}, {0, 77}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {0, 16}, {0, 131}, {0, 3}}},
};

static const pack_t prefixed[] = {
    {1, {1}, {{128, 109}}},
    {1, {1}, {{16, 221}}},
    {3, {5, 6, 8}, {{224, 2}, {0, 130}, {48, 83}}},
};

static void causal_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    ring_check_everywhere((ring_case_t){0}, packs, RA_ARRAY_LEN(packs));
}

static void a_plan_serves_many_layers_and_copying_transports(void **state)
{
    (void)state;
    const char *transports[] = {"local-copy", "local-order"};
    for (int i = 0; i < 2; i++) {
        ring_case_t c = {.transport = transports[i], .layers = 2};
        ring_check_everywhere(c, packs + 2, 2);
        ring_check_everywhere(c, prefixed, RA_ARRAY_LEN(prefixed));
    }
}

static void full_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    ring_check_everywhere((ring_case_t){.full = true}, packs, RA_ARRAY_LEN(packs));
    ring_check_everywhere((ring_case_t){.full = true}, prefixed, 1);
}

static void windows_of_any_size_are_exact_on_any_ring(void **state)
{
    (void)state;
    int64_t windows[] = {1, 17, 100};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        ring_check_everywhere((ring_case_t){.window = windows[w]}, packs + 2, 2);
        ring_check_everywhere((ring_case_t){.window = windows[w]}, prefixed,
                              RA_ARRAY_LEN(prefixed));
    }
}

static void cached_prefixes_are_exact_on_any_ring(void **state)
{
    (void)state;
    ring_check_everywhere((ring_case_t){0}, prefixed, RA_ARRAY_LEN(prefixed));
}

static void reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 17, 40};
    const char *transports[] = {"local-copy", "local", "local-order"};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        ring_case_t whole = {.ranks = 1, .window = windows[w], .reproducible = true};
        whole.pack = (pack_t){3, {1, 6, 8}, {{0, 237}, {0, 226}, {0, 131}}};
        ring_result_t want = ring_case_run(&whole);
        const pack_t others[] = {
            {3, {1, 6, 8}, {{0, 237}, {0, 226}, {0, 131}}},
            {1, {6}, {{0, 226}}},
            {3, {8, 1, 6}, {{112, 19}, {16, 221}, {208, 18}}},
            {2, {6, 1}, {{64, 162}, {224, 13}}},
        };
        for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
            for (int ranks = 1; ranks <= 8; ranks += ranks < 4 ? 1 : 2) {
                ring_case_t c = {.pack = others[p],
                                 .ranks = ranks,
                                 .window = windows[w],
                                 .reproducible = true,
                                 .transport = transports[ranks % 3]};
                ring_result_t got = ring_case_run(&c);
                for (int64_t d = 0; d < c.pack.count; d++) {
                    ring_check_same_bits(&got, d, &want);
                }
                ring_result_free(&got);
            }
        }
        ring_result_free(&want);
    }
}

static void bits_never_depend_on_neighbours(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 40};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
            for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
                ring_case_t many = {.ranks = rank_counts[n], .kind = layout_kinds[k]};
                many.window = windows[w];
                many.pack =
                    (pack_t){5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {0, 16}, {32, 99}, {0, 3}}};
                ring_result_t want = ring_case_run(&many);
                for (int64_t d = 0; d < many.pack.count; d++) {
                    ring_case_t alone = many;
                    alone.pack = pack_alone(&many.pack, d);
                    ring_result_t got = ring_case_run(&alone);
                    ring_check_same_bits(&got, 0, &want);
                    ring_result_free(&got);
                }
                ring_result_free(&want);
            }
        }
    }
}

static void ranks_that_share_a_pool_get_the_same_bits(void **state)
{
    (void)state;
    ra_pool_t *pool = NULL;
    assert_int_equal(ra_pool_create(3, &pool), RA_OK);
    for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
        ring_case_t c = {.pack = packs[3], .ranks = 4, .kind = layout_kinds[k], .layers = 2};
        ring_result_t want = ring_case_run(&c);
        ring_case_t shared = c;
        shared.pool = pool;
        ring_result_t got = ring_case_run(&shared);
        for (int64_t d = 0; d < c.pack.count; d++) {
            ring_check_same_bits(&got, d, &want);
        }
        ring_result_free(&want);
        ring_result_free(&got);
    }
    ra_pool_destroy(pool);
}

static void whole_documents_exchange_nothing(void **state)
{
    (void)state;
    ring_case_t c = {.pack = {4, {1, 2, 3, 4}, {{0, 60}, {0, 50}, {0, 40}, {0, 64}}}, .ranks = 4};
    ring_result_t result = ring_case_run(&c);
    assert_int_equal(result.received_bytes, 0);
    ring_result_free(&result);
    c.pack = (pack_t){1, {1}, {{0, 256}}};
    result = ring_case_run(&c);
    assert_int_equal(result.received_bytes, 3 * 2 * 64 * RING_KV_HEADS * 32 * 4);
    ring_result_free(&result);
}

static void a_missing_rank_ends_the_ring_on_all_others(void **state)
{
    (void)state;
    const char *transports[] = {"local", "local-copy", "local-order"};
    const pack_t tries[] = {{1, {1}, {{0, 256}}}, {1, {1}, {{256, 256}}}};
    for (int i = 0; i < 12; i++) {
        ring_case_t c = {.pack = tries[i % 2],
                         .ranks = 4,
                         .window = i / 2 % 2 ? 100 : 0,
                         .transport = transports[i / 4]};
        ring_result_t result = ring_result_make(&c);
        assert_int_equal(ring_ranks_run(&result, ring_rank_run_but_2), RA_ERR_INPUT);
        ring_result_free(&result);
    }
}

static ra_status_t make_bad_plans(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    enum { TILE = 16 };
    (void)arg;
    ra_document_t documents[] = {{0, 100}, {32, 10}};
    ra_layout_t *zigzag = NULL, *cut = NULL, *prefix = NULL;
    RA_TRY(ra_layout_create(documents, 1, TILE, 2, RA_LAYOUT_ZIGZAG, &zigzag));
    RA_TRY(ra_layout_create(documents, 2, TILE, 2, RA_LAYOUT_CONTIGUOUS, &cut));
    RA_TRY(ra_layout_create_prefix(cut, &prefix));
    ra_softmax_ring_params_t good = {
        .layout = cut, .prefix = prefix, .heads = 4, .kv_heads = 2, .head_dim = 32, .causal = true};
    ra_softmax_ring_params_t bad[6] = {good, good, good, good, good, good};
    ra_status_t want[6] = {RA_ERR_UNSUPPORTED, RA_ERR_INVALID,     RA_ERR_INVALID,
                           RA_ERR_INVALID,     RA_ERR_UNSUPPORTED, RA_ERR_UNSUPPORTED};
    bad[0].layout = zigzag;
    bad[0].reproducible = true;
    bad[1].prefix = NULL;
    bad[2].layout = zigzag; /* one document, but two prefixes */
    bad[3].causal = false;
    bad[3].window = 5;
    bad[4].kernel = "abacus";
    bad[5].causal = false;
    bad[5].reproducible = true;
    ra_log_set_quiet(1);
    for (int i = 0; i < 6; i++) {
        ra_softmax_ring_t *plan = NULL;
        RANK_CHECK(comm, ra_softmax_ring_create(comm, stream, &bad[i], &plan) == want[i]);
        RANK_CHECK(comm, plan == NULL);
    }
    ra_layout_destroy(zigzag);
    ra_layout_destroy(cut);
    ra_layout_destroy(prefix);
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
        cmocka_unit_test(causal_attention_is_exact_on_any_ring),
        cmocka_unit_test(a_plan_serves_many_layers_and_copying_transports),
        cmocka_unit_test(full_attention_is_exact_on_any_ring),
        cmocka_unit_test(windows_of_any_size_are_exact_on_any_ring),
        cmocka_unit_test(cached_prefixes_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix),
        cmocka_unit_test(bits_never_depend_on_neighbours),
        cmocka_unit_test(ranks_that_share_a_pool_get_the_same_bits),
        cmocka_unit_test(whole_documents_exchange_nothing),
        cmocka_unit_test(a_missing_rank_ends_the_ring_on_all_others),
        cmocka_unit_test(plans_that_cannot_work_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
