/**
 * @file  model/split_class.c
 * @brief Character classes: nested ones, intersections and POSIX names become what PCRE2 can do.
 */
#include "model/split_parts.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

/** One class operand: characters that fit one [...] and alternatives that do not. */
typedef struct char_set {
    ra_split_text_t simple;  /* inside of a class */
    ra_split_text_t complex; /* alternatives, each preceded by | */
} char_set_t;

static void char_set_release(char_set_t *set)
{
    free(set->simple.bytes);
    free(set->complex.bytes);
}

static void char_set_add(char_set_t *set, const char *inside, bool negated)
{
    if (!negated) {
        ra_split_text_put(&set->simple, inside, strlen(inside));
    } else if (strncmp(inside, "\\p{", 3) == 0 && strchr(inside + 1, '\\') == NULL &&
               inside[strlen(inside) - 1] == '}') {
        ra_split_text_format(&set->simple, "\\P%s", inside + 2);
    } else {
        ra_split_text_format(&set->complex, "|[^%s]", inside);
    }
}

/** One class [S] or group of alternatives that matches exactly the characters of the set. */
static void char_set_write(const char_set_t *set, ra_split_text_t *out)
{
    out->failed = out->failed || set->simple.failed || set->complex.failed;
    if (set->complex.length == 0) {
        if (set->simple.length == 0) {
            ra_split_text_format(out, "(?!)");
            return;
        }
        ra_split_text_format(out, "[");
        ra_split_text_join(out, &set->simple);
        ra_split_text_format(out, "]");
        return;
    }
    ra_split_text_format(out, "(?:");
    if (set->simple.length > 0) {
        ra_split_text_format(out, "[");
        ra_split_text_join(out, &set->simple);
        ra_split_text_format(out, "]");
        ra_split_text_join(out, &set->complex);
    } else {
        ra_split_text_put(out, set->complex.bytes + 1, set->complex.length - 1);
    }
    ra_split_text_format(out, ")");
}

static ra_status_t take_class(ra_translator_t *t, int depth, char_set_t *into,
                              ra_split_text_t *out);

/** [:name:] or [:^name:] with the bracket at t->at; anything else is an ordinary nested class. */
static ra_status_t take_posix(ra_translator_t *t, char_set_t *set, bool *found)
{
    char name[16];
    size_t at = t->at + 2;
    bool negated = at < t->length && t->source[at] == '^';
    size_t start = at + negated, length = 0;
    for (at = start; at < t->length && isalpha((unsigned char)t->source[at]); at++) {
    }
    *found =
        ra_split_looking_at(t, "[:") && t->length - at >= 2 && memcmp(t->source + at, ":]", 2) == 0;
    if (!*found) {
        return RA_OK;
    }
    length = at - start < sizeof name ? at - start : sizeof name - 1;
    memcpy(name, t->source + start, length);
    name[length] = '\0';
    const char *inside = ra_split_posix_set(name);
    if (inside == NULL) {
        return ra_split_refuse(t, t->at, "unsupported POSIX class");
    }
    char_set_add(set, inside, negated);
    t->at = at + 2;
    return RA_OK;
}

static ra_status_t take_class_char(ra_translator_t *t, uint32_t *value)
{
    if (t->at >= t->length) {
        return ra_split_refuse(t, t->at, "class without end");
    }
    if (ra_split_looking_at(t, "\\")) {
        t->at++;
        if (t->at >= t->length) {
            return ra_split_refuse(t, t->at, "escape without end");
        }
        return ra_split_take_char_escape(t, value);
    }
    *value = ra_split_take_char(t);
    return RA_OK;
}

