/* The command as users meet it: arguments in, exit code, stdout and stderr out. The program under
 * test is the command over a session without a model (fake_session.c), named by the first argument.
 */
#include "tests/cli/cli_support.h"
#include <cjson/cJSON.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <time.h>

static const char *binary;

#define RUN(...)              run_plain((const char *const[]){__VA_ARGS__, NULL})
#define EXPECT(code, ...)     expect((code), NULL, (const char *const[]){__VA_ARGS__, NULL})
#define SAYS(code, text, ...) expect((code), (text), (const char *const[]){__VA_ARGS__, NULL})

static run_t run_with(const run_how_t *how, const char *const *argv)
{
    return run_finish(run_start(binary, argv, how));
}

static run_t run_plain(const char *const *argv)
{
    return run_with(&(run_how_t){0}, argv);
}

/* Run, compare the exit code, look for @a text in what was said on stderr. */
static void expect_how(const run_how_t *how, int code, const char *text, const char *const *argv)
{
    run_t run = run_with(how, argv);
    if (run.exit_code != code || (text != NULL && strstr(run.err, text) == NULL)) {
        fail_msg("%s %s ...: exit %d (signal %d), want %d and \"%s\"; stderr: %s", argv[0],
                 argv[1] != NULL ? argv[1] : "", run.exit_code, run.signal, code,
                 text != NULL ? text : "", run.err);
    }
    for (const char *at = run.err; *at != '\0'; at++) {
        assert_true(*at == '\n' || (unsigned char)*at >= 0x20); /* nothing drives the terminal */
    }
    run_free(&run);
}

static void expect(int code, const char *text, const char *const *argv)
{
    expect_how(&(run_how_t){0}, code, text, argv);
}

static int lines_of(const char *name)
{
    char *text = test_read(test_path(name), NULL);
    int lines = text != NULL ? test_count_lines(text) : -1;
    free(text);
    return lines;
}

static bool holds(const char *name, const char *piece)
{
    char *text = test_read(test_path(name), NULL);
    bool found = text != NULL && strstr(text, piece) != NULL;
    free(text);
    return found;
}

static const char three_rows[] = "{\"id\":\"a\",\"tokens\":[1,2,3,4]}\n"
                                 "{\"id\":\"b\",\"tokens\":[5,6]}\n"
                                 "{\"id\":\"c\",\"text\":\"a short text\"}\n";

static const char *write_three(void)
{
    return test_write_text("three.jsonl", three_rows);
}

static void wrong_command_lines_end_with_2_and_a_suggestion(void **state)
{
    (void)state;
    const char *in = write_three();
    run_t run = run_plain((const char *const[]){NULL});
    assert_int_equal(run.exit_code, 2);
    run_free(&run);
    SAYS(2, "did you mean 'score'", "scroe");
    SAYS(2, "did you mean '--ranks'", "score", "--rank", "2");
    SAYS(2, "--top-k is not a flag of this command", "score", "--top-k", "2");
    SAYS(2, "takes an integer from 1 to 4096", "score", "--in", in, "--ranks", "0");
    SAYS(2, "one of auto|zigzag|contiguous", "score", "--in", in, "--layout", "ring");
    SAYS(2, "needs a value", "score", "--in");
    SAYS(2, "--in FILE is missing", "score");
    SAYS(2, "--in FILE is missing", "tokenize");
    SAYS(2, "--in FILE is missing", "prefill");
    SAYS(2, "no CUDA", "score", "--in", in, "--device", "cuda");
    SAYS(2, "needs --out", "score", "--in", in, "--token-logprobs", "npy");
    SAYS(2, "--model", "score", "--in", in, "--model", test_path("absent"));
    SAYS(2, "cannot open configuration file", "config", "--config", test_path("absent.conf"));
}

