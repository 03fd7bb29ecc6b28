#include "base/log.h"
#include "base/settings.h"
#include "tests/test_support.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int setup(void **state)
{
    ra_log_set_quiet(1);
    return ra_settings_create((ra_settings_t **)state) == RA_OK ? 0 : -1;
}

static int teardown(void **state)
{
    ra_settings_destroy(*state);
    return 0;
}

static ra_status_t load(ra_settings_t *settings, int command, int argc, const char *const *argv)
{
    bool help;
    return ra_settings_load(settings, command, argc, (char *const *)(uintptr_t)argv, &help);
}

/* A file in the current test's temporary place; the caller unlinks it. */
static void write_file(char path[64], const char *text)
{
    strcpy(path, "/tmp/ra_settings_XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

static void every_default_is_a_value_of_its_own_setting(void **state)
{
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        const ra_setting_t *row = ra_setting((ra_setting_id_t)id);
        assert_string_equal(ra_settings_text(*state, (ra_setting_id_t)id), row->fallback);
        assert_int_equal(ra_settings_origin(*state, (ra_setting_id_t)id), RA_ORIGIN_DEFAULT);
        assert_true(strlen(row->doc) > 10);
        assert_true(row->commands != 0);
        for (int other = 0; other < id; other++) {
            const ra_setting_t *earlier = ra_setting((ra_setting_id_t)other);
            assert_string_not_equal(row->key, earlier->key);
            if (row->flag != NULL && earlier->flag != NULL) {
                assert_string_not_equal(row->flag, earlier->flag);
            }
        }
    }
}

static void a_flag_beats_the_environment_which_beats_the_file(void **state)
{
    char path[64];
    write_file(path, "ring.ranks = 3\nring.tile = 32 # small\n\n# note\nlog.level = \"info\"\n");
    const char *argv[] = {"--config", path, "--ranks=5"};
    setenv("RA_RING_RANKS", "4", 1);
    setenv("RA_RING_TILE", "64", 1);
    assert_int_equal(load(*state, RA_FOR_SCORE, 3, argv), RA_OK);
    unsetenv("RA_RING_RANKS");
    unsetenv("RA_RING_TILE");
    unlink(path);

    assert_int_equal(ra_settings_int(*state, RA_SET_RANKS), 5);
    assert_string_equal(ra_settings_place(*state, RA_SET_RANKS), "--ranks");
    assert_int_equal(ra_settings_int(*state, RA_SET_TILE), 64);
    assert_string_equal(ra_settings_place(*state, RA_SET_TILE), "RA_RING_TILE");
    assert_string_equal(ra_settings_text(*state, RA_SET_LOG_LEVEL), "info");
    assert_int_equal(ra_settings_origin(*state, RA_SET_LOG_LEVEL), RA_ORIGIN_FILE);
    assert_non_null(strstr(ra_settings_place(*state, RA_SET_LOG_LEVEL), ":5"));
}

static void an_unknown_flag_is_refused_with_the_nearest_one(void **state)
{
    const char *argv[] = {"--rank", "2"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 2, argv), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "'--ranks'"));
    const char *far[] = {"--xyzzyplugh"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 1, far), RA_ERR_USAGE);
    assert_null(strstr(ra_last_error(), "did you mean"));
}

static void an_unknown_key_is_refused_with_its_line_and_the_nearest_one(void **state)
{
    char path[64];
    write_file(path, "# first\nring.rank = 3\n");
    assert_int_equal(ra_settings_load_file(*state, path), RA_ERR_USAGE);
    unlink(path);
    assert_non_null(strstr(ra_last_error(), ":2: unknown key 'ring.rank'"));
    assert_non_null(strstr(ra_last_error(), "'ring.ranks'"));
}

static void a_flag_of_another_command_is_refused(void **state)
{
    const char *argv[] = {"--ranks", "2"};
    assert_int_equal(load(*state, RA_FOR_TOKENIZE, 2, argv), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "--ranks is not a flag of this command"));
}

