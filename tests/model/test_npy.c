#include "model/npy.h"
#include "tests/model/file_support.h"

/* A .npy file: header text, padded with spaces and a newline, then data. */
static size_t build_npy(unsigned char *out, int major, const char *header, const void *data,
                        size_t data_bytes)
{
    size_t text = strlen(header) + 3, at = major == 1 ? 10 : 12;
    memcpy(out, "\x93NUMPY", 6);
    out[6] = (unsigned char)major;
    out[7] = 0;
    for (size_t i = 8; i < at; i++) {
        out[i] = (unsigned char)(text >> (8 * (i - 8)));
    }
    memcpy(out + at, header, strlen(header));
    memcpy(out + at + strlen(header), "  \n", 3);
    memcpy(out + at + text, data, data_bytes);
    return at + text + data_bytes;
}

static ra_status_t parse(const unsigned char *bytes, size_t length)
{
    /* a copy of exactly that size, so that a sanitizer sees a read behind it */
    unsigned char *copy = malloc(length + (length == 0));
    int32_t *tokens = NULL;
    int64_t count = 0;
    memcpy(copy, bytes, length);
    ra_status_t status = ra_tokens_parse("t.npy", copy, (int64_t)length, &tokens, &count);
    free(tokens);
    free(copy);
    return status;
}

static void every_integer_type_and_version_gives_the_same_tokens(void **state)
{
    static const uint16_t u2[3] = {1, 2, 65535};
    static const uint32_t u4[3] = {1, 2, 65535};
    static const int32_t i4[3] = {1, 2, 65535};
    static const int64_t i8[3] = {1, 2, 65535};
    static const struct {
        const char *descr;
        const void *data;
        size_t bytes;
    } cases[] = {{"<u2", u2, 6}, {"<u4", u4, 12}, {"<i4", i4, 12}, {"<i8", i8, 24}};
    static const int32_t want[3] = {1, 2, 65535};
    unsigned char bytes[512];
    char header[128];
    (void)state;
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        for (int major = 1; major <= 3; major++) {
            int32_t *tokens = NULL;
            int64_t count = 0;
            sprintf(header, "{'descr': '%s', 'fortran_order': False, 'shape': (3,), }",
                    cases[i].descr);
            size_t n = build_npy(bytes, major, header, cases[i].data, cases[i].bytes);
            accepted(ra_tokens_parse("t.npy", bytes, (int64_t)n, &tokens, &count));
            assert_int_equal(count, 3);
            assert_memory_equal(tokens, want, sizeof(want));
            free(tokens);
        }
    }
}

static void a_broken_npy_is_refused_with_file_byte_and_cause(void **state)
{
#define SHAPE(s) "{'descr': '<u4', 'fortran_order': False, 'shape': " s ", }"
    static const struct {
        const char *header, *says;
    } cases[] = {
        {SHAPE("(4,)"), "4 elements of 4 bytes, 12 bytes follow"},
        {SHAPE("(2,)"), "2 elements of 4 bytes, 12 bytes follow"},
        {SHAPE("(4611686018427387904,)"), "elements"},
        {SHAPE("(99999999999999999999,)"), "overflows"},
        {SHAPE("(3,1)"), "one dimension"},
        {SHAPE("(3)"), "one dimension"},
        {SHAPE("()"), "one dimension"},
        {SHAPE("(-3,)"), "one dimension"},
        {SHAPE("[3]"), "tuple"},
        {"{'descr': '>u4', 'fortran_order': False, 'shape': (3,), }", "\">u4\""},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "\"|O\""},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", "<f4"},
        {"{'descr': [('a', '<u4')], 'fortran_order': False, 'shape': (3,), }", "short string"},
        {"{'descr': '<u4', 'fortran_order': True, 'shape': (3,), }", "fortran_order"},
        {"{'descr': '<u4', 'shape': (3,), }", "lacks"},
        {"{'descr': '<u4', 'descr': '<u4', 'shape': (3,), }", "dictionary of"},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (3,), 'x': 1}", "dictionary of"},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (3,), } os.system", "follows"},
        {"{'descr': '<u4' 'fortran_order': False, 'shape': (3,), }", "neither ','"},
        {"{'descr': '<u4", "short string"},
        {"", "not a dictionary"},
    };
    static const uint32_t data[3] = {1, 2, 3};
    unsigned char bytes[512];
    (void)state;
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        size_t n = build_npy(bytes, 1, cases[i].header, data, sizeof(data));
        REFUSED(parse(bytes, n), RA_ERR_INPUT, "t.npy", cases[i].says);
    }
    size_t n = build_npy(bytes, 4, SHAPE("(3,)"), data, sizeof(data));
    REFUSED(parse(bytes, n), RA_ERR_INPUT, "byte 6", "version 4.0");
    n = build_npy(bytes, 2, SHAPE("(3,)"), data, sizeof(data));
    bytes[11] = 0xff;
    REFUSED(parse(bytes, n), RA_ERR_INPUT, "byte 8", "ends inside");
    ra_log_set_quiet(0);
}

