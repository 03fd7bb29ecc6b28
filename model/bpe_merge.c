/**
 * @file  model/bpe_merge.c
 * @brief The merge table and two merge loops: a scan for short words, queues by rank for long ones.
 */
#include "model/bpe_merge.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/** Up to this many symbols scanning all pairs for the lowest rank beats any queue. */
enum { SHORT_WORD = 32 };

static const int32_t NO_RANK = INT32_MAX;

struct ra_merge_slot {
    uint64_t pair; /* left << 32 | right */
    int32_t rank;  /* NO_RANK: slot unused */
};

struct ra_merge_symbol {
    int32_t id;
    int32_t previous; /* -1: first */
    int32_t next;     /* -1: last */
    int32_t rank;     /* of the pair (this, next), NO_RANK when none or merged away */
};

struct ra_merge_entry {
    int32_t position;
    int32_t next;
};

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static uint64_t pair_hash(uint64_t pair)
{
    pair *= 0x9e3779b97f4a7c15u;
    pair ^= pair >> 32;
    pair *= 0xd6e8feb86659fd93u;
    return pair ^ pair >> 29;
}

static int32_t rank_of(const ra_merge_table_t *table, int32_t left, int32_t right)
{
    uint64_t pair = pair_of(left, right);
    uint64_t at = pair_hash(pair) & table->mask;
    while (table->slots[at].rank != NO_RANK && table->slots[at].pair != pair) {
        at = (at + 1) & table->mask;
    }
    return table->slots[at].rank;
}

ra_status_t ra_merge_table_init(ra_merge_table_t *table, int64_t capacity)
{
    uint64_t slots = 16;
    while (slots < 2 * (uint64_t)capacity + 2) {
        slots *= 2;
    }
    *table = (ra_merge_table_t){.mask = slots - 1, .capacity = capacity};
    table->slots = malloc(slots * sizeof *table->slots);
    table->merged_id = malloc(((size_t)capacity + 1) * sizeof *table->merged_id);
    if (table->slots == NULL || table->merged_id == NULL) {
        ra_merge_table_release(table);
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate a table of %lld merges",
                       (long long)capacity);
    }
    for (uint64_t i = 0; i < slots; i++) {
        table->slots[i].rank = NO_RANK;
    }
    return RA_OK;
}

void ra_merge_table_release(ra_merge_table_t *table)
{
    free(table->slots);
    free(table->merged_id);
    *table = (ra_merge_table_t){0};
}

void ra_merge_table_add(ra_merge_table_t *table, int32_t left, int32_t right, int32_t merged_id)
{
    uint64_t pair = pair_of(left, right);
    uint64_t at = pair_hash(pair) & table->mask;
    while (table->slots[at].rank != NO_RANK && table->slots[at].pair != pair) {
        at = (at + 1) & table->mask;
    }
    table->slots[at] = (struct ra_merge_slot){.pair = pair, .rank = (int32_t)table->ranks};
    table->merged_id[table->ranks++] = merged_id;
}

static int64_t merge_short(const ra_merge_table_t *table, int32_t *ids, int64_t count)
{
    int32_t rank[SHORT_WORD];
    for (int64_t i = 0; i + 1 < count; i++) {
        rank[i] = rank_of(table, ids[i], ids[i + 1]);
    }
    while (count > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < count; i++) {
            best = rank[i] < rank[best] ? i : best;
        }
        if (rank[best] == NO_RANK) {
            break;
        }
        ids[best] = table->merged_id[rank[best]];
        count--;
        memmove(ids + best + 1, ids + best + 2, (size_t)(count - best - 1) * sizeof *ids);
        memmove(rank + best, rank + best + 1, (size_t)(count - best - 1) * sizeof *rank);
        if (best > 0) {
            rank[best - 1] = rank_of(table, ids[best - 1], ids[best]);
        }
        if (best + 1 < count) {
            rank[best] = rank_of(table, ids[best], ids[best + 1]);
        }
    }
    return count;
}

