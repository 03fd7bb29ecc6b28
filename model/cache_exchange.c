#include "model/cache_exchange.h"

#include "base/checked.h"
#include "base/log.h"
#include "model/forward.h"
#include "model/layer_ops.h"
#include <stdlib.h>

struct ra_cache_exchange {
    const ra_forward_cache_t *cache;
    int rank;
    ra_dtype_t act;
    int64_t kv_width, state_count;
    ra_stream_t *stream;
    /* On a GPU: */
    float *host;    /* pinned [2][rows_most][kv_width], or a state if that is larger */
    float *floats;  /* device, as large */
    float *initial; /* device [state_count] */
};

static bool direct(const ra_cache_exchange_t *exchange)
{
    return ra_stream_kind(exchange->stream) == RA_DEVICE_CPU;
}

ra_status_t ra_cache_exchange_create(const ra_forward_cache_t *cache, int rank, ra_dtype_t act,
                                     int64_t kv_width, int64_t rows_most, int64_t state_count,
                                     ra_stream_t *stream, ra_cache_exchange_t **exchange_p)
{
    ra_cache_exchange_t *exchange = calloc(1, sizeof(*exchange));
    if (exchange == NULL) {
        return ra_fail(RA_ERR_NOMEM, "forward", "cannot allocate a cache exchange");
    }
    *exchange = (ra_cache_exchange_t){.cache = cache,
                                      .rank = rank,
                                      .act = act,
                                      .kv_width = kv_width,
                                      .state_count = state_count,
                                      .stream = stream};
    ra_status_t status = RA_OK;
    if (!direct(exchange)) {
        ra_device_t *device = ra_stream_device(stream);
        bool has_kv = cache->load_kv != NULL || cache->save_kv != NULL;
        int64_t count = ra_max_i64(has_kv ? 2 * rows_most * kv_width : 0, state_count);
        int64_t bytes = count * (int64_t)sizeof(float);
        RA_TRY_GOTO(ra_device_alloc_host(device, bytes, (void **)&exchange->host), failed);
        RA_TRY_GOTO(ra_device_alloc(device, bytes, (void **)&exchange->floats), failed);
        RA_TRY_GOTO(ra_device_alloc(device, state_count * (int64_t)sizeof(float),
                                    (void **)&exchange->initial),
                    failed);
    }
    *exchange_p = exchange;
    return RA_OK;
failed:
    ra_cache_exchange_destroy(exchange);
    return status;
}

void ra_cache_exchange_destroy(ra_cache_exchange_t *exchange)
{
    if (exchange == NULL) {
        return;
    }
    ra_device_t *device = ra_stream_device(exchange->stream);
    ra_device_free_host(device, exchange->host);
    ra_device_free(device, exchange->floats);
    ra_device_free(device, exchange->initial);
    free(exchange);
}

/* The pinned array to the device, in the pass's dtype. */
static ra_status_t upload_kv(ra_cache_exchange_t *exchange, int64_t rows, void *kv)
{
    int64_t width = exchange->kv_width, bytes = 2 * rows * width * (int64_t)sizeof(float);
    if (exchange->act == RA_F32) {
        RA_TRY(ra_stream_copy(exchange->stream, kv, exchange->host, bytes));
    } else {
        RA_TRY(ra_stream_copy(exchange->stream, exchange->floats, exchange->host, bytes));
        RA_TRY(ra_op_copy_rows(exchange->floats, width, RA_F32, 2 * rows, width, kv, width,
                               exchange->act, exchange->stream));
    }
    return ra_stream_sync(exchange->stream);
}

ra_status_t ra_cache_load_kv(ra_cache_exchange_t *exchange, int64_t layer, int64_t rows, void *kv)
{
    const ra_forward_cache_t *cache = exchange->cache;
    if (cache->load_kv == NULL) {
        return RA_OK;
    }
    if (direct(exchange)) {
        return cache->load_kv(cache->arg, exchange->rank, layer, kv);
    }
    RA_TRY(cache->load_kv(cache->arg, exchange->rank, layer, exchange->host));
    return upload_kv(exchange, rows, kv);
}

/* The other way: keys or values to @a to in pinned memory, fp32. */
static ra_status_t download_rows(ra_cache_exchange_t *exchange, int64_t rows, const void *from,
                                 float *to)
{
    int64_t width = exchange->kv_width;
    if (exchange->act != RA_F32) {
        RA_TRY(ra_op_copy_rows(from, width, exchange->act, rows, width, exchange->floats, width,
                               RA_F32, exchange->stream));
        from = exchange->floats;
    }
    return ra_stream_copy(exchange->stream, to, from, rows * width * (int64_t)sizeof(float));
}

ra_status_t ra_cache_save_kv(ra_cache_exchange_t *exchange, int64_t layer, int64_t rows,
                             const void *k, const void *v)
{
    const ra_forward_cache_t *cache = exchange->cache;
    if (cache->save_kv == NULL) {
        return RA_OK;
    }
    if (direct(exchange)) {
        return cache->save_kv(cache->arg, exchange->rank, layer, k);
    }
    RA_TRY(download_rows(exchange, rows, k, exchange->host));
    RA_TRY(download_rows(exchange, rows, v, exchange->host + rows * exchange->kv_width));
    RA_TRY(ra_stream_sync(exchange->stream));
    return cache->save_kv(cache->arg, exchange->rank, layer, exchange->host);
}

ra_status_t ra_cache_initial_state(ra_cache_exchange_t *exchange, int64_t layer,
                                   const float **state_p)
{
    const ra_forward_cache_t *cache = exchange->cache;
    const float *state = NULL;
    if (cache->initial_state != NULL) {
        state = cache->initial_state(cache->arg, layer);
    }
    if (state != NULL && !direct(exchange)) {
        RA_TRY(ra_stream_copy(exchange->stream, exchange->initial, state,
                              exchange->state_count * (int64_t)sizeof(float)));
        state = exchange->initial;
    }
    *state_p = state;
    return RA_OK;
}

ra_status_t ra_cache_save_state(ra_cache_exchange_t *exchange, int64_t layer, const float *state)
{
    const ra_forward_cache_t *cache = exchange->cache;
    if (cache->save_state == NULL) {
        return RA_OK;
    }
    if (direct(exchange)) {
        return cache->save_state(cache->arg, layer, state);
    }
    RA_TRY(ra_stream_copy(exchange->stream, exchange->host, state,
                          exchange->state_count * (int64_t)sizeof(float)));
    RA_TRY(ra_stream_sync(exchange->stream));
    return cache->save_state(cache->arg, layer, exchange->host);
}
