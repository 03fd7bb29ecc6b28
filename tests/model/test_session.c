/*
 * Calls on one session: its ranks stay connected, so nothing of one call may show in the next, and
 * one that failed or was stopped may not stand in the way of those after it.
 */
#include "base/log.h"
#include "model/session_state.h"
#include "tests/model/golden_support.h"

static const char model[] = "tests/goldens/ring_linear";
static const char *const transports[] = {"local", "local-copy", "local-order"};

static ra_session_t *open_ring(int ranks, const char *transport, bool expert_parallel)
{
    ra_session_options_t options = options_of(model, ranks);
    options.transport = transport;
    options.expert_parallel = expert_parallel;
    return session_open(options);
}

static void assert_same_score(ra_session_t *session, const int32_t *ids, int64_t count,
                              const float *want)
{
    float *got = session_score_one(session, ids, count, NULL);
    assert_memory_equal(got, want, (size_t)(count - 1) * sizeof(float));
    free(got);
}

static void calls_on_one_session_equal_calls_on_sessions_of_their_own(void **state)
{
    (void)state;
    static const int64_t counts[] = {151, 17, 2, 151};
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    for (size_t t = 0; t < RA_ARRAY_LEN(transports); t++) {
        for (int ranks = 1; ranks <= 4; ranks += 3) {
            bool expert_parallel = ranks > 1;
            ra_session_t *kept = open_ring(ranks, transports[t], expert_parallel);
            for (size_t i = 0; i < RA_ARRAY_LEN(counts); i++) {
                ra_session_t *own = open_ring(ranks, transports[t], expert_parallel);
                float *want = session_score_one(own, golden.ids, counts[i], NULL);
                assert_same_score(kept, golden.ids, counts[i], want);
                free(want);
                ra_session_close(own);
            }
            ra_session_close(kept);
        }
    }
    ra_safetensors_close(golden.file);
}

/* Stopping is for good, as a program that was asked to end needs it; the flag is taken back here.
 */
static void a_call_after_a_stopped_one_is_as_good_as_the_first(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    for (size_t t = 0; t < RA_ARRAY_LEN(transports); t++) {
        ra_session_t *session = open_ring(3, transports[t], true);
        float *want = session_score_one(session, golden.ids, golden.count, NULL);
        for (int i = 0; i < 3; i++) {
            ra_sequence_t document = {.tokens = golden.ids, .count = golden.count};
            ra_session_stop(session);
            assert_int_equal(ra_session_score(session, &document, 1), RA_ERR_STOPPED);
            assert_int_equal(ra_session_score(session, &document, 1), RA_ERR_STOPPED);
            atomic_store(&session->control.stop, 0);
            assert_same_score(session, golden.ids, golden.count, want);
        }
        free(want);
        ra_session_close(session);
    }
    ra_safetensors_close(golden.file);
}

/* Rank 1 cannot write its keys and values of a layer in the middle; the others are under way. */
static ra_status_t refuse(void *arg, int rank, int64_t layer, const float *kv)
{
    const int64_t *last = arg;
    (void)kv;
    if (rank != 1 || layer != *last) {
        return RA_OK;
    }
    ra_log_set_quiet(1);
    return ra_fail(RA_ERR_OUTPUT, "test", "the disk of rank %d is full", rank);
}

static int64_t last_softmax_layer(const ra_model_config_t *config)
{
    int64_t last = -1;
    for (int64_t l = 0; l < config->layers; l++) {
        last = config->layer[l].mixer == RA_MIXER_SOFTMAX ? l : last;
    }
    assert_true(last >= 0);
    return last;
}

static void fail_a_pass(ra_session_t *session, const golden_t *golden)
{
    int64_t last = last_softmax_layer(session->config);
    ra_document_t document = {.first = 0, .count = golden->count};
    ra_forward_cache_t cache = {.arg = &last, .save_kv = refuse};
    ra_layout_t *layout = NULL;
    assert_int_equal(
        ra_layout_create(&document, 1, TILE, session->options.ranks, session->layout_kind, &layout),
        RA_OK);
    ra_pass_t pass = {.session = session, .layout = layout, .cache = &cache, .token = golden->ids};
    assert_int_equal(ra_pass_run(&pass), RA_ERR_OUTPUT);
    assert_string_equal(ra_last_error(), "the disk of rank 1 is full");
    ra_layout_destroy(layout);
}

static void a_call_after_a_failed_rank_is_as_good_as_the_first(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    for (size_t t = 0; t < RA_ARRAY_LEN(transports); t++) {
        ra_session_t *session = open_ring(4, transports[t], true);
        fail_a_pass(session, &golden); /* before the first good one, and between */
        float *want = session_score_one(session, golden.ids, golden.count, NULL);
        fail_a_pass(session, &golden);
        assert_same_score(session, golden.ids, golden.count, want);
        fail_a_pass(session, &golden);
        free(want);
        ra_session_close(session);
    }
    ra_safetensors_close(golden.file);
}

static void a_session_that_was_never_used_closes(void **state)
{
    (void)state;
    ra_session_close(open_ring(4, "local", false));
    ra_session_close(NULL);
}

static void transports_and_ranks_that_cannot_be_are_refused_at_once(void **state)
{
    (void)state;
    ra_session_options_t options;
    ra_session_t *session = NULL;
    ra_session_options_default(&options);
    options.model_dir = model;
    options.transport = "pigeon";
    ra_log_set_quiet(1);
    assert_int_equal(ra_session_open(&options, &session), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "transport 'pigeon' is not in this build"));
    options.transport = "local";
    options.ranks = 5000;
    assert_int_equal(ra_session_open(&options, &session), RA_ERR_USAGE);
    ra_log_set_quiet(0);
    assert_null(session);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(calls_on_one_session_equal_calls_on_sessions_of_their_own),
        cmocka_unit_test(a_call_after_a_stopped_one_is_as_good_as_the_first),
        cmocka_unit_test(a_call_after_a_failed_rank_is_as_good_as_the_first),
        cmocka_unit_test(a_session_that_was_never_used_closes),
        cmocka_unit_test(transports_and_ranks_that_cannot_be_are_refused_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
