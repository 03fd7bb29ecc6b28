/**
 * @file  model/json_check.h
 * @brief Strict JSON for files of strangers: cJSON behind a check of every byte.
 *
 * cJSON alone accepts duplicate keys (parsers then disagree about which one counts), invalid UTF-8,
 * NUL escapes that cut strings, and loses digits of long numbers. Here a text is first checked
 * against RFC 8259 and, beyond it, refused for: a key that occurs twice in an object (compared
 * after unescaping), nesting deeper than RA_JSON_MAX_DEPTH, bytes that are not UTF-8, a NUL byte or
 * an escape for one, a lone surrogate escape, a number of more than 60 characters, anything after
 * the value. O(n log n) in the size of the text whatever it holds.
 *
 * Every refusal is RA_ERR_INPUT and names the file and the byte offset; every getter names the file
 * and the key.
 *
 * Looking a key up is linear in the size of the object: walk large objects (vocabularies, weight
 * maps) with cJSON_ArrayForEach instead.
 */
#ifndef RA_MODEL_JSON_CHECK_H
#define RA_MODEL_JSON_CHECK_H

#include "base/status.h"
#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

enum { RA_JSON_MAX_DEPTH = 64 };

/** Integers beyond this magnitude do not survive a double and are refused by the getters. */
#define RA_JSON_MAX_INT ((int64_t)1 << 53)

/**
 * Check and parse @a length bytes.
 * @param name    Where the bytes come from, for messages ("rows.jsonl:17").
 * @param root_p  Caller releases with cJSON_Delete().
 * @retval RA_ERR_INPUT  as described above.  @retval RA_ERR_NOMEM
 */
ra_status_t ra_json_parse(const char *name, const char *bytes, int64_t length, cJSON **root_p);

/** What a format forbids beyond the above. */
typedef struct ra_json_rules {
    int max_depth; /**< <= RA_JSON_MAX_DEPTH */
    bool
        plain_integers; /**< every number is 0 or digits without sign, point, exponent, leading 0 */
} ra_json_rules_t;

/** ra_json_parse() with stricter rules. */
ra_status_t ra_json_parse_rules(const char *name, const char *bytes, int64_t length,
                                const ra_json_rules_t *rules, cJSON **root_p);

/** Read a file (ra_file_read()) and parse it. @retval RA_ERR_USAGE nothing exists at @a path. */
ra_status_t ra_json_read_file(const char *path, int64_t max_bytes, cJSON **root_p);

/*
 * Typed getters of one key of an object. `file` is only used in messages and may carry a path into
 * the document ("config.json: rope_scaling"). The _or forms give `fallback` when the key is absent
 * or null; the others refuse that. All fail with RA_ERR_INPUT and leave the output untouched.
 */

/** The member, or NULL when absent or null. Case sensitive. */
const cJSON *ra_json_member(const cJSON *object, const char *key);
/** Refuse a @a node that is not an object. */
ra_status_t ra_json_expect_object(const char *file, const char *key, const cJSON *node);

/** An integer in [low, high], written without fraction ("3" or "3.0"). */
ra_status_t ra_json_int(const char *file, const cJSON *object, const char *key, int64_t low,
                        int64_t high, int64_t *value);
ra_status_t ra_json_int_or(const char *file, const cJSON *object, const char *key, int64_t low,
                           int64_t high, int64_t fallback, int64_t *value);
/** A finite number in [low, high]. */
ra_status_t ra_json_double(const char *file, const cJSON *object, const char *key, double low,
                           double high, double *value);
ra_status_t ra_json_double_or(const char *file, const cJSON *object, const char *key, double low,
                              double high, double fallback, double *value);
ra_status_t ra_json_bool(const char *file, const cJSON *object, const char *key, bool *value);
ra_status_t ra_json_bool_or(const char *file, const cJSON *object, const char *key, bool fallback,
                            bool *value);
/** A string; it belongs to the document. */
ra_status_t ra_json_string(const char *file, const cJSON *object, const char *key,
                           const char **value);
ra_status_t ra_json_string_or(const char *file, const cJSON *object, const char *key,
                              const char *fallback, const char **value);

#endif
