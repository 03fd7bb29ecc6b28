#include "model/kv_file.h"
#include "model/safetensors.h"
#include "tests/model/file_support.h"

#include <pthread.h>

#define MODEL     "xxh3:00112233445566778899aabbccddeeff"
#define TOKENIZER "xxh3:ffeeddccbbaa99887766554433221100"

/* Layers 0-3 linear, layer 4 softmax with 2 key/value heads of 32. */
enum { TOKENS = 37, TILE = 8, CACHED = 32, ROW = 2 * 32, STATE = 4 * 32 * 32 };

typedef struct fixture {
    temp_t temp;
    char cache[128];
    ra_model_config_t *config;
    int32_t tokens[TOKENS];
    float k[TOKENS * ROW], v[TOKENS * ROW];
    float states[4][STATE];
} fixture_t;

static int set_up(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));
    uint64_t seed = 9;
    assert_non_null(f);
    f->temp = temp_make();
    snprintf(f->cache, sizeof(f->cache), "%s/cache", f->temp.path);
    accepted(ra_model_config_load("tests/goldens/ring_linear", RA_DECAY_A, &f->config));
    for (int i = 0; i < TOKENS; i++) {
        f->tokens[i] = 3 * i + 1;
    }
    test_fill(f->k, TOKENS * ROW, &seed, -2, 2);
    test_fill(f->v, TOKENS * ROW, &seed, -2, 2);
    test_fill(f->states[0], 4 * STATE, &seed, -2, 2);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    fixture_t *f = *state;
    ra_model_config_destroy(f->config);
    temp_remove(&f->temp);
    free(f);
    return 0;
}

static ra_kv_params_t params_of(const fixture_t *f, const ra_kv_range_t *ranges, int64_t count)
{
    return (ra_kv_params_t){.config = f->config,
                            .model_digest = MODEL,
                            .tokenizer_digest = TOKENIZER,
                            .tokens = f->tokens,
                            .token_count = TOKENS,
                            .tile = TILE,
                            .dtype = RA_F32,
                            .ranges = ranges,
                            .range_count = count};
}

/* Ranges as a zigzag over two ranks has them, one empty, out of order; the last crosses the cut. */
static const ra_kv_range_t zigzag[] = {{0, 8}, {24, TOKENS}, {8, 16}, {16, 16}, {16, 24}};

static void put_all(const fixture_t *f, ra_kv_writer_t *writer)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(zigzag); i++) {
        int64_t at = zigzag[i].begin, count = zigzag[i].end - at;
        accepted(ra_kv_writer_put(writer, 4, at, count, f->k + at * ROW, f->v + at * ROW));
    }
    for (int64_t l = 0; l < 4; l++) {
        accepted(ra_kv_writer_put_state(writer, l, f->states[l]));
    }
}

static void write_cache(const fixture_t *f, const ra_kv_params_t *params)
{
    ra_kv_writer_t *writer = NULL;
    accepted(ra_kv_writer_create(f->cache, params, &writer));
    put_all(f, writer);
    accepted(ra_kv_writer_commit(writer));
    ra_kv_writer_destroy(writer);
}

static ra_status_t open_cache(const fixture_t *f, ra_kv_reader_t **reader_p)
{
    return ra_kv_reader_open(f->cache, f->config, MODEL, TOKENIZER, reader_p);
}

static void check_contents(const fixture_t *f, const ra_kv_reader_t *reader)
{
    float k[CACHED * ROW], v[CACHED * ROW];
    const int32_t *ids = NULL;
    assert_int_equal(ra_kv_reader_tile(reader), TILE);
    assert_int_equal(ra_kv_reader_tokens(reader, &ids), CACHED);
    assert_memory_equal(ids, f->tokens, CACHED * sizeof(*ids));
    assert_int_equal(ra_kv_reader_tail(reader, &ids), TOKENS - CACHED);
    assert_memory_equal(ids, f->tokens + CACHED, (TOKENS - CACHED) * sizeof(*ids));
    /* every range, across every border between shards */
    for (int64_t begin = 0; begin < CACHED; begin++) {
        for (int64_t count = 0; begin + count <= CACHED; count += 5) {
            test_poison(k, CACHED * ROW);
            test_poison(v, CACHED * ROW);
            accepted(ra_kv_reader_get(reader, 4, begin, count, k, v));
            size_t bytes = (size_t)(count * ROW) * sizeof(float);
            assert_memory_equal(k, f->k + begin * ROW, bytes);
            assert_memory_equal(v, f->v + begin * ROW, bytes);
        }
    }
    for (int64_t l = 0; l < 4; l++) {
        assert_memory_equal(ra_kv_reader_state(reader, l), f->states[l], sizeof(f->states[l]));
    }
    assert_null(ra_kv_reader_state(reader, 4));
}