static void help_and_version_work_and_go_to_stdout(void **state)
{
    (void)state;
    static const char *const names[] = {"score",  "prefill", "tokenize", "validate",
                                        "doctor", "config",  "version"};
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        run_t help = RUN(names[i], "--help"), about = RUN("help", names[i]);
        assert_int_equal(help.exit_code, 0);
        assert_non_null(strstr(help.out, "usage: ringattn"));
        assert_non_null(strstr(help.out, "--json"));
        assert_non_null(strstr(help.out, "example:"));
        assert_string_equal(help.out, about.out);
        assert_string_equal(help.err, "");
        run_free(&help);
        run_free(&about);
    }
    run_t version = RUN("version", "--json");
    cJSON *json = cJSON_Parse(version.out);
    assert_int_equal(version.exit_code, 0);
    assert_true(cJSON_IsString(cJSON_GetObjectItem(json, "version")));
    assert_true(cJSON_IsString(cJSON_GetObjectItem(json, "commit")));
    cJSON_Delete(json);
    run_free(&version);
}

static void config_shows_every_value_with_its_origin(void **state)
{
    (void)state;
    const char *file = test_write_text("run.conf", "ring.tile = 32\nscore.bos = once\n");
    const char *variables[] = {"RA_SCORE_BOS", "none", NULL};
    run_how_t how = {.variables = variables};
    run_t run = run_with(
        &how, (const char *const[]){"config", "--config", file, "--ranks", "3", "--json", NULL});
    assert_int_equal(run.exit_code, 0);
    cJSON *json = cJSON_Parse(run.out);
    assert_true(cJSON_IsArray(json));
    int found = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, json)
    {
        static const char *const want[][3] = {{"ring.ranks", "3", "flag"},
                                              {"ring.tile", "32", "file"},
                                              {"score.bos", "none", "environment"},
                                              {"ring.layout", "auto", "default"}};
        for (size_t i = 0; i < RA_ARRAY_LEN(want); i++) {
            if (strcmp(cJSON_GetObjectItem(item, "key")->valuestring, want[i][0]) == 0) {
                assert_string_equal(cJSON_GetObjectItem(item, "value")->valuestring, want[i][1]);
                assert_string_equal(cJSON_GetObjectItem(item, "origin")->valuestring, want[i][2]);
                found++;
            }
        }
    }
    assert_int_equal(found, 4);
    cJSON_Delete(json);
    run_free(&run);
    const char *stray[] = {"RA_RING_RANK", "3", NULL};
    expect_how(&(run_how_t){.variables = stray}, 0, "did you mean RA_RING_RANKS",
               (const char *const[]){"version", NULL});
    SAYS(2, "did you mean 'ring.tile'", "config", "--config",
         test_write_text("bad.conf", "ring.tiles = 32\n"));
}

static void configuration_printed_by_config_can_be_read_back(void **state)
{
    (void)state;
    run_t first = RUN("config", "--ranks", "3", "--bos", "once");
    const char *file = test_write_text("printed.conf", first.out);
    run_t second = RUN("config", "--config", file, "--json");
    assert_int_equal(second.exit_code, 0);
    assert_non_null(
        strstr(second.out, "\"key\":\"ring.ranks\",\"value\":\"3\",\"origin\":\"file\""));
    assert_non_null(strstr(second.out, "\"key\":\"score.bos\",\"value\":\"once\""));
    run_free(&first);
    run_free(&second);
}

static void without_out_rows_go_to_stdout_and_nothing_is_written(void **state)
{
    (void)state;
    run_t run = RUN("score", "--in", write_three());
    assert_int_equal(run.exit_code, 0);
    assert_int_equal(test_count_lines(run.out), 3);
    assert_non_null(strstr(run.err, "3 documents"));
    run_free(&run);
}

