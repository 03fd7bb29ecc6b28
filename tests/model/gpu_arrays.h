/**
 * @file  tests/model/gpu_arrays.h
 * @brief One stream on GPU 0 for all tests of a program, and arrays that live on both sides.
 */
#ifndef RA_TESTS_MODEL_GPU_ARRAYS_H
#define RA_TESTS_MODEL_GPU_ARRAYS_H

#include "tests/gpu_support.h"

static ra_device_t *device; /* NULL: no GPU */
static ra_stream_t *stream;

static inline void ok(ra_status_t status)
{
    assert_int_equal(status, RA_OK);
}

/** Set-up of a test group. */
static inline int open_gpu(void **state)
{
    (void)state;
    ra_status_t status = ra_device_open("cuda", 0, NULL, &device);
    if (status == RA_ERR_UNSUPPORTED) {
        device = NULL; /* every test skips */
        return 0;
    }
    return status == RA_OK && ra_stream_create(device, &stream) == RA_OK ? 0 : -1;
}

/** Tear-down of a test group. */
static inline int close_gpu(void **state)
{
    (void)state;
    ra_stream_destroy(stream);
    ra_device_close(device);
    return 0;
}

/** Device memory with a copy of @a bytes at @a host; the caller frees it. */
static inline void *on_gpu(const void *host, int64_t bytes)
{
    void *memory;
    ok(ra_device_alloc(device, bytes, &memory));
    ok(ra_stream_copy(stream, memory, host, bytes));
    ok(ra_stream_sync(stream));
    return memory;
}

/** An array on the host in fp32 and on the device in its own type. */
typedef struct array {
    float *host;
    char *gpu;
    int64_t n;
    ra_dtype_t dtype;
} array_t;

static inline void upload(const array_t *a)
{
    ok(values_to_device(stream, a->dtype, a->host, a->n, a->gpu));
    ok(ra_stream_sync(stream));
}

static inline void download(const array_t *a)
{
    ok(values_from_device(stream, a->dtype, a->gpu, a->n, a->host));
}

/** n elements, uniform in [low, high), rounded to the type; low > high: poisoned. */
static inline array_t make(int64_t n, ra_dtype_t dtype, uint64_t *seed, float low, float high)
{
    array_t a = {.host = malloc((size_t)n * sizeof(float) + 1), .n = n, .dtype = dtype};
    void *memory;
    assert_non_null(a.host);
    if (low > high) {
        test_poison(a.host, n);
    } else {
        test_fill(a.host, n, seed, low, high);
    }
    round_values(dtype, a.host, n);
    ok(ra_device_alloc(device, n * ra_dtype_bytes(dtype), &memory));
    a.gpu = memory;
    upload(&a);
    return a;
}

static inline array_t poisoned(int64_t n, ra_dtype_t dtype)
{
    return make(n, dtype, NULL, 1, 0);
}

static inline void drop(array_t *a)
{
    ra_device_free(device, a->gpu);
    free(a->host);
}

static inline void *at(const array_t *a, int64_t element)
{
    return a->gpu + element * ra_dtype_bytes(a->dtype);
}

#endif
