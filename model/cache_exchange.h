/**
 * @file  model/cache_exchange.h
 * @brief Internal to model/: keys, values and states between a forward pass and the cache's host
 *        arrays, which are fp32 whatever the pass computes in.
 *
 * On the CPU the cache reads and writes the pass's own arrays. On a GPU they pass through pinned
 * memory and, where activations are not fp32, a conversion; each call then waits for the stream.
 */
#ifndef RA_MODEL_CACHE_EXCHANGE_H
#define RA_MODEL_CACHE_EXCHANGE_H

#include "base/device.h"
#include "base/dtype.h"
#include <stdint.h>

struct ra_forward_cache; /* model/forward.h */

typedef struct ra_cache_exchange ra_cache_exchange_t;

/**
 * @param cache, stream  borrowed.
 * @param kv_width       kv_heads * head_dim.
 * @param rows_most      most rows of any kv block.
 * @param state_count    floats of one layer's state.
 */
ra_status_t ra_cache_exchange_create(const struct ra_forward_cache *cache, int rank, ra_dtype_t act,
                                     int64_t kv_width, int64_t rows_most, int64_t state_count,
                                     ra_stream_t *stream, ra_cache_exchange_t **exchange_p);
/** Accepts NULL. */
void ra_cache_exchange_destroy(ra_cache_exchange_t *exchange);

/** Fill kv, act [2][rows][kv_width] on the device, where the cache has a prefix. */
ra_status_t ra_cache_load_kv(ra_cache_exchange_t *exchange, int64_t layer, int64_t rows, void *kv);
/** Hand over keys and values, act [rows][kv_width] each, where the cache wants them. On the CPU the
 * values lie right behind the keys. */
ra_status_t ra_cache_save_kv(ra_cache_exchange_t *exchange, int64_t layer, int64_t rows,
                             const void *k, const void *v);
/** State before the first row, in device memory until the next call; NULL: zero. */
ra_status_t ra_cache_initial_state(ra_cache_exchange_t *exchange, int64_t layer,
                                   const float **state_p);
/** Hand over a layer's final state, fp32 on the device. */
ra_status_t ra_cache_save_state(ra_cache_exchange_t *exchange, int64_t layer, const float *state);

#endif
