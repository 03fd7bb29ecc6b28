#include "model/npy.h"

#include "base/checked.h"
#include "model/file_io.h"
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BIN_HEADER_BYTES = 1024, NPY_ALIGNMENT = 64 };

/* One-dimensional data inside a file. */
typedef struct array {
    char kind; /* 'u', 'i' or 'f' */
    int width; /* bytes of an element */
    int64_t count;
    const unsigned char *data;
} array_t;

/* The Python dictionary literal of a .npy header, as far as NumPy writes it. */
typedef struct literal {
    const char *name;
    const char *text;
    int64_t length, at;
    int64_t file_at; /* offset of text in the file */
} literal_t;

static uint64_t little_endian(const unsigned char *bytes, int width)
{
    uint64_t value = 0;
    for (int i = width - 1; i >= 0; i--) {
        value = value << 8 | bytes[i];
    }
    return value;
}

static ra_status_t refuse(const char *name, int64_t at, const char *cause)
{
    return ra_fail(RA_ERR_INPUT, "npy", "%s: byte %lld: %s", name, (long long)at, cause);
}

static ra_status_t refuse_here(const literal_t *lit, const char *cause)
{
    return refuse(lit->name, lit->file_at + lit->at, cause);
}

static void skip_space(literal_t *lit)
{
    while (lit->at < lit->length && strchr(" \t\r\n", lit->text[lit->at]) != NULL &&
           lit->text[lit->at] != '\0') {
        lit->at++;
    }
}

/* Consume `word` after white space. */
static bool accept(literal_t *lit, const char *word)
{
    skip_space(lit);
    int64_t n = (int64_t)strlen(word);
    if (lit->length - lit->at < n || memcmp(lit->text + lit->at, word, (size_t)n) != 0) {
        return false;
    }
    lit->at += n;
    return true;
}

/* A quoted string without escapes, of at most 15 bytes. */
static bool accept_string(literal_t *lit, char out[16])
{
    skip_space(lit);
    char quote = lit->at < lit->length ? lit->text[lit->at] : '\0';
    if (quote != '\'' && quote != '"') {
        return false;
    }
    int64_t used = 0;
    for (int64_t i = lit->at + 1; i < lit->length && used < 15; i++) {
        if (lit->text[i] == quote) {
            out[used] = '\0';
            lit->at = i + 1;
            return true;
        }
        if (lit->text[i] == '\\' || lit->text[i] == '\0') {
            return false;
        }
        out[used++] = lit->text[i];
    }
    return false;
}

static ra_status_t read_shape(literal_t *lit, int64_t *count)
{
    if (!accept(lit, "(")) {
        return refuse_here(lit, "\"shape\" is not a tuple");
    }
    skip_space(lit);
    int64_t value = 0, digits = 0;
    while (lit->at < lit->length && lit->text[lit->at] >= '0' && lit->text[lit->at] <= '9') {
        int64_t digit = lit->text[lit->at] - '0';
        if (!ra_mul_ok(value, 10, &value) || !ra_add_ok(value, digit, &value)) {
            return refuse_here(lit, "\"shape\" overflows 63 bits");
        }
        digits++;
        lit->at++;
    }
    if (digits == 0 || !accept(lit, ",") || !accept(lit, ")")) {
        return refuse_here(lit, "\"shape\" is not of one dimension, \"(N,)\"");
    }
    *count = value;
    return RA_OK;
}

static ra_status_t read_descr(literal_t *lit, array_t *array)
{
    static const struct {
        const char *text;
        char kind;
        int width;
    } known[] = {
        {"<u2", 'u', 2}, {"<u4", 'u', 4}, {"<i4", 'i', 4}, {"<i8", 'i', 8}, {"<f4", 'f', 4}};
    char descr[16] = "";
    int64_t at = lit->at;
    if (!accept_string(lit, descr)) {
        return refuse_here(lit, "\"descr\" is not a short string");
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(known); i++) {
        if (strcmp(known[i].text, descr) == 0) {
            array->kind = known[i].kind;
            array->width = known[i].width;
            return RA_OK;
        }
    }
    return ra_fail(RA_ERR_INPUT, "npy",
                   "%s: byte %lld: elements are \"%s\"; <u2, <u4, <i4 and <i8 tokens are allowed",
                   lit->name, (long long)(lit->file_at + at), descr);
}

static ra_status_t read_order(literal_t *lit)
{
    if (accept(lit, "False")) {
        return RA_OK;
    }
    return refuse_here(lit, "\"fortran_order\" is not False");
}

