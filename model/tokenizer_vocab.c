/**
 * @file  model/tokenizer_vocab.c
 * @brief The token table: texts, the bytes they stand for, lookup by id and by text.
 */
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

/**
 * GPT-2's byte-level letters: the printable bytes of Latin-1 stand for themselves, the other 68
 * are, in order, U+0100 and following.
 */
static uint32_t letter_of_byte(uint8_t byte)
{
    if ((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad)) {
        return byte;
    }
    if (byte <= 0x20) {
        return 0x100u + byte;
    }
    return byte == 0xad ? 0x143u : 0x100u + 33 + (byte - 0x7fu);
}

/** @return The byte, -1 when the code point is no letter. */
static int byte_of_letter(uint32_t letter)
{
    if (letter < 0x100) {
        return letter_of_byte((uint8_t)letter) == letter ? (int)letter : -1;
    }
    if (letter <= 0x120) {
        return (int)(letter - 0x100);
    }
    if (letter <= 0x142) {
        return (int)(letter - 0x121 + 0x7f);
    }
    return letter == 0x143 ? 0xad : -1;
}

size_t ra_byte_letters(const uint8_t *bytes, size_t count, char *text)
{
    size_t length = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t letter = letter_of_byte(bytes[i]);
        if (letter < 0x80) {
            text[length++] = (char)letter;
        } else {
            text[length++] = (char)(0xc0 | letter >> 6);
            text[length++] = (char)(0x80 | (letter & 0x3f));
        }
    }
    return length;
}

/** Bytes of a text whose every character is a letter, else -1. */
static int64_t decode_letters(const char *text, size_t length, char *bytes)
{
    int64_t count = 0;
    for (size_t at = 0; at < length;) {
        utf8proc_int32_t letter;
        utf8proc_ssize_t step = utf8proc_iterate((const utf8proc_uint8_t *)text + at,
                                                 (utf8proc_ssize_t)(length - at), &letter);
        int byte = step > 0 ? byte_of_letter((uint32_t)letter) : -1;
        if (byte < 0) {
            return -1;
        }
        bytes[count++] = (char)byte;
        at += (size_t)step;
    }
    return count;
}

ra_status_t ra_vocab_init(ra_vocab_t *vocab, int64_t count, int64_t max_id)
{
    uint64_t slots = 16;
    while (slots < 2 * (uint64_t)count) {
        slots *= 2;
    }
    vocab->mask = slots - 1;
    vocab->capacity = count;
    vocab->id_limit = max_id + 1;
    vocab->tokens = malloc(((size_t)count + 1) * sizeof *vocab->tokens);
    vocab->slots = malloc(slots * sizeof *vocab->slots);
    vocab->by_id = malloc((size_t)(max_id + 1) * sizeof *vocab->by_id);
    if (vocab->tokens == NULL || vocab->slots == NULL || vocab->by_id == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate a vocabulary of %lld tokens",
                       (long long)count);
    }
    memset(vocab->slots, 0xff, slots * sizeof *vocab->slots);
    memset(vocab->by_id, 0xff, (size_t)(max_id + 1) * sizeof *vocab->by_id);
    return RA_OK;
}

void ra_vocab_release(ra_vocab_t *vocab)
{
    free(vocab->arena);
    free(vocab->tokens);
    free(vocab->slots);
    free(vocab->by_id);
    *vocab = (ra_vocab_t){0};
}

static ra_status_t arena_reserve(ra_vocab_t *vocab, size_t more)
{
    if (vocab->arena_capacity - vocab->arena_length >= more) {
        return RA_OK;
    }
    size_t capacity = 2 * vocab->arena_capacity + more;
    char *larger = realloc(vocab->arena, capacity);
    if (larger == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate %zu bytes of token texts",
                       capacity);
    }
    vocab->arena = larger;
    vocab->arena_capacity = capacity;
    return RA_OK;
}

/** Slot that holds the text, or the empty one where it belongs. */
static uint64_t find_slot(const ra_vocab_t *vocab, const char *text, size_t length)
{
    uint64_t at = XXH3_64bits(text, length) & vocab->mask;
    for (; vocab->slots[at] >= 0; at = (at + 1) & vocab->mask) {
        const ra_vocab_token_t *token = &vocab->tokens[vocab->slots[at]];
        if (token->text_length == length &&
            memcmp(vocab->arena + token->text_at, text, length) == 0) {
            break;
        }
    }
    return at;
}

int64_t ra_vocab_find(const ra_vocab_t *vocab, const char *text, size_t length)
{
    return length > vocab->longest_text ? -1 : vocab->slots[find_slot(vocab, text, length)];
}

ra_status_t ra_vocab_add(ra_vocab_t *vocab, const char *name, const char *text, int32_t id,
                         bool literal)
{
    size_t length = strlen(text);
    if (vocab->by_id[id] >= 0) {
        const ra_vocab_token_t *other = &vocab->tokens[vocab->by_id[id]];
        return ra_fail(RA_ERR_INPUT, "tokenizer",
                       "%s: id %d belongs to both \"%.*s\" and \"%.80s\"", name, (int)id,
                       (int)(other->text_length < 80 ? other->text_length : 80),
                       vocab->arena + other->text_at, text);
    }
    RA_TRY(arena_reserve(vocab, 2 * length));
    ra_vocab_token_t *token = &vocab->tokens[vocab->count];
    *token = (ra_vocab_token_t){.id = id, .text_length = (uint32_t)length};
    token->text_at = token->bytes_at = vocab->arena_length;
    token->bytes_length = (uint32_t)length;
    memcpy(vocab->arena + vocab->arena_length, text, length);
    vocab->arena_length += length;
    int64_t bytes = literal ? -1 : decode_letters(text, length, vocab->arena + vocab->arena_length);
    if (bytes >= 0) {
        token->bytes_at = vocab->arena_length;
        token->bytes_length = (uint32_t)bytes;
        vocab->arena_length += (size_t)bytes;
    }
    vocab->longest_text = length > vocab->longest_text ? (uint32_t)length : vocab->longest_text;
    vocab->slots[find_slot(vocab, text, length)] = (int32_t)vocab->count;
    vocab->by_id[id] = (int32_t)vocab->count++;
    return RA_OK;
}

void ra_vocab_index_bytes(ra_vocab_t *vocab)
{
    for (int i = 0; i < 256; i++) {
        char text[2];
        uint8_t byte = (uint8_t)i;
        int64_t token = ra_vocab_find(vocab, text, ra_byte_letters(&byte, 1, text));
        vocab->byte_ids[i] = token < 0 ? -1 : vocab->tokens[token].id;
    }
}
