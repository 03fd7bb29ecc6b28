/**
 * @file  tests/gpu_support.h
 * @brief Tests of GPUs skip where there is none, and arrays of fp32 values on any device.
 */
#ifndef RA_TESTS_GPU_SUPPORT_H
#define RA_TESTS_GPU_SUPPORT_H

#include "base/device.h"
#include "base/dtype.h"
#include "base/log.h"
#include "tests/test_support.h"
#include <stdlib.h>

/** GPUs of this machine, 0 in a build without CUDA. */
static inline int gpu_count(void)
{
    int count = 0;
    ra_log_set_quiet(1);
    ra_status_t status = ra_device_count("cuda", &count);
    ra_log_set_quiet(0);
    return status == RA_OK ? count : 0;
}

/** For the test's own thread. */
static inline void skip_without_gpus(int least)
{
    if (gpu_count() < least) {
        print_message("%d GPUs, %d needed: nothing was run\n", gpu_count(), least);
        skip();
    }
}

static inline void skip_without_gpu(void)
{
    skip_without_gpus(1);
}

/** Values as a device holds them in @a dtype (F32 or BF16). */
static inline void round_values(ra_dtype_t dtype, float *values, int64_t count)
{
    for (int64_t i = 0; i < count && dtype == RA_BF16; i++) {
        values[i] = ra_bf16_to_f32(ra_bf16_from_f32(values[i]));
    }
}

/** Store @a count values in @a dtype (F32 or BF16) at @a device, in stream order. */
static inline ra_status_t values_to_device(ra_stream_t *stream, ra_dtype_t dtype,
                                           const float *values, int64_t count, void *device)
{
    uint16_t *narrow = malloc((size_t)count * sizeof(*narrow) + 1);
    for (int64_t i = 0; i < count; i++) {
        narrow[i] = ra_bf16_from_f32(values[i]);
    }
    const void *from = dtype == RA_BF16 ? (const void *)narrow : values;
    ra_status_t status = ra_stream_copy(stream, device, from, count * ra_dtype_bytes(dtype));
    free(narrow);
    return status;
}

/** Wait for the stream and read what values_to_device() stores. */
static inline ra_status_t values_from_device(ra_stream_t *stream, ra_dtype_t dtype,
                                             const void *device, int64_t count, float *values)
{
    uint16_t *narrow = malloc((size_t)count * sizeof(*narrow) + 1);
    void *to = dtype == RA_BF16 ? (void *)narrow : values;
    ra_status_t status = ra_stream_copy(stream, to, device, count * ra_dtype_bytes(dtype));
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    for (int64_t i = 0; i < count && dtype == RA_BF16 && status == RA_OK; i++) {
        values[i] = ra_bf16_to_f32(narrow[i]);
    }
    free(narrow);
    return status;
}

#endif
