/**
 * @file  attention/softmax_cpu.h
 * @brief Between the two halves of the "cpu" row: softmax_cpu.c cuts the work into tasks,
 * softmax_block_simd.c computes one, once for every instruction set.
 */
#ifndef RA_ATTENTION_SOFTMAX_CPU_H
#define RA_ATTENTION_SOFTMAX_CPU_H

#include "attention/softmax_block.h"

enum { RA_SOFTMAX_MAX_DIM = 256 };

/** Consecutive rows of one group and all query heads of one key/value head. */
typedef struct ra_softmax_task {
    int64_t group;
    int64_t row_begin, row_count;
    int32_t kv_head;
    int64_t cost; /**< visible pairs, an upper bound */
} ra_softmax_task_t;

typedef ra_status_t ra_softmax_task_func_t(const ra_softmax_block_t *block,
                                           const ra_softmax_state_t *state,
                                           const ra_softmax_task_t *task);

ra_softmax_task_func_t ra_softmax_task_generic;
#if defined(__x86_64__)
ra_softmax_task_func_t ra_softmax_task_avx2, ra_softmax_task_avx512;
#endif

/** First of @a count ascending positions that is >= @a bound. */
static inline int64_t ra_softmax_lower_bound(const int64_t *pos, int64_t count, int64_t bound)
{
    int64_t low = 0;
    while (count > 0) {
        int64_t half = count / 2;
        if (pos[low + half] < bound) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

#endif
