/* Mirrors model/tokenizer.c with the shipped tokenizer. Contract: model/tokenizer.h. */
#include "base/log.h"
#include "model/safetensors.h"
#include "tests/model/tokenizer_support.h"
#include <pthread.h>

static void every_public_golden_gives_its_ids(void **state)
{
    (void)state;
    ra_tokenizer_t *tokenizer = open_shipped();
    cJSON *goldens = read_goldens("tests/goldens/tokenizer_public.json");
    const cJSON *golden;
    int count = 0;
    cJSON_ArrayForEach(golden, goldens)
    {
        cJSON *text = cJSON_GetObjectItem(golden, "text");
        int64_t length = golden_text(text);
        assert_encodes(tokenizer, text->valuestring, length, ra_json_member(golden, "ids"),
                       "golden");
        assert_round_trip(tokenizer, text->valuestring, length);
        count++;
    }
    assert_int_equal(count, 333);
    cJSON_Delete(goldens);
    ra_tokenizer_close(tokenizer);
}

static void genesis_and_luke_give_the_held_ids(void **state)
{
    (void)state;
    static const struct {
        const char *text, *ids;
        int64_t count;
    } documents[] = {{"configs/samples/kjv-genesis.txt", "kjv-Ge.input_ids", 69767},
                     {"configs/samples/kjv-luke.txt", "kjv-Luke.input_ids", 46090}};
    ra_safetensors_t *held = NULL;
    ra_tokenizer_t *tokenizer = open_shipped();
    assert_int_equal(ra_safetensors_open(
                         "tests/goldens/ring-tiny-linear/held_logprob_public.safetensors", &held),
                     RA_OK);
    for (size_t i = 0; i < RA_ARRAY_LEN(documents); i++) {
        char *text = NULL;
        int32_t *ids = NULL;
        int64_t length = 0, count = 0;
        const ra_safetensors_entry_t *want = ra_safetensors_find(held, documents[i].ids);
        assert_non_null(want);
        assert_int_equal(ra_file_read(documents[i].text, 1 << 20, &text, &length), RA_OK);
        assert_int_equal(ra_tokenizer_encode(tokenizer, text, length, &ids, &count), RA_OK);
        assert_int_equal(count, documents[i].count);
        assert_int_equal(want->bytes, count * 4);
        assert_memory_equal(ids, want->view.data, (size_t)want->bytes);
        free(ids);
        free(text);
    }
    ra_safetensors_close(held);
    ra_tokenizer_close(tokenizer);
}

/* Appends one random code point, of 1 to 4 bytes alike. */
static size_t put_random_char(uint64_t *seed, char *out)
{
    static const uint32_t ends[] = {0x80, 0x800, 0x10000, 0x110000};
    uint32_t c = (uint32_t)(test_random_u64(seed) % ends[test_random_u64(seed) % 4]);
    c = c >= 0xd800 && c < 0xe000 ? ' ' : c;
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (c & 0x3f));
        c >>= 6;
    }
    out[0] = (char)((0xf00 >> length) | c);
    return length;
}

static void random_unicode_survives_the_round_trip(void **state)
{
    (void)state;
    enum { TEXTS = 300, CHARS = 400 };
    static char text[4 * CHARS];
    uint64_t seed = 11;
    ra_tokenizer_t *tokenizer = open_shipped();
    for (int i = 0; i < TEXTS; i++) {
        size_t length = 0;
        for (int c = 0; c < CHARS; c++) {
            length += put_random_char(&seed, text + length);
        }
        assert_round_trip(tokenizer, text, (int64_t)length);
    }
    ra_tokenizer_close(tokenizer);
}

static void an_empty_text_has_no_tokens(void **state)
{
    (void)state;
    int32_t *ids = NULL;
    int64_t count = -1;
    ra_tokenizer_t *tokenizer = open_shipped();
    assert_int_equal(ra_tokenizer_encode(tokenizer, "", 0, &ids, &count), RA_OK);
    assert_int_equal(count, 0);
    assert_non_null(ids);
    free(ids);
    ra_tokenizer_close(tokenizer);
}

