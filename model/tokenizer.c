/**
 * @file  model/tokenizer.c
 * @brief Opening, encoding and decoding; the working sets that concurrent encodes borrow.
 */
/* Hashes of a few bytes are the inner loop of encoding: inlined. */
#define XXH_INLINE_ALL
#include "model/tokenizer.h"
#include "model/file_io.h"
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

/** Pieces of at most CACHE_BYTES bytes and CACHE_IDS ids are remembered; an entry is a cache line.
 */
enum { CACHE_SLOTS = 1 << 15, CACHE_BYTES = 30, CACHE_IDS = 8 };

typedef struct cache_entry {
    uint8_t length; /* 0: empty */
    uint8_t count;
    uint8_t bytes[CACHE_BYTES];
    int32_t ids[CACHE_IDS];
} cache_entry_t;

/** What one running encode needs. */
typedef struct ra_encode_work {
    struct ra_encode_work *next; /* in ra_tokenizer.idle */
    const ra_tokenizer_t *tokenizer;
    int32_t *ids; /* the result being written */
    int64_t count, capacity;
    ra_normalize_work_t normalize;
    ra_split_work_t split;
    ra_merge_work_t merge;
    cache_entry_t *cache; /* [CACHE_SLOTS] */
} ra_encode_work_t;

/* ---- working sets ---- */

static void work_destroy(ra_encode_work_t *work)
{
    if (work != NULL) {
        ra_normalize_work_release(&work->normalize);
        ra_split_work_release(&work->split);
        ra_merge_work_release(&work->merge);
        free(work->cache);
        free(work);
    }
}

static ra_status_t work_create(const ra_tokenizer_t *tokenizer, ra_encode_work_t **work_p)
{
    ra_encode_work_t *work = calloc(1, sizeof *work);
    if (work != NULL) {
        work->cache = calloc(CACHE_SLOTS, sizeof *work->cache);
    }
    if (work == NULL || work->cache == NULL) {
        work_destroy(work);
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for a working set");
    }
    work->tokenizer = tokenizer;
    ra_status_t status = ra_split_work_init(&work->split, &tokenizer->split);
    if (status != RA_OK) {
        work_destroy(work);
        return status;
    }
    *work_p = work;
    return RA_OK;
}

static ra_status_t work_acquire(ra_tokenizer_t *tokenizer, ra_encode_work_t **work_p)
{
    pthread_mutex_lock(&tokenizer->lock);
    ra_encode_work_t *work = tokenizer->idle;
    if (work != NULL) {
        tokenizer->idle = work->next;
    }
    pthread_mutex_unlock(&tokenizer->lock);
    if (work == NULL) {
        return work_create(tokenizer, work_p);
    }
    *work_p = work;
    return RA_OK;
}

/** Scratch that one long word or text made large is not kept. */
static void work_release(ra_tokenizer_t *tokenizer, ra_encode_work_t *work)
{
    enum { KEEP = 1 << 20 };
    if (work->merge.symbol_capacity > KEEP / 16) {
        ra_merge_work_release(&work->merge);
    }
    if (work->normalize.code_point_capacity > KEEP) {
        ra_normalize_work_release(&work->normalize);
    }
    pthread_mutex_lock(&tokenizer->lock);
    work->next = tokenizer->idle;
    tokenizer->idle = work;
    pthread_mutex_unlock(&tokenizer->lock);
}

/* ---- opening ---- */

ra_status_t ra_tokenizer_open_memory(const char *name, const char *json, int64_t bytes,
                                     ra_tokenizer_t **tokenizer_p)
{
    ra_tokenizer_t *tokenizer = calloc(1, sizeof *tokenizer);
    if (tokenizer == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for a tokenizer");
    }
    ra_status_t status = ra_tokenizer_load(name, json, bytes, tokenizer);
    if (status != RA_OK) {
        ra_tokenizer_unload(tokenizer);
        free(tokenizer);
        return status;
    }
    pthread_mutex_init(&tokenizer->lock, NULL);
    *tokenizer_p = tokenizer;
    return RA_OK;
}

ra_status_t ra_tokenizer_open_file(const char *path, ra_tokenizer_t **tokenizer_p)
{
    char *json;
    int64_t bytes;
    RA_TRY(ra_file_read(path, RA_TOKENIZER_MAX_FILE, &json, &bytes));
    ra_status_t status = ra_tokenizer_open_memory(path, json, bytes, tokenizer_p);
    free(json);
    return status;
}

