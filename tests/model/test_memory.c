/*
 * What a pass was predicted to take of a device, before it began, is what it takes: to the byte on
 * the CPU, where everything is counted. And a pass that has no room is refused with numbers.
 */
#include "base/dtype.h"
#include "model/model_config.h"
#include "tests/model/golden_support.h"

enum { RANKS_MOST = 3 };

static void check_stats(const ra_session_t *session, const char *what)
{
    ra_session_stats_t stats = ra_session_stats(session);
    const ra_session_options_t *options = ra_session_options(session);
    print_message("%s, %d ranks, %s, experts %s, %s: predicted %lld, peak %lld\n",
                  options->model_dir, options->ranks, options->layout,
                  options->expert_parallel ? "parallel" : "replicated", what,
                  (long long)stats.predicted_bytes, (long long)stats.peak_bytes);
    /* The residual stream alone, of all rows. */
    int64_t least = 300 * ra_session_config(session)->hidden_size * (int64_t)sizeof(float);
    assert_true(stats.predicted_bytes > least);
    assert_int_equal(stats.peak_bytes, stats.predicted_bytes);
}

static void score_whole(ra_session_t *session, const golden_t *golden, bool with_gap)
{
    float *gap = with_gap ? malloc((size_t)golden->count * sizeof(float)) : NULL;
    free(session_score_one(session, golden->ids, golden->count, gap));
    free(gap);
    check_stats(session, with_gap ? "score with gaps" : "score");
}

static void score_packed(ra_session_t *session, const golden_t *golden)
{
    enum { PIECES = 4 };
    static const int64_t cut[PIECES + 1] = {0, 37, 38, 101, 300};
    float logprob[300];
    ra_sequence_t pack[PIECES];
    for (int i = 0; i < PIECES; i++) {
        pack[i] = (ra_sequence_t){.tokens = golden->ids + cut[i],
                                  .count = cut[i + 1] - cut[i],
                                  .logprob = logprob + cut[i]};
    }
    assert_int_equal(ra_session_score(session, pack, PIECES), RA_OK);
    check_stats(session, "score packed");
}

static void prefill(ra_session_t *session, const golden_t *golden)
{
    int32_t id;
    float top;
    ra_prefill_result_t result = {.top_k = 1, .top_id = &id, .top_logprob = &top};
    ra_sequence_t document = {.tokens = golden->ids, .count = golden->count};
    assert_int_equal(ra_session_prefill(session, NULL, &document, NULL, "f32", "", &result), RA_OK);
    check_stats(session, "prefill");
}

/* Expert choices are taken from one run and given to another. */
static void score_replayed(ra_session_t *session, const golden_t *golden)
{
    size_t width = (size_t)ra_session_routing_width(session);
    int32_t *experts = malloc((size_t)golden->count * width * sizeof(*experts));
    assert_non_null(experts);
    ra_sequence_t document = {
        .tokens = golden->ids, .count = golden->count, .chosen_experts = experts};
    assert_int_equal(ra_session_score(session, &document, 1), RA_OK);
    check_stats(session, "score with choices");
    document.chosen_experts = NULL;
    document.forced_experts = experts;
    assert_int_equal(ra_session_score(session, &document, 1), RA_OK);
    check_stats(session, "score with forced choices");
    free(experts);
}

/* One session for all calls: what an earlier one left behind would be seen. */
static void check_calls(const ra_session_options_t *options, const golden_t *golden)
{
    ra_session_t *session = session_open(*options);
    score_whole(session, golden, false);
    ra_session_stats_t plain = ra_session_stats(session);
    score_packed(session, golden);
    prefill(session, golden);
    score_replayed(session, golden);
    score_whole(session, golden, true);
    /* A float of each row, in whole 256 bytes a rank, and nothing else. */
    ra_session_stats_t with_gap = ra_session_stats(session);
    int64_t gaps = with_gap.peak_bytes - plain.peak_bytes;
    assert_in_range(gaps, golden->count * 4, golden->count * 4 + 255 * options->ranks);
    ra_session_close(session);
}