static void a_cache_of_any_shards_gives_back_every_range(void **state)
{
    static const ra_kv_range_t whole[] = {{0, TOKENS}};
    static const ra_kv_range_t many[] = {{0, 1}, {1, 9}, {9, 31}, {31, 33}, {33, TOKENS}};
    static const struct {
        const ra_kv_range_t *ranges;
        int64_t count;
    } cases[] = {{whole, 1}, {many, 5}, {zigzag, 5}};
    fixture_t *f = *state;
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        ra_kv_params_t params = params_of(f, cases[i].ranges, cases[i].count);
        ra_kv_reader_t *reader = NULL;
        snprintf(f->cache, sizeof(f->cache), "%s/cache%zu", f->temp.path, i);
        write_cache(f, &params);
        accepted(open_cache(f, &reader));
        check_contents(f, reader);
        accepted(ra_kv_reader_verify(reader));
        ra_kv_reader_close(reader);
    }
}

static void bf16_keys_are_rounded_and_states_are_not(void **state)
{
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_reader_t *reader = NULL;
    float k[CACHED * ROW], v[CACHED * ROW];
    params.dtype = RA_BF16;
    write_cache(f, &params);
    accepted(open_cache(f, &reader));
    assert_int_equal(ra_kv_reader_dtype(reader), RA_BF16);
    accepted(ra_kv_reader_get(reader, 4, 0, CACHED, k, v));
    for (int i = 0; i < CACHED * ROW; i++) {
        assert_true(k[i] == ra_bf16_to_f32(ra_bf16_from_f32(f->k[i])));
        assert_true(v[i] == ra_bf16_to_f32(ra_bf16_from_f32(f->v[i])));
    }
    assert_memory_equal(ra_kv_reader_state(reader, 3), f->states[3], sizeof(f->states[3]));
    ra_kv_reader_close(reader);
}

typedef struct rank_job {
    const fixture_t *f;
    ra_kv_writer_t *writer;
    int rank;
} rank_job_t;

static void *put_rank(void *arg)
{
    rank_job_t *job = arg;
    for (size_t i = (size_t)job->rank; i < RA_ARRAY_LEN(zigzag); i += 2) {
        int64_t at = zigzag[i].begin, count = zigzag[i].end - at;
        accepted(ra_kv_writer_put(job->writer, 4, at, count, job->f->k + at * ROW,
                                  job->f->v + at * ROW));
    }
    for (int64_t l = job->rank; l < 4; l += 2) {
        accepted(ra_kv_writer_put_state(job->writer, l, job->f->states[l]));
    }
    return NULL;
}

static void ranks_may_write_at_once(void **state)
{
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_writer_t *writer = NULL;
    ra_kv_reader_t *reader = NULL;
    pthread_t thread;
    accepted(ra_kv_writer_create(f->cache, &params, &writer));
    rank_job_t jobs[2] = {{f, writer, 0}, {f, writer, 1}};
    assert_int_equal(pthread_create(&thread, NULL, put_rank, &jobs[1]), 0);
    put_rank(&jobs[0]);
    pthread_join(thread, NULL);
    accepted(ra_kv_writer_commit(writer));
    ra_kv_writer_destroy(writer);
    accepted(open_cache(f, &reader));
    check_contents(f, reader);
    ra_kv_reader_close(reader);
}