static void inputs_bad_as_a_whole_end_with_4_and_missing_ones_with_2(void **state)
{
    (void)state;
    SAYS(2, "No such file", "score", "--in", test_path("absent.jsonl"));
    SAYS(2, "No such file", "tokenize", "--in", test_path("absent.txt"));
    SAYS(2, "is a directory", "score", "--in", test_folder);
    SAYS(2, "unknown kind of file", "score", "--in", test_write_text("a.csv", "1"));
    SAYS(4, "empty_text", "score", "--in", test_write_text("empty.txt", ""));
    SAYS(4, "bad_utf8", "score", "--in", test_write_text("latin.txt", "caf\xe9"));
    SAYS(4, "bad_utf8", "tokenize", "--in", test_write_text("latin.txt", "caf\xe9"));
    SAYS(4, "bad_file", "score", "--in", test_write_text("short.npy", "\x93NUMPY"));
    SAYS(4, "bad_file", "score", "--in", test_write_text("short.bin", "1234"));
    SAYS(4, "too_long", "score", "--max-doc-bytes", "3", "--in", test_write_text("l.txt", "four"));
    EXPECT(0, "score", "--in", test_write_text("none.jsonl", ""));
}

/* One row of every kind of fault between two good ones. */
static const char *write_broken(void)
{
    return test_write_text("broken.jsonl", "{\"id\":\"first\",\"tokens\":[1,2,3]}\n"
                                           "{\"id\":\"x\x1b[31m\n"
                                           "{\"id\":\"first\",\"tokens\":[1]}\n"
                                           "{\"id\":\"\\u001b[2Jred\",\"text\":\"\"}\n"
                                           "{\"id\":\"big\",\"tokens\":[4096]}\n"
                                           "{\"id\":\"gone\",\"path\":\"gone.txt\"}\n"
                                           "{\"id\":\"utf\",\"text\":\"\xff\"}\n"
                                           "{\"id\":\"nan\",\"tokens\":[1,4094]}\n"
                                           "{\"id\":\"inf\",\"tokens\":[1,4095]}\n"
                                           "{\"id\":\"last\",\"tokens\":[1,2,3]}\n");
}

static void bad_rows_fail_alone_and_the_good_ones_are_intact(void **state)
{
    (void)state;
    static const char *const codes[] = {"bad_json",     "duplicate_id", "empty_text", "bad_token",
                                        "missing_file", "bad_utf8",     "nonfinite"};
    const char *in = write_broken(), *out = test_path("out");
    SAYS(3, "broken.jsonl:4 (id \"\\x1b[2Jred\")", "score", "--in", in, "--out", out);
    assert_int_equal(lines_of("out/scores.jsonl"), 2);
    assert_int_equal(lines_of("out/errors.jsonl"), 8);
    for (size_t i = 0; i < RA_ARRAY_LEN(codes); i++) {
        assert_true(holds("out/errors.jsonl", codes[i]));
    }
    assert_false(holds("out/scores.jsonl", "nan\"}"));
    assert_false(holds("out/errors.jsonl", "\x1b"));
    assert_true(holds("out/errors.jsonl", "\"line\":5,"));

    /* the same command again has nothing to add, and says the same */
    EXPECT(3, "score", "--in", in, "--out", out);
    assert_int_equal(lines_of("out/scores.jsonl"), 2);
    assert_int_equal(lines_of("out/errors.jsonl"), 8);
}

static void errors_beyond_the_limit_end_with_4_and_keep_what_was_done(void **state)
{
    (void)state;
    static char many[20000];
    int used = 0;
    const char *in = write_broken();
    SAYS(4, "more than --max-errors", "score", "--in", in, "--out", test_path("a"), "--max-errors",
         "2");
    assert_int_equal(lines_of("a/scores.jsonl"), 1);
    SAYS(4, "--on-error stop", "score", "--in", in, "--out", test_path("b"), "--on-error", "stop");
    assert_int_equal(lines_of("b/scores.jsonl"), 1);
    assert_true(holds("b/errors.jsonl", "\"action\":\"stopped\""));
    EXPECT(3, "score", "--in", in, "--max-errors", "8");

    /* 2 of the first 100 rows are bad: more than 1 %, not more than 2 % */
    for (int i = 0; i < 120; i++) {
        used += snprintf(many + used, sizeof(many) - (size_t)used,
                         i == 50 || i == 99 ? "bad\n" : "{\"tokens\":[%d,1]}\n", i + 1);
    }
    in = test_write_text("many.jsonl", many);
    SAYS(4, "2 of 100 rows failed", "score", "--in", in);
    EXPECT(3, "score", "--in", in, "--max-errors", "2%");
}

