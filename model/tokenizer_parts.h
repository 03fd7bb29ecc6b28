/**
 * @file  model/tokenizer_parts.h
 * @brief Private to model/tokenizer*.c: the tables of a tokenizer and the steps of encoding.
 *
 * tokenizer_load.c fills ra_tokenizer from JSON; tokenizer_vocab.c, tokenizer_added.c,
 * tokenizer_normalize.c and tokenizer_split.c own one step each; tokenizer.c runs them.
 */
#ifndef RA_MODEL_TOKENIZER_PARTS_H
#define RA_MODEL_TOKENIZER_PARTS_H

#include "model/bpe_merge.h"
#include "model/tokenizer.h"

#include <cjson/cJSON.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

/* ---- vocabulary: tokenizer_vocab.c ---- */

typedef struct ra_vocab_token {
    int32_t id;
    uint32_t text_length, bytes_length;
    size_t text_at, bytes_at; /* in ra_vocab.arena */
} ra_vocab_token_t;

/** Tokens by id and by text. `text` is the spelling in the file, `bytes` what it decodes to. */
typedef struct ra_vocab {
    char *arena;
    size_t arena_length, arena_capacity;
    ra_vocab_token_t *tokens;
    int64_t count, capacity;
    int32_t *by_id;   /* [id_limit] token index, -1 unused */
    int64_t id_limit; /* largest id + 1 */
    int32_t *slots;   /* open addressing on the text, token index, -1 empty */
    uint64_t mask;
    uint32_t longest_text;
    int32_t byte_ids[256]; /* token of one byte, -1 none */
} ra_vocab_t;

/** Room for @a count tokens of at most @a max_id; then ra_vocab_add() for each. */
ra_status_t ra_vocab_init(ra_vocab_t *vocab, int64_t count, int64_t max_id);
void ra_vocab_release(ra_vocab_t *vocab);
/**
 * @param literal  decode to the text itself; else to the bytes its letters stand for, if all do.
 * @retval RA_ERR_INPUT  the id is taken (@a name: the file)
 */
ra_status_t ra_vocab_add(ra_vocab_t *vocab, const char *name, const char *text, int32_t id,
                         bool literal);
/** Token index of a text, -1 when none. */
int64_t ra_vocab_find(const ra_vocab_t *vocab, const char *text, size_t length);
/** The byte-level letters of @a count bytes, at most 2 bytes each. @return length of the text. */
size_t ra_byte_letters(const uint8_t *bytes, size_t count, char *text);
/** Fill byte_ids once all tokens of the model are in. */
void ra_vocab_index_bytes(ra_vocab_t *vocab);

/* ---- added tokens: tokenizer_added.c ---- */

typedef struct ra_added_token {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized;
} ra_added_token_t;

typedef struct ra_trie_node {
    int32_t child, sibling; /* -1 none */
    int32_t token;          /* index of the added token that ends here, -1 none */
    uint8_t byte;
} ra_trie_node_t;

typedef struct ra_trie {
    ra_trie_node_t *nodes;
    int64_t count, capacity;
    int32_t root[256]; /* -1 none */
} ra_trie_t;

typedef struct ra_added_set {
    ra_added_token_t *tokens;
    int64_t count;
    ra_trie_t raw, normalized;
    struct pcre2_real_code_8 *word; /* one word character, for single_word; NULL when not needed */
} ra_added_set_t;

void ra_trie_init(ra_trie_t *trie);
ra_status_t ra_trie_add(ra_trie_t *trie, const char *text, size_t length, int32_t token);
ra_status_t ra_added_compile_word(ra_added_set_t *set);
void ra_added_release(ra_added_set_t *set);

/** Called for each piece in order: @a token is an index into the set, or -1 for text between. */
typedef ra_status_t (*ra_added_visit_t)(void *context, int64_t token, const char *text,
                                        size_t length);
ra_status_t ra_added_split(const ra_added_set_t *set, const ra_trie_t *trie, const char *text,
                           size_t length, ra_added_visit_t visit, void *context);

/* ---- normalizers: tokenizer_normalize.c ---- */

typedef enum ra_normalizer {
    RA_NORMALIZER_NFC,
    RA_NORMALIZER_NFD,
    RA_NORMALIZER_NFKC,
    RA_NORMALIZER_NFKD,
    RA_NORMALIZER_LOWERCASE
} ra_normalizer_t;