static void a_prefix_shorter_than_a_tile_is_all_tail(void **state)
{
    static const ra_kv_range_t range = {0, 5};
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, &range, 1);
    ra_kv_writer_t *writer = NULL;
    ra_kv_reader_t *reader = NULL;
    const int32_t *ids = NULL;
    params.token_count = 5;
    accepted(ra_kv_writer_create(f->cache, &params, &writer));
    assert_int_equal(ra_kv_writer_tokens(writer), 0);
    accepted(ra_kv_writer_put(writer, 4, 0, 5, f->k, f->v));
    accepted(ra_kv_writer_put_state(writer, 0, f->states[0]));
    accepted(ra_kv_writer_commit(writer));
    ra_kv_writer_destroy(writer);
    accepted(open_cache(f, &reader));
    assert_int_equal(ra_kv_reader_tokens(reader, &ids), 0);
    assert_int_equal(ra_kv_reader_tail(reader, &ids), 5);
    assert_null(ra_kv_reader_state(reader, 0));
    ra_kv_reader_close(reader);
}

static void a_prefix_of_whole_tiles_keeps_the_next_token_distribution(void **state)
{
    static const ra_kv_range_t range = {0, CACHED};
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, &range, 1);
    ra_kv_writer_t *writer = NULL;
    ra_kv_reader_t *reader = NULL;
    float next[512];
    uint64_t seed = 4;
    test_fill(next, 512, &seed, -20, 0);
    params.token_count = CACHED;
    accepted(ra_kv_writer_create(f->cache, &params, &writer));
    accepted(ra_kv_writer_put(writer, 4, 0, CACHED, f->k, f->v));
    for (int64_t l = 0; l < 4; l++) {
        accepted(ra_kv_writer_put_state(writer, l, f->states[l]));
    }
    REFUSED(ra_kv_writer_commit(writer), RA_ERR_INVALID, "next.safetensors", "0 of 2048");
    ra_kv_writer_destroy(writer);

    accepted(ra_kv_writer_create(f->cache, &params, &writer));
    accepted(ra_kv_writer_put(writer, 4, 0, CACHED, f->k, f->v));
    for (int64_t l = 0; l < 4; l++) {
        accepted(ra_kv_writer_put_state(writer, l, f->states[l]));
    }
    accepted(ra_kv_writer_put_next(writer, next));
    accepted(ra_kv_writer_commit(writer));
    ra_kv_writer_destroy(writer);
    accepted(open_cache(f, &reader));
    assert_memory_equal(ra_kv_reader_next(reader), next, sizeof(next));
    ra_kv_reader_close(reader);
}

static void an_unfinished_cache_cannot_be_opened(void **state)
{
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_writer_t *writer = NULL;
    ra_kv_reader_t *reader = NULL;
    accepted(ra_kv_writer_create(f->cache, &params, &writer));
    put_all(f, writer);
    REFUSED(open_cache(f, &reader), RA_ERR_USAGE, "kv.index.json", "No such file");
    ra_kv_writer_destroy(writer);
    REFUSED(open_cache(f, &reader), RA_ERR_USAGE, "kv.index.json");

    accepted(ra_kv_writer_create(f->cache, &params, &writer)); /* nothing is in the way */
    accepted(ra_kv_writer_put(writer, 4, 0, 8, f->k, f->v));
    REFUSED(ra_kv_writer_commit(writer), RA_ERR_INVALID, "0 of");
    ra_kv_writer_destroy(writer);
    REFUSED(open_cache(f, &reader), RA_ERR_USAGE, "kv.index.json");
}

static void a_cache_is_not_overwritten(void **state)
{
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_writer_t *writer = NULL;
    write_cache(f, &params);
    REFUSED(ra_kv_writer_create(f->cache, &params, &writer), RA_ERR_USAGE, "kv.index.json",
            "already");
}

static void ranges_must_cover_the_tokens(void **state)
{
    static const ra_kv_range_t hole[] = {{0, 8}, {9, TOKENS}};
    static const ra_kv_range_t overlap[] = {{0, 8}, {7, TOKENS}};
    static const ra_kv_range_t shorter[] = {{0, 8}};
    fixture_t *f = *state;
    ra_kv_writer_t *writer = NULL;
    ra_kv_params_t params = params_of(f, hole, 2);
    REFUSED(ra_kv_writer_create(f->cache, &params, &writer), RA_ERR_INVALID, "token 8");
    params.ranges = overlap;
    REFUSED(ra_kv_writer_create(f->cache, &params, &writer), RA_ERR_INVALID, "token 8");
    params.ranges = shorter;
    params.range_count = 1;
    REFUSED(ra_kv_writer_create(f->cache, &params, &writer), RA_ERR_INVALID, "token 8 of 37");
}