static void output_that_cannot_be_used_ends_with_8(void **state)
{
    (void)state;
    const char *in = write_three(), *file = test_write_text("file", "");
    SAYS(8, "file", "score", "--in", in, "--out", file);
    EXPECT(8, "score", "--in", in, "--out", test_path("no/such/parent"));
    EXPECT(8, "score", "--in", in, "--out", "/dev/full");
    expect_how(&(run_how_t){.stdout_path = "/dev/full"}, 8, "stdout cannot be written",
               (const char *const[]){"score", "--in", in, NULL});
    expect_how(&(run_how_t){.stdout_path = "/dev/full"}, 8, "stdout cannot be written",
               (const char *const[]){"help", NULL});
}

static void close_stdout_reader(void)
{
    int ends[2];
    if (pipe(ends) != 0 || dup2(ends[1], 1) < 0) {
        _exit(98);
    }
    close(ends[0]);
    close(ends[1]);
}

static void a_closed_pipe_is_a_failed_write(void **state)
{
    (void)state;
    expect_how(&(run_how_t){.prepare = close_stdout_reader}, 8, "Broken pipe",
               (const char *const[]){"score", "--in", write_three(), NULL});
}

static void limit_file_size(void)
{
    struct rlimit limit = {.rlim_cur = 1500, .rlim_max = 1500};
    setrlimit(RLIMIT_FSIZE, &limit);
}

static void a_full_disk_ends_with_8_and_the_job_goes_on_later(void **state)
{
    (void)state;
    const char *in = write_three(), *out = test_path("full");
    expect_how(&(run_how_t){.prepare = limit_file_size}, 8, "scores.jsonl cannot be written",
               (const char *const[]){"score", "--in", in, "--out", out, NULL});
    assert_int_equal(lines_of("full/scores.jsonl"), 2);
    EXPECT(0, "score", "--in", in, "--out", out);
    assert_int_equal(lines_of("full/scores.jsonl"), 3);
}

static void a_directory_of_another_job_is_refused_with_what_differs(void **state)
{
    (void)state;
    const char *in = write_three(), *out = test_path("job");
    EXPECT(0, "score", "--in", in, "--out", out);
    SAYS(2, "its bos is none, this one's is once", "score", "--in", in, "--out", out, "--bos",
         "once");
    SAYS(2, "its tile is 256, this one's is 64", "score", "--in", in, "--out", out, "--tile", "64");
    SAYS(2, "token_logprobs", "score", "--in", in, "--out", out, "--token-logprobs", "npy");
    EXPECT(0, "score", "--in", in, "--out", out, "--ranks", "3", "--pack-tokens", "4");
    assert_int_equal(lines_of("job/scores.jsonl"), 3);
}

static void broken_directories_end_with_7(void **state)
{
    (void)state;
    const char *in = write_three(), *out = test_path("job");
    static const char *const jobs[] = {
        "", "{", "{}", "[]", "{\"format\":\"ringattn-job/1\"}", "{\"format\":\"other/1\"}"};
    EXPECT(0, "score", "--in", in, "--out", out);
    char *good_job = test_read(test_path("job/job.json"), NULL);
    char *good_rows = test_read(test_path("job/scores.jsonl"), NULL);
    for (size_t i = 0; i < RA_ARRAY_LEN(jobs); i++) {
        test_write_text("job/job.json", jobs[i]);
        SAYS(7, "job.json", "score", "--in", in, "--out", out);
    }
    assert_int_equal(unlink(test_path("job/job.json")), 0);
    SAYS(7, "no job.json", "score", "--in", in, "--out", out);
    test_write_text("job/job.json", good_job);

    char *middle = strchr(good_rows, '\n') + 1;
    *middle = '!';
    test_write_text("job/scores.jsonl", good_rows);
    SAYS(7, "scores.jsonl:2 is broken", "score", "--in", in, "--out", out);
    *middle = '{';
    char twice[8192];
    snprintf(twice, sizeof(twice), "%s%s", good_rows, good_rows);
    test_write_text("job/scores.jsonl", twice);
    SAYS(7, "scores.jsonl:4 is broken: its id occurred before", "score", "--in", in, "--out", out);
    test_write_text("job/scores.jsonl", good_rows);
    EXPECT(0, "score", "--in", in, "--out", out);
    free(good_job);
    free(good_rows);
}

