/**
 * @file  model/split_pattern.c
 * @brief Recursive descent over an Oniguruma pattern, writing PCRE2. One pass, bounded output.
 */
#include "model/split_parts.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

/** @return Length of a valid {n}, {n,}, {,m} or {n,m} at t->at, 0 when it is plain text. */
static size_t interval_length(const ra_translator_t *t, bool *fixed)
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

static bool quantifier_follows(const ra_translator_t *t)
{
    bool fixed;
    return t->at < t->length && (strchr("*+?", t->source[t->at]) != NULL ||
                                 (t->source[t->at] == '{' && interval_length(t, &fixed) > 0));
}

/** A quantifier at t->at. One on top of another is made explicit with a group. */
static void take_quantifier(ra_translator_t *t)
{
    bool fixed = false;
    if (t->source[t->at] == '{') {
        size_t length = interval_length(t, &fixed);
        bool open = t->source[t->at + 1] == ',';
        ra_split_text_format(&t->out, open ? "{0" : "{");
        ra_split_text_put(&t->out, t->source + t->at + 1, length - 1);
        t->at += length;
        if (!fixed && ra_split_looking_at(t, "?")) {
            ra_split_text_format(&t->out, "?");
            t->at++;
        }
    } else {
        ra_split_text_put(&t->out, t->source + t->at++, 1);
        if (ra_split_looking_at(t, "?") || ra_split_looking_at(t, "+")) {
            ra_split_text_put(&t->out, t->source + t->at++, 1);
        }
    }
    if (quantifier_follows(t)) {
        ra_split_text_insert(&t->out, t->atom, "(?:", 3);
        ra_split_text_format(&t->out, ")");
    }
}

/** (?flags) and (?flags:, with the flags at t->at. */
static ra_status_t take_options(ra_translator_t *t, size_t start)
{
    bool leading = start == 0 || t->source[start - 1] == '(' || t->source[start - 1] == '|';
    ra_split_text_format(&t->out, "(?");
    for (; t->at < t->length && strchr("ims-", t->source[t->at]) != NULL; t->at++) {
        char c = t->source[t->at];
        ra_split_text_format(&t->out, "%c", c == 'm' ? 's' : c);
    }
    if (ra_split_looking_at(t, ":")) {
        t->groups[t->group_count++] = t->atom;
    } else if (!ra_split_looking_at(t, ")")) {
        return ra_split_refuse(t, start, "unsupported group");
    } else if (!leading) {
        return ra_split_refuse(t, start, "an option in the middle of a group");
    }
    ra_split_text_put(&t->out, t->source + t->at++, 1);
    return RA_OK;
}

