/*
 * Routing replay through whole models: what the routers choose is what the float64 reference chose,
 * and forced choices give what the reference gives with them. 2e-4 in log-probability as in
 * test_goldens.c.
 */
#include "base/checked.h"
#include "model/model_config.h"
#include "tests/model/routing_support.h"

/* Ranks, zigzag, experts over ranks; the larger model runs every fourth. */
static const int rings[][3] = {{1, 0, 0}, {2, 0, 0}, {2, 1, 0}, {2, 0, 1}, {2, 1, 1},
                               {3, 0, 0}, {3, 1, 0}, {3, 0, 1}, {3, 1, 1}};
/* A choice may differ from the reference's where its margin is no larger than fp32's error of it.
 */
static const double near_tie = 1e-5, bound = 2e-4;

/* A golden case, its choices, the same moved on by one expert in falling order, and scratch. */
typedef struct fixture {
    golden_t golden;
    routing_t routing;
    int32_t *shifted, *chosen;
} fixture_t;

static fixture_t fixture_open(const char *dir)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/golden.safetensors", dir);
    fixture_t f = {.golden = golden_open(path, ""), .routing = routing_open(dir)};
    assert_int_equal(f.routing.count, f.golden.count);
    f.shifted = routing_array(&f.routing);
    f.chosen = routing_array(&f.routing);
    return f;
}

static void shift(const fixture_t *f, const ra_session_t *session)
{
    const int64_t k = f->routing.k, experts = ra_session_config(session)->experts;
    for (int64_t i = 0; i < f->routing.count * f->routing.layers; i++) {
        for (int64_t j = 0; j < k; j++) {
            f->shifted[i * k + j] = (int32_t)((f->routing.expert[i * k + k - 1 - j] + 1) % experts);
        }
    }
}

static void fixture_close(fixture_t *f)
{
    free(f->shifted);
    free(f->chosen);
    ra_safetensors_close(f->golden.file);
    ra_safetensors_close(f->routing.file);
}

static double worst_of(const float *got, const float *want, int64_t count)
{
    double worst = 0;
    for (int64_t t = 0; t < count; t++) {
        assert_true(isfinite(got[t]));
        worst = fmax(worst, fabs((double)got[t] - (double)want[t]));
    }
    return worst;
}

static void check_flips(const fixture_t *f, const char *what)
{
    flips_t flips = routing_flips(&f->routing, f->chosen);
    print_message("  %s: %lld of %lld choices flipped, widest gap %.2e\n", what,
                  (long long)flips.count, (long long)(f->routing.count * f->routing.layers),
                  flips.widest);
    assert_true(flips.widest < near_tie);
}

static void check_session(fixture_t *f, ra_session_t *session)
{
    const int64_t scored = f->golden.count - 1;
    assert_int_equal(ra_session_routing_width(session), f->routing.layers * f->routing.k);

    float *own = routing_score(session, &f->golden, NULL, f->chosen);
    check_flips(f, "free");
    float *again = routing_score(session, &f->golden, f->chosen, NULL);
    assert_memory_equal(own, again, (size_t)scored * sizeof(float)); /* a replay: the same bits */
    free(again);
    free(own);

    float *forced = routing_score(session, &f->golden, f->routing.expert, f->chosen);
    check_flips(f, "forced");
    double worst = worst_of(forced, f->golden.logprob, scored);
    free(forced);
    float *shifted = routing_score(session, &f->golden, f->shifted, NULL);
    double worst_shifted = worst_of(shifted, f->routing.shifted_logprob, scored);
    double moved = worst_of(shifted, f->golden.logprob, scored);
    free(shifted);
    print_message("  forced: off by %.2e; other experts: off by %.2e, away from the golden %.2f\n",
                  worst, worst_shifted, moved);
    assert_true(worst <= bound && worst_shifted <= bound && moved > 0.1);
}

static void choices_and_replay_equal_the_reference_on_any_ring(void **state)
{
    (void)state;
    for (size_t m = 0; m < RA_ARRAY_LEN(models); m++) {
        fixture_t f = fixture_open(models[m]);
        for (size_t i = 0; i < RA_ARRAY_LEN(rings); i += m == 0 ? 1 : 4) {
            ra_session_options_t options = options_of(models[m], rings[i][0]);
            options.layout = rings[i][1] ? "zigzag" : "contiguous";
            options.expert_parallel = rings[i][2] == 1;
            print_message("%s ranks %d %s experts %s\n", models[m], options.ranks, options.layout,
                          options.expert_parallel ? "parallel" : "replicated");
            ra_session_t *session = session_open(options);
            shift(&f, session);
            check_session(&f, session);
            ra_session_close(session);
        }
        fixture_close(&f);
    }
}

