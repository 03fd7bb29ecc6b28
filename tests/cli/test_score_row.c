#include "cli/json_write.h"
#include "cli/score_row.h"
#include "cli/score_summary.h"
#include "cli/text_counts.h"
#include "tests/cli/cli_support.h"
#include <cjson/cJSON.h>

static void words_are_runs_without_white_space(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t chars, words;
    } cases[] = {
        {"", 0, 0},
        {"one", 3, 1},
        {"  two\twords \n", 13, 2},
        {"a\xc2\xa0"
         "b",
         3, 2},                               /* no-break space */
        {"\xe3\x80\x80x\xe2\x80\xa8y", 4, 2}, /* ideographic space, line separator */
        {"zero\xe2\x80\x8bwidth", 10, 1},     /* U+200B is not White_Space */
        {"a\x1c"
         "b",
         3, 1}, /* neither is U+001C */
        {"\xf0\x9f\x98\x80 \xc3\xa9", 3, 2},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        ra_text_counts_t counts;
        int64_t bytes = (int64_t)strlen(cases[i].text);
        assert_int_equal(ra_text_count(cases[i].text, bytes, &counts), -1);
        assert_int_equal(counts.bytes, bytes);
        assert_int_equal(counts.chars, cases[i].chars);
        assert_int_equal(counts.words, cases[i].words);
    }
}

static void broken_utf8_is_found_at_its_first_byte(void **state)
{
    (void)state;
    ra_text_counts_t counts = {.bytes = 77};
    assert_int_equal(ra_text_count("ab\xff", 3, &counts), 2);
    assert_int_equal(ra_text_count("\xe2\x82", 2, &counts), 0);
    assert_int_equal(ra_text_count("a\xed\xa0\x80", 4, &counts), 1);
    assert_int_equal(ra_text_count("\xf4\x90\x80\x80", 4, &counts), 0);
    assert_int_equal(counts.bytes, 77);
}

static void buckets_meet_at_their_borders(void **state)
{
    (void)state;
    static const struct {
        int64_t position;
        int bucket;
    } cases[] = {{0, 0},    {255, 0},  {256, 1},  {1023, 1},
                 {1024, 2}, {4095, 2}, {4096, 3}, {INT64_MAX, RA_SCORE_BUCKETS - 1}};
    int64_t last = 0;
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        assert_int_equal(ra_score_bucket(cases[i].position), cases[i].bucket);
    }
    for (int b = 0; b < RA_SCORE_BUCKETS; b++) {
        int64_t from, to;
        ra_score_bucket_range(b, &from, &to);
        assert_int_equal(from, last);
        assert_true(to > from);
        assert_int_equal(ra_score_bucket(from), b);
        assert_int_equal(ra_score_bucket(to - 1), b);
        last = to;
    }
    assert_true(last == INT64_MAX);
}

/* The sums in long double, position by position. */
static void sums_agree_with_a_plain_loop(void **state)
{
    (void)state;
    enum { TOKENS = 1500 };
    static float logprob[TOKENS];
    uint64_t seed = 5;
    test_fill(logprob, TOKENS, &seed, -12.0f, 0.0f);
    for (int bos = 0; bos <= 1; bos++) {
        ra_row_t row = {.count = TOKENS, .has_bos = bos != 0};
        ra_score_t score;
        long double total = 0, bucket[3] = {0, 0, 0};
        int first = bos ? 0 : 1;
        for (int position = first; position < TOKENS; position++) {
            long double nll = -(long double)logprob[position - first];
            total += nll;
            bucket[position < 256 ? 0 : position < 1024 ? 1 : 2] += nll;
        }
        assert_true(ra_score_sum(&row, logprob, &score));
        assert_int_equal(score.scored, TOKENS - first);
        assert_true(fabs(score.nll - (double)total) < 1e-9);
        for (int b = 0; b < 3; b++) {
            assert_true(fabs(score.bucket[b].nll - (double)bucket[b]) < 1e-9);
        }
        assert_int_equal(score.bucket[0].scored, 256 - first);
        assert_int_equal(score.bucket[2].scored, TOKENS - 1024);
        assert_true(fabs(ra_score_ppl(&score) - exp((double)total / (TOKENS - first))) < 1e-9);
    }
}

static void a_value_that_is_not_finite_fails_the_sum(void **state)
{
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        float logprob[3] = {-1, bad[i], -1};
        ra_row_t row = {.count = 4};
        ra_score_t score;
        assert_false(ra_score_sum(&row, logprob, &score));
    }
}

static char *row_text(const ra_row_t *row, const float *logprob)
{
    char *text = NULL;
    size_t bytes;
    ra_score_t score;
    ra_row_policy_t policy = {.bos = "none",
                              .model_digest = "xxh3:m",
                              .tokenizer_digest = "xxh3:t",
                              .max_positions = 3,
                              .ranks = 2,
                              .attempt = 1,
                              .started = "2026-01-01T00:00:00Z"};
    assert_true(ra_score_sum(row, logprob, &score));
    FILE *out = open_memstream(&text, &bytes);
    ra_score_write_row(out, row, &score, &policy, NULL, 0.25);
    fclose(out);
    return text;
}

