/**
 * @file  tests/ring/softmax_ring_case.h
 * @brief One softmax ring: a pack through ranks on the CPU or on GPUs, and attention in double over
 *        its whole documents.
 */
#ifndef RA_TESTS_RING_SOFTMAX_RING_CASE_H
#define RA_TESTS_RING_SOFTMAX_RING_CASE_H

#include "ring/softmax_ring.h"
#include "tests/comm/device_ranks.h"
#include "tests/ring/ring_values.h"

enum { RING_HEADS = 4, RING_KV_HEADS = 2, RING_DIM_MOST = 128 };

typedef struct ring_case {
    pack_t pack;
    bool gpu; /**< ranks share the GPUs; tiles of 64 tokens instead of 16 */
    int ranks;
    int dim; /**< of a head; 0 means 32 */
    ra_layout_kind_t kind;
    ra_dtype_t dtype;
    int64_t window;
    bool full, reproducible, walk;
    int64_t part_keys;     /**< GPUs: keys of a launch; 0: the plan's choice */
    const char *transport; /**< NULL: "peer" on GPUs, "local" on the CPU */
    int layers;            /**< runs of the plan, all the same; 0 means 1 */
    ra_pool_t *pool;       /**< threads shared by ranks on the CPU; NULL: none */
} ring_case_t;

typedef struct ring_result {
    const ring_case_t *c;
    ra_layout_t *layout, *prefix;
    float *o;   /**< [rows in document order, heads, dim] */
    float *lse; /**< [rows, heads] */
    int64_t received_bytes;
} ring_result_t;

int64_t ring_case_tile(const ring_case_t *c);

/** Layouts, and poison where the outputs go. */
ring_result_t ring_result_make(const ring_case_t *c);
void ring_result_free(ring_result_t *result);
/** Body of one rank; @a arg is the ring_result_t. */
ra_status_t ring_rank_run(ra_comm_t *comm, ra_stream_t *stream, void *arg);
/** The same; rank 2 fails with RA_ERR_INPUT instead, and the others must hear of it. */
ra_status_t ring_rank_run_but_2(ra_comm_t *comm, ra_stream_t *stream, void *arg);
/** One of these on every rank. */
ra_status_t ring_ranks_run(ring_result_t *result, device_rank_func_t body);
ring_result_t ring_case_run(const ring_case_t *c);

/** Attention in double, [total rows, heads * dim + heads]: output, then log-sum-exp. */
double *ring_oracle(const ring_case_t *c);
void ring_check_near(const ring_result_t *result, const double *want);
/** Packs over rank counts and layout kinds, against the oracle; reproducible ones contiguous. */
void ring_check_everywhere(ring_case_t c, const pack_t *packs, size_t count);
/** Rows of document d of @a got against rows of the document with the same name of @a want, from
 * the position where both have rows. */
void ring_check_same_bits(const ring_result_t *got, int64_t d, const ring_result_t *want);

#endif
