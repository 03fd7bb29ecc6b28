#include "base/device.h"

#include "base/checked.h"
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

static ra_status_t device_new(const ra_device_t *like, ra_device_t **device_p)
{
    ra_device_t *device = calloc(1, sizeof(*device));
    if (device == NULL) {
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a device handle");
    }
    *device = *like;
    pthread_mutex_init(&device->mutex, NULL);
    *device_p = device;
    return RA_OK;
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
    ra_device_t like = {.ops = ops, .index = index, .pool = pool};
    return device_new(&like, device_p);
}

/* No address of a process starts with this bit: to touch one is a fault at once. */
#define COUNTING_FIRST ((uintptr_t)1 << (8 * sizeof(uintptr_t) - 1))

ra_status_t ra_device_open_counting(const ra_device_t *like, ra_device_t **device_p)
{
    ra_device_t counting = {.ops = like->ops,
                            .index = like->index,
                            .pool = like->pool,
                            .counting = true,
                            .next_address = COUNTING_FIRST};
    return device_new(&counting, device_p);
}

void ra_device_close(ra_device_t *device)
{
    if (device != NULL) {
        if (device->reserve.memory != NULL) {
            device->ops->free(device, device->reserve.memory);
        }
        pthread_mutex_destroy(&device->mutex);
        free(device->blocks);
        free(device);
    }
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
    if (bytes < 0 || bytes > INT64_MAX - RA_DEVICE_ALIGN) {
        return ra_fail(RA_ERR_INVALID, "device", "allocation of %lld bytes", (long long)bytes);
    }
    return RA_OK;
}

/* What a block takes: no two have one address. */
static int64_t whole(int64_t bytes)
{
    return ra_ceil_div(ra_max_i64(bytes, 1), RA_DEVICE_ALIGN) * RA_DEVICE_ALIGN;
}

/* An address of its own for memory that is not there, aligned as a GPU's. */
static void *invent_address(ra_device_t *device, int64_t bytes)
{
    pthread_mutex_lock(&device->mutex);
    uintptr_t address = device->next_address;
    device->next_address += (uintptr_t)whole(bytes);
    pthread_mutex_unlock(&device->mutex);
    return (void *)address;
}

/* With the mutex held, and nothing in use. Another size where there is room for it, else none. */
static void resize_reserve(ra_device_t *device, int64_t bytes)
{
    ra_device_reserve_t *reserve = &device->reserve;
    void *memory = NULL;
    if (reserve->memory != NULL) {
        device->ops->free(device, reserve->memory);
    }
    ra_log_set_quiet(1);
    ra_status_t status = device->ops->alloc(device, bytes, &memory);
    ra_log_set_quiet(0);
    reserve->memory = status == RA_OK ? memory : NULL;
    reserve->bytes = status == RA_OK ? bytes : 0;
}

void ra_device_reserve_begin(ra_device_t *device, int64_t bytes)
{
    ra_device_reserve_t *reserve = &device->reserve;
    pthread_mutex_lock(&device->mutex);
    bool idle = reserve->users++ == 0 && reserve->blocks == 0;
    if (!device->counting && idle && bytes > reserve->bytes) {
        resize_reserve(device, bytes);
    }
    pthread_mutex_unlock(&device->mutex);
}

void ra_device_reserve_end(ra_device_t *device)
{
    pthread_mutex_lock(&device->mutex);
    device->reserve.users--;
    pthread_mutex_unlock(&device->mutex);
}

/* NULL: not from there. */
static void *serve(ra_device_t *device, int64_t bytes)
{
    ra_device_reserve_t *reserve = &device->reserve;
    char *memory = NULL;
    pthread_mutex_lock(&device->mutex);
    if (reserve->users > 0 && whole(bytes) <= reserve->bytes - reserve->served) {
        memory = reserve->memory + reserve->served;
        reserve->served += whole(bytes);
        reserve->blocks++;
    }
    pthread_mutex_unlock(&device->mutex);
    return memory;
}

/* @return whether it came from there. */
static bool take_back(ra_device_t *device, const char *memory)
{
    ra_device_reserve_t *reserve = &device->reserve;
    pthread_mutex_lock(&device->mutex);
    bool here = reserve->memory != NULL && (uintptr_t)memory >= (uintptr_t)reserve->memory &&
                (uintptr_t)memory < (uintptr_t)reserve->memory + (uintptr_t)reserve->bytes;
    if (here && --reserve->blocks == 0) {
        reserve->served = 0;
    }
    pthread_mutex_unlock(&device->mutex);
    return here;
}

static ra_status_t give_memory(ra_device_t *device, int64_t bytes, void **memory_p)
{
    if (device->counting) {
        *memory_p = invent_address(device, bytes);
        return RA_OK;
    }
    *memory_p = serve(device, bytes);
    return *memory_p != NULL ? RA_OK : device->ops->alloc(device, bytes, memory_p);
}

