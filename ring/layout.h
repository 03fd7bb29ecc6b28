/**
 * @file  ring/layout.h
 * @brief Who owns which tokens: a pure function of documents, tile, rank count and kind.
 *
 * A document is cut into tiles counted from its own position 0; every run owned by a rank is whole
 * tiles (the last tile of a document may be short). How a document is cut depends on that document
 * and the rank count alone, never on its neighbours:
 *
 *     fewer than 2 * ranks tiles to process, or 1 rank:  whole, on one rank (least loaded)
 *     contiguous:  rank r owns run r of N balanced runs
 *     zigzag:      2N balanced runs, rank r owns runs r and 2N-1-r, so that every rank has about
 *                  the same causal work (Striped/zigzag rings, arXiv 2311.09431, 2411.01783);
 *                  the two runs of rank N-1 touch and are one run
 *
 * A sharded document gives every rank the same number of tiles, give or take one. A rank may own
 * nothing. A document may start at a position > 0: the tokens before it are a cached prefix, which
 * has a layout of its own (documents {0, first}).
 *
 * Units     positions and rows are tokens. Packed rows of a rank: its runs one after another,
 * ordered by document, then position. Ownership  a layout owns its arrays; immutable once made.
 */
#ifndef RA_RING_LAYOUT_H
#define RA_RING_LAYOUT_H

#include "base/status.h"
#include <stdint.h>

typedef enum ra_layout_kind { RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG } ra_layout_kind_t;

/** Tokens [first, first + count) of a document are laid out. */
typedef struct ra_document {
    int64_t first; /**< 0, or the length of the cached prefix: a multiple of tile */
    int64_t count; /**< 0 is allowed: nothing of this document is owned by anyone */
} ra_document_t;

/** Consecutive tokens of one document on one rank. */
typedef struct ra_run {
    int64_t document;
    int64_t start; /**< position in the document, a multiple of tile */
    int64_t count;
    int64_t local; /**< row of its first token in the packed rows of @a rank */
    int rank;
} ra_run_t;

typedef struct ra_layout {
    ra_layout_kind_t kind;
    int ranks;
    int64_t tile;
    int64_t document_count;
    const ra_document_t *documents;
    /** Runs of rank r: [rank_run_begin[r], rank_run_begin[r + 1]), ascending (document, start). */
    const ra_run_t *rank_runs;
    const int64_t *rank_run_begin;
    /** The same runs by document: [document_run_begin[d], document_run_begin[d + 1]), ascending. */
    const ra_run_t *document_runs;
    const int64_t *document_run_begin;
    const int64_t *rows; /**< [ranks] packed rows of each rank */
    const int64_t
        *document_row; /**< [documents + 1] first row of each document in document order */
    int64_t total_rows, max_rows;
} ra_layout_t;

/**
 * @param documents  copied; first >= 0 and a multiple of @a tile, count >= 0.
 * @retval RA_ERR_INVALID  an argument out of range or totals beyond 2^62; RA_ERR_NOMEM.
 */
ra_status_t ra_layout_create(const ra_document_t *documents, int64_t document_count, int64_t tile,
                             int ranks, ra_layout_kind_t kind, ra_layout_t **layout_p);
/** Layout of the cached prefixes of @a layout: documents {0, first}, contiguous. */
ra_status_t ra_layout_create_prefix(const ra_layout_t *layout, ra_layout_t **prefix_p);
/** Accepts NULL. */
void ra_layout_destroy(ra_layout_t *layout);
/** RA_OK when @a prefix lays out what comes before @a layout: same documents, tile and ranks,
 * documents {0, first}. @a prefix NULL: when no document starts after 0. Else RA_ERR_INVALID. */
ra_status_t ra_layout_check_prefix(const ra_layout_t *layout, const ra_layout_t *prefix);

/** "contiguous" or "zigzag". @return 0, or -1 when unknown. */
int ra_layout_kind_parse(const char *text, ra_layout_kind_t *kind);
const char *ra_layout_kind_name(ra_layout_kind_t kind);

static inline int64_t ra_layout_run_count(const ra_layout_t *layout, int rank)
{
    return layout->rank_run_begin[rank + 1] - layout->rank_run_begin[rank];
}

static inline const ra_run_t *ra_layout_runs(const ra_layout_t *layout, int rank)
{
    return layout->rank_runs + layout->rank_run_begin[rank];
}

/** Run that holds @a position of @a document, or NULL when nobody owns it. O(log runs). */
const ra_run_t *ra_layout_find(const ra_layout_t *layout, int64_t document, int64_t position);
/** Run of @a document on @a rank that comes last, or NULL. */
const ra_run_t *ra_layout_last_run(const ra_layout_t *layout, int64_t document);

/** Position in its own document of every packed row of @a rank: positions [rows[rank]]. */
void ra_layout_positions(const ra_layout_t *layout, int rank, int64_t *positions);

/*
 * Document order: all laid out rows of document 0, then of document 1, ...; row of (document d,
 * position p) is document_row[d] + p - documents[d].first.
 */

/** Copy the rows of @a rank out of document order: ordered [total_rows] -> packed [rows[rank]]. */
void ra_layout_pack(const ra_layout_t *layout, int rank, int64_t row_bytes, const void *ordered,
                    void *packed);
/** Copy the rows of @a rank into document order: packed [rows[rank]] -> ordered [total_rows]. */
void ra_layout_unpack(const ra_layout_t *layout, int rank, int64_t row_bytes, const void *packed,
                      void *ordered);

#endif
