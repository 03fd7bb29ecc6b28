/**
 * @file  moe/moe_cuda.h
 * @brief Insides of a layer's weights and a plan on a CUDA device, shared by moe_*cuda.c. Internal.
 */
#ifndef RA_MOE_MOE_CUDA_H
#define RA_MOE_MOE_CUDA_H

#include "moe/experts_cuda.h"
#include "moe/moe_plan.h"

enum { RA_MOE_CUDA_ROUNDS = 3, RA_MOE_CUDA_LANES = 2 };

/** One allocation, in x_dtype. L = experts held. */
struct ra_moe_cuda_weights {
    ra_device_t *device; /**< borrowed */
    void *memory;
    void *router;         /**< [E, parts hidden] */
    int32_t router_parts; /**< 3: an fp32 router as the sum of three bf16 ones, side by side */
    float *bias;          /**< [E] */
    void *up;             /**< [L, 2, width, hidden] gates and ups */
    void *down;           /**< [L, hidden, width] */
    void *shared_up;      /**< [2, shared_width, hidden] */
    void *shared_down;    /**< [hidden, shared_width] */
};

/** What is on its way: rounds take two lanes in turn over ranks. */
struct ra_moe_cuda_lane {
    void *shared; /**< [T, hidden] */
    /* With a communicator only. */
    void *send, *received;                  /**< [T min(P, k), hidden], [V, hidden] */
    int32_t *send_expert, *received_expert; /**< likewise, k wide */
    void *back, *returned;                  /**< [slots here, hidden], [T k, hidden] */
};

/** A round of tokens: three are begun at once over ranks, one in each step of a round. */
struct ra_moe_cuda_round {
    int64_t row, rows;             /**< of the call */
    struct ra_moe_cuda_lane *lane; /**< borrowed */
    float *weight;                 /**< [T, k] */
    /* With a communicator only. */
    int32_t *result_at;             /**< [T, k] row of `returned` */
    int64_t *table;                 /**< [P, 2, P] host: tokens and slots from rank to rank */
    ra_request_t *tokens, *results; /**< transfers; NULL: none */
};

/**
 * T = tile_rows of this rank; V rows of tokens at hand: T, or all ranks' T with a communicator;
 * S sorted rows of their slots here. Unless said otherwise elements are of x_dtype.
 */
struct ra_moe_cuda_plan {
    void *memory;
    float *logits;     /**< [T, E] */
    int32_t *expert;   /**< [T, k] ascending */
    int32_t *position; /**< [V, k] sorted row of a slot */
    int32_t *source;   /**< [S] row of the tokens at hand */
    ra_moe_tile_t *tiles;
    int32_t *tile_count, *scratch;
    void *inner;        /**< [S, width] */
    void *out;          /**< [S, hidden] */
    void *shared_inner; /**< [T, shared_width] */
    /* Without a communicator only the first of each. */
    struct ra_moe_cuda_round round[RA_MOE_CUDA_ROUNDS];
    struct ra_moe_cuda_lane lane[RA_MOE_CUDA_LANES];
    int64_t sorted_rows, max_tiles;

    /* With a communicator only. P = ranks. */
    int32_t *totals;          /**< [2, P] */
    int32_t *tokens_before;   /**< [max(P T, V)] */
    int32_t *slots_before;    /**< [max(P T, V)] */
    int32_t *host_totals;     /**< [2, P] pinned */
    int64_t *counts;          /**< [2, P] host, then the rounds' tables */
    ra_transfer_t *transfers; /**< [4 P] host */
};

/** Tokens at hand: what the experts here read. */
typedef struct ra_moe_cuda_tokens {
    const void *x;
    int64_t rows, x_stride;
    const int32_t *expert; /**< [rows, k] */
} ra_moe_cuda_tokens_t;

/** Sort the slots of @a tokens and run them: plan->cuda->out by plan->cuda->position. */
ra_status_t ra_moe_cuda_run_experts(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                    ra_moe_cuda_tokens_t tokens, ra_stream_t *stream);
/** The shared expert on @a rows rows to @a shared. */
ra_status_t ra_moe_cuda_run_shared(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                   const void *x, int64_t x_stride, int64_t rows, void *shared,
                                   ra_stream_t *stream);

/** Allocate the buffers of the exchange on the host; those of the device are in the plan. */
ra_status_t ra_moe_cuda_exchange_create(ra_moe_plan_t *plan);
/**
 * A round over all ranks in four steps: the slots of plan->cuda->expert [home.rows, k] run where
 * their experts live. What a step posts travels while later steps, also of other rounds, compute.
 *
 *     pack   tokens by rank; how many go where is on its way to the host, and the stream marked
 *     send   waits for that mark; tokens leave, behind what is queued now
 *     run    the tokens that came through the experts here; results leave
 *     end    results are in lane->returned, by result_at
 *
 * A pack is followed by its send before another pack.
 */
ra_status_t ra_moe_cuda_exchange_pack(ra_moe_plan_t *plan, ra_moe_cuda_tokens_t home,
                                      const struct ra_moe_cuda_round *round, ra_stream_t *stream);
ra_status_t ra_moe_cuda_exchange_send(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round,
                                      ra_stream_t *stream);
ra_status_t ra_moe_cuda_exchange_run(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                     struct ra_moe_cuda_round *round, ra_stream_t *stream);
ra_status_t ra_moe_cuda_exchange_end(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round);

#endif
