/* The command with the shipped model, from end to end.
 *
 *   test_cli_real_model BINARY BUILD_FOLDER CMAKE
 */
#include "tests/cli/cli_support.h"
#include <cjson/cJSON.h>
#include <signal.h>

static const char *binary, *build_folder, *cmake;

enum { TEXT_BYTES = 6000 };

static run_t run_command(const char *const *argv)
{
    return run_finish(run_start(binary, argv, &(run_how_t){0}));
}

#define RUN(...)              run_command((const char *const[]){__VA_ARGS__, NULL})
#define SAYS(code, text, ...) expect((code), (text), (const char *const[]){__VA_ARGS__, NULL})

static void expect(int code, const char *text, const char *const *argv)
{
    run_t run = run_command(argv);
    if (run.exit_code != code || strstr(run.err, text) == NULL) {
        fail_msg("exit %d, want %d and \"%s\"; stderr: %s", run.exit_code, code, text, run.err);
    }
    run_free(&run);
}

/* The first TEXT_BYTES of the Gospel of Luke. */
static const char *write_sample(void)
{
    size_t bytes;
    char *text = test_read("configs/samples/kjv-luke.txt", &bytes);
    assert_non_null(text);
    assert_true(bytes > TEXT_BYTES);
    const char *path = test_write("luke.txt", text, TEXT_BYTES);
    free(text);
    return path;
}

/* The sample cut into rows of many lengths, some longer than a tile. */
static const char *write_rows(void)
{
    char *text = test_read(write_sample(), NULL), *out = NULL;
    size_t bytes, at = 0;
    FILE *rows = open_memstream(&out, &bytes);
    for (int i = 0; at < TEXT_BYTES; i++) {
        size_t length = (size_t)(1 + i * i * 7 % 900);
        length = at + length > TEXT_BYTES ? TEXT_BYTES - at : length;
        cJSON *row = cJSON_CreateObject();
        char id[32];
        char *piece = strndup(text + at, length);
        snprintf(id, sizeof(id), "piece %d", i);
        cJSON_AddStringToObject(row, "id", id);
        cJSON_AddStringToObject(row, "text", piece);
        char *line = cJSON_PrintUnformatted(row);
        fprintf(rows, "%s\n", line);
        cJSON_free(line);
        free(piece);
        cJSON_Delete(row);
        at += length;
    }
    fclose(rows);
    const char *path = test_write("pieces.jsonl", out, bytes);
    free(out);
    free(text);
    return path;
}

static double nll_of(run_t *run)
{
    assert_int_equal(run->exit_code, 0);
    cJSON *row = cJSON_Parse(run->out);
    assert_non_null(row);
    double nll = cJSON_GetObjectItem(row, "nll")->valuedouble;
    assert_true(cJSON_GetObjectItem(row, "words")->valueint > 1000);
    cJSON_Delete(row);
    run_free(run);
    return nll;
}

static void every_ring_gives_the_loss_of_one_rank(void **state)
{
    (void)state;
    const char *in = write_sample();
    run_t one = RUN("score", "--in", in, "--tile", "64");
    double want = nll_of(&one);
    assert_true(want > 1000 && want < 10000);
    static const char *const layouts[] = {"zigzag", "contiguous"};
    static const char *const parallel[] = {"off", "on"};
    for (int i = 0; i < 4; i++) {
        run_t run = RUN("score", "--in", in, "--ranks", i % 2 == 0 ? "4" : "3", "--tile", "64",
                        "--layout", layouts[i / 2], "--expert-parallel", parallel[i % 2]);
        double got = nll_of(&run);
        assert_true(fabs(got - want) <= 1e-5 * want); /* rounding of fp32 sums in another order */
    }
}

/* What a pass takes is said before it starts, and what does not fit is refused then. */
static void memory_is_predicted_and_limited(void **state)
{
    (void)state;
    const char *in = write_sample();
    run_t told = RUN("score", "--in", in, "--ranks", "2", "--log-level", "info");
    assert_int_equal(told.exit_code, 0);
    assert_non_null(strstr(told.err, " session: cpu 0: "));
    assert_non_null(strstr(told.err, " MiB predicted, "));
    run_free(&told);
    run_t refused = RUN("score", "--in", in, "--ranks", "2", "--memory-limit", "1Mi");
    assert_int_equal(refused.exit_code, 5);
    assert_non_null(strstr(refused.err, " MiB asked for, "));
    assert_non_null(strstr(refused.err, "use more ranks"));
    run_free(&refused);
    run_t enough = RUN("score", "--in", in, "--ranks", "2", "--memory-limit", "1Gi");
    assert_int_equal(enough.exit_code, 0);
    run_free(&enough);
}

