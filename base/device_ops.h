/**
 * @file  base/device_ops.h
 * @brief What a kind of device must do. Internal to base/device*.c.
 */
#ifndef RA_BASE_DEVICE_OPS_H
#define RA_BASE_DEVICE_OPS_H

#include "base/device.h"
#include <pthread.h>

enum { RA_DEVICE_ALIGN = 256 };

/** All slots are required but where said. Bytes are >= 0 and were checked. */
typedef struct ra_device_ops {
    const char *name, *doc;
    ra_device_kind_t kind;
    /** Devices present; a failure to look says why there are none. */
    ra_status_t (*count)(int *count_p);
    ra_status_t (*alloc)(ra_device_t *device, int64_t bytes, void **memory_p);
    void (*free)(ra_device_t *device, void *memory);
    ra_status_t (*alloc_host)(ra_device_t *device, int64_t bytes, void **memory_p);
    void (*free_host)(ra_device_t *device, void *memory);
    /** Set used and free; live is set. NULL: nobody says; what the host has left depends on what it
     * may take from others. */
    ra_status_t (*look)(const ra_device_t *device, ra_device_memory_t *memory);
    /** Fill in the members after `device`. */
    ra_status_t (*open_stream)(ra_stream_t *stream);
    void (*close_stream)(ra_stream_t *stream);
    ra_status_t (*sync)(ra_stream_t *stream);
    ra_status_t (*copy)(ra_stream_t *stream, void *to, const void *from, int64_t bytes);
    ra_status_t (*zero)(ra_stream_t *stream, void *to, int64_t bytes);
    /** NULL, all four, where work is done when it is called. Note where @a queue of the current
     * device is. */
    ra_status_t (*mark)(void *queue, void **event_p);
    /** From one to the other on one device. An error: it has not come there yet. */
    ra_status_t (*mark_gap)(void *from, void *to, double *seconds_p);
    ra_status_t (*mark_wait)(void *event);
    void (*mark_free)(void *event);
} ra_device_ops_t;

/** One ra_device_alloc() that was not freed. */
typedef struct ra_device_block {
    void *memory;
    int64_t bytes;
} ra_device_block_t;

/** One allocation from which others are served, one after another; empty again when all of them
 * were freed. */
typedef struct ra_device_reserve {
    char *memory;
    int64_t bytes, served;
    int64_t blocks; /**< in use */
    int users;      /**< between begin and end; 0: nothing is served */
} ra_device_reserve_t;

struct ra_device {
    const ra_device_ops_t *ops;
    int index;
    ra_pool_t *pool; /**< borrowed */
    bool counting;
    /* Guarded by mutex: */
    pthread_mutex_t mutex;
    ra_device_block_t *blocks; /**< [room], block_count of them */
    int64_t block_count, room;
    int64_t live, peak;
    uintptr_t next_address; /**< counting: of the next block */
    ra_device_reserve_t reserve;
};

struct ra_stream {
    ra_device_t *device; /**< borrowed */
    void *queue;         /**< cudaStream_t */
    void *workspace;     /**< RA_STREAM_WORKSPACE bytes for library calls, or NULL */
    void *mark;          /**< of ra_stream_mark(), or NULL */
};

extern const ra_device_ops_t ra_device_cpu;
extern const ra_device_ops_t ra_device_cuda;

#endif