ra_status_t ra_tokenizer_open(const char *model_dir, ra_tokenizer_t **tokenizer_p)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_path_join(model_dir, "tokenizer.json", path));
    return ra_tokenizer_open_file(path, tokenizer_p);
}

void ra_tokenizer_close(ra_tokenizer_t *tokenizer)
{
    if (tokenizer == NULL) {
        return;
    }
    while (tokenizer->idle != NULL) {
        ra_encode_work_t *work = tokenizer->idle;
        tokenizer->idle = work->next;
        work_destroy(work);
    }
    pthread_mutex_destroy(&tokenizer->lock);
    ra_tokenizer_unload(tokenizer);
    free(tokenizer);
}

/* ---- encoding ---- */

static ra_status_t ids_reserve(ra_encode_work_t *work, int64_t more)
{
    if (work->capacity - work->count >= more) {
        return RA_OK;
    }
    int64_t capacity = work->capacity + work->capacity / 2 + more;
    int32_t *larger = realloc(work->ids, (size_t)capacity * sizeof *larger);
    if (larger == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for %lld token ids",
                       (long long)capacity);
    }
    work->ids = larger;
    work->capacity = capacity;
    return RA_OK;
}

/** The token that is the whole piece, -1 when none. */
static int32_t whole_token(const ra_tokenizer_t *tokenizer, const char *text, size_t length)
{
    char letters[2 * RA_TOKENIZER_MAX_TOKEN];
    if (length > tokenizer->vocab.longest_text) {
        return -1;
    }
    int64_t token = ra_vocab_find(&tokenizer->vocab, letters,
                                  ra_byte_letters((const uint8_t *)text, length, letters));
    return token < 0 ? -1 : tokenizer->vocab.tokens[token].id;
}

/** Ids of a piece, appended; there is room for one a byte. */
static ra_status_t merge_piece(ra_encode_work_t *work, const char *text, size_t length,
                               int64_t *count_p)
{
    const ra_tokenizer_t *tokenizer = work->tokenizer;
    int32_t *ids = work->ids + work->count;
    if (tokenizer->ignore_merges) {
        ids[0] = whole_token(tokenizer, text, length);
        if (ids[0] >= 0) {
            *count_p = 1;
            return RA_OK;
        }
    }
    for (size_t i = 0; i < length; i++) {
        ids[i] = tokenizer->vocab.byte_ids[(uint8_t)text[i]];
        if (ids[i] < 0) {
            return ra_fail(RA_ERR_INPUT, "tokenizer",
                           "%s: the text has byte 0x%02x, for which there is no token",
                           tokenizer->split.name, (unsigned)(uint8_t)text[i]);
        }
    }
    return ra_bpe_merge(&tokenizer->merges, &work->merge, ids, (int64_t)length, count_p);
}

static ra_status_t encode_piece(void *context, const char *text, size_t length)
{
    ra_encode_work_t *work = context;
    cache_entry_t *entry = NULL;
    int64_t count = 0;
    RA_TRY(ids_reserve(work, (int64_t)length + CACHE_IDS));
    if (length <= CACHE_BYTES) {
        entry = &work->cache[XXH3_64bits(text, length) & (CACHE_SLOTS - 1)];
        if (entry->length == length && memcmp(entry->bytes, text, length) == 0) {
            memcpy(work->ids + work->count, entry->ids, sizeof entry->ids);
            work->count += entry->count;
            return RA_OK;
        }
    }
    RA_TRY(merge_piece(work, text, length, &count));
    if (entry != NULL && count <= CACHE_IDS) {
        entry->length = (uint8_t)length;
        entry->count = (uint8_t)count;
        memcpy(entry->bytes, text, length);
        memcpy(entry->ids, work->ids + work->count, (size_t)count * sizeof *entry->ids);
    }
    work->count += count;
    return RA_OK;
}

static ra_status_t append_added(ra_encode_work_t *work, int64_t token)
{
    RA_TRY(ids_reserve(work, 1));
    work->ids[work->count++] = work->tokenizer->added.tokens[token].id;
    return RA_OK;
}

