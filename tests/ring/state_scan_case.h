/**
 * @file  tests/ring/state_scan_case.h
 * @brief One state scan: a pack through ranks on the CPU or on GPUs, and the recurrence in double
 *        over its whole documents.
 */
#ifndef RA_TESTS_RING_STATE_SCAN_CASE_H
#define RA_TESTS_RING_STATE_SCAN_CASE_H

#include "ring/state_scan.h"
#include "tests/comm/device_ranks.h"
#include "tests/ring/ring_values.h"

enum { SCAN_HEADS = 3, SCAN_DIM_MOST = 64 };

typedef struct scan_case {
    pack_t pack;
    bool gpu; /**< ranks share the GPUs; tiles of 64 tokens instead of 16 */
    int ranks;
    int dim; /**< of keys and values; 0 means 32 */
    ra_layout_kind_t kind;
    ra_dtype_t dtype;
    bool per_token, reproducible, at_tile, over_v;
    /** Initial states are the final ones of this result on the CPU; NULL: made up where a document
     * is continued. */
    const struct scan_result *before;
    const char *transport; /**< NULL: "peer" on GPUs, "local" on the CPU */
    int layers;            /**< runs of the plan, all the same; 0 means 1 */
    ra_pool_t *pool;       /**< threads shared by ranks on the CPU; NULL: none */
} scan_case_t;

typedef struct scan_result {
    const scan_case_t *c;
    ra_layout_t *layout;
    float *o;                        /**< [rows in document order, heads, dim] */
    float *final_of[DOCUMENTS_MOST]; /**< [heads, dim, dim] */
    int64_t received_bytes;
} scan_result_t;

int64_t scan_case_tile(const scan_case_t *c);
/** Elements of a state. */
int64_t scan_state_size(const scan_case_t *c);

/** The layout, and poison where outputs and final states go. */
scan_result_t scan_result_make(const scan_case_t *c);
void scan_result_free(scan_result_t *result);
/** Body of one rank; @a arg is the scan_result_t. */
ra_status_t scan_rank_run(ra_comm_t *comm, ra_stream_t *stream, void *arg);
/** @a body, such as scan_rank_run(), on every rank. */
ra_status_t scan_ranks_run(scan_result_t *result, device_rank_func_t body);
scan_result_t scan_case_run(const scan_case_t *c);

/** The recurrence in double: [total rows, heads * dim], then the final state of each document. */
double *scan_oracle(const scan_case_t *c);
void scan_check_near(const scan_result_t *result, const double *want);
/** Packs over rank counts and layout kinds, against the oracle; reproducible ones contiguous. */
void scan_check_everywhere(scan_case_t c, const pack_t *packs, size_t count);
/** Rows and final state of document d of @a got against the same positions of @a want, by document
 * name. */
void scan_check_same_bits(const scan_result_t *got, int64_t d, const scan_result_t *want);

#endif