/* In one pack: free, forced and listened to, each as alone. */
static void documents_of_a_pack_are_forced_one_by_one(void **state)
{
    (void)state;
    fixture_t f = fixture_open(models[0]);
    enum { DOCUMENTS = 3, COUNT = 60 };
    const int64_t width = f.routing.layers * f.routing.k;
    float alone[DOCUMENTS][COUNT], packed[DOCUMENTS][COUNT];
    int32_t *heard = routing_array(&f.routing);
    ra_sequence_t pack[DOCUMENTS];
    ra_session_t *session = session_open(options_of(models[0], 2));
    shift(&f, session);
    for (int d = 0; d < DOCUMENTS; d++) {
        pack[d] = (ra_sequence_t){.tokens = f.golden.ids + d * COUNT,
                                  .count = COUNT,
                                  .logprob = alone[d],
                                  .forced_experts = d == 1 ? f.shifted + COUNT * width : NULL,
                                  .chosen_experts = d == 2 ? f.chosen : NULL};
        assert_int_equal(ra_session_score(session, &pack[d], 1), RA_OK);
        pack[d].logprob = packed[d];
        pack[d].chosen_experts = d == 2 ? heard : NULL;
    }
    assert_int_equal(ra_session_score(session, pack, DOCUMENTS), RA_OK);
    for (int d = 0; d < DOCUMENTS; d++) {
        assert_int_equal(pack[d].status, RA_OK);
        assert_memory_equal(alone[d], packed[d], (COUNT - 1) * sizeof(float));
    }
    assert_memory_equal(heard, f.chosen, (size_t)(COUNT * width) * sizeof(int32_t));
    assert_int_equal(heard[COUNT * width], 0x7f7f7f7f); /* nothing beyond the document */
    pack[1].forced_experts = NULL;
    pack[1].logprob = alone[1];
    assert_int_equal(ra_session_score(session, &pack[1], 1), RA_OK);
    assert_true(worst_of(packed[1], alone[1], COUNT - 1) > 0.1); /* the forcing was seen */
    ra_session_close(session);
    free(heard);
    fixture_close(&f);
}

static void a_bad_expert_fails_its_document_alone_and_is_named(void **state)
{
    (void)state;
    fixture_t f = fixture_open(models[0]);
    enum { COUNT = 20 };
    const int64_t width = f.routing.layers * f.routing.k;
    static const struct {
        int32_t expert;
        const char *message;
    } bad[] = {{-1, "forced expert -1 of token 7, MoE layer 2; the model's experts are [0, 16)"},
               {16, "forced expert 16 of token 7, MoE layer 2"},
               {INT32_MAX, "forced expert 2147483647 of token 7"},
               {INT32_MIN, "forced expert -2147483648 of token 7"},
               {-2, "forced expert -2 of token 7"},
               {0, "of token 7, MoE layer 2 is given twice"}};
    ra_session_t *session = session_open(options_of(models[0], 2));
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        float logprob[2][COUNT] = {{NAN}, {NAN}};
        ra_sequence_t pack[2];
        for (int d = 0; d < 2; d++) {
            pack[d] = (ra_sequence_t){.tokens = f.golden.ids,
                                      .count = COUNT,
                                      .logprob = logprob[d],
                                      .forced_experts = d == 0 ? f.shifted : f.routing.expert,
                                      .chosen_experts = d == 0 ? f.chosen : NULL};
        }
        memcpy(f.shifted, f.routing.expert, (size_t)(COUNT * width) * sizeof(int32_t));
        int32_t *place = f.shifted + 7 * width + 2 * f.routing.k;
        place[1] = strstr(bad[i].message, "twice") != NULL ? place[3] : bad[i].expert;
        assert_int_equal(ra_session_score(session, pack, 2), RA_OK);
        assert_int_equal(pack[0].status, RA_ERR_INPUT);
        if (strstr(ra_last_error(), bad[i].message) == NULL) {
            fail_msg("message '%s' lacks '%s'", ra_last_error(), bad[i].message);
        }
        assert_true(isnan(logprob[0][0]));
        assert_int_equal(f.chosen[0], 0x7f7f7f7f);
        assert_int_equal(pack[1].status, RA_OK);
        assert_true(worst_of(logprob[1], f.golden.logprob, COUNT - 1) <= bound);
    }
    ra_session_close(session);
    fixture_close(&f);
}

static void prefill_refuses_choices(void **state)
{
    (void)state;
    fixture_t f = fixture_open(models[0]);
    ra_sequence_t document = {
        .tokens = f.golden.ids, .count = 20, .forced_experts = f.routing.expert};
    ra_prefill_result_t result = {0};
    ra_session_t *session = session_open(options_of(models[0], 1));
    assert_int_equal(ra_session_prefill(session, NULL, &document, NULL, "f32", NULL, &result),
                     RA_ERR_USAGE);
    document.forced_experts = NULL;
    document.chosen_experts = f.chosen;
    assert_int_equal(ra_session_prefill(session, NULL, &document, NULL, "f32", NULL, &result),
                     RA_ERR_USAGE);
    ra_session_close(session);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(choices_and_replay_equal_the_reference_on_any_ring),
        cmocka_unit_test(documents_of_a_pack_are_forced_one_by_one),
        cmocka_unit_test(a_bad_expert_fails_its_document_alone_and_is_named),
        cmocka_unit_test(prefill_refuses_choices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
