#include "ring/layout.h"

#include "base/checked.h"
#include <stdlib.h>
#include <string.h>

/* The layout with the arrays it owns, in one allocation each. */
typedef struct layout_store {
    ra_layout_t layout; /* first: a pointer to it is a pointer to the store */
    ra_document_t *documents;
    ra_run_t *rank_runs, *document_runs;
    int64_t *rank_run_begin, *document_run_begin, *rows, *document_row;
} layout_store_t;

int ra_layout_kind_parse(const char *text, ra_layout_kind_t *kind)
{
    if (strcmp(text, "contiguous") == 0) {
        *kind = RA_LAYOUT_CONTIGUOUS;
    } else if (strcmp(text, "zigzag") == 0) {
        *kind = RA_LAYOUT_ZIGZAG;
    } else {
        return -1;
    }
    return 0;
}

const char *ra_layout_kind_name(ra_layout_kind_t kind)
{
    return kind == RA_LAYOUT_ZIGZAG ? "zigzag" : "contiguous";
}

/* Runs a sharded document is cut into. The two middle runs of a zigzag are one. */
static int piece_count(ra_layout_kind_t kind, int ranks)
{
    return kind == RA_LAYOUT_ZIGZAG ? 2 * ranks - 1 : ranks;
}

static int piece_rank(ra_layout_kind_t kind, int ranks, int piece)
{
    return kind == RA_LAYOUT_ZIGZAG && piece >= ranks ? 2 * ranks - 2 - piece : piece;
}

/*
 * Tiles of a piece. The tiles left over by an even division go where the short last tile is, so
 * that no two ranks differ by more than one tile of tokens: to the last ranks of a contiguous
 * layout, to the first ranks of a zigzag (their head run first, then their tail run).
 */
static int64_t piece_tiles(ra_layout_kind_t kind, int ranks, int64_t tiles, int piece)
{
    if (kind == RA_LAYOUT_CONTIGUOUS) {
        return tiles / ranks + (piece >= ranks - tiles % ranks);
    }
    int64_t each = tiles / (2 * ranks), left = tiles % (2 * ranks);
    int rank = piece_rank(kind, ranks, piece);
    int64_t head = each + (rank < left), tail = each + (rank < left - ranks);
    if (rank == ranks - 1) {
        return head + tail;
    }
    return piece == rank ? head : tail;
}

static bool is_whole(const ra_document_t *document, int64_t tile, int ranks)
{
    return ranks == 1 || ra_ceil_div(document->count, tile) < 2 * (int64_t)ranks;
}

static ra_status_t check_arguments(const ra_document_t *documents, int64_t document_count,
                                   int64_t tile, int ranks)
{
    if (document_count < 0 || tile < 1 || ranks < 1) {
        return ra_fail(RA_ERR_INVALID, "ring", "layout of %lld documents, tile %lld, %d ranks",
                       (long long)document_count, (long long)tile, ranks);
    }
    int64_t total = 0;
    for (int64_t d = 0; d < document_count; d++) {
        int64_t first = documents[d].first, count = documents[d].count;
        if (first < 0 || count < 0 || first % tile != 0 || !ra_add_ok(total, first, &total) ||
            !ra_add_ok(total, count, &total) || total > INT64_MAX / 2) {
            return ra_fail(RA_ERR_INVALID, "ring",
                           "document %lld: tokens [%lld, +%lld) do not fit tiles of %lld",
                           (long long)d, (long long)first, (long long)count, (long long)tile);
        }
    }
    return RA_OK;
}

/* Runs of all documents, with rank but without local; whole documents have rank -1. */
static void cut_documents(layout_store_t *store)
{
    const ra_layout_t *layout = &store->layout;
    int64_t at = 0, row = 0;
    for (int64_t d = 0; d < layout->document_count; d++) {
        const ra_document_t *document = &store->documents[d];
        int64_t tiles = ra_ceil_div(document->count, layout->tile);
        int64_t start = document->first, end = document->first + document->count;
        bool whole = is_whole(document, layout->tile, layout->ranks);
        int pieces = whole ? document->count > 0 : piece_count(layout->kind, layout->ranks);

        store->document_run_begin[d] = at;
        store->document_row[d] = row;
        for (int p = 0; p < pieces; p++) {
            int64_t count = end - start;
            int rank = -1;
            if (!whole) {
                int64_t in_piece = piece_tiles(layout->kind, layout->ranks, tiles, p);
                count = ra_min_i64(in_piece * layout->tile, count);
                rank = piece_rank(layout->kind, layout->ranks, p);
                store->rows[rank] += count;
            }
            store->document_runs[at++] =
                (ra_run_t){.document = d, .start = start, .count = count, .rank = rank};
            start += count;
        }
        row += document->count;
    }
    store->document_run_begin[layout->document_count] = at;
    store->document_row[layout->document_count] = row;
}

