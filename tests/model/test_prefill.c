/*
 * A prefix written to disk and continued gives what one go gives, wherever it was cut, whatever
 * ring wrote it and whatever ring goes on: to rounding by default, to the bit with reproducible.
 */
#include "model/kv_file.h"
#include "tests/model/golden_support.h"

#include <dirent.h>
#include <unistd.h>

enum { TOKENS = 300 };

static const char model[] = "tests/goldens/ring_linear";
static const int64_t cuts[] = {1, TILE - 1, TILE, TILE + 1, 150, 160, 299};

static void remove_directory(const char *path)
{
    char file[512];
    DIR *listing = opendir(path);
    assert_non_null(listing);
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (entry->d_name[0] != '.') {
            snprintf(file, sizeof(file), "%s/%s", path, entry->d_name);
            unlink(file);
        }
    }
    closedir(listing);
    rmdir(path);
}

static ra_session_t *open_ring(int ranks, bool reproducible, const char *layout)
{
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = model;
    options.tile = TILE;
    options.ranks = ranks;
    options.reproducible = reproducible;
    options.layout = layout;
    return session_open(options);
}

static ra_kv_reader_t *open_cache(const ra_session_t *session, const char *path)
{
    ra_kv_reader_t *reader = NULL;
    ra_status_t status = ra_kv_reader_open(path, ra_session_config(session),
                                           ra_session_model_digest(session), "", &reader);
    if (status != RA_OK) {
        fail_msg("cache: %s", ra_last_error());
    }
    return reader;
}

/* Prefill [0, cut) on one ring into a directory, go on with the rest on another. */
static void prefill_and_continue(const golden_t *golden, int64_t cut, ra_session_t *first,
                                 ra_session_t *second, const char *second_out, const char *dtype,
                                 float *logprob, ra_prefill_result_t *result)
{
    char path[] = "/tmp/ra_prefill_XXXXXX", cache[64];
    assert_non_null(mkdtemp(path));
    snprintf(cache, sizeof(cache), "%s/cache", path);

    ra_sequence_t head = {.tokens = golden->ids, .count = cut, .logprob = logprob};
    assert_int_equal(ra_session_prefill(first, NULL, &head, cache, dtype, "", result), RA_OK);
    assert_int_equal(result->tokens, cut);
    assert_int_equal(result->cached_tokens, cut / TILE * TILE);
    ra_kv_reader_t *reader = open_cache(second, cache);
    ra_sequence_t tail = {
        .tokens = golden->ids + cut, .count = golden->count - cut, .logprob = logprob + cut - 1};
    assert_int_equal(ra_session_prefill(second, reader, &tail, second_out, dtype, "", result),
                     RA_OK);
    assert_int_equal(result->tokens, golden->count);
    ra_session_stats_t stats = ra_session_stats(second);
    assert_int_equal(stats.peak_bytes, stats.predicted_bytes);
    ra_kv_reader_close(reader);
    remove_directory(cache);
    rmdir(path);
}

static void continuing_gives_the_reference_wherever_the_prefix_was_cut(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    static const struct {
        int first, second;
        const char *layout;
    } rings[] = {{1, 3, "zigzag"}, {3, 1, "contiguous"}, {4, 2, "zigzag"}};

    for (size_t r = 0; r < RA_ARRAY_LEN(rings); r++) {
        ra_session_t *first = open_ring(rings[r].first, false, NULL);
        ra_session_t *second = open_ring(rings[r].second, false, rings[r].layout);
        for (size_t c = 0; c < RA_ARRAY_LEN(cuts); c++) {
            float logprob[TOKENS];
            double want[TOKENS];
            int32_t top_id[5];
            float top_logprob[5];
            ra_prefill_result_t result = {.top_k = 5, .top_id = top_id, .top_logprob = top_logprob};
            test_poison(logprob, TOKENS);
            prefill_and_continue(&golden, cuts[c], first, second, NULL, "f32", logprob, &result);
            for (int64_t t = 0; t + 1 < golden.count; t++) {
                want[t] = golden.logprob[t];
            }
            test_near(logprob, want, golden.count - 1, 2e-4, 0, "log-probability");
            for (int k = 1; k < 5; k++) {
                assert_true(top_logprob[k] <= top_logprob[k - 1]);
            }
        }
        ra_session_close(first);
        ra_session_close(second);
    }
    ra_safetensors_close(golden.file);
}