static void every_truncation_is_refused(void **state)
{
    static const uint32_t data[3] = {1, 2, 3};
    unsigned char bytes[512];
    size_t n = build_npy(bytes, 1, SHAPE("(3,)"), data, sizeof(data));
    (void)state;
    ra_log_set_quiet(1);
    for (size_t cut = 0; cut < n; cut++) {
        REFUSED(parse(bytes, cut), RA_ERR_INPUT, "t.npy");
    }
    ra_log_set_quiet(0);
    accepted(parse(bytes, n));
}

static void ids_that_are_negative_or_too_large_are_named_with_their_place(void **state)
{
    static const int64_t large[2] = {5, (int64_t)1 << 31};
    static const int32_t negative[3] = {5, 6, -7};
    unsigned char bytes[512];
    (void)state;
    ra_log_set_quiet(1);
    size_t n = build_npy(bytes, 1, "{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}", large,
                         sizeof(large));
    REFUSED(parse(bytes, n), RA_ERR_INPUT, "token 1 is 2147483648", "0 to 2147483647");
    n = build_npy(bytes, 1, "{'descr': '<i4', 'fortran_order': False, 'shape': (3,)}", negative,
                  sizeof(negative));
    REFUSED(parse(bytes, n), RA_ERR_INPUT, "token 2 is -7");
    ra_log_set_quiet(0);
}

static void put_i32(unsigned char *at, int32_t value)
{
    memcpy(at, &value, sizeof(value));
}

static void both_kinds_of_bin_are_read_and_broken_ones_refused(void **state)
{
    unsigned char bytes[1024 + 12] = {0};
    static const uint32_t wide[3] = {1, 70000, 3};
    static const uint16_t narrow[3] = {1, 65000, 3};
    int32_t *tokens = NULL;
    int64_t count = 0;
    (void)state;
    put_i32(bytes, 20240801);
    put_i32(bytes + 4, 7);
    put_i32(bytes + 8, 3);
    memcpy(bytes + 1024, wide, sizeof(wide));
    accepted(ra_tokens_parse("t.bin", bytes, 1036, &tokens, &count));
    assert_int_equal(count, 3);
    assert_int_equal(tokens[1], 70000);
    free(tokens);
    ra_log_set_quiet(1);
    REFUSED(parse(bytes, 1035), RA_ERR_INPUT, "byte 1024", "3 elements of 4 bytes");
    put_i32(bytes + 8, -1);
    REFUSED(parse(bytes, 1036), RA_ERR_INPUT, "byte 8", "negative");
    put_i32(bytes + 4, 1);
    REFUSED(parse(bytes, 1036), RA_ERR_INPUT, "byte 0", "magic 20240801, version 1");
    REFUSED(parse(bytes, 1023), RA_ERR_INPUT, "neither a .npy nor a .bin");
    ra_log_set_quiet(0);

    put_i32(bytes, 20240520);
    put_i32(bytes + 8, 3);
    memcpy(bytes + 1024, narrow, sizeof(narrow));
    accepted(ra_tokens_parse("t.bin", bytes, 1030, &tokens, &count));
    assert_int_equal(tokens[1], 65000);
    free(tokens);
}

static void what_was_written_is_read_back(void **state)
{
    temp_t temp = temp_make();
    float values[1001], *read = NULL;
    static const uint32_t ids[3] = {0, 1, 4000000};
    int32_t *tokens = NULL;
    int64_t count = 0;
    uint64_t seed = 5;
    (void)state;
    test_fill(values, 1001, &seed, -30, 0);
    accepted(ra_npy_write_f32(temp_path(&temp, "f.npy"), values, 1001));
    accepted(ra_npy_read_f32(temp_path(&temp, "f.npy"), 1 << 20, &read, &count));
    assert_int_equal(count, 1001);
    assert_memory_equal(read, values, sizeof(values));
    free(read);
    struct stat info;
    assert_int_equal(stat(temp_path(&temp, "f.npy"), &info), 0);
    assert_int_equal((info.st_size - 4 * 1001) % 64, 0);

    accepted(ra_npy_write_u32(temp_path(&temp, "u.npy"), ids, 3));
    accepted(ra_tokens_read_file(temp_path(&temp, "u.npy"), 1 << 20, &tokens, &count));
    assert_int_equal(count, 3);
    assert_int_equal(tokens[2], 4000000);
    free(tokens);
    accepted(ra_npy_write_f32(temp_path(&temp, "e.npy"), NULL, 0));
    accepted(ra_npy_read_f32(temp_path(&temp, "e.npy"), 1 << 20, &read, &count));
    assert_int_equal(count, 0);
    free(read);

    REFUSED(ra_tokens_read_file(temp_path(&temp, "u.npy"), 100, &tokens, &count), RA_ERR_INPUT,
            "u.npy", "100 allowed");
    REFUSED(ra_tokens_read_file(temp_path(&temp, "none"), 100, &tokens, &count), RA_ERR_USAGE,
            "none");
    REFUSED(ra_npy_write_u32("/nonexistent-directory/u.npy", ids, 3), RA_ERR_OUTPUT, "u.npy",
            "No such file");
    temp_remove(&temp);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_integer_type_and_version_gives_the_same_tokens),
        cmocka_unit_test(a_broken_npy_is_refused_with_file_byte_and_cause),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(ids_that_are_negative_or_too_large_are_named_with_their_place),
        cmocka_unit_test(both_kinds_of_bin_are_read_and_broken_ones_refused),
        cmocka_unit_test(what_was_written_is_read_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
