#include "base/log.h"
#include "cli/input_rows.h"
#include "tests/cli/cli_support.h"

enum { LIMIT = 4096 };

static ra_rows_t *open_text(const char *name, const char *text)
{
    ra_rows_t *rows = NULL;
    assert_int_equal(ra_rows_open(test_write_text(name, text), LIMIT, &rows), RA_OK);
    return rows;
}

/* The next row must exist; the caller frees it. */
static ra_row_t next(ra_rows_t *rows)
{
    ra_row_t row;
    bool end = true;
    assert_int_equal(ra_rows_next(rows, &row, &end), RA_OK);
    assert_false(end);
    return row;
}

static void expect_end(ra_rows_t *rows)
{
    ra_row_t row;
    bool end = false;
    assert_int_equal(ra_rows_next(rows, &row, &end), RA_OK);
    assert_true(end);
    ra_rows_close(rows);
}

static void rows_of_text_and_tokens_come_in_order_with_their_places(void **state)
{
    (void)state;
    ra_rows_t *rows = open_text("docs.jsonl", "{\"id\":\"a\",\"text\":\"two words\"}\n"
                                              "\n  \r\n"
                                              "{\"tokens\":[1,2,3],\"extra\":{\"x\":1}}\r\n"
                                              "{\"id\":\"last\",\"text\":\"no newline\"}");
    ra_row_t row = next(rows);
    assert_string_equal(row.id, "a");
    assert_int_equal(row.line, 1);
    assert_int_equal(row.offset, 0);
    assert_string_equal(row.text, "two words");
    assert_int_equal(row.counts.words, 2);
    ra_row_free(&row);

    row = next(rows);
    assert_string_equal(row.id, "docs.jsonl:4");
    assert_int_equal(row.line, 4);
    assert_int_equal(row.offset, 35);
    assert_int_equal(row.count, 3);
    assert_int_equal(row.tokens[2], 3);
    assert_null(row.text);
    ra_row_free(&row);

    row = next(rows);
    assert_string_equal(row.id, "last");
    ra_row_free(&row);
    expect_end(rows);
}

