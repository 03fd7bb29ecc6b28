/**
 * @file  ring/softmax_stages.h
 * @brief The folds of one call on a device that folds by lists, made once for all layers: stage i
 *        is fold i. Internal to ring/.
 *
 * A row starts from no state in the first fold that has something for it and is written out in its
 * last one: rows of a fold that differ in this are launches of their own, and only rows of several
 * folds ever have their state in memory.
 *
 * A stage may be cut into parts, each a fold of its own: first by the sections of ring/kv_gather.h,
 * then long documents by some keys at a time. Multiprocessors that walk millions of keys drift
 * apart until each reads its own keys from memory; those of a part stay in the L2 for all.
 */
#ifndef RA_RING_SOFTMAX_STAGES_H
#define RA_RING_SOFTMAX_STAGES_H

#include "attention/softmax_list.h"
#include "ring/softmax_schedule.h"

/** Whose keys a fold takes. */
typedef enum ra_stage_source {
    RA_STAGE_RING,
    RA_STAGE_PREFIX,
    RA_STAGE_HALO,
    RA_STAGE_GATHERED
} ra_stage_source_t;

typedef struct ra_softmax_visit {
    ra_stage_source_t source;
    int owner;
} ra_softmax_visit_t;

/** One launch of a stage. */
typedef struct ra_softmax_launch {
    ra_softmax_list_t *list;
    bool fresh, out;
} ra_softmax_launch_t;

/** How stages are cut (ra_schedule_part_t); part_keys 0: not at all. */
typedef struct ra_stage_cut {
    int64_t part_keys, long_keys;
} ra_stage_cut_t;

typedef struct ra_softmax_stages {
    ra_stream_t *stream; /**< borrowed */
    int count;
    int64_t *keys; /**< [count] rows of the block of keys */
    int *begin;    /**< [count + 1] launches of stage i: [begin[i], begin[i + 1]) */
    ra_softmax_launch_t *launches;
    int launch_count;
    ra_softmax_state_t state; /**< of rows of several stages; owned */
} ra_softmax_stages_t;

/** Fill @a schedule for one visit. */
void ra_softmax_visit_schedule(ra_softmax_schedule_t *schedule, ra_softmax_visit_t visit);

/**
 * @param shape   heads, kv_heads, head_dim, scale and dtype of every fold.
 * @param visits  [count] in the order in which they will be folded; read during the call.
 * @param cut     part_keys 0 with `reproducible`.
 */
ra_status_t ra_softmax_stages_create(const ra_softmax_kernel_t *kernel,
                                     const ra_softmax_block_t *shape,
                                     ra_softmax_schedule_t *schedule,
                                     const ra_softmax_visit_t *visits, int count,
                                     ra_stage_cut_t cut, ra_stream_t *stream,
                                     ra_softmax_stages_t **stages_p);
/** Accepts NULL. */
void ra_softmax_stages_destroy(ra_softmax_stages_t *stages);
/** Fold stage @a i: @a call has block (q, k, v and sizes), out, out_dtype, out_stride and lse,
 * and what concerns gates and multiprocessors. */
ra_status_t ra_softmax_stages_fold(const ra_softmax_stages_t *stages, int i,
                                   const ra_softmax_cuda_call_t *call);

#endif