static void invalid_utf8_is_rejected_with_its_byte_offset(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t bad;
    } cases[] = {{"abcdefghij\xff", 10},
                 {"a\xc3", 1},             /* cut short */
                 {"\xc0\x80", 0},          /* overlong NUL */
                 {"xy\xed\xa0\x80z", 2},   /* surrogate */
                 {"\xf4\x90\x80\x80", 0},  /* beyond U+10FFFF */
                 {"\xe2\x82 and more", 0}, /* second continuation byte missing */
                 {"0123456789abcde\x80", 15}};
    ra_tokenizer_t *tokenizer = open_shipped();
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        int32_t *ids = NULL;
        int64_t count = -7;
        char want[32];
        snprintf(want, sizeof(want), "byte %lld ", (long long)cases[i].bad);
        assert_int_equal(ra_tokenizer_encode(tokenizer, cases[i].text,
                                             (int64_t)strlen(cases[i].text), &ids, &count),
                         RA_ERR_INPUT);
        assert_non_null(strstr(ra_last_error(), want));
        assert_null(ids);
        assert_int_equal(count, -7);
    }
    ra_log_set_quiet(0);
    ra_tokenizer_close(tokenizer);
}

static void an_id_without_a_token_cannot_be_decoded(void **state)
{
    (void)state;
    static const int32_t bad[] = {-1, 4096, INT32_MAX, INT32_MIN};
    ra_tokenizer_t *tokenizer = open_shipped();
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        char *bytes = NULL;
        int64_t length = 0;
        int32_t ids[2] = {66, bad[i]};
        assert_int_equal(ra_tokenizer_decode(tokenizer, ids, 2, &bytes, &length), RA_ERR_INPUT);
        assert_non_null(strstr(ra_last_error(), "position 1"));
        assert_null(bytes);
    }
    ra_log_set_quiet(0);
    ra_tokenizer_close(tokenizer);
}

static void names_size_and_digest_are_those_of_the_file(void **state)
{
    (void)state;
    ra_tokenizer_t *tokenizer = open_shipped(), *copy = NULL;
    char *json = NULL, path[RA_PATH_MAX];
    int64_t length = 0;
    assert_int_equal(ra_tokenizer_token_id(tokenizer, "<|endoftext|>"), 0);
    assert_int_equal(ra_tokenizer_token_id(tokenizer, "<|startoftext|>"), 1);
    assert_int_equal(ra_tokenizer_token_id(tokenizer, "no such token"), -1);
    assert_int_equal(ra_tokenizer_vocab_size(tokenizer), 4096);
    assert_int_equal(strlen(ra_tokenizer_digest(tokenizer)), 37);
    assert_memory_equal(ra_tokenizer_digest(tokenizer), "xxh3:", 5);

    assert_int_equal(ra_path_join(shipped_dir, "tokenizer.json", path), RA_OK);
    assert_int_equal(ra_file_read(path, RA_TOKENIZER_MAX_FILE, &json, &length), RA_OK);
    assert_int_equal(ra_tokenizer_open_memory("copy", json, length, &copy), RA_OK);
    assert_string_equal(ra_tokenizer_digest(copy), ra_tokenizer_digest(tokenizer));
    ra_tokenizer_close(copy);
    json[0] = ' '; /* one byte differs: the outer brace moves */
    json[1] = '{';
    assert_int_equal(ra_tokenizer_open_memory("copy", json, length, &copy), RA_OK);
    assert_string_not_equal(ra_tokenizer_digest(copy), ra_tokenizer_digest(tokenizer));
    ra_tokenizer_close(copy);
    free(json);
    ra_tokenizer_close(tokenizer);
}