static void reproducible_continuation_has_the_bits_of_one_go(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    ra_session_t *one = open_ring(1, true, NULL), *three = open_ring(3, true, NULL);
    float *whole = session_score_one(one, golden.ids, golden.count, NULL);
    int32_t want_id[3], top_id[3];
    float want_top[3], top[3];
    ra_prefill_result_t want = {.top_k = 3, .top_id = want_id, .top_logprob = want_top};
    ra_sequence_t document = {.tokens = golden.ids, .count = golden.count};

    assert_int_equal(ra_session_prefill(one, NULL, &document, NULL, "f32", "", &want), RA_OK);
    for (size_t c = 0; c < RA_ARRAY_LEN(cuts); c++) {
        for (int swap = 0; swap < 2; swap++) {
            float logprob[TOKENS];
            ra_prefill_result_t result = {.top_k = 3, .top_id = top_id, .top_logprob = top};
            test_poison(logprob, TOKENS);
            prefill_and_continue(&golden, cuts[c], swap ? three : one, swap ? one : three, NULL,
                                 "f32", logprob, &result);
            assert_memory_equal(logprob, whole, (size_t)(golden.count - 1) * sizeof(float));
            assert_memory_equal(top_id, want_id, sizeof(top_id));
            assert_memory_equal(top, want_top, sizeof(top));
        }
    }
    free(whole);
    ra_session_close(one);
    ra_session_close(three);
    ra_safetensors_close(golden.file);
}

/* A cache written by a continuation is whole in itself: the third piece goes on from it. */
static void a_continued_cache_can_be_continued(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    ra_session_t *two = open_ring(2, true, NULL);
    float *whole = session_score_one(two, golden.ids, golden.count, NULL);
    char path[] = "/tmp/ra_chain_XXXXXX", second[64];
    golden_t head = golden;
    float logprob[TOKENS], unused[1];
    int32_t unused_id[1];
    ra_prefill_result_t result = {.top_k = 1, .top_id = unused_id, .top_logprob = unused};

    assert_non_null(mkdtemp(path));
    snprintf(second, sizeof(second), "%s/second", path);
    head.count = 176;
    prefill_and_continue(&head, 100, two, two, second, "f32", logprob, &result);
    ra_kv_reader_t *reader = open_cache(two, second);
    ra_sequence_t tail = {
        .tokens = golden.ids + 176, .count = golden.count - 176, .logprob = logprob + 175};
    assert_int_equal(ra_session_prefill(two, reader, &tail, NULL, "f32", "", &result), RA_OK);
    assert_memory_equal(logprob, whole, (size_t)(golden.count - 1) * sizeof(float));
    ra_kv_reader_close(reader);
    remove_directory(second);
    rmdir(path);
    free(whole);
    ra_session_close(two);
    ra_safetensors_close(golden.file);
}

/* bf16 keys and values cost accuracy, but no more than their rounding. */
static void a_bf16_cache_stays_close(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    ra_session_t *one = open_ring(1, false, NULL);
    float logprob[TOKENS], top[1];
    int32_t top_id[1];
    double mean = 0;
    ra_prefill_result_t result = {.top_k = 1, .top_id = top_id, .top_logprob = top};

    prefill_and_continue(&golden, 160, one, one, NULL, "bf16", logprob, &result);
    for (int64_t t = 160; t + 1 < golden.count; t++) {
        mean += fabs((double)logprob[t] - golden.logprob[t]) / (double)(golden.count - 161);
    }
    print_message("bf16 cache: mean |difference| %.2e\n", mean);
    assert_true(mean > 1e-6); /* it was really rounded */
    assert_true(mean < 1e-2);
    ra_session_close(one);
    ra_safetensors_close(golden.file);
}

static void another_tile_is_a_usage_error(void **state)
{
    (void)state;
    golden_t golden = golden_open("tests/goldens/ring_linear/golden.safetensors", "");
    ra_session_t *one = open_ring(1, false, NULL);
    char path[] = "/tmp/ra_tile_XXXXXX", cache[64];
    float top[1];
    int32_t top_id[1];
    ra_prefill_result_t result = {.top_k = 1, .top_id = top_id, .top_logprob = top};
    ra_sequence_t head = {.tokens = golden.ids, .count = 64};

    assert_non_null(mkdtemp(path));
    snprintf(cache, sizeof(cache), "%s/cache", path);
    assert_int_equal(ra_session_prefill(one, NULL, &head, cache, "f32", "", &result), RA_OK);
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = model;
    options.tile = 32;
    ra_session_t *other = session_open(options);
    ra_kv_reader_t *reader = open_cache(other, cache);
    assert_int_equal(ra_session_prefill(other, reader, &head, NULL, "f32", "", &result),
                     RA_ERR_USAGE);
    ra_kv_reader_close(reader);
    ra_session_close(other);
    remove_directory(cache);
    rmdir(path);
    ra_session_close(one);
    ra_safetensors_close(golden.file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(continuing_gives_the_reference_wherever_the_prefix_was_cut),
        cmocka_unit_test(reproducible_continuation_has_the_bits_of_one_go),
        cmocka_unit_test(a_continued_cache_can_be_continued),
        cmocka_unit_test(a_bf16_cache_stays_close),
        cmocka_unit_test(another_tile_is_a_usage_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