static ra_status_t read_field(literal_t *lit, array_t *array, bool seen[3])
{
    static const char *const keys[3] = {"descr", "fortran_order", "shape"};
    char key[16] = "";
    int k = 0;
    if (!accept_string(lit, key)) {
        return refuse_here(lit, "the header is not a dictionary of descr, fortran_order, shape");
    }
    while (k < 3 && strcmp(keys[k], key) != 0) {
        k++;
    }
    if (k == 3 || seen[k] || !accept(lit, ":")) {
        return refuse_here(lit, "the header is not a dictionary of descr, fortran_order, shape");
    }
    seen[k] = true;
    if (k == 0) {
        return read_descr(lit, array);
    }
    return k == 1 ? read_order(lit) : read_shape(lit, &array->count);
}

static ra_status_t read_literal(literal_t *lit, array_t *array)
{
    bool seen[3] = {false, false, false};
    if (!accept(lit, "{")) {
        return refuse_here(lit, "the header is not a dictionary");
    }
    while (!accept(lit, "}")) {
        RA_TRY(read_field(lit, array, seen));
        if (!accept(lit, ",")) {
            if (!accept(lit, "}")) {
                return refuse_here(lit, "neither ',' nor '}' in the header");
            }
            break;
        }
    }
    skip_space(lit);
    if (lit->at != lit->length) {
        return refuse_here(lit, "something follows the dictionary in the header");
    }
    if (!seen[0] || !seen[1] || !seen[2]) {
        return refuse_here(lit, "the header lacks descr, fortran_order or shape");
    }
    return RA_OK;
}

/* The data must fill the file from `at` on. */
static ra_status_t check_length(const char *name, const array_t *array, int64_t at, int64_t length)
{
    int64_t bytes = 0;
    if (!ra_mul_ok(array->count, array->width, &bytes) || bytes != length - at) {
        return ra_fail(
            RA_ERR_INPUT, "npy",
            "%s: byte %lld: the header says %lld elements of %d bytes, %lld bytes follow", name,
            (long long)at, (long long)array->count, array->width, (long long)(length - at));
    }
    return RA_OK;
}

static ra_status_t parse_npy(const char *name, const unsigned char *bytes, int64_t length,
                             array_t *array)
{
    if (length < 12) {
        return refuse(name, length, "the file ends inside the .npy header");
    }
    int major = bytes[6], minor = bytes[7];
    if (major < 1 || major > 3 || minor != 0) {
        return ra_fail(RA_ERR_INPUT, "npy",
                       "%s: byte 6: .npy version %d.%d; 1.0, 2.0 and 3.0 are allowed", name, major,
                       minor);
    }
    int64_t text_at = major == 1 ? 10 : 12;
    int64_t text_length = (int64_t)little_endian(bytes + 8, major == 1 ? 2 : 4);
    if (text_length > length - text_at) {
        return refuse(name, 8, "the file ends inside the .npy header");
    }
    literal_t lit = {name, (const char *)bytes + text_at, text_length, 0, text_at};
    RA_TRY(read_literal(&lit, array));
    array->data = bytes + text_at + text_length;
    return check_length(name, array, text_at + text_length, length);
}

static ra_status_t parse_bin(const char *name, const unsigned char *bytes, int64_t length,
                             array_t *array)
{
    static const struct {
        uint64_t magic, version;
        int width;
    } kinds[] = {{20240520, 1, 2}, {20240801, 7, 4}};
    if (length < BIN_HEADER_BYTES) {
        return ra_fail(RA_ERR_INPUT, "npy",
                       "%s: byte 0: neither a .npy nor a .bin token file (%lld bytes)", name,
                       (long long)length);
    }
    uint64_t magic = little_endian(bytes, 4), version = little_endian(bytes + 4, 4);
    for (size_t i = 0; i < RA_ARRAY_LEN(kinds); i++) {
        if (kinds[i].magic == magic && kinds[i].version == version) {
            uint64_t count = little_endian(bytes + 8, 4);
            if (count > INT32_MAX) {
                return refuse(name, 8, "a negative number of tokens");
            }
            *array = (array_t){'u', kinds[i].width, (int64_t)count, bytes + BIN_HEADER_BYTES};
            return check_length(name, array, BIN_HEADER_BYTES, length);
        }
    }
    return ra_fail(RA_ERR_INPUT, "npy",
                   "%s: byte 0: neither a .npy file nor a .bin file of version 1 or 7 (magic %llu, "
                   "version %llu)",
                   name, (unsigned long long)magic, (unsigned long long)version);
}

static ra_status_t parse_array(const char *name, const void *bytes, int64_t length, array_t *array)
{
    bool npy = length >= 6 && memcmp(bytes, "\x93NUMPY", 6) == 0;
    return npy ? parse_npy(name, bytes, length, array) : parse_bin(name, bytes, length, array);
}