/** One character, a range, or an escape for a set. */
static ra_status_t take_class_item(ra_translator_t *t, char_set_t *set)
{
    uint32_t low, high;
    size_t start = t->at;
    if (ra_split_looking_at(t, "\\") && t->at + 1 < t->length) {
        char inside[128];
        bool negated, found;
        t->at++;
        RA_TRY(ra_split_take_set_escape(t, inside, sizeof inside, &negated, &found));
        if (found) {
            char_set_add(set, inside, negated);
            return RA_OK;
        }
        t->at--;
    }
    RA_TRY(take_class_char(t, &low));
    high = low;
    if (ra_split_looking_at(t, "-") && !ra_split_looking_at(t, "-]") && t->at + 1 < t->length) {
        t->at++;
        if (ra_split_looking_at(t, "[") || ra_split_looking_at(t, "&&")) {
            return ra_split_refuse(t, start, "range without end");
        }
        RA_TRY(take_class_char(t, &high));
        if (high < low) {
            return ra_split_refuse(t, start, "range in reverse order");
        }
    }
    ra_split_text_format(&set->simple, low == high ? "\\x{%x}" : "\\x{%x}-\\x{%x}", low, high);
    return RA_OK;
}

static ra_status_t take_nested(ra_translator_t *t, int depth, char_set_t *set)
{
    ra_split_text_t nested = {0};
    bool posix;
    RA_TRY(take_posix(t, set, &posix));
    if (posix) {
        return RA_OK;
    }
    ra_status_t status = take_class(t, depth + 1, set, &nested);
    if (status == RA_OK && nested.length > 0) {
        ra_split_text_format(&set->complex, "|");
        ra_split_text_join(&set->complex, &nested);
    }
    free(nested.bytes);
    return status;
}

/**
 * A class with its [ at t->at. One that is a plain union is added to `into`, if given; any other
 * is written to out as an expression that matches exactly one character.
 */
static ra_status_t take_class(ra_translator_t *t, int depth, char_set_t *into, ra_split_text_t *out)
{
    ra_status_t status = RA_OK;
    char_set_t set = {0};
    ra_split_text_t others = {0}; /* operands before the last &&, as lookaheads */
    size_t start = t->at++;
    bool negated = ra_split_looking_at(t, "^");
    t->at += negated;
    bool first = true;
    if (depth > RA_SPLIT_MAX_DEPTH) {
        return ra_split_refuse(t, start, "classes nested too deeply");
    }
    for (; first || !ra_split_looking_at(t, "]"); first = false) {
        if (t->at >= t->length) {
            RA_TRY_GOTO(ra_split_refuse(t, start, "class without end"), end);
        }
        if (ra_split_looking_at(t, "[")) {
            RA_TRY_GOTO(take_nested(t, depth, &set), end);
        } else if (ra_split_looking_at(t, "&&")) {
            t->at += 2;
            ra_split_text_format(&others, "(?=");
            char_set_write(&set, &others);
            ra_split_text_format(&others, ")");
            char_set_release(&set);
            set = (char_set_t){0};
        } else {
            RA_TRY_GOTO(take_class_item(t, &set), end);
        }
    }
    t->at++;
    if (!negated && others.length == 0 && into != NULL) {
        ra_split_text_join(&into->simple, &set.simple);
        ra_split_text_join(&into->complex, &set.complex);
    } else if (negated && others.length == 0 && set.complex.length == 0) {
        ra_split_text_format(out, "[^");
        ra_split_text_join(out, &set.simple);
        ra_split_text_format(out, "]");
    } else {
        ra_split_text_format(out, negated ? "(?:(?!" : "(?:");
        ra_split_text_join(out, &others);
        char_set_write(&set, out);
        ra_split_text_format(out, negated ? ")(?s:.))" : ")");
    }
end:
    char_set_release(&set);
    free(others.bytes);
    return status;
}

ra_status_t ra_split_take_class(ra_translator_t *t)
{
    char_set_t set = {0};
    ra_status_t status = take_class(t, 0, &set, &t->out);
    if (status == RA_OK && (set.simple.length > 0 || set.complex.length > 0)) {
        char_set_write(&set, &t->out);
    }
    char_set_release(&set);
    return status;
}