static void a_cache_of_another_model_is_refused(void **state)
{
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_reader_t *reader = NULL;
    ra_model_config_t *other = NULL;
    write_cache(f, &params);
    REFUSED(ra_kv_reader_open(f->cache, f->config, "xxh3:0", TOKENIZER, &reader), RA_ERR_USAGE,
            "model_digest", MODEL);
    REFUSED(ra_kv_reader_open(f->cache, f->config, MODEL, "xxh3:0", &reader), RA_ERR_USAGE,
            "tokenizer_digest");
    accepted(ra_kv_reader_open(f->cache, f->config, MODEL, "", &reader));
    ra_kv_reader_close(reader);
    accepted(ra_model_config_load("tests/goldens/ring_linear", RA_DECAY_B, &other));
    REFUSED(ra_kv_reader_open(f->cache, other, MODEL, TOKENIZER, &reader), RA_ERR_USAGE,
            "decay_factor");
    ra_model_config_destroy(other);
    accepted(ra_model_config_load("tests/goldens/ring_linear_mini_shape", RA_DECAY_A, &other));
    REFUSED(ra_kv_reader_open(f->cache, other, MODEL, TOKENIZER, &reader), RA_ERR_USAGE, "rope",
            "rotary_dim");
    ra_model_config_destroy(other);
}

/* The index with one replacement, equal or not in length; the old index is restored after. */
static ra_status_t open_edited(const fixture_t *f, const char *from, const char *to)
{
    char path[256], text[16384], edited[20000];
    ra_kv_reader_t *reader = NULL;
    snprintf(path, sizeof(path), "%s/kv.index.json", f->cache);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    text[fread(text, 1, sizeof(text) - 1, file)] = '\0';
    fclose(file);
    char *at = strstr(text, from);
    if (at == NULL) {
        fail_msg("the index has no %s: %s", from, text);
    }
    snprintf(edited, sizeof(edited), "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    temp_t cache;
    snprintf(cache.path, sizeof(cache.path), "%.60s", f->cache);
    temp_write_text(&cache, "kv.index.json", edited);
    ra_status_t status = open_cache(f, &reader);
    ra_kv_reader_close(reader);
    temp_write_text(&cache, "kv.index.json", text);
    return status;
}

static void a_broken_index_is_refused_with_file_place_and_cause(void **state)
{
    static const struct {
        const char *from, *to;
        ra_status_t status;
        const char *says;
    } cases[] = {
        {"ring-kv/1", "ring-kv/2", RA_ERR_INPUT, "\"format\""},
        {"\"tokens\":\t32", "\"tokens\":\t31", RA_ERR_INPUT, "not a multiple of tile 8"},
        {"\"tokens\":\t32", "\"tokens\":\t40", RA_ERR_INPUT, "32 ids"},
        {"\"tokens\":\t32", "\"tokens\":\t-8", RA_ERR_INPUT, "\"tokens\" is -8"},
        {"\"tokens\":\t32", "\"tokens\":\t1e30", RA_ERR_INPUT, "\"tokens\""},
        {"\"tile\":\t8", "\"tile\":\t0", RA_ERR_INPUT, "\"tile\""},
        {"\"tile\":\t8", "\"tile\":\t4", RA_ERR_INPUT, "5 ids, a tile is 4"},
        {"\"tail_token_ids\":\t[97", "\"tail_token_ids\":\t[512", RA_ERR_INPUT, "vocab_size 512"},
        {"\"tail_token_ids\":\t[97", "\"tail_token_ids\":\t[1.5", RA_ERR_INPUT, "tail_token_ids 0"},
        {"\"tail_token_ids\":\t[97", "\"tail_token_ids\":\t[\"97\"", RA_ERR_INPUT, "tail_token"},
        {"\"dtype\":\t\"F32\"", "\"dtype\":\t\"F16\"", RA_ERR_INPUT, "\"F16\""},
        {"\"dtype\":\t\"F32\"", "\"dtype\":\t\"BF16\"", RA_ERR_INPUT, "L04.k"},
        {"\"logical\"", "\"zigzag\"", RA_ERR_INPUT, "\"order\""},
        {"[tokens, kv_heads", "[kv_heads, tokens", RA_ERR_INPUT, "\"layout\""},
        {"\"applied\":\ttrue", "\"applied\":\tfalse", RA_ERR_INPUT, "\"applied\""},
        {"\"theta\":\t1000000", "\"theta\":\t600000", RA_ERR_USAGE, "\"theta\""},
        {"\"kind\":\t\"full\"", "\"kind\":\t\"swa\"", RA_ERR_USAGE, "\"kind\""},
        {"\"i\":\t2", "\"i\":\t3", RA_ERR_INPUT, "\"i\" is 3"},
        {"kv-00002-of", "../v-00002-of", RA_ERR_INPUT, "not allowed"},
        {"kv-00002-of", "kv-00009-of", RA_ERR_INPUT, "No such file"},
        {"kv-00002-of", "kv-00001-of", RA_ERR_INTEGRITY, "digest"},
        {"[8, 16]", "[8, 15]", RA_ERR_INPUT, "[7, 2, 32]"},
        {"[8, 16]", "[9, 16]", RA_ERR_INPUT, "must be [8, end]"},
        {"[8, 16]", "[8, 8]", RA_ERR_INPUT, "must be [8, end]"},
        {"[24, 32]", "[24, 99]", RA_ERR_INPUT, "end at most 32"},
        {"states.safetensors", "kv-00001-of-00004.safetensors", RA_ERR_INTEGRITY, "digest"},
        {"\"states\":", "\"states\":null,\"st\":", RA_ERR_INPUT, "\"states\""},
        {"\"shards\":", "\"shards\":[],\"sh\":", RA_ERR_INPUT, "end at token 0 of 32"},
        {"\"format\"", "\"tile\":8,\"format\"", RA_ERR_INPUT, "twice"},
    };
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_reader_t *reader = NULL;
    write_cache(f, &params);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        REFUSED(open_edited(f, cases[i].from, cases[i].to), cases[i].status, cases[i].says);
    }
    accepted(open_cache(f, &reader)); /* the edits left it as it was */
    ra_kv_reader_close(reader);
}

