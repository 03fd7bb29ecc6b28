/**
 * @file  attention/softmax_kernel.h
 * @brief What a row of the softmax table is. Internal to attention/softmax_*.
 */
#ifndef RA_ATTENTION_SOFTMAX_KERNEL_H
#define RA_ATTENTION_SOFTMAX_KERNEL_H

#include "attention/softmax_block.h"
#include "attention/softmax_cuda.h"
#include <stdbool.h>

struct ra_softmax_kernel {
    const char *name, *doc;
    ra_device_kind_t device;
    /** Whether this row takes the shape; everything ra_softmax_select() mentions may matter. */
    bool (*fits)(const ra_softmax_block_t *shape);
    ra_status_t (*fold)(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                        ra_stream_t *stream);
    /* Rows that fold by lists (softmax_list.h); NULL for the others. */
    ra_status_t (*tile)(int32_t head_dim, int32_t *tile_rows_p, int32_t *tile_keys_p);
    ra_status_t (*launch)(const ra_softmax_cuda_call_t *call, ra_stream_t *stream);
    bool waits_for_keys;
};

extern const ra_softmax_kernel_t ra_softmax_cpu, ra_softmax_ref;
extern const ra_softmax_kernel_t ra_softmax_sm90, ra_softmax_cuda; /* softmax_device.c */

/* reset and finish of CPU memory (softmax_cpu.c). */
void ra_softmax_cpu_reset(int64_t rows, int32_t heads, int32_t head_dim,
                          const ra_softmax_state_t *state, ra_stream_t *stream);
void ra_softmax_cpu_finish(int64_t rows, int32_t heads, int32_t head_dim,
                           const ra_softmax_state_t *state, float *lse, ra_stream_t *stream);

#endif