static void what_is_predicted_is_what_is_taken(void **state)
{
    (void)state;
    for (size_t m = 0; m < RA_ARRAY_LEN(models); m++) {
        char path[256];
        snprintf(path, sizeof(path), "%s/golden.safetensors", models[m]);
        golden_t golden = golden_open(path, "");
        golden.count = m == 0 ? golden.count : 100; /* the larger layers take longer, not more */
        for (int i = 0; i < 4 * RANKS_MOST; i++) {
            ra_session_options_t options = options_of(models[m], 1 + i / 4);
            options.layout = i % 2 ? "zigzag" : "contiguous";
            options.expert_parallel = i % 4 >= 2;
            check_calls(&options, &golden);
        }
        ra_safetensors_close(golden.file);
    }
}

/* Blocks that are copied land in buffers; tiles folded one by one keep their states. */
static void transports_and_reproducible_passes_are_predicted_too(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    int64_t lent = 0, copied = 0;
    for (int i = 0; i < 4; i++) {
        ra_session_options_t options = options_of(models[0], 3);
        options.transport = i % 2 ? "local-copy" : "local";
        options.reproducible = i >= 2;
        ra_session_t *session = session_open(options);
        score_whole(session, &golden, false);
        *(i % 2 ? &copied : &lent) = ra_session_stats(session).predicted_bytes;
        assert_true(i % 2 == 0 || copied > lent);
        ra_session_close(session);
    }
    ra_safetensors_close(golden.file);
}

static void a_pass_without_room_is_refused_before_it_starts(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    for (int ranks = 1; ranks <= RANKS_MOST; ranks++) {
        ra_session_options_t options = options_of(models[0], ranks);
        ra_session_t *session = session_open(options);
        score_whole(session, &golden, false);
        options.memory_limit = ra_session_stats(session).predicted_bytes;
        ra_session_close(session);

        session = session_open(options); /* just enough */
        score_whole(session, &golden, false);
        ra_session_close(session);

        options.memory_limit--;
        session = session_open(options);
        float logprob[300];
        test_poison(logprob, 300);
        ra_sequence_t document = {.tokens = golden.ids, .count = golden.count, .logprob = logprob};
        assert_int_equal(ra_session_score(session, &document, 1), RA_ERR_NOMEM);
        assert_int_equal(ra_status_exit_code(RA_ERR_NOMEM), 5);
        print_message("%s\n", ra_last_error());
        assert_non_null(strstr(ra_last_error(), "cpu 0: "));
        assert_non_null(strstr(ra_last_error(), " MiB asked for, "));
        assert_non_null(strstr(ra_last_error(), " MiB free beside "));
        assert_non_null(strstr(ra_last_error(), "use more ranks"));
        assert_true(isnan(logprob[0]));
        /* The session is as good as before: what fits runs. */
        free(session_score_one(session, golden.ids, golden.count / 2, NULL));
        ra_session_close(session);
    }
    ra_safetensors_close(golden.file);
}

static void waits_are_a_part_of_the_pass(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    for (int measured = 0; measured < 2; measured++) {
        ra_session_options_t options = options_of(models[0], 3);
        options.measure_waits = measured;
        ra_session_t *session = session_open(options);
        free(session_score_one(session, golden.ids, golden.count, NULL));
        double exposed = ra_session_stats(session).exposed;
        print_message("measured %d: exposed %.3f\n", measured, exposed);
        assert_true(exposed <= 1.0 && (measured ? exposed > 0.0 : exposed == 0.0));
        ra_session_close(session);
    }
    ra_safetensors_close(golden.file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_predicted_is_what_is_taken),
        cmocka_unit_test(transports_and_reproducible_passes_are_predicted_too),
        cmocka_unit_test(a_pass_without_room_is_refused_before_it_starts),
        cmocka_unit_test(waits_are_a_part_of_the_pass),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
