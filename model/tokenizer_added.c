/**
 * @file  model/tokenizer_added.c
 * @brief Added tokens: a byte trie and the cutting of a text at its matches.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/split_pattern.h"
#include "model/tokenizer_parts.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

void ra_trie_init(ra_trie_t *trie)
{
    *trie = (ra_trie_t){0};
    memset(trie->root, 0xff, sizeof trie->root);
}

/** Child of a node (-1: the root) by its byte, made when it is missing. @return -1: no memory. */
static int32_t trie_step(ra_trie_t *trie, int32_t node, uint8_t byte)
{
    int32_t first = node < 0 ? trie->root[byte] : trie->nodes[node].child;
    for (int32_t at = first; at >= 0; at = trie->nodes[at].sibling) {
        if (trie->nodes[at].byte == byte) {
            return at;
        }
    }
    if (trie->count == trie->capacity) {
        int64_t capacity = 2 * trie->capacity + 64;
        ra_trie_node_t *larger = realloc(trie->nodes, (size_t)capacity * sizeof *larger);
        if (larger == NULL) {
            return -1;
        }
        trie->nodes = larger;
        trie->capacity = capacity;
    }
    int32_t made = (int32_t)trie->count++;
    trie->nodes[made] =
        (ra_trie_node_t){.child = -1, .sibling = node < 0 ? -1 : first, .token = -1, .byte = byte};
    *(node < 0 ? &trie->root[byte] : &trie->nodes[node].child) = made;
    return made;
}

ra_status_t ra_trie_add(ra_trie_t *trie, const char *text, size_t length, int32_t token)
{
    int32_t node = -1;
    for (size_t i = 0; i < length; i++) {
        node = trie_step(trie, node, (uint8_t)text[i]);
        if (node < 0) {
            return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate the added tokens");
        }
    }
    if (node >= 0 && trie->nodes[node].token < 0) {
        trie->nodes[node].token = token;
    }
    return RA_OK;
}

ra_status_t ra_added_compile_word(ra_added_set_t *set)
{
    int error;
    PCRE2_SIZE offset;
    set->word =
        pcre2_compile((PCRE2_SPTR) "[" RA_CLASS_WORD "\\p{Join_Control}]", PCRE2_ZERO_TERMINATED,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, NULL);
    return set->word == NULL ? ra_fail(RA_ERR_INTERNAL, "tokenizer",
                                       "this PCRE2 does not compile the class of word characters")
                             : RA_OK;
}

void ra_added_release(ra_added_set_t *set)
{
    free(set->tokens);
    free(set->raw.nodes);
    free(set->normalized.nodes);
    pcre2_code_free(set->word);
    *set = (ra_added_set_t){0};
}

/** Longest token at `at`. @return its index, -1 none. */
static int64_t match_at(const ra_trie_t *trie, const char *text, size_t length, size_t at,
                        size_t *end)
{
    int64_t found = -1;
    int32_t node = trie->root[(uint8_t)text[at]];
    while (node >= 0) {
        at++;
        if (trie->nodes[node].token >= 0) {
            found = trie->nodes[node].token;
            *end = at;
        }
        if (at == length) {
            break;
        }
        for (node = trie->nodes[node].child;
             node >= 0 && trie->nodes[node].byte != (uint8_t)text[at];
             node = trie->nodes[node].sibling) {
        }
    }
    return found;
}

static size_t previous_char(const char *text, size_t at)
{
    do {
        at--;
    } while (at > 0 && ((uint8_t)text[at] & 0xc0) == 0x80);
    return at;
}

static utf8proc_int32_t char_at(const char *text, size_t length, size_t at, size_t *step)
{
    utf8proc_int32_t value;
    *step = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at,
                                     (utf8proc_ssize_t)(length - at), &value);
    return value;
}

/** Unicode White_Space. */
static bool is_space(utf8proc_int32_t c)
{
    return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

static bool word_at(const ra_added_set_t *set, const char *text, size_t length, size_t at)
{
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    int found = match == NULL ? PCRE2_ERROR_NOMEMORY
                              : pcre2_match(set->word, (PCRE2_SPTR)text + at, length - at, 0,
                                            PCRE2_NO_UTF_CHECK, match, NULL);
    pcre2_match_data_free(match);
    return found > 0;
}

static bool stands_alone(const ra_added_set_t *set, const char *text, size_t length, size_t start,
                         size_t end)
{
    return (start == 0 || !word_at(set, text, length, previous_char(text, start))) &&
           (end == length || !word_at(set, text, length, end));
}

static size_t spaces_before(const char *text, size_t length, size_t start)
{
    while (start > 0) {
        size_t step, previous = previous_char(text, start);
        if (!is_space(char_at(text, length, previous, &step))) {
            break;
        }
        start = previous;
    }
    return start;
}

static size_t spaces_after(const char *text, size_t length, size_t end)
{
    size_t step;
    while (end < length && is_space(char_at(text, length, end, &step))) {
        end += step;
    }
    return end;
}

/*
 * Follows find_matches() of the `tokenizers` library to the letter, oddities included: matches do
 * not overlap each other, but an rstrip may run over the next match, which then still counts.
 */
ra_status_t ra_added_split(const ra_added_set_t *set, const ra_trie_t *trie, const char *text,
                           size_t length, ra_added_visit_t visit, void *context)
{
    size_t done = 0, end = 0;
    if (trie->count == 0) {
        return length > 0 ? visit(context, -1, text, length) : RA_OK;
    }
    for (size_t at = 0; at < length;) {
        int64_t found = match_at(trie, text, length, at, &end);
        if (found < 0) {
            at++;
            continue;
        }
        const ra_added_token_t *token = &set->tokens[found];
        size_t start = at, stop = end;
        at = end;
        if (token->single_word && !stands_alone(set, text, length, start, stop)) {
            continue;
        }
        if (token->lstrip) {
            size_t stripped = spaces_before(text, length, start);
            start = stripped > done ? stripped : done;
        }
        stop = token->rstrip ? spaces_after(text, length, stop) : stop;
        if (done < start) {
            RA_TRY(visit(context, -1, text + done, start - done));
        }
        RA_TRY(visit(context, found, text + start, stop - start));
        done = stop;
    }
    return done < length ? visit(context, -1, text + done, length - done) : RA_OK;
}
