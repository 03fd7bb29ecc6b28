/**
 * @file  model/tokenizer_load.c
 * @brief tokenizer.json into a tokenizer: checks every part of the pipeline, refuses what is
 * unknown.
 */
#include "model/file_io.h"
#include "model/json_check.h"
#include "model/tokenizer_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/** GPT-2's pattern, the one of ByteLevel with use_regex. */
static const char byte_level_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+|"
                                         " ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/** State of a load: which file, and what it fills. */
typedef struct loader {
    const char *name;
    ra_tokenizer_t *tokenizer;
    bool byte_level; /* ByteLevel seen: nothing may follow */
} loader_t;

static ra_status_t refuse_type(const char *name, const char *key, const char *type)
{
    return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: %s.type \"%.40s\" is not supported", name, key,
                   type);
}

/** The "type" of a pipeline part. */
static ra_status_t part_type(const char *name, const char *key, const cJSON *node,
                             const char **type)
{
    char place[512];
    RA_TRY(ra_json_expect_object(name, key, node));
    snprintf(place, sizeof place, "%s: %s", name, key);
    return ra_json_string(place, node, "type", type);
}

/** The list of a Sequence. */
static ra_status_t part_list(const char *name, const char *key, const cJSON *node,
                             const char *member, const cJSON **list)
{
    *list = ra_json_member(node, member);
    return cJSON_IsArray(*list)
               ? RA_OK
               : ra_fail(RA_ERR_INPUT, "tokenizer", "%s: %s.%s is not an array", name, key, member);
}

/* ---- normalizer ---- */

static ra_status_t load_normalizer(const loader_t *loader, const cJSON *node)
{
    static const char *const types[] = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"};
    ra_tokenizer_t *tokenizer = loader->tokenizer;
    const char *type;
    if (node == NULL) {
        return RA_OK;
    }
    RA_TRY(part_type(loader->name, "normalizer", node, &type));
    if (strcmp(type, "Sequence") == 0) {
        const cJSON *list, *item;
        RA_TRY(part_list(loader->name, "normalizer", node, "normalizers", &list));
        cJSON_ArrayForEach(item, list)
        {
            RA_TRY(load_normalizer(loader, item));
        }
        return RA_OK;
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(types); i++) {
        if (strcmp(type, types[i]) != 0) {
            continue;
        }
        if (tokenizer->normalizer_count == RA_TOKENIZER_MAX_STEPS) {
            return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: more than %d normalizers", loader->name,
                           RA_TOKENIZER_MAX_STEPS);
        }
        tokenizer->normalizers[tokenizer->normalizer_count++] = (ra_normalizer_t)i;
        return RA_OK;
    }
    return refuse_type(loader->name, "normalizer", type);
}

/* ---- pre-tokenizer ---- */

static ra_status_t load_split(loader_t *loader, const char *place, const cJSON *node)
{
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const cJSON *pattern = ra_json_member(node, "pattern");
    const char *regex, *text, *behavior;
    bool invert;
    RA_TRY(ra_json_expect_object(loader->name, "pre_tokenizer.pattern", pattern));
    RA_TRY(ra_json_string_or(place, pattern, "Regex", NULL, &regex));
    RA_TRY(ra_json_string_or(place, pattern, "String", NULL, &text));
    RA_TRY(ra_json_string(place, node, "behavior", &behavior));
    RA_TRY(ra_json_bool_or(place, node, "invert", false, &invert));
    if ((regex == NULL) == (text == NULL)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: pattern has to be one of {\"Regex\"} and {\"String\"}", place);
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(names); i++) {
        if (strcmp(behavior, names[i]) == 0) {
            return ra_split_plan_add(&loader->tokenizer->split, "pre_tokenizer.pattern",
                                     regex != NULL ? regex : text, regex == NULL,
                                     (ra_split_behavior_t)i, invert);
        }
    }
    return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: behavior \"%.40s\" is not supported", place,
                   behavior);
}

static ra_status_t load_digits(loader_t *loader, const char *place, const cJSON *node)
{
    bool individual;
    RA_TRY(ra_json_bool_or(place, node, "individual_digits", false, &individual));
    return ra_split_plan_add(&loader->tokenizer->split, "Digits", "\\p{N}", false,
                             individual ? RA_SPLIT_ISOLATED : RA_SPLIT_CONTIGUOUS, false);
}

static ra_status_t load_byte_level(loader_t *loader, const char *place, const cJSON *node)
{
    ra_split_plan_t *plan = &loader->tokenizer->split;
    bool use_regex, prefix;
    RA_TRY(ra_json_bool_or(place, node, "use_regex", true, &use_regex));
    RA_TRY(ra_json_bool_or(place, node, "add_prefix_space", true, &prefix));
    if (prefix) {
        RA_TRY(ra_split_plan_add_prefix(plan));
    }
    if (use_regex) {
        RA_TRY(ra_split_plan_add(plan, "ByteLevel", byte_level_pattern, false, RA_SPLIT_ISOLATED,
                                 false));
    }
    loader->byte_level = true;
    return RA_OK;
}