static int longest_first(const void *a, const void *b)
{
    const ra_run_t *x = *(ra_run_t *const *)a, *y = *(ra_run_t *const *)b;
    if (x->count != y->count) {
        return x->count < y->count ? 1 : -1;
    }
    return x->document < y->document ? -1 : x->document > y->document;
}

/* Longest processing time first: each whole document goes to the least loaded rank. */
static ra_status_t place_whole_documents(layout_store_t *store)
{
    const ra_layout_t *layout = &store->layout;
    int64_t runs = store->document_run_begin[layout->document_count], waiting = 0;
    ra_run_t **order = malloc(((size_t)runs + 1) * sizeof(ra_run_t *));
    if (order == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate an order of %lld runs",
                       (long long)runs);
    }
    for (int64_t i = 0; i < runs; i++) {
        if (store->document_runs[i].rank < 0) {
            order[waiting++] = &store->document_runs[i];
        }
    }
    qsort(order, (size_t)waiting, sizeof(ra_run_t *), longest_first);
    for (int64_t i = 0; i < waiting; i++) {
        int least = 0;
        for (int r = 1; r < layout->ranks; r++) {
            if (store->rows[r] < store->rows[least]) {
                least = r;
            }
        }
        order[i]->rank = least;
        store->rows[least] += order[i]->count;
    }
    free(order);
    return RA_OK;
}

/* Packed rows of each rank, and the runs once more in rank order. */
static void pack_ranks(layout_store_t *store)
{
    const ra_layout_t *layout = &store->layout;
    int64_t runs = store->document_run_begin[layout->document_count];
    int64_t *begin = store->rank_run_begin;
    for (int64_t i = 0; i < runs; i++) {
        begin[store->document_runs[i].rank + 1]++;
    }
    for (int r = 0; r < layout->ranks; r++) {
        begin[r + 1] += begin[r];
        store->rows[r] = 0;
    }
    /* begin[r] walks to begin[r + 1] while the runs of rank r are filled, then all move back. */
    for (int64_t i = 0; i < runs; i++) {
        ra_run_t *run = &store->document_runs[i];
        run->local = store->rows[run->rank];
        store->rows[run->rank] += run->count;
        store->rank_runs[begin[run->rank]++] = *run;
    }
    for (int r = layout->ranks; r > 0; r--) {
        begin[r] = begin[r - 1];
    }
    begin[0] = 0;
}

static ra_status_t store_create(const ra_document_t *documents, int64_t document_count,
                                int64_t tile, int ranks, ra_layout_kind_t kind,
                                layout_store_t **store_p)
{
    int64_t runs = 0;
    for (int64_t d = 0; d < document_count; d++) {
        runs += is_whole(&documents[d], tile, ranks) ? 1 : piece_count(kind, ranks);
    }
    layout_store_t *store = calloc(1, sizeof(*store));
    if (store != NULL) {
        store->documents = calloc((size_t)document_count + 1, sizeof(ra_document_t));
        store->rank_runs = calloc((size_t)runs + 1, sizeof(ra_run_t));
        store->document_runs = calloc((size_t)runs + 1, sizeof(ra_run_t));
        store->rank_run_begin = calloc((size_t)ranks + 1, sizeof(int64_t));
        store->document_run_begin = calloc((size_t)document_count + 1, sizeof(int64_t));
        store->rows = calloc((size_t)ranks, sizeof(int64_t));
        store->document_row = calloc((size_t)document_count + 1, sizeof(int64_t));
    }
    if (store == NULL || store->documents == NULL || store->rank_runs == NULL ||
        store->document_runs == NULL || store->rank_run_begin == NULL ||
        store->document_run_begin == NULL || store->rows == NULL || store->document_row == NULL) {
        ra_layout_destroy(store == NULL ? NULL : &store->layout);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a layout of %lld runs",
                       (long long)runs);
    }
    if (document_count > 0) {
        memcpy(store->documents, documents, (size_t)document_count * sizeof(*documents));
    }
    store->layout = (ra_layout_t){.kind = kind,
                                  .ranks = ranks,
                                  .tile = tile,
                                  .document_count = document_count,
                                  .documents = store->documents,
                                  .rank_runs = store->rank_runs,
                                  .rank_run_begin = store->rank_run_begin,
                                  .document_runs = store->document_runs,
                                  .document_run_begin = store->document_run_begin,
                                  .rows = store->rows,
                                  .document_row = store->document_row};
    *store_p = store;
    return RA_OK;
}

