/**
 * @file  attention/linear_cpu.h
 * @brief Between linear_cpu.c (compiled once) and linear_chunk_simd.c (once an instruction set).
 */
#ifndef RA_ATTENTION_LINEAR_CPU_H
#define RA_ATTENTION_LINEAR_CPU_H

#include "attention/linear_chunk.h"
#include <stdbool.h>

/** Tokens of a chunk: eight register tiles of rows. Of 32, 48, 64, 96 and 128 the fastest, though a
 * larger one shows a higher share of the peak (it does more work a token). */
enum { RA_LINEAR_CHUNK = 48 };

/**
 * Neighbouring heads of one segment. Their parts of a row share pages, so the more heads go through
 * a chunk together, the fewer address translations; their states stay in the L2 cache.
 */
typedef struct ra_linear_task {
    const ra_linear_args_t *args;
    const ra_linear_segment_t *segment;
    int64_t head, head_count;
    bool state_only;
} ra_linear_task_t;

/** Runs a task in the calling thread. @retval RA_ERR_NOMEM  scratch. */
typedef ra_status_t ra_linear_task_func_t(const ra_linear_task_t *task);

ra_linear_task_func_t ra_linear_task_generic, ra_linear_task_avx2, ra_linear_task_avx512;

#endif
