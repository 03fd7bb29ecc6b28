#include "base/device.h"

#include "base/log.h"
#include <stdlib.h>
#include <string.h>

/** What a kind of device must do. All slots are required. */
typedef struct ra_device_ops {
    const char *name, *doc;
    ra_device_kind_t kind;
    int (*count)(void);
    ra_status_t (*alloc)(ra_device_t *device, int64_t bytes, void **memory_p);
    void (*free)(ra_device_t *device, void *memory);
    ra_status_t (*sync)(ra_stream_t *stream);
    ra_status_t (*copy)(ra_stream_t *stream, void *to, const void *from, int64_t bytes);
} ra_device_ops_t;

struct ra_device {
    const ra_device_ops_t *ops;
    int index;
    ra_pool_t *pool; /* borrowed */
};

struct ra_stream {
    ra_device_t *device; /* borrowed */
};

static int cpu_count(void)
{
    return 1;
}

static ra_status_t cpu_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    (void)device;
    if (bytes < 0 || bytes > INT64_MAX - 64) {
        return ra_fail(RA_ERR_INVALID, "device", "allocation of %lld bytes", (long long)bytes);
    }
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

/* Every kind of device. Adding one is one row and one file. */
static const ra_device_ops_t device_table[] = {
    {.name = "cpu",
     .doc = "host memory, kernels on the thread pool",
     .kind = RA_DEVICE_CPU,
     .count = cpu_count,
     .alloc = cpu_alloc,
     .free = cpu_free,
     .sync = cpu_sync,
     .copy = cpu_copy},
};

ra_status_t ra_device_open(const char *name, int index, ra_pool_t *pool, ra_device_t **device_p)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(device_table); i++) {
        if (strcmp(name, device_table[i].name) != 0) {
            continue;
        }
        int count = device_table[i].count();
        if (index < 0 || index >= count) {
            return ra_fail(RA_ERR_USAGE, "device", "%s device %d asked for; there are %d", name,
                           index, count);
        }
        ra_device_t *device = calloc(1, sizeof(*device));
        if (device == NULL) {
            return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a device handle");
        }
        *device = (ra_device_t){.ops = &device_table[i], .index = index, .pool = pool};
        *device_p = device;
        return RA_OK;
    }
    return ra_fail(RA_ERR_USAGE, "device", "device '%s' is not in this build; it has: cpu", name);
}

void ra_device_close(ra_device_t *device)
{
    free(device);
}

ra_device_kind_t ra_device_kind(const ra_device_t *device)
{
    return device->ops->kind;
}

const char *ra_device_name(const ra_device_t *device)
{
    return device->ops->name;
}

ra_status_t ra_device_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    return device->ops->alloc(device, bytes, memory_p);
}

void ra_device_free(ra_device_t *device, void *memory)
{
    if (memory != NULL) {
        device->ops->free(device, memory);
    }
}

ra_status_t ra_stream_create(ra_device_t *device, ra_stream_t **stream_p)
{
    ra_stream_t *stream = calloc(1, sizeof(*stream));
    if (stream == NULL) {
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a stream");
    }
    stream->device = device;
    *stream_p = stream;
    return RA_OK;
}

void ra_stream_destroy(ra_stream_t *stream)
{
    free(stream);
}

ra_status_t ra_stream_sync(ra_stream_t *stream)
{
    return stream->device->ops->sync(stream);
}

ra_status_t ra_stream_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes)
{
    return stream->device->ops->copy(stream, to, from, bytes);
}

ra_device_t *ra_stream_device(const ra_stream_t *stream)
{
    return stream->device;
}

ra_pool_t *ra_stream_pool(const ra_stream_t *stream)
{
    return stream == NULL ? NULL : stream->device->pool;
}