ra_status_t ra_layout_create(const ra_document_t *documents, int64_t document_count, int64_t tile,
                             int ranks, ra_layout_kind_t kind, ra_layout_t **layout_p)
{
    RA_TRY(check_arguments(documents, document_count, tile, ranks));
    layout_store_t *store = NULL;
    RA_TRY(store_create(documents, document_count, tile, ranks, kind, &store));
    cut_documents(store);
    ra_status_t status = place_whole_documents(store);
    if (status != RA_OK) {
        ra_layout_destroy(&store->layout);
        return status;
    }
    pack_ranks(store);
    for (int r = 0; r < ranks; r++) {
        store->layout.total_rows += store->rows[r];
        store->layout.max_rows = ra_max_i64(store->layout.max_rows, store->rows[r]);
    }
    *layout_p = &store->layout;
    return RA_OK;
}

ra_status_t ra_layout_create_prefix(const ra_layout_t *layout, ra_layout_t **prefix_p)
{
    int64_t count = layout->document_count;
    ra_document_t *cached = calloc((size_t)count + 1, sizeof(*cached));
    if (cached == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %lld documents", (long long)count);
    }
    for (int64_t d = 0; d < count; d++) {
        cached[d].count = layout->documents[d].first;
    }
    ra_status_t status = ra_layout_create(cached, count, layout->tile, layout->ranks,
                                          RA_LAYOUT_CONTIGUOUS, prefix_p);
    free(cached);
    return status;
}

ra_status_t ra_layout_check_prefix(const ra_layout_t *layout, const ra_layout_t *prefix)
{
    if (prefix != NULL && (prefix->ranks != layout->ranks || prefix->tile != layout->tile ||
                           prefix->document_count != layout->document_count)) {
        return ra_fail(RA_ERR_INVALID, "ring",
                       "prefix of %lld documents, tile %lld, %d ranks for %lld, %lld, %d",
                       (long long)prefix->document_count, (long long)prefix->tile, prefix->ranks,
                       (long long)layout->document_count, (long long)layout->tile, layout->ranks);
    }
    for (int64_t d = 0; d < layout->document_count; d++) {
        int64_t first = prefix == NULL ? 0 : prefix->documents[d].first;
        int64_t count = prefix == NULL ? 0 : prefix->documents[d].count;
        if (first != 0 || count != layout->documents[d].first) {
            return ra_fail(RA_ERR_INVALID, "ring",
                           "document %lld starts at %lld, its prefix is [%lld, +%lld)",
                           (long long)d, (long long)layout->documents[d].first, (long long)first,
                           (long long)count);
        }
    }
    return RA_OK;
}

void ra_layout_destroy(ra_layout_t *layout)
{
    if (layout == NULL) {
        return;
    }
    layout_store_t *store = (layout_store_t *)layout;
    free(store->documents);
    free(store->rank_runs);
    free(store->document_runs);
    free(store->rank_run_begin);
    free(store->document_run_begin);
    free(store->rows);
    free(store->document_row);
    free(store);
}

const ra_run_t *ra_layout_find(const ra_layout_t *layout, int64_t document, int64_t position)
{
    int64_t low = layout->document_run_begin[document];
    int64_t high = layout->document_run_begin[document + 1];
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const ra_run_t *run = &layout->document_runs[middle];
        if (position < run->start) {
            high = middle;
        } else if (position >= run->start + run->count) {
            low = middle + 1;
        } else {
            return run;
        }
    }
    return NULL;
}

const ra_run_t *ra_layout_last_run(const ra_layout_t *layout, int64_t document)
{
    int64_t end = layout->document_run_begin[document + 1];
    return end > layout->document_run_begin[document] ? &layout->document_runs[end - 1] : NULL;
}

void ra_layout_positions(const ra_layout_t *layout, int rank, int64_t *positions)
{
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count; t++) {
            positions[runs[i].local + t] = runs[i].start + t;
        }
    }
}

/* First row of a run in document order. */
static int64_t ordered_row(const ra_layout_t *layout, const ra_run_t *run)
{
    return layout->document_row[run->document] + run->start -
           layout->documents[run->document].first;
}

void ra_layout_pack(const ra_layout_t *layout, int rank, int64_t row_bytes, const void *ordered,
                    void *packed)
{
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        memcpy((char *)packed + runs[i].local * row_bytes,
               (const char *)ordered + ordered_row(layout, &runs[i]) * row_bytes,
               (size_t)(runs[i].count * row_bytes));
    }
}

void ra_layout_unpack(const ra_layout_t *layout, int rank, int64_t row_bytes, const void *packed,
                      void *ordered)
{
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        memcpy((char *)ordered + ordered_row(layout, &runs[i]) * row_bytes,
               (const char *)packed + runs[i].local * row_bytes,
               (size_t)(runs[i].count * row_bytes));
    }
}
