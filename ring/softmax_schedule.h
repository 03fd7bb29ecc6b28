/**
 * @file  ring/softmax_schedule.h
 * @brief Which rows fold which keys of a block, in which order. Pure; internal to ring/.
 *
 * Positions are made unique over packed documents by adding each document's base, so that one call
 * of attention/softmax_block.h serves all documents of a block. Each run of rows folds only spans
 * of its own document:
 *
 *     default        the runs of keys, last first; the mask does the rest
 *     reproducible   single tiles of keys, from the row's own tile (or the one before the run)
 *                    downward; all rows share one descending list and start where they belong
 */
#ifndef RA_RING_SOFTMAX_SCHEDULE_H
#define RA_RING_SOFTMAX_SCHEDULE_H

#include "attention/softmax_block.h"
#include "ring/halo.h"
#include "ring/kv_gather.h"
#include "ring/layout.h"

typedef struct ra_softmax_schedule_params {
    const ra_layout_t *layout, *prefix; /**< borrowed; prefix may be NULL */
    int rank;
    int64_t window; /**< 0: none */
    bool causal, reproducible;
    const ra_halo_run_t *halo_runs; /**< with a window; borrowed */
    int64_t halo_rows;
    const ra_kv_gather_t *gather; /**< optional, not reproducible; borrowed */
} ra_softmax_schedule_params_t;

typedef struct ra_softmax_schedule {
    ra_softmax_schedule_params_t params;
    int64_t *base;            /**< [documents] */
    int64_t *row_lo, *row_hi; /**< [rows] of this rank, for every block */
    /** Of the block asked for last. */
    int64_t keys;
    int64_t *key_pos; /**< [keys] */
    ra_row_group_t *groups;
    int64_t group_count;
    ra_key_span_t *spans;
    int64_t span_count;
    /** What clipping starts from. */
    ra_row_group_t *whole_groups;
    ra_key_span_t *whole_spans;
    int64_t whole_group_count;   /**< -1: not clipped yet */
    int64_t *first_of, *next_of; /**< gathered: first run of each document, the one after each */
} ra_softmax_schedule_t;

ra_status_t ra_softmax_schedule_create(const ra_softmax_schedule_params_t *params,
                                       ra_softmax_schedule_t **schedule_p);
/** Accepts NULL. */
void ra_softmax_schedule_destroy(ra_softmax_schedule_t *schedule);

/** Fill in for the keys that @a owner holds of the layout or of the prefix. */
void ra_softmax_schedule_block(ra_softmax_schedule_t *schedule, bool of_prefix, int owner);
/** Fill in for the halo rows. */
void ra_softmax_schedule_halo(ra_softmax_schedule_t *schedule);

/** Fill in for the gathered rows: section after section, which is how they arrive. */
void ra_softmax_schedule_gathered(ra_softmax_schedule_t *schedule);
/**
 * Part @a index of keys [begin, end) of a block: of each group whose document has more than
 * long_keys keys, the index-th `keys` keys from the highest one that the group folds there down; of
 * the other groups all keys, in part 0. So what a row folds in which part is its own document's
 * affair alone.
 */
typedef struct ra_schedule_part {
    int64_t begin, end, index;
    int64_t keys, long_keys;
} ra_schedule_part_t;

/** Parts that keys [begin, end) of the block make; index is not read. */
int64_t ra_softmax_schedule_parts(const ra_softmax_schedule_t *schedule,
                                  const ra_schedule_part_t *part);
/** Keep only @a part of the whole block, and of each group the rows that see some of it. Not for
 * `reproducible`, whose groups share spans. */
void ra_softmax_schedule_clip(ra_softmax_schedule_t *schedule, const ra_schedule_part_t *part);
/** Add groups without spans for the rows in none, so that a fold reaches every row. */
void ra_softmax_schedule_cover(ra_softmax_schedule_t *schedule);

/** Whether a row of @a rank may see a key that @a owner holds in @a keys (layout or prefix). */
bool ra_softmax_schedule_needs(const ra_layout_t *layout, const ra_layout_t *keys, int rank,
                               int owner, bool causal);

#endif