static void a_torn_last_line_is_dropped_and_scored_again(void **state)
{
    (void)state;
    const char *in = write_three(), *out = test_path("torn");
    EXPECT(0, "score", "--in", in, "--out", out);
    char *rows = test_read(test_path("torn/scores.jsonl"), NULL);
    size_t length = strlen(rows);
    for (size_t cut = 1; cut < 300; cut += 37) {
        test_write("torn/scores.jsonl", rows, length - cut);
        SAYS(0, "torn last line", "score", "--in", in, "--out", out);
        assert_int_equal(lines_of("torn/scores.jsonl"), 3);
    }
    free(rows);
}

static void a_row_whose_document_changed_fails(void **state)
{
    (void)state;
    const char *out = test_path("job");
    EXPECT(0, "score", "--in", write_three(), "--out", out);
    const char *in = test_write_text("three.jsonl", "{\"id\":\"a\",\"tokens\":[1,2,3,5]}\n");
    EXPECT(3, "score", "--in", in, "--out", out);
    assert_true(holds("job/errors.jsonl", "\"code\":\"changed\""));
    assert_int_equal(lines_of("job/scores.jsonl"), 3);
}

static void a_directory_in_use_is_refused_with_the_process_number(void **state)
{
    (void)state;
    const char *in = write_three(), *out = test_path("busy");
    EXPECT(0, "score", "--in", in, "--out", out);
    test_write_text("busy/.lock", "4711\n");
    int fd = open(test_path("busy/.lock"), O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    SAYS(8, "in use by process 4711", "score", "--in", in, "--out", out);
    close(fd);
    EXPECT(0, "score", "--in", in, "--out", out);
}

static void a_directory_whose_holder_is_just_ending_is_waited_for(void **state)
{
    (void)state;
    const struct timespec pause = {.tv_nsec = 100000000};
    const char *in = write_three(), *out = test_path("ending");
    EXPECT(0, "score", "--in", in, "--out", out);
    int fd = open(test_path("ending/.lock"), O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    pid_t child = run_start(binary, (const char *const[]){"score", "--in", in, "--out", out, NULL},
                            &(run_how_t){0});
    nanosleep(&pause, NULL);
    assert_int_equal(flock(fd, LOCK_UN), 0); /* the child has this very file open too */
    run_t run = run_finish(child);
    assert_int_equal(run.exit_code, 0);
    run_free(&run);
    close(fd);
}

static void token_files_hold_one_value_a_scored_token(void **state)
{
    (void)state;
    static const struct {
        const char *bos, *out;
        int values[3]; /* of documents of 4 and 2 tokens */
    } cases[] = {{"none", "none", {3, 1, 0}}, {"once", "once", {4, 2, 0}}};
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        char name[128];
        EXPECT(0, "score", "--in", write_three(), "--out", test_path(cases[i].out), "--bos",
               cases[i].bos, "--token-logprobs", "npy");
        snprintf(name, sizeof(name), "%s/scores.jsonl", cases[i].out);
        char *rows = test_read(test_path(name), NULL), *line = rows;
        for (int r = 0; r < 2; r++) {
            cJSON *row = cJSON_ParseWithOpts(line, (const char **)(void *)&line, 0);
            assert_non_null(row);
            assert_int_equal(cJSON_GetObjectItem(row, "scored")->valueint, cases[i].values[r]);
            snprintf(name, sizeof(name), "%s/%s", cases[i].out,
                     cJSON_GetObjectItem(row, "token_logprobs")->valuestring);
            size_t bytes;
            char *npy = test_read(test_path(name), &bytes);
            assert_non_null(npy);
            assert_int_equal(bytes % 64, 4 * cases[i].values[r] % 64);
            assert_non_null(strstr(npy + 10, "<f4"));
            free(npy);
            cJSON_Delete(row);
        }
        free(rows);
    }
}

static void a_model_without_bos_refuses_bos_once(void **state)
{
    (void)state;
    char *config = test_read(TEST_MODEL "/config.json", NULL);
    assert_non_null(config);
    char *bos = strstr(config, "\"bos_token_id\"");
    assert_non_null(bos);
    memcpy(bos, "\"not_token_id\"", 14);
    assert_int_equal(mkdir(test_path("model"), 0700), 0);
    test_write_text("model/config.json", config);
    free(config);
    const char *in = test_write_text("t.jsonl", "{\"tokens\":[1,2]}\n{\"text\":\"a\"}\n");
    const char *model = test_path("model");
    SAYS(2, "names a BOS token", "score", "--model", model, "--in", in, "--bos", "once");
    SAYS(3, "no tokenizer.json", "score", "--model", model, "--in", in);
    test_write_text("model/tokenizer_config.json", "{\"bos_token\":\"<absent>\"}");
    SAYS(2, "names a BOS token", "score", "--model", model, "--in", in, "--bos", "once");
}

static void one_of_several_processes_is_refused(void **state)
{
    (void)state;
    static const char *const launchers[][5] = {
        {"SLURM_NTASKS", "4", "SLURM_PROCID", "0", NULL},
        {"OMPI_COMM_WORLD_SIZE", "2", NULL},
        {"PMI_SIZE", "2", NULL},
        {"PMIX_RANK", "1", NULL},
    };
    static const char *const alone[][5] = {{"SLURM_NTASKS", "1", "SLURM_PROCID", "0", NULL},
                                           {"SLURM_NTASKS", "4", NULL},
                                           {"PMIX_RANK", "0", NULL}};
    const char *in = write_three();
    for (size_t i = 0; i < RA_ARRAY_LEN(launchers); i++) {
        run_how_t how = {.variables = launchers[i]};
        expect_how(&how, 2, "a command's ranks are threads of one process",
                   (const char *const[]){"score", "--in", in, NULL});
        expect_how(&how, 2, launchers[i][0], (const char *const[]){"prefill", "--in", in, NULL});
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(alone); i++) {
        run_how_t how = {.variables = alone[i]};
        expect_how(&how, 0, NULL, (const char *const[]){"score", "--in", in, NULL});
    }
}

/* Start a slow job, wait for its first row, send @a signal_number, and go on with it. */
static void stop_and_go_on(int signal_number, int code)
{
    static const char *const slow[] = {"FAKE_SESSION_DELAY_US", "60000", NULL};
    static char rows[8192];
    int used = 0;
    for (int i = 0; i < 100; i++) {
        used +=
            snprintf(rows + used, sizeof(rows) - (size_t)used, "{\"tokens\":[%d,2,3]}\n", i + 1);
    }
    char in[512], out[512];
    snprintf(in, sizeof(in), "%s", test_write_text("slow.jsonl", rows));
    snprintf(out, sizeof(out), "%s", test_path("slow"));
    const char *argv[] = {"score", "--in", in, "--out", out, "--pack-tokens", "3", NULL};
    pid_t child = run_start(binary, argv, &(run_how_t){.variables = slow});
    while (lines_of("slow/scores.jsonl") < 1) {
        usleep(1000);
    }
    assert_int_equal(kill(child, signal_number), 0);
    run_t run = run_finish(child);
    assert_int_equal(run.exit_code, code);
    assert_non_null(strstr(run.err, "goes on from there"));
    run_free(&run);
    int done = lines_of("slow/scores.jsonl");
    assert_true(done >= 1 && done < 100);
    EXPECT(0, "score", "--in", in, "--out", out, "--pack-tokens", "3");
    assert_int_equal(lines_of("slow/scores.jsonl"), 100);
    assert_true(holds("slow/scores.jsonl", "\"attempt\":2"));
}

static void sigterm_saves_and_ends_with_75(void **state)
{
    (void)state;
    stop_and_go_on(SIGTERM, 75);
}

static void sigusr1_saves_and_ends_with_75(void **state)
{
    (void)state;
    stop_and_go_on(SIGUSR1, 75);
}

static void sigint_saves_and_ends_with_130(void **state)
{
    (void)state;
    stop_and_go_on(SIGINT, 130);
}

static void tokenize_prints_rows_and_reports_bad_ones(void **state)
{
    (void)state;
    run_t run = RUN("tokenize", "--json", "--in",
                    test_write_text("t.jsonl", "{\"id\":\"a\",\"text\":\"hello\"}\nbad\n"
                                               "{\"id\":\"e\\u0007\",\"text\":\"\"}\n"
                                               "{\"id\":\"b\",\"tokens\":[7,8]}\n"));
    assert_int_equal(run.exit_code, 3);
    assert_int_equal(test_count_lines(run.out), 2);
    assert_non_null(strstr(run.out, "{\"id\":\"b\",\"tokens\":[7,8]}\n"));
    assert_non_null(strstr(run.err, "t.jsonl:2"));
    assert_non_null(strstr(run.err, "t.jsonl:3 (id \"e\\x07\")"));
    run_free(&run);
}

static void the_result_of_a_document_does_not_depend_on_its_pack(void **state)
{
    (void)state;
    static const char *const packs[] = {"1", "5", "1000"};
    char *first = NULL;
    for (size_t i = 0; i < RA_ARRAY_LEN(packs); i++) {
        run_t run = RUN("score", "--in", write_three(), "--pack-tokens", packs[i]);
        assert_int_equal(run.exit_code, 0);
        for (char *at = run.out; (at = strstr(at, ",\"seconds\":")) != NULL;) {
            memset(at, ' ', strcspn(at, "\n"));
        }
        if (first == NULL) {
            first = strdup(run.out);
        }
        assert_int_equal(test_count_lines(run.out), 3);
        for (char *a = first, *b = run.out; *a != '\0' || *b != '\0';) {
            if (*a == ' ' || *b == ' ') {
                a += strspn(a, " "), b += strspn(b, " ");
                continue;
            }
            assert_int_equal(*a++, *b++);
        }
        run_free(&run);
    }
    free(first);
}

static void ids_that_are_integers_stay_integers(void **state)
{
    (void)state;
    const char *out = test_path("job");
    const char *in = test_write_text("n.jsonl", "{\"id\":7,\"tokens\":[1,2]}\n"
                                                "{\"id\":-12,\"tokens\":[1,2]}\n"
                                                "{\"id\":7,\"tokens\":[1,2]}\n");
    for (int attempt = 0; attempt < 2; attempt++) {
        EXPECT(3, "score", "--in", in, "--out", out);
        assert_int_equal(lines_of("job/scores.jsonl"), 2);
        assert_true(holds("job/scores.jsonl", "{\"id\":7,"));
        assert_true(holds("job/scores.jsonl", "{\"id\":-12,"));
        assert_true(holds("job/errors.jsonl", "{\"id\":7,"));
    }
}

static void example_configurations_can_be_read(void **state)
{
    (void)state;
    static const char *const names[] = {"configs/runs/score-long.conf",
                                        "configs/runs/score-reproducible.conf",
                                        "configs/runs/prefill-cache.conf"};
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        EXPECT(0, "config", "--config", names[i]);
    }
}

