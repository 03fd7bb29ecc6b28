/**
 * @file  model/split_parts.h
 * @brief Private to model/split_*.c: the translator's state and what its parts share.
 */
#ifndef RA_MODEL_SPLIT_PARTS_H
#define RA_MODEL_SPLIT_PARTS_H

#include "model/split_pattern.h"

#include <stdbool.h>

enum { RA_SPLIT_MAX_GROUPS = 200, RA_SPLIT_MAX_DEPTH = 16, RA_SPLIT_MAX_OUTPUT = 1 << 20 };

/** Text that grows; `failed` once memory or RA_SPLIT_MAX_OUTPUT ran out, checked at the end. */
typedef struct ra_split_text {
    char *bytes;
    size_t length, capacity;
    bool failed;
} ra_split_text_t;

typedef struct ra_translator {
    const char *name, *source;
    size_t length, at;
    ra_split_text_t out;
    size_t atom; /* where in out the last atom starts, for quantifiers around it */
    size_t groups[RA_SPLIT_MAX_GROUPS]; /* where in out the open groups start */
    int group_count;
} ra_translator_t;

void ra_split_text_insert(ra_split_text_t *text, size_t at, const char *bytes, size_t length);
void ra_split_text_put(ra_split_text_t *text, const char *bytes, size_t length);
/** For short pieces; longer text goes through ra_split_text_put(). */
void ra_split_text_format(ra_split_text_t *text, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void ra_split_text_join(ra_split_text_t *text, const ra_split_text_t *other);

/** RA_ERR_INPUT: "name: what at byte N of the pattern". */
ra_status_t ra_split_refuse(const ra_translator_t *t, size_t at, const char *what);
bool ra_split_looking_at(const ra_translator_t *t, const char *text);
/** The next code point, taken. */
uint32_t ra_split_take_char(ra_translator_t *t);

/** After the backslash: does an escape for a set of characters follow? Takes it if so. */
ra_status_t ra_split_take_set_escape(ra_translator_t *t, char *inside, size_t inside_size,
                                     bool *negated, bool *found);
/** After the backslash: an escape for one character. */
ra_status_t ra_split_take_char_escape(ra_translator_t *t, uint32_t *value);
/** With the [ at t->at: the whole class, written to t->out. */
ra_status_t ra_split_take_class(ra_translator_t *t);

#endif
