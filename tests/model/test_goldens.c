/*
 * The whole forward pass against reference outputs of small random models (float64, plain
 * formulas): every rank count, layout and expert placement. 2e-4 in log-probability is what fp32
 * activations over five layers of these models leave room for; observed values are printed.
 */
#include "ring/layout.h"
#include "tests/model/golden_support.h"

static const int rank_counts[] = {1, 2, 3, 4, 7};

static void assert_every_rank_owns_tokens(int64_t count, int ranks, const char *kind_name)
{
    ra_document_t document = {.first = 0, .count = count};
    ra_layout_kind_t kind;
    ra_layout_t *layout = NULL;

    assert_int_equal(ra_layout_kind_parse(kind_name, &kind), 0);
    assert_int_equal(ra_layout_create(&document, 1, TILE, ranks, kind, &layout), RA_OK);
    for (int r = 0; r < ranks; r++) {
        assert_true(layout->rows[r] > 0);
    }
    ra_layout_destroy(layout);
}

static double max_difference(const ra_session_options_t *options, const golden_t *golden)
{
    ra_session_t *session = session_open(*options);
    float *logprob = session_score_one(session, golden->ids, golden->count, NULL);
    double worst = 0;

    for (int64_t t = 0; t + 1 < golden->count; t++) {
        double difference = fabs((double)logprob[t] - golden->logprob[t]);
        assert_true(isfinite(difference));
        worst = difference > worst ? difference : worst;
    }
    free(logprob);
    ra_session_close(session);
    return worst;
}

static void check_model(const char *dir, bool expert_parallel)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/golden.safetensors", dir);
    golden_t golden = golden_open(path, "");

    for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
        for (int zigzag = 0; zigzag < 2; zigzag++) {
            ra_session_options_t options = options_of(dir, rank_counts[n]);
            options.layout = zigzag ? "zigzag" : "contiguous";
            options.expert_parallel = expert_parallel;
            assert_every_rank_owns_tokens(golden.count, options.ranks, options.layout);
            double worst = max_difference(&options, &golden);
            print_message("%s ranks %d %s experts %s: max |difference| %.2e\n", dir, options.ranks,
                          options.layout, expert_parallel ? "parallel" : "replicated", worst);
            assert_true(worst <= 2e-4);
        }
    }
    ra_safetensors_close(golden.file);
}

static void goldens_hold_with_replicated_experts(void **state)
{
    (void)state;
    for (size_t m = 0; m < RA_ARRAY_LEN(models); m++) {
        check_model(models[m], false);
    }
}

static void goldens_hold_with_experts_over_ranks(void **state)
{
    (void)state;
    for (size_t m = 0; m < RA_ARRAY_LEN(models); m++) {
        check_model(models[m], true);
    }
}

/* The test itself must be able to fail: the other decay convention is far outside the bound. */
static void the_wrong_decay_factor_misses_the_golden(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = models[0];
    options.tile = TILE;
    options.decay_factor = "B";
    assert_true(max_difference(&options, &golden) > 1e-3);
    ra_safetensors_close(golden.file);
}

/* Pieces of the golden document as neighbours of each other, in both orders and alone. */
static void a_document_does_not_depend_on_its_neighbours_or_their_order(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    static const int64_t cut[] = {0, 37, 38, 101, 300};
    enum { PIECES = 4 };
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = models[0];
    options.tile = TILE;
    options.ranks = 2;
    ra_session_t *session = session_open(options);
    float alone[PIECES][300], packed[PIECES][300];
    ra_sequence_t pack[PIECES];

    for (int order = 0; order < 2; order++) {
        for (int i = 0; i < PIECES; i++) {
            int piece = order ? PIECES - 1 - i : i;
            pack[i] = (ra_sequence_t){.tokens = golden.ids + cut[piece],
                                      .count = cut[piece + 1] - cut[piece],
                                      .logprob = packed[piece]};
            float *one = session_score_one(session, pack[i].tokens, pack[i].count, NULL);
            memcpy(alone[piece], one, (size_t)(pack[i].count - 1) * sizeof(float));
            free(one);
        }
        assert_int_equal(ra_session_score(session, pack, PIECES), RA_OK);
        for (int piece = 0; piece < PIECES; piece++) {
            size_t n = (size_t)(cut[piece + 1] - cut[piece] - 1);
            assert_memory_equal(alone[piece], packed[piece], n * sizeof(float));
        }
    }
    ra_session_close(session);
    ra_safetensors_close(golden.file);
}

