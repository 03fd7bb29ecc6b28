/**
 * @file  model/tokenizer_model.c
 * @brief "model" and "added_tokens" of tokenizer.json into vocabulary, merges and tries.
 */
#include "model/json_check.h"
#include "model/tokenizer_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static ra_status_t check_text(const char *name, const char *key, const char *text)
{
    size_t length = strlen(text);
    if (length == 0 || length > RA_TOKENIZER_MAX_TOKEN) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: %s: a token of %zu bytes (\"%.40s\"), allowed are 1 to %d", name, key,
                       length, text, RA_TOKENIZER_MAX_TOKEN);
    }
    return RA_OK;
}

static ra_status_t check_id(const char *name, const char *key, const char *text, const cJSON *node,
                            int32_t *id)
{
    double value = node->valuedouble;
    if (!cJSON_IsNumber(node) || !(value >= 0 && value <= RA_TOKENIZER_MAX_ID) ||
        value != floor(value)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: %s: the id of \"%.60s\" is no integer from 0 to %d", name, key, text,
                       RA_TOKENIZER_MAX_ID);
    }
    *id = (int32_t)value;
    return RA_OK;
}

/* ---- vocabulary ---- */

static ra_status_t load_vocab(const char *name, const cJSON *vocab, const cJSON *added,
                              ra_vocab_t *out)
{
    int64_t count = 0;
    int32_t id = 0, highest = 0;
    const cJSON *node;
    cJSON_ArrayForEach(node, vocab)
    {
        RA_TRY(check_text(name, "model.vocab", node->string));
        RA_TRY(check_id(name, "model.vocab", node->string, node, &id));
        highest = id > highest ? id : highest;
        count++;
    }
    cJSON_ArrayForEach(node, added)
    {
        const char *content;
        int64_t value;
        RA_TRY(ra_json_expect_object(name, "added_tokens", node));
        RA_TRY(ra_json_string(name, node, "content", &content));
        RA_TRY(check_text(name, "added_tokens", content));
        RA_TRY(ra_json_int(name, node, "id", 0, RA_TOKENIZER_MAX_ID, &value));
        highest = value > highest ? (int32_t)value : highest;
        count++;
    }
    RA_TRY(ra_vocab_init(out, count, highest));
    cJSON_ArrayForEach(node, vocab)
    {
        RA_TRY(ra_vocab_add(out, name, node->string, (int32_t)node->valuedouble, false));
    }
    ra_vocab_index_bytes(out);
    return RA_OK;
}

/* ---- merges ---- */

/** "a b" or ["a", "b"] as two texts. */
static bool merge_sides(const cJSON *node, const char *side[2], size_t length[2])
{
    if (cJSON_IsString(node)) {
        const char *space = strchr(node->valuestring, ' ');
        if (space == NULL || strchr(space + 1, ' ') != NULL) {
            return false;
        }
        side[0] = node->valuestring;
        length[0] = (size_t)(space - node->valuestring);
        side[1] = space + 1;
    } else {
        const cJSON *left = cJSON_IsArray(node) ? node->child : NULL;
        const cJSON *right = left == NULL ? NULL : left->next;
        if (!cJSON_IsString(left) || !cJSON_IsString(right) || right->next != NULL) {
            return false;
        }
        side[0] = left->valuestring;
        length[0] = strlen(side[0]);
        side[1] = right->valuestring;
    }
    length[1] = strlen(side[1]);
    return length[0] > 0 && length[1] > 0;
}

static ra_status_t add_merge(const char *name, int64_t rank, const cJSON *node,
                             ra_tokenizer_t *tokenizer)
{
    const char *side[2];
    size_t length[2];
    const ra_vocab_t *vocab = &tokenizer->vocab;
    if (!merge_sides(node, side, length)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: model.merges[%lld] is neither \"a b\" nor [\"a\", \"b\"]", name,
                       (long long)rank);
    }
    char text[2 * RA_TOKENIZER_MAX_TOKEN];
    int64_t parts[3] = {ra_vocab_find(vocab, side[0], length[0]),
                        ra_vocab_find(vocab, side[1], length[1]), -1};
    if (parts[0] >= 0 && parts[1] >= 0) {
        memcpy(text, side[0], length[0]);
        memcpy(text + length[0], side[1], length[1]);
        parts[2] = ra_vocab_find(vocab, text, length[0] + length[1]);
    }
    if (parts[2] < 0) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: model.merges[%lld]: \"%.*s\", \"%.*s\" or the two joined is no token",
                       name, (long long)rank, (int)(length[0] < 60 ? length[0] : 60), side[0],
                       (int)(length[1] < 60 ? length[1] : 60), side[1]);
    }
    ra_merge_table_add(&tokenizer->merges, vocab->tokens[parts[0]].id, vocab->tokens[parts[1]].id,
                       vocab->tokens[parts[2]].id);
    return RA_OK;
}

static ra_status_t load_merges(const char *name, const cJSON *merges, ra_tokenizer_t *tokenizer)
{
    int64_t rank = 0, count = 0;
    const cJSON *node;
    cJSON_ArrayForEach(node, merges)
    {
        count++;
    }
    RA_TRY(ra_merge_table_init(&tokenizer->merges, count));
    cJSON_ArrayForEach(node, merges)
    {
        /* `tokenizers` skips the heading of merges.txt where it was copied along. */
        if (!cJSON_IsString(node) || strncmp(node->valuestring, "#version", 8) != 0) {
            RA_TRY(add_merge(name, rank, node, tokenizer));
        }
        rank++;
    }
    return RA_OK;
}

/* ---- options of the model ---- */

