/**
 * @file  model/split_pattern.c
 * @brief Recursive descent over an Oniguruma pattern, writing PCRE2. One pass, bounded output.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/split_pattern.h"

#include <ctype.h>
#include <pcre2.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_GROUPS = 200, MAX_CLASS_DEPTH = 16, MAX_OUTPUT = 1 << 20 };

/** Text that grows; `failed` once memory or MAX_OUTPUT ran out, checked at the end. */
typedef struct text {
    char *bytes;
    size_t length, capacity;
    bool failed;
} text_t;

typedef struct translator {
    const char *name, *source;
    size_t length, at;
    text_t out;
    size_t atom;               /* where in out the last atom starts, for quantifiers around it */
    size_t groups[MAX_GROUPS]; /* where in out the open groups start */
    int group_count;
} translator_t;

/** One class operand: characters that fit one [...] and alternatives that do not. */
typedef struct char_set {
    text_t simple;  /* inside of a class */
    text_t complex; /* alternatives, each preceded by | */
} char_set_t;

static void text_insert(text_t *text, size_t at, const char *bytes, size_t length)
{
    if (text->failed || text->length + length > MAX_OUTPUT) {
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

static void text_put(text_t *text, const char *bytes, size_t length)
{
    text_insert(text, text->length, bytes, length);
}

static void text_format(text_t *text, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/** For short pieces; longer text goes through text_put(). */
static void text_format(text_t *text, const char *format, ...)
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
    text_put(text, piece, (size_t)length);
}

static void text_join(text_t *text, const text_t *other)
{
    text->failed = text->failed || other->failed;
    text_put(text, other->bytes == NULL ? "" : other->bytes, other->length);
}

static ra_status_t refuse(const translator_t *t, size_t at, const char *what)
{
    return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: %s at byte %zu of the pattern \"%.60s%s\"",
                   t->name, what, at, t->source, t->length > 60 ? "..." : "");
}

static bool looking_at(const translator_t *t, const char *text)
{
    size_t length = strlen(text);
    return t->length - t->at >= length && memcmp(t->source + t->at, text, length) == 0;
}

static size_t char_length(char lead)
{
    unsigned char byte = (unsigned char)lead;
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

static uint32_t take_char(translator_t *t)
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
static ra_status_t take_property(translator_t *t, char *inside, size_t inside_size, bool *negated)
{
    char name[64];
    size_t length = 0, start = t->at;
    const char *end = memchr(t->source + t->at, '}', t->length - t->at);
    if (!looking_at(t, "{") || end == NULL) {
        return refuse(t, start, "\\p without {name}");
    }
    t->at++;
    if (looking_at(t, "^")) {
        *negated = !*negated;
        t->at++;
    }
    for (; t->source + t->at < end; t->at++) {
        char c = t->source[t->at];
        if (c == ' ' || c == '_' || c == '-') {
            continue;
        }
        if (!isalnum((unsigned char)c) || length + 1 >= sizeof name) {
            return refuse(t, start, "unknown property name");
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
    return pcre_compiles(inside) ? RA_OK : refuse(t, start, "unknown property name");
}

/** After the backslash: does an escape for a set of characters follow? Takes it if so. */
static ra_status_t take_set_escape(translator_t *t, char *inside, size_t inside_size, bool *negated,
                                   bool *found)
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

/** After the backslash: an escape for one character. */
static ra_status_t take_char_escape(translator_t *t, uint32_t *value)
{
    static const char letters[] = "abefnrtv";
    static const char values[] = "\a\b\x1b\f\n\r\t\v";
    size_t start = t->at;
    uint32_t c = take_char(t);
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
        return refuse(t, start, "unsupported escape");
    }
    bool braces = c == 'x' && looking_at(t, "{");
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
    if (digits == 0 || (c == 'u' && digits != 4) || (braces && !looking_at(t, "}")) ||
        (c == 'x' && !braces && *value >= 0x80) || *value > 0x10ffff ||
        (*value >= 0xd800 && *value < 0xe000)) {
        return refuse(t, start, "unsupported character code");
    }
    t->at += braces;
    return RA_OK;
}

/* ---- classes ---- */

static void char_set_release(char_set_t *set)
{
    free(set->simple.bytes);
    free(set->complex.bytes);
}

static void char_set_add(char_set_t *set, const char *inside, bool negated)
{
    if (!negated) {
        text_put(&set->simple, inside, strlen(inside));
    } else if (strncmp(inside, "\\p{", 3) == 0 && strchr(inside + 1, '\\') == NULL &&
               inside[strlen(inside) - 1] == '}') {
        text_format(&set->simple, "\\P%s", inside + 2);
    } else {
        text_format(&set->complex, "|[^%s]", inside);
    }
}

/** One class [S] or group of alternatives that matches exactly the characters of the set. */
static void char_set_write(const char_set_t *set, text_t *out)
{
    out->failed = out->failed || set->simple.failed || set->complex.failed;
    if (set->complex.length == 0) {
        if (set->simple.length == 0) {
            text_format(out, "(?!)");
            return;
        }
        text_format(out, "[");
        text_join(out, &set->simple);
        text_format(out, "]");
        return;
    }
    text_format(out, "(?:");
    if (set->simple.length > 0) {
        text_format(out, "[");
        text_join(out, &set->simple);
        text_format(out, "]");
        text_join(out, &set->complex);
    } else {
        text_put(out, set->complex.bytes + 1, set->complex.length - 1);
    }
    text_format(out, ")");
}

static ra_status_t take_class(translator_t *t, int depth, char_set_t *into, text_t *out);

/** [:name:] or [:^name:] with the bracket at t->at; anything else is an ordinary nested class. */
static ra_status_t take_posix(translator_t *t, char_set_t *set, bool *found)
{
    char name[16];
    size_t at = t->at + 2;
    bool negated = at < t->length && t->source[at] == '^';
    size_t start = at + negated, length = 0;
    for (at = start; at < t->length && isalpha((unsigned char)t->source[at]); at++) {
    }
    *found = looking_at(t, "[:") && t->length - at >= 2 && memcmp(t->source + at, ":]", 2) == 0;
    if (!*found) {
        return RA_OK;
    }
    length = at - start < sizeof name ? at - start : sizeof name - 1;
    memcpy(name, t->source + start, length);
    name[length] = '\0';
    const char *inside = ra_split_posix_set(name);
    if (inside == NULL) {
        return refuse(t, t->at, "unsupported POSIX class");
    }
    char_set_add(set, inside, negated);
    t->at = at + 2;
    return RA_OK;
}

static ra_status_t take_class_char(translator_t *t, uint32_t *value)
{
    if (t->at >= t->length) {
        return refuse(t, t->at, "class without end");
    }
    if (looking_at(t, "\\")) {
        t->at++;
        if (t->at >= t->length) {
            return refuse(t, t->at, "escape without end");
        }
        return take_char_escape(t, value);
    }
    *value = take_char(t);
    return RA_OK;
}

/** One character, a range, or an escape for a set. */
static ra_status_t take_class_item(translator_t *t, char_set_t *set)
{
    uint32_t low, high;
    size_t start = t->at;
    if (looking_at(t, "\\") && t->at + 1 < t->length) {
        char inside[128];
        bool negated, found;
        t->at++;
        RA_TRY(take_set_escape(t, inside, sizeof inside, &negated, &found));
        if (found) {
            char_set_add(set, inside, negated);
            return RA_OK;
        }
        t->at--;
    }
    RA_TRY(take_class_char(t, &low));
    high = low;
    if (looking_at(t, "-") && !looking_at(t, "-]") && t->at + 1 < t->length) {
        t->at++;
        if (looking_at(t, "[") || looking_at(t, "&&")) {
            return refuse(t, start, "range without end");
        }
        RA_TRY(take_class_char(t, &high));
        if (high < low) {
            return refuse(t, start, "range in reverse order");
        }
    }
    text_format(&set->simple, low == high ? "\\x{%x}" : "\\x{%x}-\\x{%x}", low, high);
    return RA_OK;
}

static ra_status_t take_nested(translator_t *t, int depth, char_set_t *set)
{
    text_t nested = {0};
    bool posix;
    RA_TRY(take_posix(t, set, &posix));
    if (posix) {
        return RA_OK;
    }
    ra_status_t status = take_class(t, depth + 1, set, &nested);
    if (status == RA_OK && nested.length > 0) {
        text_format(&set->complex, "|");
        text_join(&set->complex, &nested);
    }
    free(nested.bytes);
    return status;
}

/**
 * A class with its [ at t->at. One that is a plain union is added to `into`, if given; any other
 * is written to out as an expression that matches exactly one character.
 */
static ra_status_t take_class(translator_t *t, int depth, char_set_t *into, text_t *out)
{
    ra_status_t status = RA_OK;
    char_set_t set = {0};
    text_t others = {0}; /* operands before the last &&, as lookaheads */
    size_t start = t->at++;
    bool negated = looking_at(t, "^");
    t->at += negated;
    bool first = true;
    if (depth > MAX_CLASS_DEPTH) {
        return refuse(t, start, "classes nested too deeply");
    }
    for (; first || !looking_at(t, "]"); first = false) {
        if (t->at >= t->length) {
            RA_TRY_GOTO(refuse(t, start, "class without end"), end);
        }
        if (looking_at(t, "[")) {
            RA_TRY_GOTO(take_nested(t, depth, &set), end);
        } else if (looking_at(t, "&&")) {
            t->at += 2;
            text_format(&others, "(?=");
            char_set_write(&set, &others);
            text_format(&others, ")");
            char_set_release(&set);
            set = (char_set_t){0};
        } else {
            RA_TRY_GOTO(take_class_item(t, &set), end);
        }
    }
    t->at++;
    if (!negated && others.length == 0 && into != NULL) {
        text_join(&into->simple, &set.simple);
        text_join(&into->complex, &set.complex);
    } else if (negated && others.length == 0 && set.complex.length == 0) {
        text_format(out, "[^");
        text_join(out, &set.simple);
        text_format(out, "]");
    } else {
        text_format(out, negated ? "(?:(?!" : "(?:");
        text_join(out, &others);
        char_set_write(&set, out);
        text_format(out, negated ? ")(?s:.))" : ")");
    }
end:
    char_set_release(&set);
    free(others.bytes);
    return status;
}

/* ---- everything outside classes ---- */

/** @return Length of a valid {n}, {n,}, {,m} or {n,m} at t->at, 0 when it is plain text. */
static size_t interval_length(const translator_t *t, bool *fixed)
{
    size_t at = t->at + 1, low = 0, high = 0;
    for (; at < t->length && isdigit((unsigned char)t->source[at]); at++, low++) {
    }
    *fixed = at < t->length && t->source[at] == '}';
    if (!*fixed) {
        if (at >= t->length || t->source[at] != ',') {
            return 0;
        }
        for (at++; at < t->length && isdigit((unsigned char)t->source[at]); at++, high++) {
        }
    }
    if (at >= t->length || t->source[at] != '}' || low + high == 0) {
        return 0;
    }
    return at + 1 - t->at;
}

static bool quantifier_follows(const translator_t *t)
{
    bool fixed;
    return t->at < t->length && (strchr("*+?", t->source[t->at]) != NULL ||
                                 (t->source[t->at] == '{' && interval_length(t, &fixed) > 0));
}

/** A quantifier at t->at. One on top of another is made explicit with a group. */
static void take_quantifier(translator_t *t)
{
    bool fixed = false;
    if (t->source[t->at] == '{') {
        size_t length = interval_length(t, &fixed);
        bool open = t->source[t->at + 1] == ',';
        text_format(&t->out, open ? "{0" : "{");
        text_put(&t->out, t->source + t->at + 1, length - 1);
        t->at += length;
        if (!fixed && looking_at(t, "?")) {
            text_format(&t->out, "?");
            t->at++;
        }
    } else {
        text_put(&t->out, t->source + t->at++, 1);
        if (looking_at(t, "?") || looking_at(t, "+")) {
            text_put(&t->out, t->source + t->at++, 1);
        }
    }
    if (quantifier_follows(t)) {
        text_insert(&t->out, t->atom, "(?:", 3);
        text_format(&t->out, ")");
    }
}

/** (?flags) and (?flags:, with the flags at t->at. */
static ra_status_t take_options(translator_t *t, size_t start)
{
    bool leading = start == 0 || t->source[start - 1] == '(' || t->source[start - 1] == '|';
    text_format(&t->out, "(?");
    for (; t->at < t->length && strchr("ims-", t->source[t->at]) != NULL; t->at++) {
        char c = t->source[t->at];
        text_format(&t->out, "%c", c == 'm' ? 's' : c);
    }
    if (looking_at(t, ":")) {
        t->groups[t->group_count++] = t->atom;
    } else if (!looking_at(t, ")")) {
        return refuse(t, start, "unsupported group");
    } else if (!leading) {
        return refuse(t, start, "an option in the middle of a group");
    }
    text_put(&t->out, t->source + t->at++, 1);
    return RA_OK;
}

static ra_status_t take_group(translator_t *t)
{
    static const char *const openers[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    size_t start = t->at;
    t->atom = t->out.length;
    if (t->group_count == MAX_GROUPS) {
        return refuse(t, start, "groups nested too deeply");
    }
    if (looking_at(t, "(*")) {
        return refuse(t, start, "unsupported group");
    }
    if (looking_at(t, "(?#")) {
        const char *end = memchr(t->source + t->at, ')', t->length - t->at);
        t->at = end == NULL ? t->length : (size_t)(end - t->source) + 1;
        return end == NULL ? refuse(t, start, "comment without end") : RA_OK;
    }
    if (!looking_at(t, "(?")) {
        t->groups[t->group_count++] = t->atom;
        text_format(&t->out, "(");
        t->at++;
        return RA_OK;
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(openers); i++) {
        if (looking_at(t, openers[i])) {
            t->groups[t->group_count++] = t->atom;
            text_format(&t->out, "%s", openers[i]);
            t->at += strlen(openers[i]);
            return RA_OK;
        }
    }
    if (!looking_at(t, "(?<")) {
        t->at += 2;
        return take_options(t, start);
    }
    const char *end = memchr(t->source + t->at, '>', t->length - t->at);
    if (end == NULL) {
        return refuse(t, start, "unsupported group");
    }
    t->groups[t->group_count++] = t->atom;
    text_put(&t->out, t->source + t->at, (size_t)(end - t->source) + 1 - t->at);
    t->at = (size_t)(end - t->source) + 1;
    return RA_OK;
}

/** With the backslash at t->at. */
static ra_status_t take_escape(translator_t *t)
{
    char inside[128];
    bool negated, found;
    uint32_t value;
    size_t start = t->at++;
    if (t->at >= t->length) {
        return refuse(t, start, "escape without end");
    }
    RA_TRY(take_set_escape(t, inside, sizeof inside, &negated, &found));
    if (found) {
        text_format(&t->out, negated ? "[^%s]" : "[%s]", inside);
        return RA_OK;
    }
    char c = t->source[t->at];
    if (c == 'b' || c == 'B') {
        t->at++;
        text_format(&t->out,
                    c == 'b' ? "(?:(?<=[%s])(?![%s])|(?<![%s])(?=[%s]))"
                             : "(?:(?<=[%s])(?=[%s])|(?<![%s])(?![%s]))",
                    RA_CLASS_WORD, RA_CLASS_WORD, RA_CLASS_WORD, RA_CLASS_WORD);
        return RA_OK;
    }
    if (strchr("AzZGRXKN", c) != NULL) {
        text_put(&t->out, t->source + start, 2);
        t->at++;
        return RA_OK;
    }
    if (c == 'O') {
        text_format(&t->out, "(?s:.)");
        t->at++;
        return RA_OK;
    }
    if (c >= '1' && c <= '9') {
        t->at++;
        if (t->at < t->length && isdigit((unsigned char)t->source[t->at])) {
            return refuse(t, start, "unsupported escape");
        }
        text_format(&t->out, "\\g{%c}", c);
        return RA_OK;
    }
    const char *end = memchr(t->source + t->at, '>', t->length - t->at);
    if (c == 'k' && end != NULL && t->at + 1 < t->length && t->source[t->at + 1] == '<') {
        text_put(&t->out, t->source + start, (size_t)(end - t->source) + 1 - start);
        t->at = (size_t)(end - t->source) + 1;
        return RA_OK;
    }
    RA_TRY(take_char_escape(t, &value));
    text_format(&t->out, "\\x{%x}", value);
    return RA_OK;
}

static ra_status_t take_next(translator_t *t)
{
    char c = t->source[t->at];
    if (c != '\0' && quantifier_follows(t)) {
        take_quantifier(t);
        return RA_OK;
    }
    if (c == ')') {
        if (t->group_count == 0) {
            return refuse(t, t->at, "unmatched closing parenthesis");
        }
        t->atom = t->groups[--t->group_count];
        text_format(&t->out, ")");
        t->at++;
        return RA_OK;
    }
    if (c == '(') {
        return take_group(t);
    }
    t->atom = t->out.length;
    if (c == '\\') {
        return take_escape(t);
    }
    if (c == '[') {
        char_set_t set = {0};
        ra_status_t status = take_class(t, 0, &set, &t->out);
        if (status == RA_OK && (set.simple.length > 0 || set.complex.length > 0)) {
            char_set_write(&set, &t->out);
        }
        char_set_release(&set);
        return status;
    }
    if (strchr("^$.|", c) != NULL && c != '\0') {
        text_put(&t->out, &c, 1);
        t->at++;
        return RA_OK;
    }
    text_format(&t->out, "\\x{%x}", take_char(t));
    return RA_OK;
}

ra_status_t ra_split_pattern_translate(const char *name, const char *pattern, size_t length,
                                       char **pcre_p)
{
    translator_t t = {.name = name, .source = pattern, .length = length};
    ra_status_t status = RA_OK;
    text_format(&t.out, "%s", "");
    while (t.at < t.length && status == RA_OK) {
        status = take_next(&t);
    }
    if (status == RA_OK && t.group_count > 0) {
        status = refuse(&t, t.length, "group without end");
    }
    if (status == RA_OK && (t.out.failed || t.out.bytes == NULL)) {
        status = refuse(&t, t.at, "pattern too large");
    }
    if (status != RA_OK) {
        free(t.out.bytes);
        return status;
    }
    *pcre_p = t.out.bytes;
    return RA_OK;
}
