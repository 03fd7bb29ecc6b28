/**
 * @file  base/device.h
 * @brief Where memory lives and work runs: memory, copies, streams, events. Kernels are not here.
 *
 * Devices are rows of one table (device.c), chosen by name. A stream is the execution context every
 * kernel takes: on the CPU it carries the thread pool and work is finished when the call returns;
 * on a GPU it is an ordered queue. Handles belong to one thread at a time.
 */
#ifndef RA_BASE_DEVICE_H
#define RA_BASE_DEVICE_H

#include "base/pool.h"
#include "base/status.h"
#include <stdint.h>

typedef enum ra_device_kind { RA_DEVICE_CPU = 0, RA_DEVICE_CUDA } ra_device_kind_t;

typedef struct ra_device ra_device_t;
typedef struct ra_stream ra_stream_t;

/**
 * Open device number @a index of kind @a name ("cpu").
 * @param pool  Threads of CPU streams; borrowed, may be NULL (the caller's thread alone).
 * @retval RA_ERR_USAGE  Unknown name (the message lists the rows) or no such device.
 */
ra_status_t ra_device_open(const char *name, int index, ra_pool_t *pool, ra_device_t **device_p);
/** Accepts NULL. Everything made on the device has been destroyed. */
void ra_device_close(ra_device_t *device);
ra_device_kind_t ra_device_kind(const ra_device_t *device);
const char *ra_device_name(const ra_device_t *device);

/** 64-byte aligned device memory. bytes = 0 gives a valid pointer. @retval RA_ERR_NOMEM says both
 * sizes. */
ra_status_t ra_device_alloc(ra_device_t *device, int64_t bytes, void **memory_p);
/** Accepts NULL. */
void ra_device_free(ra_device_t *device, void *memory);

ra_status_t ra_stream_create(ra_device_t *device, ra_stream_t **stream_p);
/** Accepts NULL; the stream has been synchronised. */
void ra_stream_destroy(ra_stream_t *stream);
/** Wait until everything queued on @a stream is done. */
ra_status_t ra_stream_sync(ra_stream_t *stream);
/** Copy between host and device memory, either side either kind, in stream order. */
ra_status_t ra_stream_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes);
/** Device the stream belongs to. */
ra_device_t *ra_stream_device(const ra_stream_t *stream);
/** Threads a CPU kernel may use; NULL means the caller alone. @a stream NULL is allowed (tests). */
ra_pool_t *ra_stream_pool(const ra_stream_t *stream);

#endif
