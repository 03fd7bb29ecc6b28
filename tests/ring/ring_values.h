/**
 * @file  tests/ring/ring_values.h
 * @brief Inputs that depend on the document's own number and the position alone, so that the same
 *        document can be laid out, packed and cut in any way.
 */
#ifndef RA_TESTS_RING_RING_VALUES_H
#define RA_TESTS_RING_RING_VALUES_H

#include "base/device.h"
#include "ring/layout.h"
#include "tests/test_support.h"
#include <stdlib.h>

enum { DOCUMENTS_MOST = 5 };

/** What rings are tried with; GPUs, which ranks may have to share, with the first few. */
enum { RANK_COUNTS = 5, GPU_RANK_COUNTS = 4 };
static const int rank_counts[RANK_COUNTS] = {1, 2, 3, 4, 7};
static const ra_layout_kind_t layout_kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

/** Documents by a number of their own; tokens [0, first) are a cached prefix. */
typedef struct pack {
    int64_t count;
    int name[DOCUMENTS_MOST];
    ra_document_t documents[DOCUMENTS_MOST];
} pack_t;

/** Rows of all documents. */
static inline int64_t pack_rows(const pack_t *pack)
{
    int64_t rows = 0;
    for (int64_t d = 0; d < pack->count; d++) {
        rows += pack->documents[d].count;
    }
    return rows;
}

/** Number in @a pack of the document called @a name, which it has. */
static inline int64_t pack_find(const pack_t *pack, int name)
{
    int64_t d = 0;
    while (pack->name[d] != name) {
        d++;
    }
    return d;
}

/** One document of @a pack, alone. */
static inline pack_t pack_alone(const pack_t *pack, int64_t d)
{
    return (pack_t){.count = 1, .name = {pack->name[d]}, .documents = {pack->documents[d]}};
}

/** Row of @a width values in [-1, 1) of one token; @a stream tells q, k, v and others apart. */
static inline void value_row(int name, int stream, int64_t position, int64_t width, float *row)
{
    uint64_t seed = (uint64_t)name * 1000003u + (uint64_t)stream * 7919u + (uint64_t)position * 64u;
    for (int64_t i = 0; i < width; i++) {
        row[i] = test_random(&seed, -1.0f, 1.0f);
    }
}

/** The rows of one rank, row r at rows + r * stride. */
static inline void value_rows(const pack_t *pack, const ra_layout_t *layout, int rank, int stream,
                              int64_t width, int64_t stride, float *rows)
{
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count; t++) {
            value_row(pack->name[runs[i].document], stream, runs[i].start + t, width,
                      rows + (runs[i].local + t) * stride);
        }
    }
}

static inline float *float_array(int64_t count)
{
    float *values = malloc((size_t)(count + 1) * sizeof(float));
    test_poison(values, count + 1);
    return values;
}

#endif
