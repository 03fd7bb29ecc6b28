#include "comm/cuda_waits.h"

#include "base/device_cuda.h"
#include <cuda_runtime_api.h>
#include <stdlib.h>

typedef struct ra_cuda_wait_pair {
    cudaEvent_t before, after;
} ra_cuda_wait_pair_t;

/* Many waits between two sums would keep many events: add up those that are over. */
enum { PAIRS_MOST = 4096 };

static ra_status_t add_up(ra_cuda_waits_t *waits)
{
    for (int i = 0; i < waits->count; i++) {
        float ms = 0.0f;
        cudaError_t error = cudaEventSynchronize(waits->pairs[i].after);
        if (error == cudaSuccess) {
            error = cudaEventElapsedTime(&ms, waits->pairs[i].before, waits->pairs[i].after);
        }
        RA_TRY(ra_cuda_check(error, "timing a wait"));
        waits->seconds += (double)ms * 1e-3;
    }
    waits->count = 0;
    return RA_OK;
}

static ra_status_t grow(ra_cuda_waits_t *waits)
{
    int capacity = waits->capacity == 0 ? 64 : 2 * waits->capacity;
    ra_cuda_wait_pair_t *pairs = realloc(waits->pairs, (size_t)capacity * sizeof(*pairs));
    if (pairs == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate %d pairs of events", capacity);
    }
    waits->pairs = pairs;
    for (; waits->capacity < capacity; waits->capacity++) {
        ra_cuda_wait_pair_t *pair = &pairs[waits->capacity];
        RA_TRY(ra_cuda_check(cudaEventCreate(&pair->before), "making an event"));
        cudaError_t error = cudaEventCreate(&pair->after);
        if (error != cudaSuccess) {
            cudaEventDestroy(pair->before);
            return ra_cuda_check(error, "making an event");
        }
    }
    return RA_OK;
}

ra_status_t ra_cuda_waits_set(ra_cuda_waits_t *waits, bool on)
{
    waits->on = on;
    waits->count = 0;
    waits->seconds = 0.0;
    return RA_OK;
}

ra_status_t ra_cuda_waits_begin(ra_cuda_waits_t *waits, struct CUstream_st *stream)
{
    if (!waits->on) {
        return RA_OK;
    }
    if (waits->count == PAIRS_MOST) {
        RA_TRY(add_up(waits));
    }
    if (waits->count == waits->capacity) {
        RA_TRY(grow(waits));
    }
    return ra_cuda_check(cudaEventRecord(waits->pairs[waits->count].before, stream),
                         "timing a wait");
}

ra_status_t ra_cuda_waits_end(ra_cuda_waits_t *waits, struct CUstream_st *stream)
{
    if (!waits->on) {
        return RA_OK;
    }
    return ra_cuda_check(cudaEventRecord(waits->pairs[waits->count++].after, stream),
                         "timing a wait");
}

ra_status_t ra_cuda_waits_sum(ra_cuda_waits_t *waits, double *seconds_p)
{
    RA_TRY(add_up(waits));
    *seconds_p = waits->seconds;
    return RA_OK;
}

void ra_cuda_waits_clear(ra_cuda_waits_t *waits)
{
    for (int i = 0; i < waits->capacity; i++) {
        cudaEventDestroy(waits->pairs[i].before);
        cudaEventDestroy(waits->pairs[i].after);
    }
    free(waits->pairs);
    *waits = (ra_cuda_waits_t){0};
}