static double number(const cJSON *row, const char *key)
{
    const cJSON *member = cJSON_GetObjectItemCaseSensitive(row, key);
    assert_true(cJSON_IsNumber(member));
    return member->valuedouble;
}

static void a_row_reads_back_exactly(void **state)
{
    (void)state;
    char id[] = "quote\" back\\slash \x01\x1b[31m \n\t\x7f \xe6\xb0\xb4",
         text[] = "four words in here";
    const float logprob[] = {-0.1f, -2.7f, -3.3f};
    ra_row_t row = {.id = id, .text = text, .count = 4};
    assert_int_equal(ra_text_count(text, (int64_t)strlen(text), &row.counts), -1);
    char *line = row_text(&row, logprob);
    assert_int_equal(test_count_lines(line), 1);
    assert_null(strchr(line, 0x1b));
    cJSON *json = cJSON_Parse(line);
    assert_non_null(json);
    assert_string_equal(cJSON_GetObjectItem(json, "id")->valuestring, id);
    double nll = (double)0.1f + (double)2.7f + (double)3.3f;
    assert_true(number(json, "nll") == nll);
    assert_true(number(json, "nll_per_token") == nll / 3);
    assert_true(number(json, "bits_per_byte") == nll / (18 * log(2.0)));
    assert_true(number(json, "tokens") == 4 && number(json, "scored") == 3);
    assert_true(number(json, "words") == 4 && number(json, "chars") == 18);
    assert_true(cJSON_IsTrue(cJSON_GetObjectItem(json, "beyond_max_positions")));
    assert_true(cJSON_IsNull(cJSON_GetObjectItem(json, "token_logprobs")));
    cJSON_Delete(json);
    free(line);
}

static void token_input_and_single_tokens_give_null_not_nan(void **state)
{
    (void)state;
    char id[] = "one";
    ra_row_t row = {.id = id, .count = 1};
    char *line = row_text(&row, NULL);
    cJSON *json = cJSON_Parse(line);
    assert_non_null(json);
    static const char *const nulls[] = {"nll_per_token", "bytes",         "chars",    "words",
                                        "ppl",           "bits_per_byte", "tokenizer"};
    for (size_t i = 0; i < RA_ARRAY_LEN(nulls); i++) {
        assert_true(cJSON_IsNull(cJSON_GetObjectItem(json, nulls[i])));
    }
    assert_true(number(json, "nll") == 0 && number(json, "scored") == 0);
    assert_null(strstr(line, "nan"));
    cJSON_Delete(json);
    free(line);
}

static void numbers_that_are_not_finite_are_null_in_json(void **state)
{
    (void)state;
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    ra_json_write_number(out, NAN);
    ra_json_write_number(out, INFINITY);
    ra_json_write_number(out, 0.1);
    fclose(out);
    assert_string_equal(text, "nullnull0.10000000000000001");
    free(text);
}

static void the_summary_weighs_by_tokens_and_by_documents(void **state)
{
    (void)state;
    ra_summary_t summary = {0};
    ra_score_t scores[] = {{.tokens = 3, .scored = 2, .nll = 2, .bytes = 10},
                           {.tokens = 9, .scored = 8, .nll = 24, .bytes = -1},
                           {.tokens = 1, .scored = 0, .nll = 0, .bytes = 1},
                           {.tokens = 5, .scored = 4, .nll = 8, .bytes = 20}};
    assert_true(isnan(ra_summary_token_ppl(&summary)));
    assert_true(isnan(ra_summary_median_ppl(&summary)));
    for (size_t i = 0; i < RA_ARRAY_LEN(scores); i++) {
        assert_int_equal(ra_summary_add(&summary, &scores[i]), RA_OK);
    }
    assert_int_equal(summary.documents, 4);
    assert_true(fabs(ra_summary_token_ppl(&summary) - exp(34.0 / 14)) < 1e-12);
    assert_true(fabs(ra_summary_mean_ppl(&summary) - (exp(1) + exp(3) + exp(2)) / 3) < 1e-12);
    assert_true(fabs(ra_summary_median_ppl(&summary) - exp(2)) < 1e-12);
    assert_true(fabs(ra_summary_bits_per_byte(&summary) - 10 / (31 * log(2.0))) < 1e-12);
    ra_score_t fourth = {.tokens = 2, .scored = 1, .nll = 4, .bytes = 5};
    assert_int_equal(ra_summary_add(&summary, &fourth), RA_OK);
    assert_true(fabs(ra_summary_median_ppl(&summary) - (exp(2) + exp(3)) / 2) < 1e-12);
    ra_summary_free(&summary);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(words_are_runs_without_white_space),
        cmocka_unit_test(broken_utf8_is_found_at_its_first_byte),
        cmocka_unit_test(buckets_meet_at_their_borders),
        cmocka_unit_test(sums_agree_with_a_plain_loop),
        cmocka_unit_test(a_value_that_is_not_finite_fails_the_sum),
        cmocka_unit_test(a_row_reads_back_exactly),
        cmocka_unit_test(token_input_and_single_tokens_give_null_not_nan),
        cmocka_unit_test(numbers_that_are_not_finite_are_null_in_json),
        cmocka_unit_test(the_summary_weighs_by_tokens_and_by_documents),
    };
    return cmocka_run_group_tests_name("cli.score_row", tests, NULL, NULL);
}