static void prefill_takes_one_document_and_prints_the_next_tokens(void **state)
{
    (void)state;
    run_t run = RUN("prefill", "--in", test_write_text("a.txt", "hello"), "--top-k", "3", "--json");
    assert_int_equal(run.exit_code, 0);
    cJSON *json = cJSON_Parse(run.out);
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(json, "top")), 3);
    cJSON_Delete(json);
    run_free(&run);
    SAYS(2, "more than one document", "prefill", "--in", write_three());
    SAYS(4, "bad_utf8", "prefill", "--in", test_write_text("b.txt", "\xff"));
    SAYS(4, "holds no document", "prefill", "--in", test_write_text("none.jsonl", "\n"));
    SAYS(2, "needs --out", "prefill", "--in", test_path("a.txt"), "--token-logprobs", "npy");
    SAYS(2, "before the first token", "prefill", "--in", test_path("a.txt"), "--bos", "once",
         "--continue", test_folder);
}

static void doctor_and_validate_reach_a_verdict(void **state)
{
    (void)state;
    run_t doctor = RUN("doctor", "--json", "--threads", "1");
    cJSON *json = cJSON_Parse(doctor.out);
    assert_int_equal(doctor.exit_code, 0);
    assert_true(cJSON_IsTrue(cJSON_GetObjectItem(json, "usable")));
    const cJSON *cuda = cJSON_GetObjectItem(json, "cuda");
    const cJSON *why = cJSON_GetObjectItem(cuda, "why_none");
    int gpus = cJSON_GetArraySize(cJSON_GetObjectItem(cuda, "gpus"));
    assert_true(cJSON_IsBool(cJSON_GetObjectItem(cuda, "built")));
    assert_true(gpus > 0 ? cJSON_IsNull(why) : cJSON_IsString(why));
    cJSON_Delete(json);
    run_free(&doctor);

    run_t validate = RUN("validate", "--in", write_broken(), "--json");
    json = cJSON_Parse(validate.out);
    assert_int_equal(validate.exit_code, 3);
    assert_string_equal(cJSON_GetObjectItem(json, "decay_factor")->valuestring, "A");
    assert_int_equal(cJSON_GetObjectItem(json, "rows_failed")->valueint, 6);
    cJSON_Delete(json);
    run_free(&validate);

    assert_int_equal(mkdir(test_path("model"), 0700), 0);
    SAYS(2, "model", "validate", "--model", test_path("absent"));
    EXPECT(2, "validate", "--model", test_path("model"));
    test_write_text("model/config.json", "{\"model_type\":\"unknown\"}");
    SAYS(4, "config.json", "validate", "--model", test_path("model"));
}

