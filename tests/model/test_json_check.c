#include "model/json_check.h"
#include "tests/model/file_support.h"

static ra_status_t parse_bytes(const char *bytes, size_t length)
{
    cJSON *root = NULL;
    ra_status_t status = ra_json_parse("text.json", bytes, (int64_t)length, &root);
    cJSON_Delete(root);
    return status;
}

static void a_broken_text_is_refused_with_file_byte_and_cause(void **state)
{
    static const struct {
        const char *text, *place, *cause;
    } cases[] = {
        {"", "byte 0", "ends"},
        {"  ", "byte 2", "ends"},
        {"{\"a\":1,\"a\":2}", "byte 7", "\"a\" is there twice (first at byte 1)"},
        {"{\"a\":1,\"\\u0061\":2}", "byte 7", "twice"},
        {"[{\"x\":{\"k\":1,\"k\":1}}]", "byte 13", "twice"},
        {"{\"\\ud83d\\ude00\":1,\"\xf0\x9f\x98\x80\":2}", "byte 18", "twice"},
        {"{\"\":1,\"\":2}", "byte 6", "twice"},
        {"[1,2", "byte 0", "does not end"},
        {"[1,]", "byte 3", "not a JSON value"},
        {"[1 2]", "byte 3", "neither ','"},
        {"{\"a\" 1}", "byte 5", "no ':'"},
        {"{a:1}", "byte 1", "key must be a string"},
        {"{} x", "byte 3", "follows"},
        {"{}{}", "byte 2", "follows"},
        {"\xef\xbb\xbf{}", "byte 0", "not a JSON value"},
        {"01", "byte 1", "follows"},
        {"-", "byte 0", "not a JSON number"},
        {"1.", "byte 0", "not a JSON number"},
        {"1e", "byte 0", "not a JSON number"},
        {"+1", "byte 0", "not a JSON value"},
        {"NaN", "byte 0", "not a JSON value"},
        {"nul", "byte 0", "not a JSON value"},
        {"1111111111111111111111111111111111111111111111111111111111111", "byte 0", "60"},
        {"\"abc", "byte 0", "does not end"},
        {"\"\\x\"", "byte 1", "escape"},
        {"\"\\u12g4\"", "byte 5", "hexadecimal"},
        {"\"\\u0000\"", "byte 1", "\\u0000"},
        {"\"\\ud800\"", "byte 1", "surrogate"},
        {"\"\\ud800\\u0041\"", "byte 1", "surrogate"},
        {"\"\\udc00\"", "byte 1", "surrogate"},
        {"\"a\nb\"", "byte 2", "control"},
        {"\"\xff\"", "byte 1", "UTF-8"},
        {"\"\xc0\xaf\"", "byte 1", "UTF-8"},
        {"\"\xed\xa0\x80\"", "byte 1", "UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "byte 1", "UTF-8"},
        {"\"\xe2\x82\"", "byte 1", "UTF-8"},
    };
    (void)state;
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        REFUSED(parse_bytes(cases[i].text, strlen(cases[i].text)), RA_ERR_INPUT, "text.json",
                cases[i].place, cases[i].cause);
    }
    ra_log_set_quiet(0);
}

static void a_nul_byte_is_refused_wherever_it_stands(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    REFUSED(parse_bytes("\0", 1), RA_ERR_INPUT, "byte 0", "NUL");
    REFUSED(parse_bytes("{}\0", 3), RA_ERR_INPUT, "byte 2", "follows");
    REFUSED(parse_bytes("\"a\0b\"", 5), RA_ERR_INPUT, "byte 2", "control");
    ra_log_set_quiet(0);
}

static void depth_64_is_read_and_65_is_not(void **state)
{
    char text[140];
    (void)state;
    for (int depth = 64; depth <= 65; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        if (depth == 64) {
            accepted(parse_bytes(text, 128));
        } else {
            ra_log_set_quiet(1);
            REFUSED(parse_bytes(text, 130), RA_ERR_INPUT, "byte 64", "deeper than 64");
            ra_log_set_quiet(0);
        }
    }
}

static void stricter_rules_refuse_what_they_name(void **state)
{
    static const ra_json_rules_t rules = {.max_depth = 2, .plain_integers = true};
    static const char *const bad[] = {"[-1]", "[1.0]", "[1e3]", "[[[1]]]"};
    cJSON *root = NULL;
    (void)state;
    accepted(ra_json_parse_rules("r.json", "[[0,17]]", 8, &rules, &root));
    cJSON_Delete(root);
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        int64_t length = (int64_t)strlen(bad[i]);
        REFUSED(ra_json_parse_rules("r.json", bad[i], length, &rules, &root), RA_ERR_INPUT,
                "r.json", "byte");
    }
    ra_log_set_quiet(0);
}

static void valid_text_is_read_with_its_values(void **state)
{
    static const char text[] =
        " {\"a\":[1,-2.5e3,true,false,null],\"b\":\"\\ud83d\\ude00\\n\xc3\xa9\","
        "\"c\":{\"a\":{}},\"A\":7} \n";
    cJSON *root = NULL;
    (void)state;
    accepted(ra_json_parse("text.json", text, sizeof(text) - 1, &root));
    int64_t upper = 0;
    const char *string = NULL;
    accepted(ra_json_int("text.json", root, "A", 0, 10, &upper));
    accepted(ra_json_string("text.json", root, "b", &string));
    assert_int_equal(upper, 7);
    assert_string_equal(string, "\xf0\x9f\x98\x80\n\xc3\xa9");
    cJSON_Delete(root);
}