static int64_t element(const array_t *array, int64_t i)
{
    uint64_t bits = little_endian(array->data + i * array->width, array->width);
    if (array->kind == 'i' && array->width == 4) {
        return (int32_t)(uint32_t)bits;
    }
    return (int64_t)bits;
}

ra_status_t ra_tokens_parse(const char *name, const void *bytes, int64_t length, int32_t **tokens_p,
                            int64_t *count_p)
{
    array_t array = {0, 0, 0, NULL};
    RA_TRY(parse_array(name, bytes, length, &array));
    if (array.kind == 'f') {
        return ra_fail(RA_ERR_INPUT, "npy",
                       "%s: elements are \"<f4\"; <u2, <u4, <i4 and <i8 tokens are allowed", name);
    }
    int32_t *tokens = malloc(((size_t)array.count + 1) * sizeof(*tokens));
    if (tokens == NULL) {
        return ra_fail(RA_ERR_NOMEM, "npy", "%s: no memory for %lld tokens", name,
                       (long long)array.count);
    }
    for (int64_t i = 0; i < array.count; i++) {
        int64_t id = element(&array, i);
        if (id < 0 || id > INT32_MAX) {
            free(tokens);
            return ra_fail(RA_ERR_INPUT, "npy",
                           "%s: token %lld is %lld; ids from 0 to 2147483647 are allowed", name,
                           (long long)i, (long long)id);
        }
        tokens[i] = (int32_t)id;
    }
    *tokens_p = tokens;
    *count_p = array.count;
    return RA_OK;
}

ra_status_t ra_tokens_read_file(const char *path, int64_t max_bytes, int32_t **tokens_p,
                                int64_t *count_p)
{
    char *bytes = NULL;
    int64_t length = 0;
    RA_TRY(ra_file_read(path, max_bytes, &bytes, &length));
    ra_status_t status = ra_tokens_parse(path, bytes, length, tokens_p, count_p);
    free(bytes);
    return status;
}

ra_status_t ra_npy_read_f32(const char *path, int64_t max_bytes, float **values_p, int64_t *count_p)
{
    char *bytes = NULL;
    int64_t length = 0;
    array_t array = {0, 0, 0, NULL};
    RA_TRY(ra_file_read(path, max_bytes, &bytes, &length));
    ra_status_t status = parse_array(path, bytes, length, &array);
    if (status == RA_OK && array.kind != 'f') {
        status = ra_fail(RA_ERR_INPUT, "npy", "%s: elements are not \"<f4\"", path);
    }
    float *values = NULL;
    if (status == RA_OK) {
        values = malloc(((size_t)array.count + 1) * sizeof(*values));
        if (values == NULL) {
            status = ra_fail(RA_ERR_NOMEM, "npy", "%s: no memory for %lld values", path,
                             (long long)array.count);
        }
    }
    if (status == RA_OK) {
        memcpy(values, array.data, (size_t)array.count * sizeof(*values));
        *values_p = values;
        *count_p = array.count;
    }
    free(bytes);
    return status;
}

static ra_status_t write_array(const char *path, const char *descr, const void *values,
                               int64_t count)
{
    char header[192];
    memcpy(header, "\x93NUMPY\x01\x00", 8);
    int used = snprintf(header + 10, sizeof(header) - 10,
                        "{'descr': '%s', 'fortran_order': False, 'shape': (%lld,), }", descr,
                        (long long)count);
    int total = (10 + used + 1 + NPY_ALIGNMENT - 1) / NPY_ALIGNMENT * NPY_ALIGNMENT;
    memset(header + 10 + used, ' ', (size_t)(total - 10 - used));
    header[total - 1] = '\n';
    header[8] = (char)((total - 10) & 0xff);
    header[9] = (char)((total - 10) >> 8);

    ra_file_writer_t writer;
    RA_TRY(ra_file_writer_open(&writer, path));
    ra_status_t status;
    RA_TRY_GOTO(ra_file_writer_put(&writer, header, total, 0), failed);
    RA_TRY_GOTO(ra_file_writer_put(&writer, values, 4 * count, total), failed);
    return ra_file_writer_commit(&writer);
failed:
    ra_file_writer_abort(&writer);
    return status;
}

ra_status_t ra_npy_write_f32(const char *path, const float *values, int64_t count)
{
    return write_array(path, "<f4", values, count);
}

ra_status_t ra_npy_write_u32(const char *path, const uint32_t *values, int64_t count)
{
    return write_array(path, "<u4", values, count);
}
