/**
 * @file  attention/linear_kernel.h
 * @brief What a row of the linear attention table must do. Internal to attention/.
 */
#ifndef RA_ATTENTION_LINEAR_KERNEL_H
#define RA_ATTENTION_LINEAR_KERNEL_H

#include "attention/linear_chunk.h"
#include <stdbool.h>

/** All slots but scratch_bytes are required. */
struct ra_linear_kernel {
    const char *name, *doc;
    ra_device_kind_t device;
    /** False refuses the shape. */
    bool (*fits)(const ra_linear_args_t *shape);
    /** Arguments have been checked. @param state_only  ra_linear_summarise(). */
    ra_status_t (*run)(const ra_linear_args_t *args, bool state_only, ra_stream_t *stream);
    /** ra_linear_scratch_bytes(); NULL: none. */
    int64_t (*scratch_bytes)(const ra_linear_args_t *args);
};

extern const ra_linear_kernel_t ra_linear_ref; /**< linear_ref.c */
extern const ra_linear_kernel_t ra_linear_cpu; /**< linear_cpu.c */

#endif