static void a_vocabulary_of_200000_keys_is_checked_for_duplicates(void **state)
{
    enum { KEYS = 200000 };
    char *text = malloc(KEYS * 20 + 64);
    cJSON *root = NULL;
    (void)state;
    assert_non_null(text);
    size_t used = (size_t)sprintf(text, "{\"k0\":0");
    for (int i = 1; i < KEYS; i++) {
        used += (size_t)sprintf(text + used, ",\"k%d\":%d", i, i);
    }
    strcpy(text + used, "}");
    accepted(ra_json_parse("vocab.json", text, (int64_t)used + 1, &root));
    cJSON_Delete(root);
    strcpy(text + used, ",\"k77777\":1}");
    ra_log_set_quiet(1);
    REFUSED(parse_bytes(text, strlen(text)), RA_ERR_INPUT, "\"k77777\" is there twice");
    ra_log_set_quiet(0);
    free(text);
}

static void getters_name_file_key_value_and_what_is_allowed(void **state)
{
    static const char text[] =
        "{\"i\":3,\"f\":2.5,\"big\":9007199254740993,\"inf\":1e999,\"n\":null,"
        "\"s\":\"x\",\"b\":true}";
    cJSON *root = NULL;
    int64_t i = 0;
    double f = 0;
    bool b = false;
    const char *s = NULL;
    (void)state;
    accepted(ra_json_parse("c.json", text, sizeof(text) - 1, &root));
    ra_log_set_quiet(1);
    REFUSED(ra_json_int("c.json", root, "i", 4, 9, &i), RA_ERR_INPUT, "c.json", "\"i\"", "is 3",
            "from 4 to 9");
    REFUSED(ra_json_int("c.json", root, "f", 0, 9, &i), RA_ERR_INPUT, "\"f\"", "2.5");
    REFUSED(ra_json_int("c.json", root, "big", 0, INT64_MAX, &i), RA_ERR_INPUT, "\"big\"");
    REFUSED(ra_json_int("c.json", root, "s", 0, 9, &i), RA_ERR_INPUT, "\"s\"", "not a string");
    REFUSED(ra_json_int("c.json", root, "I", 0, 9, &i), RA_ERR_INPUT, "\"I\"", "missing");
    REFUSED(ra_json_int("c.json", root, "n", 0, 9, &i), RA_ERR_INPUT, "\"n\"", "missing");
    REFUSED(ra_json_double("c.json", root, "inf", 0, 1e308, &f), RA_ERR_INPUT, "\"inf\"");
    REFUSED(ra_json_bool("c.json", root, "i", &b), RA_ERR_INPUT, "\"i\"", "true or false");
    REFUSED(ra_json_string("c.json", root, "b", &s), RA_ERR_INPUT, "\"b\"", "not a boolean");
    REFUSED(ra_json_int_or("c.json", root, "f", 0, 9, 5, &i), RA_ERR_INPUT, "\"f\"");
    ra_log_set_quiet(0);
    accepted(ra_json_int_or("c.json", root, "n", 0, 9, 5, &i));
    assert_int_equal(i, 5);
    accepted(ra_json_double("c.json", root, "f", 0, 9, &f));
    assert_true(f == 2.5);
    accepted(ra_json_bool_or("c.json", root, "absent", true, &b));
    assert_true(b);
    accepted(ra_json_string_or("c.json", root, "absent", "d", &s));
    assert_string_equal(s, "d");
    cJSON_Delete(root);
}

static void a_file_is_bounded_and_must_exist(void **state)
{
    temp_t temp = temp_make();
    cJSON *root = NULL;
    (void)state;
    temp_write_text(&temp, "ok.json", "[1,2,3]");
    accepted(ra_json_read_file(temp_path(&temp, "ok.json"), 7, &root));
    cJSON_Delete(root);
    REFUSED(ra_json_read_file(temp_path(&temp, "ok.json"), 6, &root), RA_ERR_INPUT, "ok.json",
            "7 bytes", "6 allowed");
    REFUSED(ra_json_read_file(temp_path(&temp, "none.json"), 9, &root), RA_ERR_USAGE, "none.json",
            "No such file");
    REFUSED(ra_json_read_file(temp.path, 9, &root), RA_ERR_INPUT, "not a regular file");
    temp_remove(&temp);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_broken_text_is_refused_with_file_byte_and_cause),
        cmocka_unit_test(a_nul_byte_is_refused_wherever_it_stands),
        cmocka_unit_test(depth_64_is_read_and_65_is_not),
        cmocka_unit_test(stricter_rules_refuse_what_they_name),
        cmocka_unit_test(valid_text_is_read_with_its_values),
        cmocka_unit_test(a_vocabulary_of_200000_keys_is_checked_for_duplicates),
        cmocka_unit_test(getters_name_file_key_value_and_what_is_allowed),
        cmocka_unit_test(a_file_is_bounded_and_must_exist),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