static ra_status_t load_pre_tokenizer(loader_t *loader, const cJSON *node)
{
    const char *type;
    char place[512];
    snprintf(place, sizeof place, "%s: pre_tokenizer", loader->name);
    RA_TRY(part_type(loader->name, "pre_tokenizer", node, &type));
    if (strcmp(type, "Sequence") == 0) {
        const cJSON *list, *item;
        RA_TRY(part_list(loader->name, "pre_tokenizer", node, "pretokenizers", &list));
        cJSON_ArrayForEach(item, list)
        {
            RA_TRY(load_pre_tokenizer(loader, item));
        }
        return RA_OK;
    }
    if (loader->byte_level) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: \"%.40s\" after \"ByteLevel\" is not supported", place, type);
    }
    if (loader->tokenizer->split.count == RA_TOKENIZER_MAX_STEPS) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: more than %d steps", place,
                       RA_TOKENIZER_MAX_STEPS);
    }
    if (strcmp(type, "Split") == 0) {
        return load_split(loader, place, node);
    }
    if (strcmp(type, "Digits") == 0) {
        return load_digits(loader, place, node);
    }
    if (strcmp(type, "ByteLevel") == 0) {
        return load_byte_level(loader, place, node);
    }
    return refuse_type(loader->name, "pre_tokenizer", type);
}

/* ---- post-processor and decoder: accepted when they change nothing here ---- */

static ra_status_t check_part(const char *name, const char *key, const cJSON *node,
                              const char *list_key, const char *const *accepted, size_t count)
{
    const char *type;
    if (node == NULL) {
        return RA_OK;
    }
    RA_TRY(part_type(name, key, node, &type));
    if (strcmp(type, "Sequence") == 0) {
        const cJSON *list, *item;
        RA_TRY(part_list(name, key, node, list_key, &list));
        cJSON_ArrayForEach(item, list)
        {
            RA_TRY(check_part(name, key, item, list_key, accepted, count));
        }
        return RA_OK;
    }
    for (size_t i = 0; i < count; i++) {
        if (strcmp(type, accepted[i]) == 0) {
            return RA_OK;
        }
    }
    return refuse_type(name, key, type);
}

static ra_status_t load_document(loader_t *loader, const cJSON *root)
{
    static const char *const posts[] = {"ByteLevel", "TemplateProcessing"};
    static const char *const decoders[] = {"ByteLevel"};
    const char *version;
    RA_TRY(ra_json_expect_object(loader->name, "the document", root));
    RA_TRY(ra_json_string_or(loader->name, root, "version", "1.0", &version));
    if (strcmp(version, "1.0") != 0) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: version \"%.40s\" is not supported",
                       loader->name, version);
    }
    RA_TRY(load_normalizer(loader, ra_json_member(root, "normalizer")));
    RA_TRY(load_pre_tokenizer(loader, ra_json_member(root, "pre_tokenizer")));
    if (!loader->byte_level) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: pre_tokenizer has no \"ByteLevel\": only byte-level BPE is supported",
                       loader->name);
    }
    RA_TRY(check_part(loader->name, "post_processor", ra_json_member(root, "post_processor"),
                      "processors", posts, RA_ARRAY_LEN(posts)));
    RA_TRY(check_part(loader->name, "decoder", ra_json_member(root, "decoder"), "decoders",
                      decoders, RA_ARRAY_LEN(decoders)));
    return ra_tokenizer_load_model(loader->name, root, loader->tokenizer);
}

ra_status_t ra_tokenizer_load(const char *name, const char *json, int64_t bytes,
                              ra_tokenizer_t *tokenizer)
{
    loader_t loader = {.name = name, .tokenizer = tokenizer};
    cJSON *root;
    XXH128_hash_t hash = XXH3_128bits(json, (size_t)bytes);
    snprintf(tokenizer->digest, sizeof tokenizer->digest, "xxh3:%016llx%016llx",
             (unsigned long long)hash.high64, (unsigned long long)hash.low64);
    tokenizer->split.name = strdup(name);
    if (tokenizer->split.name == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for a name");
    }
    RA_TRY(ra_json_parse(name, json, bytes, &root));
    ra_status_t status = load_document(&loader, root);
    cJSON_Delete(root);
    return status;
}

void ra_tokenizer_unload(ra_tokenizer_t *tokenizer)
{
    ra_vocab_release(&tokenizer->vocab);
    ra_merge_table_release(&tokenizer->merges);
    ra_added_release(&tokenizer->added);
    ra_split_plan_release(&tokenizer->split);
}
