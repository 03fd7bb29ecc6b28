/**
 * @file  model/tokenizer_normalize.c
 * @brief Unicode normalization and lower case by utf8proc, linear in the text.
 *
 * utf8proc's own decomposition sorts combining marks by insertion, quadratic in a long run of them;
 * here runs are sorted by counting, and its composition, which is linear, does the rest.
 */
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/** Code points below this are their own normal form and never compose with what precedes them. */
static bool is_inert(const char *text, size_t length, ra_normalizer_t step)
{
    /* First lead byte of a changing code point: NFC U+0300 on, the others U+0080 on. */
    uint8_t limit = step == RA_NORMALIZER_NFC ? 0xcc : 0x80;
    uint8_t highest = 0;
    for (size_t i = 0; i < length; i++) {
        uint8_t byte = (uint8_t)text[i];
        /* Upper-case ASCII changes too; continuation bytes below 0xc0 never reach 0xcc. */
        highest = byte > highest ? byte : highest;
        if (step == RA_NORMALIZER_LOWERCASE && byte >= 'A' && byte <= 'Z') {
            return false;
        }
    }
    return highest < limit;
}

static ra_status_t reserve(void **memory, size_t *capacity, size_t count, size_t element)
{
    if (count <= *capacity) {
        return RA_OK;
    }
    size_t wanted = count + count / 4 + 64;
    void *larger = realloc(*memory, wanted * element);
    if (larger == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate %zu bytes to normalize a text",
                       wanted * element);
    }
    *memory = larger;
    *capacity = wanted;
    return RA_OK;
}

void ra_normalize_work_release(ra_normalize_work_t *work)
{
    free(work->code_points);
    free(work->text[0]);
    free(work->text[1]);
    *work = (ra_normalize_work_t){0};
}

static int combining_class(int32_t c)
{
    return c < 0x300 ? 0 : (int)utf8proc_get_property(c)->combining_class;
}

/** Stable sort of a run of marks by combining class. @param spare room for @a count code points */
static void sort_marks(int32_t *marks, size_t count, int32_t *spare)
{
    size_t starts[256] = {0};
    for (size_t i = 0; i < count; i++) {
        starts[combining_class(marks[i])]++;
    }
    size_t sum = 0;
    for (int i = 0; i < 256; i++) {
        size_t size = starts[i];
        starts[i] = sum;
        sum += size;
    }
    for (size_t i = 0; i < count; i++) {
        spare[starts[combining_class(marks[i])]++] = marks[i];
    }
    memcpy(marks, spare, count * sizeof *marks);
}

/** Canonical ordering of all runs of marks. */
static ra_status_t order_marks(ra_normalize_work_t *work, size_t count)
{
    for (size_t at = 0; at < count;) {
        size_t end = at;
        while (end < count && combining_class(work->code_points[end]) != 0) {
            end++;
        }
        if (end - at > 1) {
            RA_TRY(reserve((void **)&work->code_points, &work->code_point_capacity,
                           count + (end - at), sizeof *work->code_points));
            sort_marks(work->code_points + at, end - at, work->code_points + count);
        }
        at = end + 1;
    }
    return RA_OK;
}

/** Rust's char::to_lowercase: the simple mapping but for U+0130, which becomes two. */
static size_t lower(int32_t c, int32_t out[2])
{
    out[0] = c == 0x130 ? 'i' : utf8proc_tolower(c);
    out[1] = 0x307;
    return c == 0x130 ? 2 : 1;
}

static ra_status_t expand(ra_normalizer_t step, ra_normalize_work_t *work, const char *text,
                          size_t length, size_t *count_p)
{
    enum { MOST = 32 }; /* code points of one decomposition: 18 in Unicode */
    utf8proc_option_t options =
        UTF8PROC_STABLE |
        (step == RA_NORMALIZER_NFC || step == RA_NORMALIZER_NFKC ? UTF8PROC_COMPOSE
                                                                 : UTF8PROC_DECOMPOSE);
    if (step == RA_NORMALIZER_NFKC || step == RA_NORMALIZER_NFKD) {
        options |= UTF8PROC_COMPAT;
    }
    size_t count = 0;
    int boundary = 0;
    for (size_t at = 0; at < length;) {
        utf8proc_int32_t c;
        at += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at,
                                       (utf8proc_ssize_t)(length - at), &c);
        RA_TRY(reserve((void **)&work->code_points, &work->code_point_capacity, count + MOST,
                       sizeof *work->code_points));
        int32_t *out = work->code_points + count;
        if (step == RA_NORMALIZER_LOWERCASE) {
            count += lower(c, out);
            continue;
        }
        utf8proc_ssize_t made = utf8proc_decompose_char(c, out, MOST, options, &boundary);
        if (made < 0 || made > MOST) {
            return ra_fail(RA_ERR_INTERNAL, "tokenizer", "utf8proc cannot decompose U+%04X",
                           (unsigned)c);
        }
        count += (size_t)made;
    }
    *count_p = count;
    if (step == RA_NORMALIZER_LOWERCASE) {
        return RA_OK;
    }
    RA_TRY(order_marks(work, count));
    if (options & UTF8PROC_COMPOSE) {
        *count_p =
            (size_t)utf8proc_normalize_utf32(work->code_points, (utf8proc_ssize_t)count, options);
    }
    return RA_OK;
}

static ra_status_t apply(ra_normalizer_t step, ra_normalize_work_t *work, int target,
                         const char *text, size_t length, size_t *out_length_p)
{
    size_t count = 0, written = 0;
    RA_TRY(expand(step, work, text, length, &count));
    RA_TRY(reserve((void **)&work->text[target], &work->text_capacity[target], 4 * count + 1, 1));
    for (size_t i = 0; i < count; i++) {
        written += (size_t)utf8proc_encode_char(work->code_points[i],
                                                (utf8proc_uint8_t *)work->text[target] + written);
    }
    *out_length_p = written;
    return RA_OK;
}

ra_status_t ra_normalize(const ra_normalizer_t *steps, int count, ra_normalize_work_t *work,
                         const char *text, size_t length, const char **out_p, size_t *out_length_p)
{
    int target = 0;
    for (int i = 0; i < count; i++) {
        if (is_inert(text, length, steps[i])) {
            continue;
        }
        RA_TRY(apply(steps[i], work, target, text, length, &length));
        text = work->text[target];
        target = 1 - target;
    }
    *out_p = text;
    *out_length_p = length;
    return RA_OK;
}
