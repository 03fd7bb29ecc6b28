#include "base/log.h"
#include "base/status.h"
#include "tests/test_support.h"
#include <string.h>
#include <unistd.h>

static void escaped_is(const char *text, const char *want)
{
    char out[256];
    size_t length = ra_log_escape(text, out, sizeof(out));
    assert_string_equal(out, want);
    assert_int_equal(length, strlen(want));
}

static void control_bytes_are_escaped(void **state)
{
    (void)state;
    escaped_is("plain text", "plain text");
    escaped_is("a\x1b[31mred\x07\n\r\t\x7f", "a\\x1b[31mred\\x07\\x0a\\x0d\\x09\\x7f");
    /* U+0085 and U+009B (an 8-bit CSI) are control characters, though valid UTF-8 */
    escaped_is("\xc2\x85\xc2\x9b", "\\xc2\\x85\\xc2\\x9b");
    /* U+202E turns the writing direction round */
    escaped_is("\xe2\x80\xae", "\\xe2\\x80\\xae");
}

static void valid_utf8_passes_and_broken_utf8_is_escaped(void **state)
{
    (void)state;
    escaped_is("\xc3\xa9 \xe6\xb0\xb4 \xf0\x9f\x98\x80", "\xc3\xa9 \xe6\xb0\xb4 \xf0\x9f\x98\x80");
    escaped_is("\xff\xc3", "\\xff\\xc3");
    escaped_is("\xc0\xaf", "\\xc0\\xaf");                   /* overlong '/' */
    escaped_is("\xed\xa0\x80", "\\xed\\xa0\\x80");          /* surrogate */
    escaped_is("\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"); /* beyond U+10FFFF */
}

static void truncation_keeps_whole_pieces_and_the_end(void **state)
{
    (void)state;
    char out[6];
    assert_int_equal(ra_log_escape("ab\x01", out, sizeof(out)), 2);
    assert_string_equal(out, "ab");
    assert_int_equal(ra_log_escape("abcdefgh", out, sizeof(out)), 5);
    assert_string_equal(out, "abcde");
    assert_int_equal(ra_log_escape("x", out, 0), 0);
}

/* Everything written to stderr by @a emit, as text. */
static void capture(void (*emit)(void), char *text, size_t size)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    int saved = dup(STDERR_FILENO);
    dup2(ends[1], STDERR_FILENO);
    emit();
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(ends[1]);
    ssize_t n = read(ends[0], text, size - 1);
    close(ends[0]);
    text[n > 0 ? n : 0] = '\0';
}

static void emit_levels(void)
{
    ra_log_set_level(RA_LOG_WARN);
    ra_log(RA_LOG_INFO, "room", "not shown");
    ra_log(RA_LOG_WARN, "room", "id '%s'", "a\x1b[2J\nringattn error room: forged");
}

static void a_line_is_one_line_whatever_the_input_holds(void **state)
{
    (void)state;
    char text[512];
    capture(emit_levels, text, sizeof(text));
    assert_string_equal(text, "ringattn warn room: id 'a\\x1b[2J\\x0aringattn error room: "
                              "forged'\n");
}

static void emit_rank(void)
{
    ra_log_set_rank(3);
    ra_fail(RA_ERR_PEER, "ring", "gone");
    ra_log_set_rank(-1);
    ra_log_set_quiet(1);
    ra_fail(RA_ERR_PEER, "ring", "silent");
    ra_log_set_quiet(0);
}

static void the_rank_is_shown_and_quiet_threads_print_no_errors(void **state)
{
    (void)state;
    char text[512];
    capture(emit_rank, text, sizeof(text));
    assert_string_equal(text, "ringattn error [rank 3] ring: gone\n");
    assert_string_equal(ra_last_error(), "silent");
}

static void emit_long(void)
{
    static char long_text[10000];
    memset(long_text, 'x', sizeof(long_text) - 1);
    ra_log(RA_LOG_ERROR, "room", "%s", long_text);
}

static void a_line_too_long_is_cut_and_still_ends(void **state)
{
    (void)state;
    char text[8192];
    capture(emit_long, text, sizeof(text));
    assert_true(strlen(text) > 1000 && strlen(text) < 4096);
    assert_int_equal(text[strlen(text) - 1], '\n');
}

static void levels_are_parsed_by_name(void **state)
{
    (void)state;
    ra_log_level_t level = RA_LOG_ERROR;
    assert_int_equal(ra_log_level_parse("debug", &level), 0);
    assert_int_equal(level, RA_LOG_DEBUG);
    assert_int_equal(ra_log_level_parse("loud", &level), -1);
    assert_int_equal(level, RA_LOG_DEBUG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(control_bytes_are_escaped),
        cmocka_unit_test(valid_utf8_passes_and_broken_utf8_is_escaped),
        cmocka_unit_test(truncation_keeps_whole_pieces_and_the_end),
        cmocka_unit_test(a_line_is_one_line_whatever_the_input_holds),
        cmocka_unit_test(the_rank_is_shown_and_quiet_threads_print_no_errors),
        cmocka_unit_test(a_line_too_long_is_cut_and_still_ends),
        cmocka_unit_test(levels_are_parsed_by_name),
    };
    return cmocka_run_group_tests_name("base.log", tests, NULL, NULL);
}