static void take_memory(ra_device_t *device, void *memory)
{
    if (!device->counting && !take_back(device, memory)) {
        device->ops->free(device, memory);
    }
}

static bool note_block(ra_device_t *device, void *memory, int64_t bytes)
{
    pthread_mutex_lock(&device->mutex);
    if (device->block_count == device->room) {
        int64_t room = 2 * device->room + 64;
        ra_device_block_t *grown = realloc(device->blocks, (size_t)room * sizeof(*grown));
        device->blocks = grown != NULL ? grown : device->blocks;
        device->room = grown != NULL ? room : device->room;
    }
    bool noted = device->block_count < device->room;
    if (noted) {
        device->blocks[device->block_count++] = (ra_device_block_t){memory, whole(bytes)};
        device->live += whole(bytes);
        device->peak = ra_max_i64(device->peak, device->live);
    }
    pthread_mutex_unlock(&device->mutex);
    return noted;
}

/* The newest first: most of what is freed is young. */
static void forget_block(ra_device_t *device, const void *memory)
{
    pthread_mutex_lock(&device->mutex);
    int64_t i = device->block_count - 1;
    while (i >= 0 && device->blocks[i].memory != memory) {
        i--;
    }
    if (i >= 0) {
        device->live -= device->blocks[i].bytes;
        device->blocks[i] = device->blocks[--device->block_count];
    }
    pthread_mutex_unlock(&device->mutex);
}

ra_status_t ra_device_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    void *memory = NULL;
    RA_TRY(check_bytes(bytes));
    RA_TRY(give_memory(device, bytes, &memory));
    if (!note_block(device, memory, bytes)) {
        take_memory(device, memory);
        return ra_fail(RA_ERR_NOMEM, "device", "cannot allocate a list of blocks");
    }
    *memory_p = memory;
    return RA_OK;
}

void ra_device_free(ra_device_t *device, void *memory)
{
    if (memory != NULL) {
        forget_block(device, memory); /* first: its address may be given out again */
        take_memory(device, memory);
    }
}

ra_status_t ra_device_memory(ra_device_t *device, ra_device_memory_t *memory)
{
    pthread_mutex_lock(&device->mutex);
    *memory = (ra_device_memory_t){
        .live = device->live, .peak = device->peak, .used = device->live, .free = INT64_MAX};
    int64_t idle = device->reserve.bytes - device->reserve.served;
    pthread_mutex_unlock(&device->mutex);
    if (!device->counting && device->ops->look != NULL) {
        RA_TRY(device->ops->look(device, memory));
        memory->used -= idle;
        memory->free += idle;
    }
    return RA_OK;
}

void ra_device_reset_peak(ra_device_t *device)
{
    pthread_mutex_lock(&device->mutex);
    device->peak = device->live;
    pthread_mutex_unlock(&device->mutex);
}

ra_status_t ra_device_alloc_host(ra_device_t *device, int64_t bytes, void **memory_p)
{
    RA_TRY(check_bytes(bytes));
    if (device->counting) {
        *memory_p = invent_address(device, bytes);
        return RA_OK;
    }
    return device->ops->alloc_host(device, bytes, memory_p);
}

void ra_device_free_host(ra_device_t *device, void *memory)
{
    if (memory != NULL && !device->counting) {
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
    ra_status_t status = device->counting ? RA_OK : device->ops->open_stream(stream);
    if (status != RA_OK) {
        free(stream);
        return status;
    }
    *stream_p = stream;
    return RA_OK;
}

static void drop_mark(ra_stream_t *stream)
{
    if (stream->mark != NULL) {
        stream->device->ops->mark_free(stream->mark);
        stream->mark = NULL;
    }
}

void ra_stream_destroy(ra_stream_t *stream)
{
    if (stream != NULL) {
        drop_mark(stream);
        if (!stream->device->counting) {
            stream->device->ops->close_stream(stream);
        }
        free(stream);
    }
}

ra_status_t ra_stream_sync(ra_stream_t *stream)
{
    return stream->device->counting ? RA_OK : stream->device->ops->sync(stream);
}

ra_status_t ra_stream_mark(ra_stream_t *stream)
{
    const ra_device_t *device = stream->device;
    drop_mark(stream);
    return device->counting || device->ops->mark == NULL
               ? RA_OK
               : device->ops->mark(stream->queue, &stream->mark);
}

ra_status_t ra_stream_wait_mark(ra_stream_t *stream)
{
    return stream->mark == NULL ? RA_OK : stream->device->ops->mark_wait(stream->mark);
}

ra_status_t ra_stream_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes)
{
    return stream->device->counting ? RA_OK : stream->device->ops->copy(stream, to, from, bytes);
}

ra_status_t ra_stream_zero(ra_stream_t *stream, void *to, int64_t bytes)
{
    return stream->device->counting ? RA_OK : stream->device->ops->zero(stream, to, bytes);
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