/* Rows without what may differ, for comparison of bytes. */
static char *comparable(char *rows)
{
    for (char *at = rows; (at = strstr(at, ",\"seconds\":")) != NULL;) {
        size_t length = strcspn(at, "\n");
        memmove(at, at + length, strlen(at + length) + 1);
    }
    return rows;
}

static void reproducible_rows_are_the_same_bytes_for_any_ring_and_pack(void **state)
{
    (void)state;
    static const char *const rings[][3] = {
        {"1", "1", "off"}, {"2", "16384", "off"}, {"3", "100", "on"}, {"4", "700", "off"}};
    const char *in = write_rows();
    char *want = NULL;
    for (size_t i = 0; i < RA_ARRAY_LEN(rings); i++) {
        run_t run =
            RUN("score", "--in", in, "--reproducible", "--tile", "32", "--ranks", rings[i][0],
                "--pack-tokens", rings[i][1], "--expert-parallel", rings[i][2]);
        assert_int_equal(run.exit_code, 0);
        comparable(run.out);
        if (want == NULL) {
            want = strdup(run.out);
            assert_true(test_count_lines(want) > 10);
        }
        assert_string_equal(run.out, want);
        run_free(&run);
    }
    free(want);
}

static void a_continued_prefill_gives_the_bits_of_one_go(void **state)
{
    (void)state;
    size_t bytes, whole_bytes, tail_bytes;
    char *ids = NULL;
    run_t tokens = RUN("tokenize", "--in", write_sample(), "--json");
    cJSON *row = cJSON_Parse(tokens.out);
    cJSON *list = cJSON_GetObjectItem(row, "tokens");
    int count = cJSON_GetArraySize(list), cut = count / 2 + 5;
    for (int part = 0; part < 2; part++) {
        FILE *out = open_memstream(&ids, &bytes);
        int from = part == 0 ? 0 : cut, to = part == 0 ? cut : count, i = 0;
        const cJSON *token;
        fputs("{\"tokens\":[", out);
        cJSON_ArrayForEach(token, list)
        {
            if (i >= from && i < to) {
                fprintf(out, i > from ? ",%d" : "%d", token->valueint);
            }
            i++;
        }
        fputs("]}\n", out);
        fclose(out);
        test_write(part == 0 ? "head.jsonl" : "tail.jsonl", ids, bytes);
        free(ids);
    }
    cJSON_Delete(row);
    run_free(&tokens);

    run_t whole = RUN("prefill", "--in", test_path("luke.txt"), "--out", test_path("whole"),
                      "--reproducible", "--tile", "32", "--token-logprobs", "npy", "--json");
    run_t head = RUN("prefill", "--in", test_path("head.jsonl"), "--out", test_path("head"),
                     "--reproducible", "--tile", "32");
    run_t tail = RUN("prefill", "--in", test_path("tail.jsonl"), "--continue", test_path("head"),
                     "--out", test_path("tail"), "--reproducible", "--tile", "32", "--ranks", "3",
                     "--token-logprobs", "npy", "--json");
    assert_int_equal(whole.exit_code, 0);
    assert_int_equal(head.exit_code, 0);
    if (tail.exit_code != 0) {
        fail_msg("%s", tail.err);
    }
    assert_string_equal(strstr(whole.out, "\"top\""), strstr(tail.out, "\"top\""));
    char *whole_npy = test_read(test_path("whole/logprobs.npy"), &whole_bytes);
    char *tail_npy = test_read(test_path("tail/logprobs.npy"), &tail_bytes);
    size_t values = (size_t)(count - cut) * sizeof(float);
    assert_memory_equal(whole_npy + whole_bytes - values, tail_npy + tail_bytes - values, values);
    free(whole_npy);
    free(tail_npy);
    run_free(&whole);
    run_free(&head);
    run_free(&tail);
}

static void copy_model(void)
{
    static const char *const names[] = {
        "config.json", "tokenizer.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    assert_int_equal(mkdir(test_path("model"), 0700), 0);
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        char from[256], to[256];
        size_t bytes;
        snprintf(from, sizeof(from), TEST_MODEL "/%s", names[i]);
        snprintf(to, sizeof(to), "model/%s", names[i]);
        char *contents = test_read(from, &bytes);
        assert_non_null(contents);
        test_write(to, contents, bytes);
        free(contents);
    }
}

