/**
 * @file  moe/moe_plan.h
 * @brief Insides of a plan and of a layer's weights, shared by moe_*.c. Internal.
 */
#ifndef RA_MOE_MOE_PLAN_H
#define RA_MOE_MOE_PLAN_H

#include "moe/moe.h"
#include <stddef.h>

/** What a kind of device does; rows in moe.c. The objects' common fields are set and checked.
 */
typedef struct ra_moe_device_ops {
    int64_t default_tile_rows;
    ra_status_t (*prepare)(const ra_gemm_kernel_t *kernel, const ra_moe_tensors_t *tensors,
                           ra_stream_t *stream, ra_moe_weights_t *weights);
    /** Also of weights whose preparing failed. */
    void (*release)(ra_moe_weights_t *weights);
    /** Sets plan->bytes. */
    ra_status_t (*allocate)(ra_moe_plan_t *plan);
    /** Also of a plan whose allocation failed. */
    void (*free)(ra_moe_plan_t *plan);
    ra_status_t (*forward)(ra_moe_plan_t *plan, const ra_moe_args_t *args, ra_stream_t *stream);
} ra_moe_device_ops_t;

extern const ra_moe_device_ops_t ra_moe_cpu_ops, ra_moe_cuda_ops;

struct ra_moe_weights {
    const ra_moe_device_ops_t *ops;
    ra_moe_shape_t shape;
    ra_dtype_t x_dtype;
    int32_t first, last; /**< experts held; arrays below are indexed by expert - first */
    float *bias;         /**< [E], host */
    struct ra_moe_cuda_weights *cuda;
    /* CPU. */
    ra_gemm_weight_t *router;
    ra_gemm_weight_t **gate, **up, **down;
    ra_gemm_weight_t *shared_gate, *shared_up, *shared_down; /**< NULL without shared experts */
};

/** One (token, expert) pair to run: a row of the tokens at hand and who runs it. */
typedef struct ra_moe_slot {
    int32_t row;
    int32_t expert;
} ra_moe_slot_t;

/**
 * Buffers are views into one allocation. T = tile_rows of this rank, k = top_k, S = max_slots.
 * Capitals after the type: extents.
 */
struct ra_moe_plan {
    const ra_moe_device_ops_t *ops;
    ra_moe_shape_t shape;
    ra_dtype_t x_dtype;
    ra_device_t *device; /**< borrowed */
    ra_comm_t *comm;     /**< borrowed; NULL when one rank */
    int ranks, rank;
    int32_t first, last; /**< experts that run here */
    int64_t tile_rows;   /**< of this rank in one round */
    int64_t max_slots;   /**< that can meet here in one round */
    int64_t bytes;
    struct ra_moe_cuda_plan *cuda;

    /* CPU. */
    void *memory;
    float *logits;                            /**< [T, E] */
    int32_t *expert;                          /**< [T, k] ascending */
    float *weight;                            /**< [T, k] */
    int64_t *result_at;                       /**< [T, k] row of `results` that holds the slot */
    float *shared_inner, *shared_up, *shared; /**< [T, shared_width] twice, [T, hidden] */

    ra_moe_slot_t *slots; /**< [S] that run here, in the order they came */
    int64_t *position;    /**< [S] of each slot after sorting by expert */
    int64_t *begin;       /**< [E + 1] first position of each expert */
    float *sorted;        /**< [S, hidden] tokens by expert; later: results by slot */
    float *inner, *up;    /**< [S, expert_width] */
    float *outputs;       /**< [S, hidden] results by position */
    ra_gemm_job_t *jobs;  /**< [2 (E + 1)] */

    /* With a communicator only. */
    int64_t *rank_rows;     /**< [ranks] host: rows of the whole call */
    int32_t *all_experts;   /**< [ranks, T, k] */
    float *send, *received; /**< [T min(ranks, k), hidden]; [ranks T, hidden] */
    float *returned;        /**< [T k, hidden] results of my slots, by owner, token, expert */
    int64_t *send_bytes, *send_offset, *receive_bytes, *receive_offset; /**< [ranks] */
};

/** One buffer of an owner: [rows, cols] elements. */
typedef struct ra_moe_buffer {
    size_t member; /**< offset of its pointer in the owner */
    int64_t rows, cols, element;
} ra_moe_buffer_t;

/** Lay buffers out one after another, 256-byte aligned; with @a memory, point the members into it.
 */
ra_status_t ra_moe_lay_out(void *owner, const ra_moe_buffer_t *buffers, size_t count, void *memory,
                           int64_t *bytes_p);

/** The CPU's row: its parts. */
ra_status_t ra_moe_cpu_prepare(const ra_gemm_kernel_t *kernel, const ra_moe_tensors_t *from,
                               ra_stream_t *stream, ra_moe_weights_t *to);
void ra_moe_cpu_release(ra_moe_weights_t *weights);
ra_status_t ra_moe_cpu_allocate(ra_moe_plan_t *plan);
void ra_moe_cpu_free(ra_moe_plan_t *plan);

/** Tokens at hand: what ra_moe_run_experts() reads. */
typedef struct ra_moe_tokens {
    const float *x;
    int64_t x_stride;
} ra_moe_tokens_t;

/**
 * Run plan->slots[0 .. slots) over @a tokens and, in the same grouped products, the shared expert
 * on @a rows rows of @a home. Results: plan->outputs[plan->position[s]], plan->shared.
 */
ra_status_t ra_moe_run_experts(ra_moe_plan_t *plan, const ra_moe_weights_t *weights, int64_t slots,
                               ra_moe_tokens_t tokens, int64_t rows, ra_moe_tokens_t home,
                               ra_stream_t *stream);

/**
 * One round over all ranks: the slots of plan->expert [rows, k] run where their experts live and
 * the shared expert here. Results: *results_p with plan->result_at, and plan->shared.
 */
ra_status_t ra_moe_exchange_round(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                  int64_t round, int64_t rows, ra_moe_tokens_t home,
                                  const float **results_p, ra_stream_t *stream);

/** Every rank takes part in every round: as many as the rank with the most rows needs. */
ra_status_t ra_moe_agree_on_rounds(ra_moe_plan_t *plan, int64_t rows, int64_t *rounds_p);

/** func(arg, first row, rows) over chunks of rows, on the stream's threads. */
typedef void (*ra_moe_rows_func_t)(void *arg, int64_t begin, int64_t end);
void ra_moe_for_rows(ra_stream_t *stream, int64_t rows, ra_moe_rows_func_t func, void *arg);

#endif
