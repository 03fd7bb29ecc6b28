/**
 * @file  model/kv_file.h
 * @brief `ring-kv/1`: the key/value cache and linear states of a prefix, as a directory.
 *
 *     kv.index.json               what is here, and of which model (written last, by rename)
 *     tokens.u32.npy              ids of the cached tokens
 *     kv-00001-of-00004.safetensors ...   one shard a range of tokens: "L04.k", "L04.v" of every
 *                                 softmax layer, [tokens, kv heads, head dim] in logical token
 *                                 order
 *     states.safetensors          "L00.state" of every linear layer, [heads, D, D] F32, the state
 *                                 S[k index][v index] after the last cached token
 *     next.safetensors            "logprob" [vocab] F32: ln p(next token | all of the prefix); only
 *                                 where no id follows the last whole tile, since nothing that is
 *                                 run again could tell it then
 *
 * A cache ends at the last whole tile; the ids after it (`tail_token_ids`) are stored and run again
 * by whoever goes on. Keys are stored normed and rotated ("rope": {"applied": true}). dtype of keys
 * and values: F32, or BF16 (rounded to nearest even); states are always F32. A cache of no whole
 * tile has neither shards nor states.
 *
 * A directory without kv.index.json is no cache, so a crash leaves nothing that can be read by
 * mistake. The reader believes nothing: every claim is checked against the model, every file
 * against its size and XXH3-128 digest. How many shards a cache has does not matter to a reader.
 */
#ifndef RA_MODEL_KV_FILE_H
#define RA_MODEL_KV_FILE_H

#include "base/dtype.h"
#include "base/status.h"
#include "model/model_config.h"
#include <stdint.h>

/** Tokens [begin, end) of the sequence. */
typedef struct ra_kv_range {
    int64_t begin, end;
} ra_kv_range_t;

/** What a writer must know. Everything is borrowed until create returns, but for config. */
typedef struct ra_kv_params {
    const ra_model_config_t *config; /**< must outlive the writer */
    const char *model_digest;        /**< "xxh3:..." */
    const char *tokenizer_digest;    /**< "" when the tokens came without a tokenizer */
    const int32_t *tokens;           /**< [token_count]: all of the prefix */
    int64_t token_count;
    int64_t tile;
    ra_dtype_t dtype; /**< of keys and values: RA_F32 or RA_BF16 */
    /** One shard each, in any order; together [0, token_count) without overlap; empty ones and what
     * lies behind the last whole tile are dropped. */
    const ra_kv_range_t *ranges;
    int64_t range_count;
} ra_kv_params_t;

typedef struct ra_kv_writer ra_kv_writer_t;

/**
 * Create @a directory (its parent must exist) and the files in it.
 * @retval RA_ERR_USAGE  it holds a cache already.  @retval RA_ERR_OUTPUT with the reason.
 * @retval RA_ERR_INVALID  ranges do not cover the tokens.
 */
ra_status_t ra_kv_writer_create(const char *directory, const ra_kv_params_t *params,
                                ra_kv_writer_t **writer_p);
/** Accepts NULL. Without a commit no index, and so no cache, is left. */
void ra_kv_writer_destroy(ra_kv_writer_t *writer);
/** Tokens the cache will hold: token_count down to a multiple of the tile. */
int64_t ra_kv_writer_tokens(const ra_kv_writer_t *writer);

/**
 * Store keys and values of tokens [begin, begin + count) of softmax layer @a l, each token once;
 * tokens behind the last whole tile are dropped. Safe from several threads at once.
 * @param k,v  [count, kv heads, head dim] fp32.
 * @retval RA_ERR_INVALID  no softmax layer, or tokens beyond the prefix; RA_ERR_OUTPUT with the
 *                         reason, as of the other puts.
 */
ra_status_t ra_kv_writer_put(ra_kv_writer_t *writer, int64_t l, int64_t begin, int64_t count,
                             const float *k, const float *v);
/** Store the state of linear layer @a l, once. @param state [heads, D, D]. Thread safe. */
ra_status_t ra_kv_writer_put_state(ra_kv_writer_t *writer, int64_t l, const float *state);
/**
 * Store ln p(next token | prefix) [vocab]. Needed when the tokens end with a whole tile; dropped
 * otherwise.
 */
ra_status_t ra_kv_writer_put_next(ra_kv_writer_t *writer, const float *logprob);
/** Finish every file, the index last. @retval RA_ERR_INVALID something was not put; RA_ERR_OUTPUT
 * with the reason. */
ra_status_t ra_kv_writer_commit(ra_kv_writer_t *writer);

typedef struct ra_kv_reader ra_kv_reader_t;

/**
 * Open a cache for a model.
 * @param model_digest      Must be the cache's.
 * @param tokenizer_digest  Must be the cache's, unless one of them is "".
 * @retval RA_ERR_USAGE      no cache there; or it belongs to another model, tokenizer or decay
 * factor
 * @retval RA_ERR_INPUT      malformed; the message names file, place and cause
 * @retval RA_ERR_INTEGRITY  the bytes of a file are not those its digest was made of
 */
ra_status_t ra_kv_reader_open(const char *directory, const ra_model_config_t *config,
                              const char *model_digest, const char *tokenizer_digest,
                              ra_kv_reader_t **reader_p);
/** Accepts NULL. */
void ra_kv_reader_close(ra_kv_reader_t *reader);

int64_t ra_kv_reader_tile(const ra_kv_reader_t *reader);
ra_dtype_t ra_kv_reader_dtype(const ra_kv_reader_t *reader);
/** Cached tokens, a multiple of the tile, and their ids. */
int64_t ra_kv_reader_tokens(const ra_kv_reader_t *reader, const int32_t **ids_p);
/** Ids behind the last whole tile, fewer than a tile. */
int64_t ra_kv_reader_tail(const ra_kv_reader_t *reader, const int32_t **ids_p);

/**
 * Keys and values of tokens [begin, begin + count) of softmax layer @a l, whatever the shards.
 * @param k,v  out [count, kv heads, head dim] fp32. Thread safe; to be believed once
 *             ra_kv_reader_verify() said RA_OK.
 * @retval RA_ERR_INVALID  no softmax layer, or tokens that are not cached.
 */
ra_status_t ra_kv_reader_get(const ra_kv_reader_t *reader, int64_t l, int64_t begin, int64_t count,
                             float *k, float *v);
/** State of linear layer @a l, [heads, D, D]; NULL for a softmax layer or an empty cache. */
const float *ra_kv_reader_state(const ra_kv_reader_t *reader, int64_t l);
/** ln p(next token | prefix) [vocab] of a cache without tail ids; NULL with tail ids. */
const float *ra_kv_reader_next(const ra_kv_reader_t *reader);
/** @retval RA_ERR_INPUT a file changed after it was opened. */
ra_status_t ra_kv_reader_verify(const ra_kv_reader_t *reader);

#endif