/** True when every byte has a token, so that nothing is ever unknown. */
static bool covers_all_bytes(const ra_vocab_t *vocab)
{
    for (int i = 0; i < 256; i++) {
        if (vocab->byte_ids[i] < 0) {
            return false;
        }
    }
    return true;
}

static ra_status_t check_options(const char *name, const cJSON *model, ra_tokenizer_t *tokenizer)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const char *text;
    bool byte_fallback;
    double dropout;
    for (size_t i = 0; i < RA_ARRAY_LEN(affixes); i++) {
        RA_TRY(ra_json_string_or(name, model, affixes[i], "", &text));
        if (text[0] != '\0') {
            return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: model.%s \"%.40s\" is not supported",
                           name, affixes[i], text);
        }
    }
    RA_TRY(ra_json_double_or(name, model, "dropout", 0, 1, 0, &dropout));
    if (dropout != 0) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: model.dropout %g is not supported: ids would be random", name, dropout);
    }
    RA_TRY(ra_json_string_or(name, model, "unk_token", "", &text));
    RA_TRY(ra_json_bool_or(name, model, "byte_fallback", false, &byte_fallback));
    if ((text[0] != '\0' || byte_fallback) && !covers_all_bytes(&tokenizer->vocab)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: model.%s is not supported with a vocabulary that lacks some bytes",
                       name, byte_fallback ? "byte_fallback" : "unk_token");
    }
    return ra_json_bool_or(name, model, "ignore_merges", false, &tokenizer->ignore_merges);
}

/* ---- added tokens ---- */

static ra_status_t add_to_trie(ra_tokenizer_t *tokenizer, const char *content, int32_t index)
{
    const ra_added_token_t *token = &tokenizer->added.tokens[index];
    ra_normalize_work_t work = {0};
    size_t length = strlen(content);
    if (!token->normalized) {
        return ra_trie_add(&tokenizer->added.raw, content, length, index);
    }
    ra_status_t status = ra_normalize(tokenizer->normalizers, tokenizer->normalizer_count, &work,
                                      content, length, &content, &length);
    if (status == RA_OK) {
        status = ra_trie_add(&tokenizer->added.normalized, content, length, index);
    }
    ra_normalize_work_release(&work);
    return status;
}

static ra_status_t load_added(const char *name, const cJSON *node, ra_tokenizer_t *tokenizer)
{
    ra_added_set_t *set = &tokenizer->added;
    ra_added_token_t *token = &set->tokens[set->count];
    const char *content;
    bool special;
    int64_t id;
    RA_TRY(ra_json_string(name, node, "content", &content));
    RA_TRY(ra_json_int(name, node, "id", 0, RA_TOKENIZER_MAX_ID, &id));
    RA_TRY(ra_json_bool_or(name, node, "special", false, &special));
    RA_TRY(ra_json_bool_or(name, node, "single_word", false, &token->single_word));
    RA_TRY(ra_json_bool_or(name, node, "lstrip", false, &token->lstrip));
    RA_TRY(ra_json_bool_or(name, node, "rstrip", false, &token->rstrip));
    RA_TRY(ra_json_bool_or(name, node, "normalized", !special, &token->normalized));
    token->id = (int32_t)id;
    int64_t known = ra_vocab_find(&tokenizer->vocab, content, strlen(content));
    if (known >= 0 && tokenizer->vocab.tokens[known].id != token->id) {
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: added_tokens: \"%.60s\" has id %d, elsewhere in the file %d", name,
                       content, (int)token->id, (int)tokenizer->vocab.tokens[known].id);
    }
    if (known < 0) {
        RA_TRY(ra_vocab_add(&tokenizer->vocab, name, content, token->id, true));
    }
    return add_to_trie(tokenizer, content, (int32_t)set->count++);
}

static ra_status_t load_added_tokens(const char *name, const cJSON *added,
                                     ra_tokenizer_t *tokenizer)
{
    ra_added_set_t *set = &tokenizer->added;
    const cJSON *node;
    int64_t count = 0;
    bool single_word = false;
    cJSON_ArrayForEach(node, added)
    {
        count++;
    }
    ra_trie_init(&set->raw);
    ra_trie_init(&set->normalized);
    set->tokens = calloc((size_t)count + 1, sizeof *set->tokens);
    if (set->tokens == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for %lld added tokens",
                       (long long)count);
    }
    cJSON_ArrayForEach(node, added)
    {
        RA_TRY(load_added(name, node, tokenizer));
        single_word = single_word || set->tokens[set->count - 1].single_word;
    }
    return single_word ? ra_added_compile_word(set) : RA_OK;
}

ra_status_t ra_tokenizer_load_model(const char *name, const cJSON *root, ra_tokenizer_t *tokenizer)
{
    const cJSON *model = ra_json_member(root, "model");
    const cJSON *added = ra_json_member(root, "added_tokens");
    const char *type;
    RA_TRY(ra_json_expect_object(name, "model", model));
    /* Files of old versions leave the type out; only BPE has merges. */
    RA_TRY(ra_json_string_or(name, model, "type", "BPE", &type));
    if (strcmp(type, "BPE") != 0) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: model.type \"%.40s\" is not supported", name,
                       type);
    }
    const cJSON *vocab = ra_json_member(model, "vocab"), *merges = ra_json_member(model, "merges");
    RA_TRY(ra_json_expect_object(name, "model.vocab", vocab));
    if (!cJSON_IsArray(merges)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: model.merges is not an array", name);
    }
    if (added != NULL && !cJSON_IsArray(added)) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: added_tokens is not an array", name);
    }
    RA_TRY(load_vocab(name, vocab, added, &tokenizer->vocab));
    RA_TRY(check_options(name, model, tokenizer));
    RA_TRY(load_merges(name, merges, tokenizer));
    return load_added_tokens(name, added, tokenizer);
}
