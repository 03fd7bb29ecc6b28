/**
 * @file  model/tokenizer.h
 * @brief Hugging Face `tokenizer.json`, byte-level BPE: text to token ids and back.
 *
 * The ids equal those of the `tokenizers` library with add_special_tokens=False. Steps of encode:
 *
 *   1. Added tokens are cut out of the raw text, leftmost and of those longest, with their
 *      single_word, lstrip and rstrip rules (white space: Unicode White_Space).
 *   2. The rest is normalized: null, NFC, NFD, NFKC, NFKD, Lowercase or a Sequence of those; added
 *      tokens marked `normalized` are then cut out of the normalized text.
 *   3. Pre-tokenizers cut it further: Split (Regex or String; every behavior; invert), Digits,
 *      ByteLevel, Sequence of those. The last one must be ByteLevel. Patterns are in the dialect of
 *      Oniguruma, translated by model/split_pattern.h and run by PCRE2.
 *   4. Each piece of UTF-8 bytes becomes one symbol a byte; adjacent pairs are merged, lowest rank
 *      first, leftmost first among equals, until no pair has a rank (with `ignore_merges` a piece
 *      that is a token as a whole is taken as it is).
 *
 * Post-processors (ByteLevel, TemplateProcessing, Sequence of those) are accepted and not applied:
 * no special token is ever added here. `truncation` and `padding` are ignored for the same reason.
 * Anything else is refused with RA_ERR_INPUT and a message naming file, key and value, never
 * approximated; so is an unk_token or byte_fallback that could apply (some byte has no token), any
 * dropout, continuing_subword_prefix or end_of_word_suffix.
 *
 * Unicode data: categories by PCRE2 (Unicode 14 in Debian 12), normalization by utf8proc (15). Code
 * points assigned later count as unassigned. `tokenizers` 0.23 splits by Unicode 16 and normalizes
 * by Unicode 9, so it differs on code points added in 15 and 16 and, where a normalizer is set, on
 * decompositions and combining classes added since 9.
 *
 * Costs: O(n log n) whatever the text, times the longest added token at worst where a text nearly
 * matches it everywhere; patterns that are themselves super-linear end in RA_ERR_INPUT at a match
 * limit that grows with the text. Peak memory of encode is about 40
 * bytes a byte of the longest piece beside 4 bytes a token.
 */
#ifndef RA_MODEL_TOKENIZER_H
#define RA_MODEL_TOKENIZER_H

#include "base/status.h"
#include <stdint.h>

/** Limits of what is accepted from a file. */
enum {
    RA_TOKENIZER_MAX_FILE = 256 << 20,   /**< bytes of tokenizer.json */
    RA_TOKENIZER_MAX_ID = (1 << 24) - 1, /**< largest token id */
    RA_TOKENIZER_MAX_TOKEN = 16 << 10,   /**< bytes of one token's text */
    RA_TOKENIZER_MAX_PATTERN = 32 << 10, /**< bytes of one split pattern */
    RA_TOKENIZER_MAX_STEPS = 32          /**< normalizers; pre-tokenizers, Sequences unrolled */
};

typedef struct ra_tokenizer ra_tokenizer_t;

/**
 * Open `model_dir/tokenizer.json`.
 * @param tokenizer_p  Caller releases with ra_tokenizer_close().
 * @retval RA_ERR_USAGE  no such file
 * @retval RA_ERR_INPUT  broken, hostile or not supported; the message names file and cause
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_tokenizer_open(const char *model_dir, ra_tokenizer_t **tokenizer_p);
ra_status_t ra_tokenizer_open_file(const char *path, ra_tokenizer_t **tokenizer_p);
/** The same from memory; @a name stands for the file in messages. The bytes are not kept. */
ra_status_t ra_tokenizer_open_memory(const char *name, const char *json, int64_t bytes,
                                     ra_tokenizer_t **tokenizer_p);
/** Accepts NULL. No call on the tokenizer may be running. */
void ra_tokenizer_close(ra_tokenizer_t *tokenizer);

/**
 * Token ids of @a bytes bytes of UTF-8 (NUL allowed inside).
 *
 * Safe to call from any number of threads at once on one tokenizer: each call borrows a working
 * set (about 3 MiB: word cache, match state) that later calls reuse.
 * @param ids_p    Caller frees; never NULL on success, also for an empty text.
 * @param count_p  Number of ids.
 * @retval RA_ERR_INPUT  not UTF-8 (message: byte offset); a byte without a token; the pattern gave
 *                       up on the text (match limit)
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_tokenizer_encode(ra_tokenizer_t *tokenizer, const char *utf8, int64_t bytes,
                                int32_t **ids_p, int64_t *count_p);

/**
 * Bytes of @a count tokens joined: exact bytes, so a part of a text may end inside a character.
 * Added tokens that the model's vocabulary lacks give their content. decode(encode(x)) == x
 * wherever no normalizer, strip rule, Removed split or add_prefix_space changes x.
 * @param bytes_p   Caller frees; a zero byte follows the @a length_p bytes.
 * @retval RA_ERR_INPUT  an id without a token
 */
ra_status_t ra_tokenizer_decode(const ra_tokenizer_t *tokenizer, const int32_t *ids, int64_t count,
                                char **bytes_p, int64_t *length_p);

/** Largest id + 1. Ids below it may be unused. */
int64_t ra_tokenizer_vocab_size(const ra_tokenizer_t *tokenizer);
/** Id of a token by its text as tokenizer.json spells it (byte-level letters), -1 when none. */
int32_t ra_tokenizer_token_id(const ra_tokenizer_t *tokenizer, const char *text);
/** "xxh3:" and 32 hex digits: XXH3-128 of the bytes of the file. Identifies, does not protect. */
const char *ra_tokenizer_digest(const ra_tokenizer_t *tokenizer);

#endif
