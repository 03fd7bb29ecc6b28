/* Kill -9 at many points, go on, and compare with a job that was never disturbed: every id exactly
 * once, rows and token files byte for byte the same but for {seconds, ranks, attempt, started}.
 *
 *   test_cli_kill_resume BINARY TIMED_KILLS COMMIT_KILLS OTHER_RANKS
 *
 * Kills come at moments spread over the time an undisturbed run takes, and at numbered points
 * inside commits (debug.stop_at_commit). The job goes on with OTHER_RANKS ranks, reproducibly.
 */
#include "tests/cli/cli_support.h"
#include <signal.h>
#include <time.h>

enum { DOCUMENTS = 24, COMMIT_POINTS = 4 /* a document, beside one a pass */ };

static const char *binary, *other_ranks;
static int timed_kills, commit_kills;
static char input[512];

static void write_input(void)
{
    static char text[DOCUMENTS * 2048];
    uint64_t seed = 11;
    int used = 0;
    for (int d = 0; d < DOCUMENTS; d++) {
        int tokens = 1 + (int)(test_random_u64(&seed) % 200);
        used += sprintf(text + used, "{\"id\":\"doc %d \\u0007\",\"tokens\":[", d);
        for (int t = 0; t < tokens; t++) {
            used +=
                sprintf(text + used, t > 0 ? ",%d" : "%d", (int)(test_random_u64(&seed) % 4000));
        }
        used += sprintf(text + used, "]}\n%s", d % 10 == 4 ? "broken\n" : "");
    }
    snprintf(input, sizeof(input), "%s", test_write_text("docs.jsonl", text));
}

static pid_t start(const char *out, const char *ranks, int64_t stop_at)
{
    char number[32];
    snprintf(number, sizeof(number), "%lld", (long long)stop_at);
    const char *variables[] = {"RA_DEBUG_STOP_AT_COMMIT", number, NULL};
    const char *argv[] = {"score",
                          "--in",
                          input,
                          "--out",
                          test_path(out),
                          "--ranks",
                          ranks,
                          "--reproducible",
                          "--tile",
                          "16",
                          "--token-logprobs",
                          "npy",
                          "--pack-tokens",
                          "300",
                          NULL};
    return run_start(binary, argv, &(run_how_t){.variables = variables});
}

static void finish(const char *out, const char *ranks)
{
    run_t run = run_finish(start(out, ranks, 0));
    if (run.exit_code != 3) {
        fail_msg("%s: exit %d: %s", out, run.exit_code, run.err);
    }
    run_free(&run);
}

static char *read_part(const char *out, const char *name, size_t *bytes)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/%s", out, name);
    char *text = test_read(test_path(path), bytes);
    if (text == NULL) {
        fail_msg("%s is missing", path);
    }
    return text;
}

/* Blank out what may differ: it comes last in a row. */
static void blank(char *rows)
{
    char *to = rows;
    for (char *line = rows; *line != '\0';) {
        char *end = strchr(line, '\n');
        assert_non_null(end);
        *end = '\0';
        char *cut = strstr(line, ",\"seconds\":");
        assert_non_null(cut);
        size_t keep = (size_t)(cut - line);
        memmove(to, line, keep);
        to += keep;
        *to++ = '\n';
        line = end + 1;
    }
    *to = '\0';
}

static void compare_token_files(const char *rows, const char *out)
{
    int compared = 0;
    for (const char *at = rows; (at = strstr(at, "\"tok/")) != NULL; at++) {
        char name[64];
        size_t want_bytes, got_bytes;
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(at + 1, "\""), at + 1);
        char *want = read_part("reference", name, &want_bytes);
        char *got = read_part(out, name, &got_bytes);
        assert_int_equal(want_bytes, got_bytes);
        assert_memory_equal(want, got, got_bytes);
        free(want);
        free(got);
        compared++;
    }
    assert_int_equal(compared, DOCUMENTS);
}

static void compare_with_reference(const char *out)
{
    char *want = read_part("reference", "scores.jsonl", NULL);
    char *got = read_part(out, "scores.jsonl", NULL);
    blank(want);
    blank(got);
    assert_int_equal(test_count_lines(got), DOCUMENTS);
    assert_string_equal(got, want);
    compare_token_files(got, out);
    free(want);
    free(got);
    want = read_part("reference", "errors.jsonl", NULL);
    got = read_part(out, "errors.jsonl", NULL);
    assert_string_equal(got, want);
    free(want);
    free(got);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void kills_at_any_time_lose_nothing(void **state)
{
    (void)state;
    write_input();
    double begin = now();
    finish("reference", "1");
    double duration = now() - begin;
    int disturbed = 0;
    for (int i = 0; i < timed_kills; i++) {
        char out[32];
        snprintf(out, sizeof(out), "timed-%d", i);
        pid_t child = start(out, "1", 0);
        usleep((useconds_t)(1e6 * duration * (i + 0.5) / timed_kills));
        kill(child, SIGKILL);
        run_t run = run_finish(child);
        disturbed += run.signal == SIGKILL;
        run_free(&run);
        finish(out, i % 2 == 0 ? "1" : other_ranks);
        compare_with_reference(out);
    }
    assert_true(timed_kills == 0 || disturbed > 0);
}

static void kills_inside_commits_lose_nothing(void **state)
{
    (void)state;
    write_input();
    finish("reference", "1");
    for (int i = 0; i < commit_kills; i++) {
        char out[32];
        /* each of the points of a commit, in documents from the first to the last */
        int64_t document = (int64_t)i * (DOCUMENTS - 1) / (commit_kills > 1 ? commit_kills - 1 : 1);
        int64_t point = 1 + document * COMMIT_POINTS + i % COMMIT_POINTS;
        snprintf(out, sizeof(out), "commit-%d", i);
        run_t run = run_finish(start(out, "1", point));
        assert_int_equal(run.signal, SIGKILL);
        run_free(&run);
        finish(out, i % 2 == 0 ? "1" : other_ranks);
        compare_with_reference(out);
    }
}

static void a_job_killed_again_and_again_still_ends_right(void **state)
{
    (void)state;
    write_input();
    finish("reference", "1");
    for (int i = 0; i < 12; i++) {
        run_t run = run_finish(start("again", i % 2 == 0 ? "1" : other_ranks, 3 + i));
        assert_int_equal(run.signal, SIGKILL);
        run_free(&run);
    }
    finish("again", "1");
    compare_with_reference("again");
}

int main(int argc, char **argv)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, test_folder_make, test_folder_remove)
    const struct CMUnitTest tests[] = {
        CASE(kills_at_any_time_lose_nothing),
        CASE(kills_inside_commits_lose_nothing),
        CASE(a_job_killed_again_and_again_still_ends_right),
    };
    if (argc != 5) {
        fprintf(stderr, "usage: %s BINARY TIMED_KILLS COMMIT_KILLS OTHER_RANKS\n", argv[0]);
        return 2;
    }
    binary = argv[1];
    timed_kills = atoi(argv[2]);
    commit_kills = atoi(argv[3]);
    other_ranks = argv[4];
    return cmocka_run_group_tests_name("cli.kill_resume", tests, NULL, NULL);
}