/* A long run is one piece. Its merges are known by hand: Ġ^32 is the longest run of spaces. */
static void a_long_run_of_one_character_is_merged_right(void **state)
{
    (void)state;
    enum { BYTES = 1 << 18 };
    static const char letters[] = {'a', ' ', '!', '-', '\n', '='};
    char *text = malloc(BYTES + 1);
    ra_tokenizer_t *tokenizer = open_shipped();
    assert_non_null(text);
    for (size_t i = 0; i < RA_ARRAY_LEN(letters); i++) {
        int32_t *ids = NULL, *part = NULL;
        int64_t count = 0, part_count = 0;
        memset(text, letters[i], BYTES);
        text[BYTES] = '\0';
        assert_round_trip(tokenizer, text, BYTES);
        /* merges pair up from the left, so the start of a run does not depend on its length */
        assert_int_equal(ra_tokenizer_encode(tokenizer, text, BYTES, &ids, &count), RA_OK);
        assert_int_equal(ra_tokenizer_encode(tokenizer, text, 1024, &part, &part_count), RA_OK);
        assert_int_equal(count, part_count * (BYTES / 1024));
        assert_memory_equal(ids, part, (size_t)part_count * sizeof(*part));
        free(ids);
        free(part);
    }
    free(text);
    ra_tokenizer_close(tokenizer);
}

typedef struct job {
    ra_tokenizer_t *tokenizer;
    const char *text;
    int64_t length, count;
    int32_t *ids;
    ra_status_t status;
} job_t;

static void *encode_thread(void *arg)
{
    job_t *job = arg;
    for (int i = 0; i < 20 && job->status == RA_OK; i++) {
        free(job->ids);
        job->ids = NULL;
        job->status =
            ra_tokenizer_encode(job->tokenizer, job->text, job->length, &job->ids, &job->count);
    }
    return NULL;
}

static void threads_may_share_a_tokenizer(void **state)
{
    (void)state;
    enum { THREADS = 4 };
    char *text = NULL;
    int64_t length = 0;
    pthread_t threads[THREADS];
    job_t jobs[THREADS];
    ra_tokenizer_t *tokenizer = open_shipped();
    assert_int_equal(ra_file_read("configs/samples/kjv-luke.txt", 1 << 20, &text, &length), RA_OK);
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (job_t){.tokenizer = tokenizer, .text = text, .length = 20000};
        assert_int_equal(pthread_create(&threads[i], NULL, encode_thread, &jobs[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(jobs[i].status, RA_OK);
        assert_int_equal(jobs[i].count, jobs[0].count);
        assert_memory_equal(jobs[i].ids, jobs[0].ids, (size_t)jobs[0].count * sizeof(int32_t));
    }
    for (int i = 0; i < THREADS; i++) {
        free(jobs[i].ids);
    }
    free(text);
    ra_tokenizer_close(tokenizer);
}

static void a_missing_directory_is_a_usage_error(void **state)
{
    (void)state;
    ra_tokenizer_t *tokenizer = NULL;
    ra_log_set_quiet(1);
    assert_int_equal(ra_tokenizer_open("no/such/model", &tokenizer), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "no/such/model/tokenizer.json"));
    ra_log_set_quiet(0);
    assert_null(tokenizer);
    ra_tokenizer_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_public_golden_gives_its_ids),
        cmocka_unit_test(genesis_and_luke_give_the_held_ids),
        cmocka_unit_test(random_unicode_survives_the_round_trip),
        cmocka_unit_test(an_empty_text_has_no_tokens),
        cmocka_unit_test(invalid_utf8_is_rejected_with_its_byte_offset),
        cmocka_unit_test(an_id_without_a_token_cannot_be_decoded),
        cmocka_unit_test(names_size_and_digest_are_those_of_the_file),
        cmocka_unit_test(a_long_run_of_one_character_is_merged_right),
        cmocka_unit_test(threads_may_share_a_tokenizer),
        cmocka_unit_test(a_missing_directory_is_a_usage_error),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
