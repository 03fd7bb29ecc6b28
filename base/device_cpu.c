#include "base/device_ops.h"

#include "base/log.h"
#include <stdlib.h>
#include <string.h>

static ra_status_t cpu_count(int *count_p)
{
    *count_p = 1;
    return RA_OK;
}

static ra_status_t cpu_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    (void)device;
    size_t rounded = ((size_t)bytes + 64) / 64 * 64;
    void *memory = aligned_alloc(64, rounded);
    if (memory == NULL) {
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate %zu bytes of host memory", rounded);
    }
    *memory_p = memory;
    return RA_OK;
}

static void cpu_free(ra_device_t *device, void *memory)
{
    (void)device;
    free(memory);
}

static ra_status_t cpu_open_stream(ra_stream_t *stream)
{
    (void)stream;
    return RA_OK;
}

static void cpu_close_stream(ra_stream_t *stream)
{
    (void)stream;
}

static ra_status_t cpu_sync(ra_stream_t *stream)
{
    (void)stream;
    return RA_OK;
}

static ra_status_t cpu_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes)
{
    (void)stream;
    if (bytes > 0) {
        memcpy(to, from, (size_t)bytes);
    }
    return RA_OK;
}

static ra_status_t cpu_zero(ra_stream_t *stream, void *to, int64_t bytes)
{
    (void)stream;
    if (bytes > 0) {
        memset(to, 0, (size_t)bytes);
    }
    return RA_OK;
}

const ra_device_ops_t ra_device_cpu = {.name = "cpu",
                                       .doc = "host memory, kernels on the thread pool",
                                       .kind = RA_DEVICE_CPU,
                                       .count = cpu_count,
                                       .alloc = cpu_alloc,
                                       .free = cpu_free,
                                       .alloc_host = cpu_alloc,
                                       .free_host = cpu_free,
                                       .open_stream = cpu_open_stream,
                                       .close_stream = cpu_close_stream,
                                       .sync = cpu_sync,
                                       .copy = cpu_copy,
                                       .zero = cpu_zero};
