/** @file tests/cpu_engine.h  @brief A stream of the CPU over threads of its own. */
#ifndef RA_TESTS_CPU_ENGINE_H
#define RA_TESTS_CPU_ENGINE_H

#include "base/device.h"
#include "tests/test_support.h"

typedef struct engine {
    ra_pool_t *pool;
    ra_device_t *device;
    ra_stream_t *stream;
} engine_t;

static inline engine_t engine_make(int threads)
{
    engine_t e;
    assert_int_equal(ra_pool_create(threads, &e.pool), RA_OK);
    assert_int_equal(ra_device_open("cpu", 0, e.pool, &e.device), RA_OK);
    assert_int_equal(ra_stream_create(e.device, &e.stream), RA_OK);
    return e;
}

static inline void engine_free(engine_t *e)
{
    ra_stream_destroy(e->stream);
    ra_device_close(e->device);
    ra_pool_destroy(e->pool);
}

#endif
