#include "model/json_check.h"

#include "model/file_io.h"
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { NUMBER_MAX_CHARS = 60 };

/* A key seen in an object still open: equal keys have equal hashes, so sorting an object's keys by
 * hash brings every duplicate together. A forged collision would only refuse the forger's file. */
typedef struct json_key {
    XXH128_hash_t hash;
    int64_t at;
} json_key_t;

typedef struct json_scan {
    const char *name;
    const ra_json_rules_t *rules;
    const unsigned char *bytes;
    int64_t length;
    int64_t at;
    int depth;
    json_key_t *keys; /* of all open objects, innermost last */
    int64_t keys_used, keys_room;
    unsigned char *text; /* the last string, unescaped */
    int64_t text_used, text_room;
} json_scan_t;

static ra_status_t scan_value(json_scan_t *scan);

static ra_status_t refuse(const json_scan_t *scan, int64_t at, const char *cause)
{
    return ra_fail(RA_ERR_INPUT, "json", "%s: byte %lld: %s", scan->name, (long long)at, cause);
}

static ra_status_t no_memory(const json_scan_t *scan)
{
    return ra_fail(RA_ERR_NOMEM, "json", "%s: no memory to check it", scan->name);
}

static int peek(const json_scan_t *scan)
{
    return scan->at < scan->length ? scan->bytes[scan->at] : -1;
}

static void skip_space(json_scan_t *scan)
{
    int c;
    while ((c = peek(scan)) == ' ' || c == '\t' || c == '\n' || c == '\r') {
        scan->at++;
    }
}

static ra_status_t text_reserve(json_scan_t *scan, int64_t more)
{
    if (scan->text_used + more <= scan->text_room) {
        return RA_OK;
    }
    int64_t room = 2 * (scan->text_used + more) + 64;
    unsigned char *text = realloc(scan->text, (size_t)room);
    if (text == NULL) {
        return no_memory(scan);
    }
    scan->text = text;
    scan->text_room = room;
    return RA_OK;
}

static ra_status_t text_append(json_scan_t *scan, const unsigned char *bytes, int64_t count)
{
    RA_TRY(text_reserve(scan, count));
    memcpy(scan->text + scan->text_used, bytes, (size_t)count);
    scan->text_used += count;
    return RA_OK;
}

static ra_status_t text_append_code(json_scan_t *scan, uint32_t code)
{
    unsigned char utf8[4];
    int64_t count;
    if (code < 0x80) {
        utf8[0] = (unsigned char)code;
        count = 1;
    } else if (code < 0x800) {
        utf8[0] = (unsigned char)(0xc0 | (code >> 6));
        utf8[1] = (unsigned char)(0x80 | (code & 0x3f));
        count = 2;
    } else if (code < 0x10000) {
        utf8[0] = (unsigned char)(0xe0 | (code >> 12));
        utf8[1] = (unsigned char)(0x80 | ((code >> 6) & 0x3f));
        utf8[2] = (unsigned char)(0x80 | (code & 0x3f));
        count = 3;
    } else {
        utf8[0] = (unsigned char)(0xf0 | (code >> 18));
        utf8[1] = (unsigned char)(0x80 | ((code >> 12) & 0x3f));
        utf8[2] = (unsigned char)(0x80 | ((code >> 6) & 0x3f));
        utf8[3] = (unsigned char)(0x80 | (code & 0x3f));
        count = 4;
    }
    return text_append(scan, utf8, count);
}