static void a_token_outside_the_vocabulary_fails_its_document_alone(void **state)
{
    (void)state;
    int32_t good[3] = {1, 2, 3}, bad[3] = {1, 512, 3};
    float logprob[2][2] = {{NAN, NAN}, {NAN, NAN}};
    ra_sequence_t pack[2] = {{.tokens = bad, .count = 3, .logprob = logprob[0]},
                             {.tokens = good, .count = 3, .logprob = logprob[1]}};
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = models[0];
    ra_session_t *session = session_open(options);

    assert_int_equal(ra_session_score(session, pack, 2), RA_OK);
    assert_int_equal(pack[0].status, RA_ERR_INPUT);
    assert_int_equal(pack[1].status, RA_OK);
    assert_true(isfinite(logprob[1][0]) && isfinite(logprob[1][1]));
    ra_session_close(session);
}

static void a_stopped_session_returns_stopped(void **state)
{
    (void)state;
    int32_t ids[40] = {0};
    ra_sequence_t document = {.tokens = ids, .count = 40};
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = models[0];
    options.tile = TILE;
    options.ranks = 3;
    ra_session_t *session = session_open(options);

    ra_session_stop(session);
    assert_int_equal(ra_session_score(session, &document, 1), RA_ERR_STOPPED);
    ra_session_close(session);
}

static void zigzag_with_reproducible_is_a_usage_error(void **state)
{
    (void)state;
    ra_session_options_t options;
    ra_session_t *session = NULL;
    ra_session_options_default(&options);
    options.model_dir = models[0];
    options.layout = "zigzag";
    options.reproducible = true;
    assert_int_equal(ra_session_open(&options, &session), RA_ERR_USAGE);
    assert_null(session);
}

/* Same bits for every rank count, packed or alone, experts replicated or over ranks. */
static void reproducible_bits_do_not_depend_on_ranks_packing_or_expert_placement(void **state)
{
    (void)state;
    static const int ranks[] = {1, 2, 3, 4, 8};
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    float *want = NULL;

    for (size_t n = 0; n < RA_ARRAY_LEN(ranks); n++) {
        for (int parallel = 0; parallel < 2; parallel++) {
            ra_session_options_t options;
            ra_session_options_default(&options);
            options.model_dir = models[0];
            options.tile = TILE;
            options.ranks = ranks[n];
            options.threads = 1 + (int)n % 3;
            options.reproducible = true;
            options.expert_parallel = parallel == 1;
            ra_session_t *session = session_open(options);
            float *alone = session_score_one(session, golden.ids, golden.count, NULL);
            float packed[300], neighbour[100];
            ra_sequence_t pack[2] = {
                {.tokens = golden.ids + 50, .count = 101, .logprob = neighbour},
                {.tokens = golden.ids, .count = golden.count, .logprob = packed}};
            assert_int_equal(ra_session_score(session, pack, 2), RA_OK);
            size_t bytes = (size_t)(golden.count - 1) * sizeof(float);
            if (want == NULL) {
                want = malloc(bytes);
                assert_non_null(want);
                memcpy(want, alone, bytes);
            }
            assert_memory_equal(alone, want, bytes);
            assert_memory_equal(packed, want, bytes);
            free(alone);
            ra_session_close(session);
        }
    }
    free(want);
    ra_safetensors_close(golden.file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(goldens_hold_with_replicated_experts),
        cmocka_unit_test(goldens_hold_with_experts_over_ranks),
        cmocka_unit_test(the_wrong_decay_factor_misses_the_golden),
        cmocka_unit_test(a_document_does_not_depend_on_its_neighbours_or_their_order),
        cmocka_unit_test(a_token_outside_the_vocabulary_fails_its_document_alone),
        cmocka_unit_test(a_stopped_session_returns_stopped),
        cmocka_unit_test(zigzag_with_reproducible_is_a_usage_error),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_packing_or_expert_placement),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
