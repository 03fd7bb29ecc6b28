/**
 * @file  model/bpe_merge.h
 * @brief Byte-pair merging of one word: a table of ranked pairs and the merge loop.
 *
 * Of all adjacent pairs of symbols the one of lowest rank is merged first, the leftmost first among
 * equals, until no adjacent pair is in the table (Sennrich et al., arXiv 1508.07909, with ranks as
 * the Hugging Face `tokenizers` library orders them). O(n log n) for any table and any word.
 */
#ifndef RA_MODEL_BPE_MERGE_H
#define RA_MODEL_BPE_MERGE_H

#include "base/status.h"
#include <stdint.h>

/** Longest word in symbols; positions are 32-bit. */
#define RA_BPE_MAX_WORD ((int64_t)1 << 29)

/** Pairs (left, right) -> rank, and the id of the merged token for each rank. */
typedef struct ra_merge_table {
    struct ra_merge_slot *slots; /* open addressing, a power of two of them */
    uint64_t mask;
    int32_t *merged_id; /* [ranks] */
    int64_t ranks;      /* added so far */
    int64_t capacity;   /* ranks there is room for */
} ra_merge_table_t;

/** All zero is the empty table. */
ra_status_t ra_merge_table_init(ra_merge_table_t *table, int64_t capacity);
void ra_merge_table_release(ra_merge_table_t *table);
/** Add the next rank. A pair added twice keeps the later rank, as `tokenizers` does. */
void ra_merge_table_add(ra_merge_table_t *table, int32_t left, int32_t right, int32_t merged_id);

/** Scratch of the merge loop; one a thread. All zero is valid; grows to the longest word. */
typedef struct ra_merge_work {
    struct ra_merge_symbol *symbols;
    int64_t symbol_capacity;
    struct ra_merge_entry *entries; /* pool of the queues below */
    int64_t entry_capacity;
    int64_t entry_count;
    int32_t entry_free;   /* list of returned entries, -1 ends */
    int32_t *queue_first; /* [ranks] entries of one rank in ascending position, -1: empty */
    int32_t *queue_last;
    int32_t *active; /* binary heap of the ranks whose queue is not empty */
    int64_t active_count;
    uint64_t *late; /* binary heap of rank << 32 | position: entries that came out of order */
    int64_t late_count;
    int64_t late_capacity;
    int64_t ranks;
} ra_merge_work_t;

void ra_merge_work_release(ra_merge_work_t *work);

/**
 * Merge the symbols ids[0, count) in place.
 * @param merged_count_p  Symbols left in ids.
 * @retval RA_ERR_INPUT  more than RA_BPE_MAX_WORD symbols.  @retval RA_ERR_NOMEM
 */
ra_status_t ra_bpe_merge(const ra_merge_table_t *table, ra_merge_work_t *work, int32_t *ids,
                         int64_t count, int64_t *merged_count_p);

#endif
