#include "base/device.h"

#include "base/device_ops.h"
#include "base/log.h"
#include <stdlib.h>
#include <string.h>

/* Every kind of device. Adding one is one row and one file. */
static const ra_device_ops_t *const device_table[] = {
    &ra_device_cpu,
#if RA_HAVE_CUDA
    &ra_device_cuda,
#endif
};

static ra_status_t find(const char *name, const ra_device_ops_t **ops_p)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(device_table); i++) {
        if (strcmp(name, device_table[i]->name) == 0) {
            *ops_p = device_table[i];
            return RA_OK;
        }
    }
    if (strcmp(name, "cuda") == 0) {
        return ra_fail(RA_ERR_UNSUPPORTED, "device",
                       "this build has no CUDA; configure it with -DRA_CUDA=ON, or use cpu");
    }
    return ra_fail(RA_ERR_USAGE, "device", "device '%s' is unknown; use cpu or cuda", name);
}

bool ra_device_list(int index, const char **name_p, const char **doc_p)
{
    if (index < 0 || (size_t)index >= RA_ARRAY_LEN(device_table)) {
        return false;
    }
    *name_p = device_table[index]->name;
    *doc_p = device_table[index]->doc;
    return true;
}

ra_status_t ra_device_count(const char *name, int *count_p)
{
    const ra_device_ops_t *ops = NULL;
    RA_TRY(find(name, &ops));
    return ops->count(count_p);
}

ra_status_t ra_device_open(const char *name, int index, ra_pool_t *pool, ra_device_t **device_p)
{
    const ra_device_ops_t *ops = NULL;
    int count;
    RA_TRY(find(name, &ops));
    RA_TRY(ops->count(&count));
    if (index < 0 || index >= count) {
        return ra_fail(RA_ERR_USAGE, "device", "%s device %d asked for; there are %d", name, index,
                       count);
    }
    ra_device_t *device = calloc(1, sizeof(*device));
    if (device == NULL) {
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a device handle");
    }
    device->ops = ops;
    device->index = index;
    device->pool = pool;
    *device_p = device;
    return RA_OK;
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

int ra_device_index(const ra_device_t *device)
{
    return device->index;
}

static ra_status_t check_bytes(int64_t bytes)
{
    if (bytes < 0 || bytes > INT64_MAX - 256) {
        return ra_fail(RA_ERR_INVALID, "device", "allocation of %lld bytes", (long long)bytes);
    }
    return RA_OK;
}

ra_status_t ra_device_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    RA_TRY(check_bytes(bytes));
    return device->ops->alloc(device, bytes, memory_p);
}

void ra_device_free(ra_device_t *device, void *memory)
{
    if (memory != NULL) {
        device->ops->free(device, memory);
    }
}

ra_status_t ra_device_alloc_host(ra_device_t *device, int64_t bytes, void **memory_p)
{
    RA_TRY(check_bytes(bytes));
    return device->ops->alloc_host(device, bytes, memory_p);
}

void ra_device_free_host(ra_device_t *device, void *memory)
{
    if (memory != NULL) {
        device->ops->free_host(device, memory);
    }
}

ra_status_t ra_stream_create(ra_device_t *device, ra_stream_t **stream_p)
{
    ra_stream_t *stream = calloc(1, sizeof(*stream));
    if (stream == NULL) {
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a stream");
    }
    stream->device = device;
    ra_status_t status = device->ops->open_stream(stream);
    if (status != RA_OK) {
        free(stream);
        return status;
    }
    *stream_p = stream;
    return RA_OK;
}

void ra_stream_destroy(ra_stream_t *stream)
{
    if (stream != NULL) {
        stream->device->ops->close_stream(stream);
        free(stream);
    }
}

ra_status_t ra_stream_sync(ra_stream_t *stream)
{
    return stream->device->ops->sync(stream);
}

ra_status_t ra_stream_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes)
{
    return stream->device->ops->copy(stream, to, from, bytes);
}

ra_status_t ra_stream_zero(ra_stream_t *stream, void *to, int64_t bytes)
{
    return stream->device->ops->zero(stream, to, bytes);
}

ra_device_t *ra_stream_device(const ra_stream_t *stream)
{
    return stream->device;
}

ra_device_kind_t ra_stream_kind(const ra_stream_t *stream)
{
    return stream == NULL ? RA_DEVICE_CPU : stream->device->ops->kind;
}

ra_pool_t *ra_stream_pool(const ra_stream_t *stream)
{
    return stream == NULL ? NULL : stream->device->pool;
}
