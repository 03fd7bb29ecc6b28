/**
 * @file  base/pool.h
 * @brief One pool of compute permits for the process; rank threads borrow its workers.
 *
 * At most `threads` threads compute inside ra_pool_for() at any moment, whoever calls: a caller
 * takes a permit and works on its own job, idle workers with a permit join. Waiting (on a peer, on
 * the disk) happens outside and holds no permit, so ranks of one process share the cores they are
 * given.
 */
#ifndef RA_BASE_POOL_H
#define RA_BASE_POOL_H

#include "base/status.h"
#include <stdint.h>

typedef struct ra_pool ra_pool_t;

/** One piece of work: index in [0, count). Runs concurrently with other indices of the same job. */
typedef void (*ra_pool_func_t)(void *arg, int64_t index);

/** Cores in this process's affinity mask; at least 1. */
int ra_pool_default_threads(void);

/** @param threads  Permits, >= 1. @retval RA_ERR_NOMEM a thread cannot be started. */
ra_status_t ra_pool_create(int threads, ra_pool_t **pool);
/** Accepts NULL. No job may be running. */
void ra_pool_destroy(ra_pool_t *pool);
int ra_pool_threads(const ra_pool_t *pool);

/**
 * Run func(arg, 0 .. count-1), in any order, on the caller and idle workers; returns when all are
 * done. Callable from several threads at once; a call from inside a job runs inline. @a pool NULL
 * runs everything on the caller. Results may not depend on which thread runs which index.
 */
void ra_pool_for(ra_pool_t *pool, int64_t count, ra_pool_func_t func, void *arg);

/**
 * Scratch memory of the calling thread, 64-byte aligned, at least @a bytes, kept for the thread's
 * life. Contents are lost at the next call on the same thread with the same slot.
 * @param slot  0 .. RA_SCRATCH_SLOTS-1: independent buffers.
 * @return NULL when memory is exhausted, which has been reported.
 */
void *ra_scratch(int slot, int64_t bytes);
enum { RA_SCRATCH_SLOTS = 4 };

#endif
