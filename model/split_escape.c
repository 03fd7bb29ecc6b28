/**
 * @file  model/split_escape.c
 * @brief The translator's text buffer, its reading of the source, and escapes.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/split_parts.h"

#include <ctype.h>
#include <pcre2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void ra_split_text_insert(ra_split_text_t *text, size_t at, const char *bytes, size_t length)
{
    if (text->failed || text->length + length > RA_SPLIT_MAX_OUTPUT) {
        text->failed = true;
        return;
    }
    if (text->length + length + 1 > text->capacity) {
        size_t capacity = 2 * (text->length + length) + 64;
        char *larger = realloc(text->bytes, capacity);
        if (larger == NULL) {
            text->failed = true;
            return;
        }
        text->bytes = larger;
        text->capacity = capacity;
    }
    memmove(text->bytes + at + length, text->bytes + at, text->length - at);
    memcpy(text->bytes + at, bytes, length);
    text->length += length;
    text->bytes[text->length] = '\0';
}

void ra_split_text_put(ra_split_text_t *text, const char *bytes, size_t length)
{
    ra_split_text_insert(text, text->length, bytes, length);
}

void ra_split_text_format(ra_split_text_t *text, const char *format, ...)
{
    char piece[256];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(piece, sizeof piece, format, args);
    va_end(args);
    if (length < 0 || (size_t)length >= sizeof piece) {
        text->failed = true;
        return;
    }
    ra_split_text_put(text, piece, (size_t)length);
}

void ra_split_text_join(ra_split_text_t *text, const ra_split_text_t *other)
{
    text->failed = text->failed || other->failed;
    ra_split_text_put(text, other->bytes == NULL ? "" : other->bytes, other->length);
}

ra_status_t ra_split_refuse(const ra_translator_t *t, size_t at, const char *what)
{
    return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: %s at byte %zu of the pattern \"%.60s%s\"",
                   t->name, what, at, t->source, t->length > 60 ? "..." : "");
}

bool ra_split_looking_at(const ra_translator_t *t, const char *text)
{
    size_t length = strlen(text);
    return t->length - t->at >= length && memcmp(t->source + t->at, text, length) == 0;
}

static size_t char_length(char lead)
{
    unsigned char byte = (unsigned char)lead;
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

uint32_t ra_split_take_char(ra_translator_t *t)
{
    const unsigned char *s = (const unsigned char *)t->source + t->at;
    size_t length = char_length((char)s[0]);
    uint32_t value = length == 1 ? s[0] : s[0] & (0x7fu >> length);
    for (size_t i = 1; i < length; i++) {
        value = value << 6 | (s[i] & 0x3fu);
    }
    t->at += length;
    return value;
}

static bool pcre_compiles(const char *pattern)
{
    int error;
    PCRE2_SIZE offset;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_UCP, &error, &offset, NULL);
    pcre2_code_free(code);
    return code != NULL;
}

/* ---- escapes that stand for a set of characters ---- */

/** At the { of \p{Name}: the inside of a class for the name. `negated` flips with a leading ^. */
static ra_status_t take_property(ra_translator_t *t, char *inside, size_t inside_size,
                                 bool *negated)
{
    char name[64];
    size_t length = 0, start = t->at;
    const char *end = memchr(t->source + t->at, '}', t->length - t->at);
    if (!ra_split_looking_at(t, "{") || end == NULL) {
        return ra_split_refuse(t, start, "\\p without {name}");
    }
    t->at++;
    if (ra_split_looking_at(t, "^")) {
        *negated = !*negated;
        t->at++;
    }
    for (; t->source + t->at < end; t->at++) {
        char c = t->source[t->at];
        if (c == ' ' || c == '_' || c == '-') {
            continue;
        }
        if (!isalnum((unsigned char)c) || length + 1 >= sizeof name) {
            return ra_split_refuse(t, start, "unknown property name");
        }
        name[length++] = (char)tolower((unsigned char)c);
    }
    t->at++;
    name[length] = '\0';
    const char *known = ra_split_property_set(name);
    if (known != NULL) {
        snprintf(inside, inside_size, "%s", known);
        return RA_OK;
    }
    snprintf(inside, inside_size, "\\p{sc:%s}", name);
    if (length > 2 && pcre_compiles(inside)) {
        return RA_OK;
    }
    name[0] = (char)toupper((unsigned char)name[0]);
    snprintf(inside, inside_size, "\\p{%s}", name);
    return pcre_compiles(inside) ? RA_OK : ra_split_refuse(t, start, "unknown property name");
}

ra_status_t ra_split_take_set_escape(ra_translator_t *t, char *inside, size_t inside_size,
                                     bool *negated, bool *found)
{
    char c = t->source[t->at];
    const char *plain = NULL;
    *found = true;
    *negated = isupper((unsigned char)c) != 0;
    switch (tolower((unsigned char)c)) {
    case 'd':
        plain = "\\p{Nd}";
        break;
    case 's':
        plain = RA_CLASS_SPACE;
        break;
    case 'w':
        plain = RA_CLASS_WORD;
        break;
    case 'h':
        plain = "0-9A-Fa-f";
        break;
    case 'p':
        t->at++;
        return take_property(t, inside, inside_size, negated);
    default:
        *found = false;
        return RA_OK;
    }
    t->at++;
    snprintf(inside, inside_size, "%s", plain);
    return RA_OK;
}

ra_status_t ra_split_take_char_escape(ra_translator_t *t, uint32_t *value)
{
    static const char letters[] = "abefnrtv";
    static const char values[] = "\a\b\x1b\f\n\r\t\v";
    size_t start = t->at;
    uint32_t c = ra_split_take_char(t);
    if (c >= 0x80 || !isalnum((int)c)) {
        *value = c;
        return RA_OK;
    }
    const char *letter = strchr(letters, (int)c);
    if (letter != NULL) {
        *value = (unsigned char)values[letter - letters];
        return RA_OK;
    }
    if (c != 'x' && c != 'u') {
        return ra_split_refuse(t, start, "unsupported escape");
    }
    bool braces = c == 'x' && ra_split_looking_at(t, "{");
    t->at += braces;
    size_t most = braces ? 8 : c == 'u' ? 4 : 2, digits = 0;
    for (*value = 0; digits < most && t->at < t->length; digits++, t->at++) {
        char digit = t->source[t->at];
        if (!isxdigit((unsigned char)digit)) {
            break;
        }
        *value = *value * 16 + (uint32_t)(isdigit((unsigned char)digit)
                                              ? digit - '0'
                                              : tolower((unsigned char)digit) - 'a' + 10);
    }
    if (digits == 0 || (c == 'u' && digits != 4) || (braces && !ra_split_looking_at(t, "}")) ||
        (c == 'x' && !braces && *value >= 0x80) || *value > 0x10ffff ||
        (*value >= 0xd800 && *value < 0xe000)) {
        return ra_split_refuse(t, start, "unsupported character code");
    }
    t->at += braces;
    return RA_OK;
}