static ra_status_t take_group(ra_translator_t *t)
{
    static const char *const openers[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    size_t start = t->at;
    t->atom = t->out.length;
    if (t->group_count == RA_SPLIT_MAX_GROUPS) {
        return ra_split_refuse(t, start, "groups nested too deeply");
    }
    if (ra_split_looking_at(t, "(*")) {
        return ra_split_refuse(t, start, "unsupported group");
    }
    if (ra_split_looking_at(t, "(?#")) {
        const char *end = memchr(t->source + t->at, ')', t->length - t->at);
        t->at = end == NULL ? t->length : (size_t)(end - t->source) + 1;
        return end == NULL ? ra_split_refuse(t, start, "comment without end") : RA_OK;
    }
    if (!ra_split_looking_at(t, "(?")) {
        t->groups[t->group_count++] = t->atom;
        ra_split_text_format(&t->out, "(");
        t->at++;
        return RA_OK;
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(openers); i++) {
        if (ra_split_looking_at(t, openers[i])) {
            t->groups[t->group_count++] = t->atom;
            ra_split_text_format(&t->out, "%s", openers[i]);
            t->at += strlen(openers[i]);
            return RA_OK;
        }
    }
    if (!ra_split_looking_at(t, "(?<")) {
        t->at += 2;
        return take_options(t, start);
    }
    const char *end = memchr(t->source + t->at, '>', t->length - t->at);
    if (end == NULL) {
        return ra_split_refuse(t, start, "unsupported group");
    }
    t->groups[t->group_count++] = t->atom;
    ra_split_text_put(&t->out, t->source + t->at, (size_t)(end - t->source) + 1 - t->at);
    t->at = (size_t)(end - t->source) + 1;
    return RA_OK;
}

/** With the backslash at t->at. */
static ra_status_t take_escape(ra_translator_t *t)
{
    char inside[128];
    bool negated, found;
    uint32_t value;
    size_t start = t->at++;
    if (t->at >= t->length) {
        return ra_split_refuse(t, start, "escape without end");
    }
    RA_TRY(ra_split_take_set_escape(t, inside, sizeof inside, &negated, &found));
    if (found) {
        ra_split_text_format(&t->out, negated ? "[^%s]" : "[%s]", inside);
        return RA_OK;
    }
    char c = t->source[t->at];
    if (c == 'b' || c == 'B') {
        t->at++;
        ra_split_text_format(&t->out,
                             c == 'b' ? "(?:(?<=[%s])(?![%s])|(?<![%s])(?=[%s]))"
                                      : "(?:(?<=[%s])(?=[%s])|(?<![%s])(?![%s]))",
                             RA_CLASS_WORD, RA_CLASS_WORD, RA_CLASS_WORD, RA_CLASS_WORD);
        return RA_OK;
    }
    if (strchr("AzZGRXKN", c) != NULL) {
        ra_split_text_put(&t->out, t->source + start, 2);
        t->at++;
        return RA_OK;
    }
    if (c == 'O') {
        ra_split_text_format(&t->out, "(?s:.)");
        t->at++;
        return RA_OK;
    }
    if (c >= '1' && c <= '9') {
        t->at++;
        if (t->at < t->length && isdigit((unsigned char)t->source[t->at])) {
            return ra_split_refuse(t, start, "unsupported escape");
        }
        ra_split_text_format(&t->out, "\\g{%c}", c);
        return RA_OK;
    }
    const char *end = memchr(t->source + t->at, '>', t->length - t->at);
    if (c == 'k' && end != NULL && t->at + 1 < t->length && t->source[t->at + 1] == '<') {
        ra_split_text_put(&t->out, t->source + start, (size_t)(end - t->source) + 1 - start);
        t->at = (size_t)(end - t->source) + 1;
        return RA_OK;
    }
    RA_TRY(ra_split_take_char_escape(t, &value));
    ra_split_text_format(&t->out, "\\x{%x}", value);
    return RA_OK;
}

static ra_status_t take_next(ra_translator_t *t)
{
    char c = t->source[t->at];
    if (c != '\0' && quantifier_follows(t)) {
        take_quantifier(t);
        return RA_OK;
    }
    if (c == ')') {
        if (t->group_count == 0) {
            return ra_split_refuse(t, t->at, "unmatched closing parenthesis");
        }
        t->atom = t->groups[--t->group_count];
        ra_split_text_format(&t->out, ")");
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
        return ra_split_take_class(t);
    }
    if (strchr("^$.|", c) != NULL && c != '\0') {
        ra_split_text_put(&t->out, &c, 1);
        t->at++;
        return RA_OK;
    }
    ra_split_text_format(&t->out, "\\x{%x}", ra_split_take_char(t));
    return RA_OK;
}

ra_status_t ra_split_pattern_translate(const char *name, const char *pattern, size_t length,
                                       char **pcre_p)
{
    ra_translator_t t = {.name = name, .source = pattern, .length = length};
    ra_status_t status = RA_OK;
    ra_split_text_format(&t.out, "%s", "");
    while (t.at < t.length && status == RA_OK) {
        status = take_next(&t);
    }
    if (status == RA_OK && t.group_count > 0) {
        status = ra_split_refuse(&t, t.length, "group without end");
    }
    if (status == RA_OK && (t.out.failed || t.out.bytes == NULL)) {
        status = ra_split_refuse(&t, t.at, "pattern too large");
    }
    if (status != RA_OK) {
        free(t.out.bytes);
        return status;
    }
    *pcre_p = t.out.bytes;
    return RA_OK;
}