/* Length of the UTF-8 sequence at p of at most `left` bytes (Unicode table 3-7), 0 when invalid. */
static int64_t utf8_length(const unsigned char *p, int64_t left)
{
    unsigned char c = p[0];
    if (c < 0x80) {
        return 1;
    }
    if (c < 0xc2 || c > 0xf4) {
        return 0;
    }
    int64_t need = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    if (left < need) {
        return 0;
    }
    unsigned char low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    unsigned char high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    if (p[1] < low || p[1] > high) {
        return 0;
    }
    for (int64_t i = 2; i < need; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return need;
}

static int hex_value(int c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The four digits after "\u"; scan->at stands on the first one. */
static ra_status_t scan_hex4(json_scan_t *scan, uint32_t *code)
{
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex_value(peek(scan));
        if (digit < 0) {
            return refuse(scan, scan->at, "\\u is not followed by four hexadecimal digits");
        }
        value = value << 4 | (uint32_t)digit;
        scan->at++;
    }
    *code = value;
    return RA_OK;
}

static ra_status_t scan_unicode_escape(json_scan_t *scan)
{
    int64_t start = scan->at - 2;
    uint32_t code;
    RA_TRY(scan_hex4(scan, &code));
    if (code == 0) {
        return refuse(scan, start, "\\u0000 in a string");
    }
    if (code >= 0xdc00 && code <= 0xdfff) {
        return refuse(scan, start, "a low surrogate escape without the high one before it");
    }
    if (code >= 0xd800 && code <= 0xdbff) {
        uint32_t low;
        if (scan->length - scan->at < 6 || memcmp(scan->bytes + scan->at, "\\u", 2) != 0) {
            return refuse(scan, start, "a high surrogate escape without the low one after it");
        }
        scan->at += 2;
        RA_TRY(scan_hex4(scan, &low));
        if (low < 0xdc00 || low > 0xdfff) {
            return refuse(scan, start, "a high surrogate escape without the low one after it");
        }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    return text_append_code(scan, code);
}

static ra_status_t scan_escape(json_scan_t *scan)
{
    static const char from[] = "\"\\/bfnrt";
    static const char to[] = "\"\\/\b\f\n\r\t";
    scan->at++;
    int c = peek(scan);
    scan->at++;
    if (c == 'u') {
        return scan_unicode_escape(scan);
    }
    const char *found = c > 0 ? strchr(from, c) : NULL;
    if (found == NULL) {
        return refuse(scan, scan->at - 2, "an escape that JSON does not have");
    }
    return text_append(scan, (const unsigned char *)to + (found - from), 1);
}

/* Bytes from p on that stand for themselves: no quote, no backslash, no control, ASCII. */
static int64_t plain_run(const unsigned char *p, int64_t left)
{
    int64_t n = 0;
    while (n < left && p[n] >= 0x20 && p[n] < 0x80 && p[n] != '"' && p[n] != '\\') {
        n++;
    }
    return n;
}

/* A string, unescaped into scan->text; scan->at stands on the opening quote. */
static ra_status_t scan_string(json_scan_t *scan)
{
    int64_t start = scan->at++;
    scan->text_used = 0;
    for (;;) {
        int c = peek(scan);
        if (c < 0) {
            return refuse(scan, start, "a string that does not end");
        }
        if (c == '"') {
            scan->at++;
            return RA_OK;
        }
        if (c < 0x20) {
            return refuse(scan, scan->at, "a control byte in a string");
        }
        if (c == '\\') {
            RA_TRY(scan_escape(scan));
            continue;
        }
        const unsigned char *p = scan->bytes + scan->at;
        int64_t left = scan->length - scan->at;
        int64_t n = c < 0x80 ? plain_run(p, left) : utf8_length(p, left);
        if (n == 0) {
            return refuse(scan, scan->at, "not UTF-8");
        }
        RA_TRY(text_append(scan, p, n));
        scan->at += n;
    }
}

static bool skip_digits(json_scan_t *scan)
{
    int64_t start = scan->at;
    while (peek(scan) >= '0' && peek(scan) <= '9') {
        scan->at++;
    }
    return scan->at > start;
}

static ra_status_t scan_number(json_scan_t *scan)
{
    int64_t start = scan->at;
    bool ok = true;
    if (peek(scan) == '-') {
        scan->at++;
    }
    int64_t digits = scan->at;
    if (peek(scan) == '0') {
        scan->at++;
    } else {
        ok = skip_digits(scan);
    }
    int64_t digits_end = scan->at;
    if (ok && peek(scan) == '.') {
        scan->at++;
        ok = skip_digits(scan);
    }
    if (ok && (peek(scan) == 'e' || peek(scan) == 'E')) {
        scan->at++;
        if (peek(scan) == '+' || peek(scan) == '-') {
            scan->at++;
        }
        ok = skip_digits(scan);
    }
    if (!ok) {
        return refuse(scan, start, "not a JSON number");
    }
    if (scan->at - start > NUMBER_MAX_CHARS) {
        return refuse(scan, start, "a number of more than 60 characters");
    }
    if (scan->rules->plain_integers && (digits != start || digits_end != scan->at)) {
        return refuse(scan, start, "only plain non-negative integers are allowed here");
    }
    return RA_OK;
}

static ra_status_t scan_word(json_scan_t *scan, const char *word)
{
    int64_t n = (int64_t)strlen(word);
    if (scan->length - scan->at < n || memcmp(scan->bytes + scan->at, word, (size_t)n) != 0) {
        return refuse(scan, scan->at, "not a JSON value");
    }
    scan->at += n;
    return RA_OK;
}

static ra_status_t key_push(json_scan_t *scan, int64_t at)
{
    if (scan->keys_used == scan->keys_room) {
        int64_t room = 2 * scan->keys_room + 64;
        json_key_t *keys = realloc(scan->keys, (size_t)room * sizeof(*keys));
        if (keys == NULL) {
            return no_memory(scan);
        }
        scan->keys = keys;
        scan->keys_room = room;
    }
    const void *text = scan->text_used > 0 ? (const void *)scan->text : "";
    scan->keys[scan->keys_used++] = (json_key_t){XXH3_128bits(text, (size_t)scan->text_used), at};
    return RA_OK;
}

static int compare_keys(const void *left, const void *right)
{
    const json_key_t *a = left, *b = right;
    if (a->hash.high64 != b->hash.high64) {
        return a->hash.high64 < b->hash.high64 ? -1 : 1;
    }
    if (a->hash.low64 != b->hash.low64) {
        return a->hash.low64 < b->hash.low64 ? -1 : 1;
    }
    return a->at < b->at ? -1 : a->at > b->at;
}

static ra_status_t check_duplicates(json_scan_t *scan, int64_t first)
{
    int64_t count = scan->keys_used - first;
    scan->keys_used = first;
    if (count < 2) {
        return RA_OK;
    }
    json_key_t *keys = scan->keys + first;
    qsort(keys, (size_t)count, sizeof(*keys), compare_keys);
    for (int64_t i = 1; i < count; i++) {
        if (XXH128_isEqual(keys[i - 1].hash, keys[i].hash)) {
            scan->at = keys[i].at;
            RA_TRY(scan_string(scan)); /* for its text */
            int shown = (int)(scan->text_used < 200 ? scan->text_used : 200);
            return ra_fail(RA_ERR_INPUT, "json",
                           "%s: byte %lld: the key \"%.*s\" is there twice (first at byte %lld)",
                           scan->name, (long long)keys[i].at, shown, (const char *)scan->text,
                           (long long)keys[i - 1].at);
        }
    }
    return RA_OK;
}

static ra_status_t scan_member(json_scan_t *scan)
{
    skip_space(scan);
    int64_t key_at = scan->at;
    if (peek(scan) != '"') {
        return refuse(scan, scan->at, "an object key must be a string");
    }
    RA_TRY(scan_string(scan));
    RA_TRY(key_push(scan, key_at));
    skip_space(scan);
    if (peek(scan) != ':') {
        return refuse(scan, scan->at, "no ':' after an object key");
    }
    scan->at++;
    return scan_value(scan);
}

/* An object or array; scan->at stands on the opening bracket. */
static ra_status_t scan_container(json_scan_t *scan, int close)
{
    int64_t start = scan->at;
    int64_t first_key = scan->keys_used;
    if (++scan->depth > scan->rules->max_depth) {
        return ra_fail(RA_ERR_INPUT, "json", "%s: byte %lld: nested deeper than %d levels",
                       scan->name, (long long)start, scan->rules->max_depth);
    }
    scan->at++;
    skip_space(scan);
    if (peek(scan) == close) {
        scan->at++;
        scan->depth--;
        return RA_OK;
    }
    for (;;) {
        RA_TRY(close == '}' ? scan_member(scan) : scan_value(scan));
        skip_space(scan);
        int c = peek(scan);
        if (c != ',' && c != close) {
            return c < 0 ? refuse(scan, start, "an object or array that does not end")
                         : refuse(scan, scan->at, "neither ',' nor the end of an object or array");
        }
        scan->at++;
        if (c == close) {
            break;
        }
    }
    int64_t end = scan->at;
    RA_TRY(check_duplicates(scan, first_key));
    scan->at = end;
    scan->depth--;
    return RA_OK;
}

static ra_status_t scan_value(json_scan_t *scan)
{
    skip_space(scan);
    switch (peek(scan)) {
    case -1:
        return refuse(scan, scan->at, "the text ends where a value should be");
    case 0:
        return refuse(scan, scan->at, "a NUL byte");
    case '{':
        return scan_container(scan, '}');
    case '[':
        return scan_container(scan, ']');
    case '"':
        return scan_string(scan);
    case 't':
        return scan_word(scan, "true");
    case 'f':
        return scan_word(scan, "false");
    case 'n':
        return scan_word(scan, "null");
    default: {
        int c = peek(scan);
        bool number = c == '-' || (c >= '0' && c <= '9');
        return number ? scan_number(scan) : refuse(scan, scan->at, "not a JSON value");
    }
    }
}

static ra_status_t check_text(const char *name, const char *bytes, int64_t length,
                              const ra_json_rules_t *rules)
{
    json_scan_t scan = {
        .name = name, .rules = rules, .bytes = (const unsigned char *)bytes, .length = length};
    ra_status_t status = scan_value(&scan);
    if (status == RA_OK) {
        skip_space(&scan);
        if (scan.at < length) {
            status = refuse(&scan, scan.at, "something follows the JSON value");
        }
    }
    free(scan.keys);
    free(scan.text);
    return status;
}

ra_status_t ra_json_parse_rules(const char *name, const char *bytes, int64_t length,
                                const ra_json_rules_t *rules, cJSON **root_p)
{
    RA_TRY(check_text(name, bytes, length, rules));
    cJSON *root = cJSON_ParseWithLengthOpts(bytes, (size_t)length, NULL, 0);
    if (root == NULL) {
        /* the text is well-formed, so only memory can be missing */
        return ra_fail(RA_ERR_NOMEM, "json", "%s: no memory to parse its %lld bytes", name,
                       (long long)length);
    }
    *root_p = root;
    return RA_OK;
}

ra_status_t ra_json_parse(const char *name, const char *bytes, int64_t length, cJSON **root_p)
{
    static const ra_json_rules_t rules = {.max_depth = RA_JSON_MAX_DEPTH};
    return ra_json_parse_rules(name, bytes, length, &rules, root_p);
}

ra_status_t ra_json_read_file(const char *path, int64_t max_bytes, cJSON **root_p)
{
    char *bytes = NULL;
    int64_t length = 0;
    RA_TRY(ra_file_read(path, max_bytes, &bytes, &length));
    ra_status_t status = ra_json_parse(path, bytes, length, root_p);
    free(bytes);
    return status;
}