/** A piece of normalized text. */
static ra_status_t visit_normalized(void *context, int64_t token, const char *text, size_t length)
{
    ra_encode_work_t *work = context;
    return token >= 0 ? append_added(work, token)
                      : ra_split_run(&work->tokenizer->split, &work->split, text, length,
                                     encode_piece, work);
}

/** A piece of raw text. */
static ra_status_t visit_raw(void *context, int64_t token, const char *text, size_t length)
{
    ra_encode_work_t *work = context;
    const ra_tokenizer_t *tokenizer = work->tokenizer;
    if (token >= 0) {
        return append_added(work, token);
    }
    RA_TRY(ra_normalize(tokenizer->normalizers, tokenizer->normalizer_count, &work->normalize, text,
                        length, &text, &length));
    return ra_added_split(&tokenizer->added, &tokenizer->added.normalized, text, length,
                          visit_normalized, work);
}

int64_t ra_utf8_first_error(const char *text, int64_t length)
{
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)text;
    for (int64_t at = 0; at < length;) {
        uint64_t word;
        if (length - at >= 8 && (memcpy(&word, text + at, 8), (word & 0x8080808080808080u) == 0)) {
            at += 8;
            continue;
        }
        utf8proc_int32_t c;
        utf8proc_ssize_t step = utf8proc_iterate(bytes + at, length - at, &c);
        if (step <= 0) {
            return at;
        }
        at += step;
    }
    return -1;
}

ra_status_t ra_tokenizer_encode(ra_tokenizer_t *tokenizer, const char *utf8, int64_t bytes,
                                int32_t **ids_p, int64_t *count_p)
{
    ra_encode_work_t *work = NULL;
    int64_t bad = ra_utf8_first_error(utf8, bytes);
    if (bad >= 0) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "the text is not UTF-8: byte %lld is 0x%02x",
                       (long long)bad, (unsigned)(uint8_t)utf8[bad]);
    }
    RA_TRY(work_acquire(tokenizer, &work));
    work->ids = NULL;
    work->count = work->capacity = 0;
    ra_status_t status = ids_reserve(work, bytes / 4 + CACHE_IDS);
    if (status == RA_OK) {
        status = ra_added_split(&tokenizer->added, &tokenizer->added.raw, utf8, (size_t)bytes,
                                visit_raw, work);
    }
    int32_t *ids = work->ids;
    int64_t count = work->count;
    work_release(tokenizer, work);
    if (status != RA_OK) {
        free(ids);
        return status;
    }
    int32_t *fitted = realloc(ids, ((size_t)count + 1) * sizeof *ids);
    *ids_p = fitted != NULL ? fitted : ids;
    *count_p = count;
    return RA_OK;
}

/* ---- decoding and the rest ---- */

ra_status_t ra_tokenizer_decode(const ra_tokenizer_t *tokenizer, const int32_t *ids, int64_t count,
                                char **bytes_p, int64_t *length_p)
{
    const ra_vocab_t *vocab = &tokenizer->vocab;
    size_t length = 0;
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= vocab->id_limit || vocab->by_id[ids[i]] < 0) {
            return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: no token has id %d (position %lld)",
                           tokenizer->split.name, (int)ids[i], (long long)i);
        }
        length += vocab->tokens[vocab->by_id[ids[i]]].bytes_length;
    }
    char *bytes = malloc(length + 1);
    if (bytes == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for a text of %zu bytes", length);
    }
    size_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        const ra_vocab_token_t *token = &vocab->tokens[vocab->by_id[ids[i]]];
        memcpy(bytes + at, vocab->arena + token->bytes_at, token->bytes_length);
        at += token->bytes_length;
    }
    bytes[length] = '\0';
    *bytes_p = bytes;
    *length_p = (int64_t)length;
    return RA_OK;
}

int64_t ra_tokenizer_vocab_size(const ra_tokenizer_t *tokenizer)
{
    return tokenizer->vocab.id_limit;
}

int32_t ra_tokenizer_token_id(const ra_tokenizer_t *tokenizer, const char *text)
{
    int64_t token = ra_vocab_find(&tokenizer->vocab, text, strlen(text));
    return token < 0 ? -1 : tokenizer->vocab.tokens[token].id;
}

const char *ra_tokenizer_digest(const ra_tokenizer_t *tokenizer)
{
    return tokenizer->digest;
}