/*
 * Long words: one first-in first-out queue of positions a rank, and a heap of the ranks whose queue
 * is not empty. Positions nearly always arrive in ascending order (the word is scanned, and each
 * rank merged, from left to right), so a queue stays sorted by itself and its ends cost O(1); the
 * few entries that arrive out of order go to one heap of their own. An entry is stale, and skipped,
 * when the pair at its position has another rank by now: symbols only grow, so a pair never
 * returns.
 */

static ra_status_t grow(void **memory, int64_t *capacity, int64_t needed, size_t element)
{
    if (needed <= *capacity) {
        return RA_OK;
    }
    int64_t wanted = *capacity + *capacity / 2 > needed ? *capacity + *capacity / 2 : needed;
    void *larger = realloc(*memory, (size_t)wanted * element);
    if (larger == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate %lld bytes to merge a word",
                       (long long)wanted * (long long)element);
    }
    *memory = larger;
    *capacity = wanted;
    return RA_OK;
}

static void active_push(ra_merge_work_t *work, int32_t rank)
{
    int64_t at = work->active_count++;
    while (at > 0 && work->active[(at - 1) / 2] > rank) {
        work->active[at] = work->active[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    work->active[at] = rank;
}

static void active_pop(ra_merge_work_t *work)
{
    int32_t moved = work->active[--work->active_count];
    int64_t at = 0;
    for (int64_t child = 1; child < work->active_count; child = 2 * at + 1) {
        if (child + 1 < work->active_count && work->active[child + 1] < work->active[child]) {
            child++;
        }
        if (work->active[child] >= moved) {
            break;
        }
        work->active[at] = work->active[child];
        at = child;
    }
    work->active[at] = moved;
}

static ra_status_t late_push(ra_merge_work_t *work, uint64_t key)
{
    RA_TRY(
        grow((void **)&work->late, &work->late_capacity, work->late_count + 1, sizeof *work->late));
    int64_t at = work->late_count++;
    while (at > 0 && work->late[(at - 1) / 2] > key) {
        work->late[at] = work->late[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    work->late[at] = key;
    return RA_OK;
}

static void late_pop(ra_merge_work_t *work)
{
    uint64_t moved = work->late[--work->late_count];
    int64_t at = 0;
    for (int64_t child = 1; child < work->late_count; child = 2 * at + 1) {
        if (child + 1 < work->late_count && work->late[child + 1] < work->late[child]) {
            child++;
        }
        if (work->late[child] >= moved) {
            break;
        }
        work->late[at] = work->late[child];
        at = child;
    }
    work->late[at] = moved;
}

static ra_status_t queue_push(ra_merge_work_t *work, int32_t rank, int32_t position)
{
    int32_t last = work->queue_last[rank];
    bool empty = work->queue_first[rank] < 0;
    if (!empty && work->entries[last].position > position) {
        return late_push(work, pair_of(rank, position));
    }
    int32_t entry = work->entry_free;
    if (entry >= 0) {
        work->entry_free = work->entries[entry].next;
    } else {
        RA_TRY(grow((void **)&work->entries, &work->entry_capacity, work->entry_count + 1,
                    sizeof *work->entries));
        entry = (int32_t)work->entry_count++;
    }
    work->entries[entry] = (struct ra_merge_entry){.position = position, .next = -1};
    work->queue_last[rank] = entry;
    if (empty) {
        work->queue_first[rank] = entry;
        active_push(work, rank);
    } else {
        work->entries[last].next = entry;
    }
    return RA_OK;
}

/** Lowest (rank, position) of all queues. @return false when everything is empty. */
static bool queue_pop(ra_merge_work_t *work, int32_t *rank, int32_t *position)
{
    uint64_t late = work->late_count > 0 ? work->late[0] : UINT64_MAX;
    uint64_t queued = UINT64_MAX;
    if (work->active_count > 0) {
        int32_t first = work->queue_first[work->active[0]];
        queued = pair_of(work->active[0], work->entries[first].position);
    }
    if (late == UINT64_MAX && queued == UINT64_MAX) {
        return false;
    }
    uint64_t key = late < queued ? late : queued;
    *rank = (int32_t)(key >> 32);
    *position = (int32_t)(key & UINT32_MAX);
    if (late < queued) {
        late_pop(work);
        return true;
    }
    int32_t entry = work->queue_first[*rank];
    work->queue_first[*rank] = work->entries[entry].next;
    work->entries[entry].next = work->entry_free;
    work->entry_free = entry;
    if (work->queue_first[*rank] < 0) {
        active_pop(work);
    }
    return true;
}

static ra_status_t pair_update(const ra_merge_table_t *table, ra_merge_work_t *work, int32_t at)
{
    struct ra_merge_symbol *symbol = &work->symbols[at];
    symbol->rank =
        symbol->next < 0 ? NO_RANK : rank_of(table, symbol->id, work->symbols[symbol->next].id);
    return symbol->rank == NO_RANK ? RA_OK : queue_push(work, symbol->rank, at);
}

static ra_status_t merge_at(const ra_merge_table_t *table, ra_merge_work_t *work, int32_t at)
{
    struct ra_merge_symbol *left = &work->symbols[at];
    struct ra_merge_symbol *right = &work->symbols[left->next];
    left->id = table->merged_id[left->rank];
    left->next = right->next;
    right->rank = NO_RANK;
    if (left->next >= 0) {
        work->symbols[left->next].previous = at;
    }
    if (left->previous >= 0) {
        RA_TRY(pair_update(table, work, left->previous));
    }
    return pair_update(table, work, at);
}

static ra_status_t merge_queued(const ra_merge_table_t *table, ra_merge_work_t *work, int64_t count)
{
    int32_t rank, position;
    for (int64_t i = 0; i < count; i++) {
        RA_TRY(pair_update(table, work, (int32_t)i));
    }
    while (queue_pop(work, &rank, &position)) {
        if (work->symbols[position].rank == rank) {
            RA_TRY(merge_at(table, work, position));
        }
    }
    return RA_OK;
}

static ra_status_t work_reserve(ra_merge_work_t *work, int64_t ranks, int64_t count)
{
    RA_TRY(grow((void **)&work->symbols, &work->symbol_capacity, count, sizeof *work->symbols));
    work->entry_count = 0;
    work->entry_free = -1;
    work->active_count = 0;
    work->late_count = 0;
    if (work->ranks < ranks) {
        free(work->queue_first);
        work->ranks = 0;
        work->queue_first = malloc(3 * (size_t)ranks * sizeof *work->queue_first);
        if (work->queue_first == NULL) {
            return ra_fail(RA_ERR_NOMEM, "tokenizer", "cannot allocate queues for %lld merges",
                           (long long)ranks);
        }
        work->ranks = ranks;
        work->queue_last = work->queue_first + ranks;
        work->active = work->queue_last + ranks;
        memset(work->queue_first, 0xff, (size_t)ranks * sizeof *work->queue_first);
    }
    return RA_OK;
}

void ra_merge_work_release(ra_merge_work_t *work)
{
    free(work->symbols);
    free(work->entries);
    free(work->queue_first);
    free(work->late);
    *work = (ra_merge_work_t){0};
}

ra_status_t ra_bpe_merge(const ra_merge_table_t *table, ra_merge_work_t *work, int32_t *ids,
                         int64_t count, int64_t *merged_count_p)
{
    if (count <= SHORT_WORD || table->ranks == 0) {
        *merged_count_p = count > 1 && table->ranks > 0 ? merge_short(table, ids, count) : count;
        return RA_OK;
    }
    if (count > RA_BPE_MAX_WORD) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "one word of %lld bytes is more than %lld",
                       (long long)count, (long long)RA_BPE_MAX_WORD);
    }
    RA_TRY(work_reserve(work, table->ranks, count));
    for (int64_t i = 0; i < count; i++) {
        work->symbols[i] = (struct ra_merge_symbol){
            .id = ids[i],
            .previous = (int32_t)i - 1,
            .next = i + 1 < count ? (int32_t)i + 1 : -1,
        };
    }
    ra_status_t status = merge_queued(table, work, count);
    if (status != RA_OK) {
        memset(work->queue_first, 0xff, (size_t)work->ranks * sizeof *work->queue_first);
        return status;
    }
    int64_t kept = 0;
    for (int32_t at = 0; at >= 0; at = work->symbols[at].next) {
        ids[kept++] = work->symbols[at].id;
    }
    *merged_count_p = kept;
    return RA_OK;
}