int main(int argc, char **argv)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, test_folder_make, test_folder_remove)
    const struct CMUnitTest tests[] = {
        CASE(wrong_command_lines_end_with_2_and_a_suggestion),
        CASE(help_and_version_work_and_go_to_stdout),
        CASE(config_shows_every_value_with_its_origin),
        CASE(configuration_printed_by_config_can_be_read_back),
        CASE(without_out_rows_go_to_stdout_and_nothing_is_written),
        CASE(inputs_bad_as_a_whole_end_with_4_and_missing_ones_with_2),
        CASE(bad_rows_fail_alone_and_the_good_ones_are_intact),
        CASE(errors_beyond_the_limit_end_with_4_and_keep_what_was_done),
        CASE(output_that_cannot_be_used_ends_with_8),
        CASE(a_closed_pipe_is_a_failed_write),
        CASE(a_full_disk_ends_with_8_and_the_job_goes_on_later),
        CASE(a_directory_of_another_job_is_refused_with_what_differs),
        CASE(broken_directories_end_with_7),
        CASE(a_torn_last_line_is_dropped_and_scored_again),
        CASE(a_row_whose_document_changed_fails),
        CASE(a_directory_in_use_is_refused_with_the_process_number),
        CASE(a_directory_whose_holder_is_just_ending_is_waited_for),
        CASE(token_files_hold_one_value_a_scored_token),
        CASE(a_model_without_bos_refuses_bos_once),
        CASE(one_of_several_processes_is_refused),
        CASE(sigterm_saves_and_ends_with_75),
        CASE(sigusr1_saves_and_ends_with_75),
        CASE(sigint_saves_and_ends_with_130),
        CASE(tokenize_prints_rows_and_reports_bad_ones),
        CASE(the_result_of_a_document_does_not_depend_on_its_pack),
        CASE(ids_that_are_integers_stay_integers),
        CASE(example_configurations_can_be_read),
        CASE(prefill_takes_one_document_and_prints_the_next_tokens),
        CASE(doctor_and_validate_reach_a_verdict),
    };
    if (argc < 2) {
        fprintf(stderr, "usage: %s BINARY\n", argv[0]);
        return 2;
    }
    binary = argv[1];
    return cmocka_run_group_tests_name("cli.command", tests, NULL, NULL);
}
