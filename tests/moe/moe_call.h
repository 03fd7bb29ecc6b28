/**
 * @file  tests/moe/moe_call.h
 * @brief One call of a mixture-of-experts layer, on the CPU or on GPUs, on one rank or over
 * several, and what holds for every such call.
 */
#ifndef RA_TESTS_MOE_MOE_CALL_H
#define RA_TESTS_MOE_MOE_CALL_H

#include "comm/ranks.h"
#include "moe/moe.h"
#include "tests/gpu_support.h"
#include "tests/moe/moe_layer.h"

/** Rows of x, y are hidden + 8 apart on GPUs and hidden + 3 on the CPU; all arrays are the host's.
 */
typedef struct moe_call {
    moe_layer_t *layer;
    bool gpu;
    ra_dtype_t dtype; /**< of the activations; x holds values of that type */
    const char *gemm; /**< CPU; NULL: "packed" */
    int64_t tile_rows, rows;
    const float *x;
    float *y, *gap; /**< poisoned by the run, y unless accumulated to; gap may be NULL */
    bool accumulate;
    ra_router_replay_t replay;
    ra_pool_t *pool; /**< CPU: threads shared by ranks; NULL: none */
} moe_call_t;

int64_t moe_call_stride(const moe_call_t *call);
/** Random x, y and gap. @param size  of x. */
moe_call_t moe_call_make(moe_layer_t *layer, bool gpu, ra_dtype_t dtype, int64_t rows, float size);
void moe_call_free(moe_call_t *call);

/** @param comm  NULL: one rank. */
ra_status_t moe_call_run(const moe_call_t *call, ra_comm_t *comm);
/** Compare with the oracle, row by row, where the choice of experts is forced or not a near tie. */
void moe_call_check(const moe_call_t *call);

/** A layer of bf16 weights on GPUs, fp32 on the CPU. */
moe_layer_t *moe_usual_layer(const ra_moe_shape_t *shape, bool gpu);

/** Forced experts run, with their own weights; those chosen are the ones of a call that forces
 * none. */
void moe_check_forced(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype, int64_t tile_rows);
void moe_check_accumulates(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype);
void moe_check_not_finite(const ra_moe_shape_t *shape, bool gpu, ra_dtype_t dtype);

/** A layer whose experts are split over ranks; its bits against those of one rank with all. */
typedef struct moe_split {
    bool gpu;
    ra_dtype_t dtype;
    int ranks;
    int64_t rows;      /**< about as many, dealt out unevenly */
    int64_t tile_rows; /**< 0: as the one rank */
    ra_pool_t *pool;
    bool forced; /**< with random_replay.h */
} moe_split_t;

void moe_check_split(const ra_moe_shape_t *shape, const moe_split_t *split);

#endif