static void ids_beyond_the_vocabulary_warn_and_fail_their_rows(void **state)
{
    (void)state;
    copy_model();
    char *json = test_read(test_path("model/tokenizer.json"), NULL), *grown = NULL;
    size_t bytes;
    char *list = strstr(json, "\"added_tokens\"");
    assert_non_null(list);
    list = strchr(list, '[') + 1;
    FILE *out = open_memstream(&grown, &bytes);
    fprintf(out,
            "%.*s{\"id\":4096,\"content\":\"<beyond>\",\"single_word\":false,\"lstrip\":false,"
            "\"rstrip\":false,\"normalized\":false,\"special\":true}%s%s",
            (int)(list - json), json, list[strspn(list, " \n")] == ']' ? "" : ",", list);
    fclose(out);
    test_write("model/tokenizer.json", grown, bytes);
    free(json);
    free(grown);
    SAYS(0, "vocab_size is 4096", "validate", "--model", test_path("model"));
    const char *in =
        test_write_text("t.jsonl", "{\"text\":\"plain words\"}\n{\"text\":\"a <beyond> b\"}\n");
    SAYS(3, "bad_token", "score", "--model", test_path("model"), "--in", in);
}

static void broken_weights_end_with_4_and_their_name(void **state)
{
    (void)state;
    size_t bytes;
    copy_model();
    char *weights = test_read(test_path("model/model-00001-of-00002.safetensors"), &bytes);
    test_write("model/model-00001-of-00002.safetensors", weights, bytes - 100);
    free(weights);
    const char *in = test_write_text("t.jsonl", "{\"text\":\"plain words\"}\n");
    SAYS(4, "model-00001-of-00002.safetensors", "validate", "--model", test_path("model"));
    SAYS(4, "model-00001-of-00002.safetensors", "score", "--model", test_path("model"), "--in", in);
}

static void options_that_exclude_each_other_end_with_2(void **state)
{
    (void)state;
    const char *in = write_sample();
    SAYS(2, "reproducible", "score", "--in", in, "--reproducible", "--layout", "zigzag");
    SAYS(2, "pigeon", "score", "--in", in, "--transport", "pigeon");
    SAYS(2, "nonesuch", "score", "--in", in, "--gemm-kernel", "nonesuch");
}

static void a_long_document_is_dropped_on_sigterm(void **state)
{
    (void)state;
    size_t bytes;
    char *text = test_read("configs/samples/kjv-genesis.txt", &bytes), *many = malloc(bytes * 16);
    assert_non_null(many);
    for (size_t i = 0; i < 16; i++) {
        memcpy(many + i * bytes, text, bytes);
    }
    test_write("long.txt", many, bytes * 16);
    free(text);
    free(many);
    const char *argv[] = {"score", "--in", test_path("long.txt"), "--out", test_path("out"), NULL};
    pid_t child = run_start(binary, argv, &(run_how_t){0});
    while (access(test_path("out/scores.jsonl"), F_OK) != 0) {
        usleep(10000);
    }
    kill(child, SIGTERM);
    run_t run = run_finish(child);
    assert_int_equal(run.exit_code, 75);
    run_free(&run);
    char *rows = test_read(test_path("out/scores.jsonl"), NULL);
    assert_string_equal(rows, "");
    free(rows);
}

static void an_installed_command_finds_its_model(void **state)
{
    (void)state;
    const char *argv[] = {"--install", build_folder, "--prefix", test_path("prefix"), NULL};
    run_t install = run_finish(run_start(cmake, argv, &(run_how_t){0}));
    if (install.exit_code != 0) {
        fail_msg("cmake --install: %s", install.err);
    }
    run_free(&install);
    const char *validate[] = {"validate", "--json", NULL};
    run_t run = run_finish(run_start(test_path("prefix/bin/ringattn"), validate, &(run_how_t){0}));
    assert_int_equal(run.exit_code, 0);
    assert_non_null(strstr(run.out, "/prefix/share/ringattn/models/ring-tiny-linear"));
    run_free(&run);
}

int main(int argc, char **argv)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, test_folder_make, test_folder_remove)
    const struct CMUnitTest tests[] = {
        CASE(every_ring_gives_the_loss_of_one_rank),
        CASE(memory_is_predicted_and_limited),
        CASE(reproducible_rows_are_the_same_bytes_for_any_ring_and_pack),
        CASE(a_continued_prefill_gives_the_bits_of_one_go),
        CASE(ids_beyond_the_vocabulary_warn_and_fail_their_rows),
        CASE(broken_weights_end_with_4_and_their_name),
        CASE(options_that_exclude_each_other_end_with_2),
        CASE(a_long_document_is_dropped_on_sigterm),
        CASE(an_installed_command_finds_its_model),
    };
    if (argc != 4) {
        fprintf(stderr, "usage: %s BINARY BUILD_FOLDER CMAKE\n", argv[0]);
        return 2;
    }
    binary = argv[1];
    build_folder = argv[2];
    cmake = argv[3];
    return cmocka_run_group_tests_name("cli.real_model", tests, NULL, NULL);
}
