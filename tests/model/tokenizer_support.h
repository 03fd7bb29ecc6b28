/** @file tests/model/tokenizer_support.h  @brief What the tokenizer tests share. */
#ifndef RA_TESTS_TOKENIZER_SUPPORT_H
#define RA_TESTS_TOKENIZER_SUPPORT_H

#include "model/file_io.h"
#include "model/json_check.h"
#include "model/tokenizer.h"
#include "tests/test_support.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static const char shipped_dir[] = "configs/models/ring-tiny-linear";

static inline ra_tokenizer_t *open_shipped(void)
{
    ra_tokenizer_t *tokenizer = NULL;
    assert_int_equal(ra_tokenizer_open(shipped_dir, &tokenizer), RA_OK);
    return tokenizer;
}

/*
 * Texts of the goldens hold NUL, which strict JSON refuses. Each \\u0000 of the file is read as
 * U+E000, which the goldens have nowhere else, and golden_text() puts it back.
 */
static inline cJSON *read_goldens(const char *path)
{
    cJSON *root = NULL;
    char *json = NULL;
    int64_t length = 0;
    assert_int_equal(ra_file_read(path, (int64_t)64 << 20, &json, &length), RA_OK);
    assert_null(strstr(json, "\\ue000"));
    assert_null(strstr(json, "\xee\x80\x80"));
    for (char *at = json; (at = strstr(at, "\\u0000")) != NULL; at += 6) {
        memcpy(at, "\\ue000", 6);
    }
    assert_int_equal(ra_json_parse(path, json, length, &root), RA_OK);
    free(json);
    return root;
}

/** The bytes of a text, in place. @return their number. */
static inline int64_t golden_text(cJSON *text)
{
    char *from = text->valuestring, *to = from;
    while (*from != '\0') {
        bool nul = memcmp(from, "\xee\x80\x80", strnlen(from, 3)) == 0;
        *to++ = nul ? '\0' : *from;
        from += nul ? 3 : 1;
    }
    int64_t length = to - text->valuestring;
    *to = '\0';
    return length;
}

/** Encode and compare with a JSON array of ids. */
static inline void assert_encodes(ra_tokenizer_t *tokenizer, const char *text, int64_t length,
                                  const cJSON *want, const char *what)
{
    int32_t *ids = NULL;
    int64_t count = -1, at = 0;
    assert_int_equal(ra_tokenizer_encode(tokenizer, text, length, &ids, &count), RA_OK);
    const cJSON *id;
    cJSON_ArrayForEach(id, want)
    {
        if (at >= count || ids[at] != (int32_t)id->valuedouble) {
            fail_msg("%s: id %lld of \"%s\" is %d, want %d", what, (long long)at, text,
                     at < count ? (int)ids[at] : -1, (int)id->valuedouble);
        }
        at++;
    }
    assert_int_equal(count, at);
    free(ids);
}

static inline void assert_round_trip(ra_tokenizer_t *tokenizer, const char *text, int64_t length)
{
    int32_t *ids = NULL;
    char *back = NULL;
    int64_t count = 0, back_length = 0;
    assert_int_equal(ra_tokenizer_encode(tokenizer, text, length, &ids, &count), RA_OK);
    assert_int_equal(ra_tokenizer_decode(tokenizer, ids, count, &back, &back_length), RA_OK);
    assert_int_equal(back_length, length);
    assert_memory_equal(back, text, (size_t)length);
    free(back);
    free(ids);
}

#endif