/** Growing buffers of one normalization; all zero is valid. */
typedef struct ra_normalize_work {
    int32_t *code_points;
    size_t code_point_capacity;
    char *text[2];
    size_t text_capacity[2];
} ra_normalize_work_t;

void ra_normalize_work_release(ra_normalize_work_t *work);
/**
 * Apply the steps one after another to valid UTF-8.
 * @param out_p  @a text itself when nothing changes, else a buffer of @a work.
 */
ra_status_t ra_normalize(const ra_normalizer_t *steps, int count, ra_normalize_work_t *work,
                         const char *text, size_t length, const char **out_p, size_t *out_length_p);

/* ---- pre-tokenizers: tokenizer_split.c ---- */

typedef enum ra_split_behavior {
    RA_SPLIT_ISOLATED,
    RA_SPLIT_REMOVED,
    RA_SPLIT_MERGED_WITH_PREVIOUS,
    RA_SPLIT_MERGED_WITH_NEXT,
    RA_SPLIT_CONTIGUOUS
} ra_split_behavior_t;

/** One cut by a pattern (code), or a prefix space (code NULL). */
typedef struct ra_split_step {
    struct pcre2_real_code_8 *code;
    ra_split_behavior_t behavior;
    bool invert;
} ra_split_step_t;

typedef struct ra_split_plan {
    char *name; /* of the file, for messages */
    ra_split_step_t steps[RA_TOKENIZER_MAX_STEPS + 2];
    int count;
} ra_split_plan_t;

/**
 * Append a cut. @param literal the pattern is plain text. @param key place in the file.
 * @retval RA_ERR_INPUT  the pattern does not compile
 */
ra_status_t ra_split_plan_add(ra_split_plan_t *plan, const char *key, const char *pattern,
                              bool literal, ra_split_behavior_t behavior, bool invert);
/** Append "put a space before pieces that do not start with one". */
ra_status_t ra_split_plan_add_prefix(ra_split_plan_t *plan);
void ra_split_plan_release(ra_split_plan_t *plan);

/** Match state of one thread. */
typedef struct ra_split_work {
    struct pcre2_real_match_data_8 *match[RA_TOKENIZER_MAX_STEPS + 2];
    struct pcre2_real_match_context_8 *context;
    struct pcre2_real_jit_stack_8 *stack;
    char *prefixed;
    size_t prefixed_capacity;
} ra_split_work_t;

ra_status_t ra_split_work_init(ra_split_work_t *work, const ra_split_plan_t *plan);
void ra_split_work_release(ra_split_work_t *work);

/** Called for each final piece in order; never an empty one. */
typedef ra_status_t (*ra_split_visit_t)(void *context, const char *text, size_t length);
ra_status_t ra_split_run(const ra_split_plan_t *plan, ra_split_work_t *work, const char *text,
                         size_t length, ra_split_visit_t visit, void *context);

/* ---- the whole ---- */

struct ra_tokenizer {
    char digest[5 + 32 + 1];
    ra_vocab_t vocab;
    ra_merge_table_t merges;
    bool ignore_merges;
    ra_added_set_t added;
    ra_normalizer_t normalizers[RA_TOKENIZER_MAX_STEPS];
    int normalizer_count;
    ra_split_plan_t split;
    pthread_mutex_t lock;        /* guards idle */
    struct ra_encode_work *idle; /* working sets nobody uses */
};

/** Fill everything of a zeroed tokenizer but lock and idle. */
ra_status_t ra_tokenizer_load(const char *name, const char *json, int64_t bytes,
                              ra_tokenizer_t *tokenizer);
/** Vocabulary, merges and added tokens of a document: tokenizer_model.c. */
ra_status_t ra_tokenizer_load_model(const char *name, const cJSON *root, ra_tokenizer_t *tokenizer);
/** Release what ra_tokenizer_load() filled, also half filled. */
void ra_tokenizer_unload(ra_tokenizer_t *tokenizer);

/** First byte of @a text that is not part of valid UTF-8, -1 when all is. */
int64_t ra_utf8_first_error(const char *text, int64_t length);

#endif