static void a_flipped_bit_in_any_file_is_found(void **state)
{
    static const char *const names[] = {"kv-00003-of-00004.safetensors", "states.safetensors"};
    fixture_t *f = *state;
    ra_kv_params_t params = params_of(f, zigzag, 5);
    ra_kv_reader_t *reader = NULL;
    write_cache(f, &params);
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        char path[256];
        snprintf(path, sizeof(path), "%s/%s", f->cache, names[i]);
        for (int flips = 0; flips < 2; flips++) {
            FILE *file = fopen(path, "r+b");
            assert_non_null(file);
            assert_int_equal(fseek(file, 5000, SEEK_SET), 0);
            int byte = fgetc(file);
            assert_int_equal(fseek(file, 5000, SEEK_SET), 0);
            fputc(byte ^ 1, file);
            assert_int_equal(fclose(file), 0);
            if (flips == 0) {
                REFUSED(open_cache(f, &reader), RA_ERR_INTEGRITY, names[i], "digest");
            }
        }
    }
    accepted(open_cache(f, &reader));
    ra_kv_reader_close(reader);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define KV_TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        KV_TEST(a_cache_of_any_shards_gives_back_every_range),
        KV_TEST(bf16_keys_are_rounded_and_states_are_not),
        KV_TEST(ranks_may_write_at_once),
        KV_TEST(a_prefix_shorter_than_a_tile_is_all_tail),
        KV_TEST(a_prefix_of_whole_tiles_keeps_the_next_token_distribution),
        KV_TEST(an_unfinished_cache_cannot_be_opened),
        KV_TEST(a_cache_is_not_overwritten),
        KV_TEST(ranges_must_cover_the_tokens),
        KV_TEST(a_cache_of_another_model_is_refused),
        KV_TEST(a_broken_index_is_refused_with_file_place_and_cause),
        KV_TEST(a_flipped_bit_in_any_file_is_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