static void values_outside_type_or_range_are_refused(void **state)
{
    static const char *const bad[][2] = {
        {"--ranks", "0"},
        {"--ranks", "4097"},
        {"--ranks", "two"},
        {"--ranks", "2x"},
        {"--ranks", ""},
        {"--ranks", "99999999999999999999"},
        {"--layout", "zig"},
        {"--layout", ""},
        {"--layout", "zigzag|contiguous"},
        {"--timeout", "nan"},
        {"--timeout", "-1"},
        {"--timeout", "1e400"},
        {"--max-errors", "101%"},
        {"--max-errors", "-1"},
        {"--max-errors", "%"},
        {"--max-doc-bytes", "9Gi9"},
        {"--max-errors", "nan%"},
        {"--max-doc-bytes", "2048Gi"},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        assert_int_equal(load(*state, RA_FOR_SCORE, 2, bad[i]), RA_ERR_USAGE);
        assert_non_null(strstr(ra_last_error(), bad[i][0]));
    }
    assert_int_equal(ra_settings_int(*state, RA_SET_RANKS), 1);
}

static void suffixes_percentages_and_switches_are_understood(void **state)
{
    double percent = -1;
    int64_t count = -1;
    assert_true(ra_settings_limit(*state, RA_SET_MAX_ERRORS, &percent, &count));
    assert_true(percent == 1.0);

    const char *argv[] = {"--max-doc-bytes", "2Ki", "--max-errors", "7", "--reproducible"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 5, argv), RA_OK);
    assert_int_equal(ra_settings_int(*state, RA_SET_MAX_DOC_BYTES), 2048);
    assert_false(ra_settings_limit(*state, RA_SET_MAX_ERRORS, &percent, &count));
    assert_int_equal(count, 7);
    assert_true(ra_settings_bool(*state, RA_SET_REPRODUCIBLE));

    const char *off[] = {"--reproducible=off"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 1, off), RA_OK);
    assert_false(ra_settings_bool(*state, RA_SET_REPRODUCIBLE));
}

static void a_flag_without_its_value_and_a_stray_word_are_refused(void **state)
{
    const char *argv[] = {"--ranks"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 1, argv), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "--ranks needs a value"));
    const char *stray[] = {"file.txt"};
    assert_int_equal(load(*state, RA_FOR_SCORE, 1, stray), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "'file.txt'"));
}

static void broken_configuration_files_are_refused_with_their_line(void **state)
{
    static const char *const bad[] = {"ring.ranks\n", "ring.ranks = \"2\n", "ring.ranks = 2 3\n",
                                      "= 3\n", "input = \"a\" b\n"};
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        char path[64];
        write_file(path, bad[i]);
        assert_int_equal(ra_settings_load_file(*state, path), RA_ERR_USAGE);
        assert_non_null(strstr(ra_last_error(), ":1"));
        unlink(path);
    }
    assert_int_equal(ra_settings_load_file(*state, "/nonexistent/ra.conf"), RA_ERR_USAGE);
}

static void quotes_keep_spaces_and_hashes(void **state)
{
    char path[64];
    write_file(path, "input = \" a # b \"  # comment\noutput = dir#1 # comment\n");
    assert_int_equal(ra_settings_load_file(*state, path), RA_OK);
    unlink(path);
    assert_string_equal(ra_settings_text(*state, RA_SET_INPUT), " a # b ");
    assert_string_equal(ra_settings_text(*state, RA_SET_OUTPUT), "dir#1");
}

static void help_names_every_flag_of_the_command_and_no_other(void **state)
{
    (void)state;
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    ra_settings_help(out, RA_FOR_TOKENIZE);
    fclose(out);
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        const ra_setting_t *row = ra_setting((ra_setting_id_t)id);
        if (row->flag == NULL) {
            continue;
        }
        char head[64];
        snprintf(head, sizeof(head), "  %s ", row->flag);
        assert_int_equal(strstr(text, head) != NULL, (row->commands & RA_FOR_TOKENIZE) != 0);
    }
    free(text);
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        CASE(every_default_is_a_value_of_its_own_setting),
        CASE(a_flag_beats_the_environment_which_beats_the_file),
        CASE(an_unknown_flag_is_refused_with_the_nearest_one),
        CASE(an_unknown_key_is_refused_with_its_line_and_the_nearest_one),
        CASE(a_flag_of_another_command_is_refused),
        CASE(values_outside_type_or_range_are_refused),
        CASE(suffixes_percentages_and_switches_are_understood),
        CASE(a_flag_without_its_value_and_a_stray_word_are_refused),
        CASE(broken_configuration_files_are_refused_with_their_line),
        CASE(quotes_keep_spaces_and_hashes),
        CASE(help_names_every_flag_of_the_command_and_no_other),
    };
    return cmocka_run_group_tests_name("base.settings", tests, NULL, NULL);
}