static void a_bad_row_fails_alone_with_its_own_code(void **state)
{
    (void)state;
    static const struct {
        const char *row;
        ra_row_error_t error;
    } cases[] = {
        {"nonsense", RA_ROW_BAD_JSON},
        {"{\"id\":\"x\",\"text\":\"a\"} trailing", RA_ROW_BAD_JSON},
        {"{\"id\":\"x\",\"text\":\"a\",\"text\":\"b\"}", RA_ROW_BAD_JSON},
        {"{\"text\":\"a\\u0000b\"}", RA_ROW_BAD_JSON},
        {"{\"text\":\"\\ud800\"}", RA_ROW_BAD_JSON},
        {"{\"text\":", RA_ROW_BAD_JSON},
        {"{\"text\":\"\xff\"}", RA_ROW_BAD_UTF8},
        {"{\"text\":\"\xc0\xaf\"}", RA_ROW_BAD_UTF8},
        {"[1,2]", RA_ROW_BAD_ROW},
        {"\"text\"", RA_ROW_BAD_ROW},
        {"{}", RA_ROW_BAD_ROW},
        {"{\"text\":null}", RA_ROW_BAD_ROW},
        {"{\"text\":7}", RA_ROW_BAD_ROW},
        {"{\"tokens\":\"1 2\"}", RA_ROW_BAD_ROW},
        {"{\"path\":[]}", RA_ROW_BAD_ROW},
        {"{\"text\":\"a\",\"tokens\":[1]}", RA_ROW_BAD_ROW},
        {"{\"id\":7.5,\"text\":\"a\"}", RA_ROW_BAD_ROW},
        {"{\"id\":1e300,\"text\":\"a\"}", RA_ROW_BAD_ROW},
        {"{\"id\":[7],\"text\":\"a\"}", RA_ROW_BAD_ROW},
        {"{\"text\":\"\"}", RA_ROW_EMPTY_TEXT},
        {"{\"tokens\":[]}", RA_ROW_NO_TOKENS},
        {"{\"tokens\":[1,-1]}", RA_ROW_BAD_TOKEN},
        {"{\"tokens\":[1.5]}", RA_ROW_BAD_TOKEN},
        {"{\"tokens\":[2147483648]}", RA_ROW_BAD_TOKEN},
        {"{\"tokens\":[1e300]}", RA_ROW_BAD_TOKEN},
        {"{\"tokens\":[\"1\"]}", RA_ROW_BAD_TOKEN},
        {"{\"tokens\":[null]}", RA_ROW_BAD_TOKEN},
        {"{\"path\":\"absent.txt\"}", RA_ROW_MISSING_FILE},
        {"{\"path\":\"docs.jsonl\"}", RA_ROW_BAD_FILE},
        {"{\"path\":\"/dev/null\"}", RA_ROW_BAD_FILE},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        char text[512];
        snprintf(text, sizeof(text),
                 "{\"id\":\"before\",\"text\":\"b\"}\n%s\n{\"text\":\"after\"}\n", cases[i].row);
        ra_rows_t *rows = open_text("docs.jsonl", text);
        ra_row_t before = next(rows), bad = next(rows), after = next(rows);
        assert_int_equal(before.error, RA_ROW_NONE);
        if (bad.error != cases[i].error) {
            fail_msg("%s: got %s (%s), want %s", cases[i].row, ra_row_error_code(bad.error),
                     bad.message, ra_row_error_code(cases[i].error));
        }
        assert_true(strlen(bad.message) > 0);
        assert_int_equal(bad.line, 2);
        assert_null(bad.text);
        assert_null(bad.tokens);
        assert_int_equal(after.error, RA_ROW_NONE);
        assert_string_equal(after.text, "after");
        ra_row_free(&before);
        ra_row_free(&bad);
        ra_row_free(&after);
        expect_end(rows);
    }
}

static void a_duplicate_id_fails_the_later_row(void **state)
{
    (void)state;
    ra_rows_t *rows = open_text("d.jsonl", "{\"id\":\"a\",\"text\":\"1\"}\n"
                                           "{\"id\":\"a\",\"text\":\"2\"}\n"
                                           "{\"text\":\"3\"}\n"
                                           "{\"id\":\"d.jsonl:3\",\"text\":\"4\"}\n");
    static const ra_row_error_t want[] = {RA_ROW_NONE, RA_ROW_DUPLICATE_ID, RA_ROW_NONE,
                                          RA_ROW_DUPLICATE_ID};
    for (int i = 0; i < 4; i++) {
        ra_row_t row = next(rows);
        assert_int_equal(row.error, want[i]);
        ra_row_free(&row);
    }
    expect_end(rows);
}

static void a_line_over_the_limit_fails_and_the_next_is_read(void **state)
{
    (void)state;
    static char text[3 * LIMIT];
    memset(text, 'x', sizeof(text) - 1);
    memcpy(text, "{\"text\":\"", 9);
    strcpy(text + LIMIT + 1, "\"}\n{\"text\":\"short\"}\n");
    ra_rows_t *rows = open_text("long.jsonl", text);
    ra_row_t row = next(rows);
    assert_int_equal(row.error, RA_ROW_TOO_LONG);
    ra_row_free(&row);
    row = next(rows);
    assert_int_equal(row.error, RA_ROW_NONE);
    assert_string_equal(row.text, "short");
    ra_row_free(&row);
    expect_end(rows);
}

