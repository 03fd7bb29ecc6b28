/**
 * @file  base/device.h
 * @brief Where memory lives and work runs: memory, copies, streams. Kernels are not here.
 *
 * Devices are rows of one table (device.c), chosen by name. A stream is the execution context every
 * kernel takes: on the CPU it carries the thread pool and work is finished when the call returns;
 * on a GPU it is an ordered queue, calls only enqueue, and a failure of a kernel shows at
 * ra_stream_sync(). A device may be shared by threads; a stream belongs to one thread, the one that
 * made it, whose current CUDA device it sets.
 */
#ifndef RA_BASE_DEVICE_H
#define RA_BASE_DEVICE_H

#include "base/pool.h"
#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

typedef enum ra_device_kind { RA_DEVICE_CPU = 0, RA_DEVICE_CUDA } ra_device_kind_t;

typedef struct ra_device ra_device_t;
typedef struct ra_stream ra_stream_t;

/**
 * Open device number @a index of kind @a name ("cpu", "cuda").
 * @param pool  Threads of CPU streams; borrowed, may be NULL (the caller's thread alone).
 * @retval RA_ERR_USAGE        Unknown name (the message lists the rows) or no such device.
 * @retval RA_ERR_UNSUPPORTED  The kind is known but cannot be used here; the message says why.
 */
ra_status_t ra_device_open(const char *name, int index, ra_pool_t *pool, ra_device_t **device_p);
/** Accepts NULL. Everything made on the device has been destroyed. */
void ra_device_close(ra_device_t *device);
/** Devices of kind @a name. Errors as ra_device_open(). */
ra_status_t ra_device_count(const char *name, int *count_p);
/** Kind number @a index of this build, from 0. @return false past the last. */
bool ra_device_list(int index, const char **name_p, const char **doc_p);
/**
 * Open a device of the kind and index of @a like that counts and has no memory. What is allocated
 * on it has an address that nothing may read or write, copies and zeroing do nothing, and its
 * streams run nothing. Whatever only allocates and fills its buffers when it is made, as plans do,
 * can so be made first to learn what it takes (ra_device_memory()), and then in earnest.
 */
ra_status_t ra_device_open_counting(const ra_device_t *like, ra_device_t **device_p);
ra_device_kind_t ra_device_kind(const ra_device_t *device);
const char *ra_device_name(const ra_device_t *device);
int ra_device_index(const ra_device_t *device);

/** Device memory aligned to 64 bytes (256 on a GPU). bytes = 0 gives a valid pointer. Contents are
 * undefined. @retval RA_ERR_NOMEM says what was asked and what was free. */
ra_status_t ra_device_alloc(ra_device_t *device, int64_t bytes, void **memory_p);
/** Accepts NULL. On a GPU waits for the device, but for memory of its reserve. */
void ra_device_free(ra_device_t *device, void *memory);
/**
 * Until ra_device_reserve_end(), serve ra_device_alloc() from @a bytes that the device keeps from
 * one time to the next, and grows when nothing of them is in use; so that work of many small calls
 * neither asks the driver for its memory each time nor waits for it. Allocations for which they are
 * too small, or which come when there was no room to grow, are the driver's as ever. Memory served
 * so is free at once: who frees it has waited for the work that uses it. Several users may overlap,
 * each with the sum that all of them need. Does nothing on a counting device.
 */
void ra_device_reserve_begin(ra_device_t *device, int64_t bytes);
void ra_device_reserve_end(ra_device_t *device);

/** Bytes. */
typedef struct ra_device_memory {
    int64_t live; /**< of ra_device_alloc() on this handle, and streams' workspaces; each in whole
                       256 bytes */
    int64_t peak; /**< most live since ra_device_reset_peak() */
    int64_t used; /**< on the device, by everybody, as its driver says; CPU, counting: live */
    int64_t free; /**< INT64_MAX where nobody says: CPU, counting. What of the reserve is not in use
                       counts as free. */
} ra_device_memory_t;
ra_status_t ra_device_memory(ra_device_t *device, ra_device_memory_t *memory);
void ra_device_reset_peak(ra_device_t *device);
/** Host memory that the device copies from and to at full rate (pinned on a GPU). */
ra_status_t ra_device_alloc_host(ra_device_t *device, int64_t bytes, void **memory_p);
/** Accepts NULL. */
void ra_device_free_host(ra_device_t *device, void *memory);

ra_status_t ra_stream_create(ra_device_t *device, ra_stream_t **stream_p);
/** Accepts NULL; the stream has been synchronised. */
void ra_stream_destroy(ra_stream_t *stream);
/** Wait until everything queued on @a stream is done. @retval RA_ERR_DEVICE something failed. */
ra_status_t ra_stream_sync(ra_stream_t *stream);
/** Remember what is queued on @a stream now, in place of what was remembered before.
 * @retval RA_ERR_DEVICE. */
ra_status_t ra_stream_mark(ra_stream_t *stream);
/** Wait until what the last ra_stream_mark() remembered is done; work queued since goes on.
 * @retval RA_ERR_DEVICE something failed. */
ra_status_t ra_stream_wait_mark(ra_stream_t *stream);
/**
 * Copy between host and device memory, either side either kind, in stream order. Pageable host
 * memory may be reused when the call returns; memory of ra_device_alloc_host() only after a
 * ra_stream_sync() or ra_stream_wait_mark().
 */
ra_status_t ra_stream_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes);
/** Zero device memory in stream order. */
ra_status_t ra_stream_zero(ra_stream_t *stream, void *to, int64_t bytes);
/** Device the stream belongs to. */
ra_device_t *ra_stream_device(const ra_stream_t *stream);
/** Kind of the stream's device; @a stream NULL counts as the CPU. */
ra_device_kind_t ra_stream_kind(const ra_stream_t *stream);
/** Threads a CPU kernel may use; NULL means the caller alone. @a stream NULL is allowed (tests). */
ra_pool_t *ra_stream_pool(const ra_stream_t *stream);

#endif
