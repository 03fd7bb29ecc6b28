/**
 * @file  moe/moe.h
 * @brief Mixture-of-experts feed-forward: route, dispatch, grouped experts, combine.
 *
 *     logits = x Wr^T                                       Wr [E, hidden]
 *     (id_j, w_j) j = 1..k: chosen and weighted by moe/router.h, ids ascending
 *     FFN(x) = Wdown ( SiLU(Wgate x) * (Wup x) )            SiLU(a) = a / (1 + e^{-a})
 *     y      = ((w_1 FFN_id1(x) + w_2 FFN_id2(x)) + ... ) + FFN_shared(x)
 *
 * Symbols   E experts, k experts a token, hidden, width = an expert's inner size. Weights are
 * stored [out, in]: gate and up [width, hidden], down [hidden, width], BF16 or F32.
 *
 * Who owns what: a weights object belongs to one layer and one device and holds the experts
 * [first, last) and the shared expert prepared for it; it is read only and may be used by several
 * ranks of that device at once. A plan belongs to one rank; it owns every buffer and serves all
 * layers of that shape.
 *
 * Expert parallel: with a communicator of N > 1 ranks, rank r runs the experts of
 * ra_moe_expert_range(E, N, r) for everybody. Tokens travel once to each rank that runs one of
 * their experts; every (token, expert) result returns unsummed and the token's home rank adds them
 * in ascending expert id, then the shared expert. With a row-invariant GEMM kernel the bits equal
 * the replicated ones. Traffic goes in rounds of tile_rows tokens over all ranks together, so
 * buffers stay O(tile_rows x k x hidden) a rank whatever the routing; a rank that has run out of
 * rows keeps taking part.
 *
 * Numerics
 *   cpu         fp32 activations and sums. A row's bits depend on the row and the weights only,
 *               given a row-invariant GEMM kernel.
 *   cuda, F32   the same, without tensor cores; weights widened to fp32.
 *   cuda, BF16  x and weights bf16, router logits and all sums fp32; the inner activations
 *               SiLU(gate) * up and each expert's result are rounded to bf16; y fp32. A router
 *               given in fp32 keeps its precision (three bf16 parts). A row's bits depend on the
 *               row and the weights only, on any number of ranks.
 * A non-finite logit never crashes and never hides: see moe/router.h.
 *
 * Source    DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for the router; GShard (arXiv 2006.16668)
 * for expert parallelism.
 */
#ifndef RA_MOE_MOE_H
#define RA_MOE_MOE_H

#include "base/device.h"
#include "base/gemm.h"
#include "base/tensor.h"
#include "comm/comm.h"
#include "moe/router.h"
#include <stdbool.h>
#include <stdint.h>

/** Sizes of one mixture-of-experts layer. */
typedef struct ra_moe_shape {
    int64_t hidden;
    int64_t expert_width;
    int64_t shared_width; /**< of all shared experts together; 0: none */
    ra_router_t router;   /**< experts, top_k, groups, ... */
} ra_moe_shape_t;

/** Experts [first, last) that rank @a rank of @a ranks owns; empty for some when ranks > experts.
 */
void ra_moe_expert_range(int32_t experts, int ranks, int rank, int32_t *first_p, int32_t *last_p);

/** Views of a layer's checkpoint tensors; borrowed for the life of the weights object. */
typedef struct ra_moe_tensors {
    ra_tensor_t router;           /**< [E, hidden] */
    ra_tensor_t expert_bias;      /**< [E] F32 or BF16, copied; data NULL counts as zero */
    const ra_tensor_t *gate, *up; /**< E views of [width, hidden]; only [first, last) are read */
    const ra_tensor_t *down;      /**< E views of [hidden, width] */
    ra_tensor_t shared_gate, shared_up; /**< [shared_width, hidden] */
    ra_tensor_t shared_down;            /**< [hidden, shared_width] */
} ra_moe_tensors_t;

typedef struct ra_moe_weights ra_moe_weights_t;

/**
 * Prepare one layer, experts [first, last) only.
 * @param kernel   CPU: of the products. Elsewhere unused, may be NULL.
 * @param x_dtype  Activations the layer will get. CPU: F32.
 * @param stream   CPU: may be NULL, and the tensors' memory must outlive the weights. CUDA: its
 *                 device gets copies in x_dtype; the tensors may go after ra_stream_sync().
 * @retval RA_ERR_SHAPE  a tensor's extents differ from @a shape, or the shape is impossible; the
 * message names the tensor. RA_ERR_NOMEM, RA_ERR_UNSUPPORTED (dtype).
 */
ra_status_t ra_moe_weights_create(const ra_gemm_kernel_t *kernel, const ra_moe_shape_t *shape,
                                  const ra_moe_tensors_t *tensors, int32_t first, int32_t last,
                                  ra_dtype_t x_dtype, ra_stream_t *stream,
                                  ra_moe_weights_t **weights_p);
/** Accepts NULL. */
void ra_moe_weights_destroy(ra_moe_weights_t *weights);

typedef struct ra_moe_plan ra_moe_plan_t;

/**
 * @param tile_rows  Tokens in flight over all ranks together; 0 chooses. Buffers grow with it, and
 *                   on a GPU speed does: an expert's weights are read once a tile.
 * @param x_dtype    Of the activations: F32, or BF16 on CUDA.
 * @param comm       Borrowed; NULL or one rank: every expert runs here. On CUDA attached to the
 *                   stream that will run the layer.
 * @retval RA_ERR_SHAPE  impossible sizes; RA_ERR_UNSUPPORTED (dtype or device); RA_ERR_NOMEM.
 */
ra_status_t ra_moe_plan_create(const ra_moe_shape_t *shape, int64_t tile_rows, ra_dtype_t x_dtype,
                               ra_device_t *device, ra_comm_t *comm, ra_moe_plan_t **plan_p);
/** Accepts NULL. */
void ra_moe_plan_destroy(ra_moe_plan_t *plan);
/** Bytes of the plan's buffers. */
int64_t ra_moe_plan_bytes(const ra_moe_plan_t *plan);

typedef struct ra_moe_args {
    const ra_moe_weights_t *weights; /**< covers at least the experts that this rank runs */
    int64_t rows;                    /**< may be 0, and may differ between ranks */
    const void *x;                   /**< [rows, hidden] of the plan's x_dtype */
    int64_t x_stride;                /**< elements between rows */
    float *y;                        /**< [rows, hidden]; does not overlap x */
    int64_t y_stride;
    bool accumulate;           /**< y += result (a residual stream) instead of y = result */
    float *gap;                /**< optional [rows]: routing gap, see ra_router_select() */
    ra_router_replay_t replay; /**< optional: choices given and written down, [rows, top_k] */
} ra_moe_args_t;

/**
 * Run the layer; on a GPU queue it, all pointers being device memory (with a communicator the host
 * waits for counts once a round). Collective over the plan's communicator: every rank calls, with
 * or without rows. On an error y is unspecified and, with a communicator, the caller returns from
 * its rank (which aborts the others).
 * @retval RA_ERR_INVALID  the weights lack an expert this rank runs, or differ in shape.
 * @retval RA_ERR_PEER, RA_ERR_TIMEOUT  a rank is gone.
 */
ra_status_t ra_moe_forward(ra_moe_plan_t *plan, const ra_moe_args_t *args, ra_stream_t *stream);

#endif