static void paths_start_at_the_folder_of_the_rows(void **state)
{
    (void)state;
    static const unsigned char npy[] = "\x93NUMPY\x01\x00\x46\x00{'descr': '<u2', 'fortran_order': "
                                       "False, 'shape': (2,), }            \n\x05\x00\x06\x00";
    test_write_text("a.txt", "from a file");
    test_write("t.npy", npy, sizeof(npy) - 1);
    ra_rows_t *rows = open_text("p.jsonl", "{\"id\":\"1\",\"path\":\"a.txt\"}\n"
                                           "{\"id\":\"2\",\"path\":\"t.npy\"}\n");
    ra_row_t row = next(rows);
    assert_int_equal(row.error, RA_ROW_NONE);
    assert_string_equal(row.text, "from a file");
    ra_row_free(&row);
    row = next(rows);
    if (row.error != RA_ROW_NONE) {
        fail_msg("%s", row.message);
    }
    assert_int_equal(row.count, 2);
    assert_int_equal(row.tokens[0], 5);
    assert_int_equal(row.tokens[1], 6);
    ra_row_free(&row);
    expect_end(rows);
}

static void whole_files_are_one_row_named_after_the_file(void **state)
{
    (void)state;
    ra_rows_t *rows = open_text("story.TXT", "once\n");
    ra_row_t row = next(rows);
    assert_true(ra_rows_is_whole_file(rows));
    assert_string_equal(row.id, "story.TXT");
    assert_int_equal(row.line, 0);
    assert_string_equal(row.text, "once\n");
    ra_row_free(&row);
    expect_end(rows);
}

static void inputs_that_cannot_be_are_refused_as_usage(void **state)
{
    (void)state;
    ra_rows_t *rows = NULL;
    assert_int_equal(ra_rows_open(test_path("absent.jsonl"), LIMIT, &rows), RA_ERR_USAGE);
    assert_int_equal(ra_rows_open(test_folder, LIMIT, &rows), RA_ERR_USAGE);
    assert_int_equal(ra_rows_open(test_write_text("x.csv", "a"), LIMIT, &rows), RA_ERR_USAGE);
    assert_null(rows);
}

static void a_byte_order_mark_before_the_first_row_is_passed_over(void **state)
{
    (void)state;
    ra_rows_t *rows = open_text("bom.jsonl", "\xef\xbb\xbf{\"id\":\"a\",\"text\":\"x\"}\n");
    ra_row_t row = next(rows);
    assert_int_equal(row.error, RA_ROW_NONE);
    assert_string_equal(row.id, "a");
    ra_row_free(&row);
    expect_end(rows);
}

static void the_digest_depends_on_the_contents_only(void **state)
{
    (void)state;
    ra_rows_t *rows = open_text("g.jsonl", "{\"id\":\"a\",\"text\":\"same\"}\n"
                                           "{\"id\":\"b\",\"text\":\"\\u0073ame\"}\n"
                                           "{\"id\":\"c\",\"text\":\"other\"}\n");
    ra_row_t a = next(rows), b = next(rows), c = next(rows);
    assert_memory_equal(&a.digest, &b.digest, sizeof(a.digest));
    assert_memory_not_equal(&a.digest, &c.digest, sizeof(a.digest));
    ra_row_free(&a);
    ra_row_free(&b);
    ra_row_free(&c);
    expect_end(rows);
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, test_folder_make, test_folder_remove)
    const struct CMUnitTest tests[] = {
        CASE(rows_of_text_and_tokens_come_in_order_with_their_places),
        CASE(a_bad_row_fails_alone_with_its_own_code),
        CASE(a_duplicate_id_fails_the_later_row),
        CASE(a_line_over_the_limit_fails_and_the_next_is_read),
        CASE(paths_start_at_the_folder_of_the_rows),
        CASE(whole_files_are_one_row_named_after_the_file),
        CASE(inputs_that_cannot_be_are_refused_as_usage),
        CASE(a_byte_order_mark_before_the_first_row_is_passed_over),
        CASE(the_digest_depends_on_the_contents_only),
    };
    ra_log_set_quiet(1);
    return cmocka_run_group_tests_name("cli.input_rows", tests, NULL, NULL);
}
