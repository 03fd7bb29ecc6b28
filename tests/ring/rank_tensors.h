/**
 * @file  tests/ring/rank_tensors.h
 * @brief One rank's tensors: fp32 values on the host, and where its device has them: copies, or on
 *        the CPU the very arrays, so that a sanitizer sees their ends.
 */
#ifndef RA_TESTS_RING_RANK_TENSORS_H
#define RA_TESTS_RING_RANK_TENSORS_H

#include "tests/gpu_support.h"

typedef struct rank_tensor {
    float *host; /**< owned, by malloc() */
    int64_t count;
    ra_dtype_t dtype; /**< on the device: F32 or BF16 */
    void *device;
} rank_tensor_t;

static inline ra_status_t rank_tensors_to_device(ra_stream_t *stream, rank_tensor_t *t, int count)
{
    for (int i = 0; i < count; i++) {
        if (ra_stream_kind(stream) == RA_DEVICE_CPU) {
            t[i].device = t[i].host;
            continue;
        }
        int64_t bytes = t[i].count * ra_dtype_bytes(t[i].dtype);
        RA_TRY(ra_device_alloc(ra_stream_device(stream), bytes, &t[i].device));
        RA_TRY(values_to_device(stream, t[i].dtype, t[i].host, t[i].count, t[i].device));
    }
    return RA_OK;
}

static inline ra_status_t rank_tensor_to_host(ra_stream_t *stream, const rank_tensor_t *t)
{
    return t->device == t->host
               ? RA_OK
               : values_from_device(stream, t->dtype, t->device, t->count, t->host);
}

static inline void rank_tensors_free(ra_stream_t *stream, rank_tensor_t *t, int count)
{
    for (int i = 0; i < count; i++) {
        if (t[i].device != t[i].host) {
            ra_device_free(ra_stream_device(stream), t[i].device);
        }
        free(t[i].host);
    }
}

#endif
