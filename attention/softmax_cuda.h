/**
 * @file  attention/softmax_cuda.h
 * @brief Launch contract of the CUDA softmax kernels: ra_softmax_block_t's formula with the
 *        carried state in fp32 device memory, or with no state in memory at all.
 *
 * Two kernels take the same call. sm90: Hopper, bf16, head_dim 64 or 128, interval masks; the fast
 * one. cuda: any mask, F32 or BF16, head_dim to 256, any device; fp32 arithmetic.
 *
 * A sequence of calls over blocks of keys is
 *     first call   fresh = 1: the state is not read, (m, l, O) = (-inf, 0, 0)
 *     last call    out given: O / l goes to out, m + ln l to lse, the state is not written
 * so that one call over all keys touches no state. Rows outside every group are neither read nor
 * written; groups without spans are how a first or last call reaches rows that see no key.
 *
 * Keys still arriving (sm90 only): with @a ready given, keys [g gate_keys, (g + 1) gate_keys) are
 * read only once ready[g] has reached epoch (32-bit serial comparison), so one call can walk all
 * blocks of a ring in one launch while copies bring them. Whoever brings a block writes its gate
 * after it, in stream order (cuStreamWriteValue32 or a copy; not a kernel: this one may hold every
 * multiprocessor). Keys folded first should be the ones there first. A caller that gives up opens
 * every gate.
 *
 * Nothing is allocated, copied or waited for here. The tile list is made once per mask
 * (softmax_tiles.h, with the kernel's own sizes) and copied to the device by the caller; it
 * holds the kernel's counters, so one list serves one launch at a time.
 *
 * Numerics    State as in softmax_block.h; O is rounded once, when out is written. cuda: fp32
 * throughout. sm90: q k^T and p v on bf16 operands, fp32 sums, p rounded to bf16, exponentials with
 * relative error 2^-22; m is a running reference within RA_SOFTMAX_SLACK of the running maximum,
 * never above it.
 */
#ifndef RA_ATTENTION_SOFTMAX_CUDA_H
#define RA_ATTENTION_SOFTMAX_CUDA_H

#include "attention/softmax_tiles.h"

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/**
 * A row's reference m is raised only when a score passes it by more than this (natural units), so
 * that O is rescaled seldom; probabilities stay below e^8 and every sum far inside fp32.
 */
#define RA_SOFTMAX_SLACK 8.0f

typedef struct ra_softmax_cuda_call {
    const ra_softmax_block_t
        *block; /**< q, k, v, scores and biases on the device; the rest unused */
    const ra_softmax_tiles_layout_t *layout;
    void *tiles;                     /**< the tile list on the device */
    const ra_softmax_state_t *state; /**< may be NULL when fresh and out are both given */
    int fresh;                       /**< take the state as reset, without reading it */
    void *out;                       /**< optional [R, H, D], row r at out + r * out_stride */
    ra_dtype_t out_dtype;            /**< BF16 or F32 */
    int64_t out_stride;              /**< elements between rows */
    float *lse;                      /**< optional [H, R], written together with out */
    const uint32_t *ready;           /**< optional [ceil(keys / gate_keys)] in device memory */
    uint32_t epoch;
    int64_t gate_keys;
    int32_t spare; /**< sm90: multiprocessors left to other kernels, such as transfers */
} ra_softmax_cuda_call_t;

/**
 * Tile sizes of the sm90 kernel for @a head_dim on the current device.
 * @retval RA_ERR_UNSUPPORTED  not compute capability 9.0, or head_dim is neither 64 nor 128.
 */
ra_status_t ra_softmax_sm90_tile(int32_t head_dim, int32_t *tile_rows_p, int32_t *tile_keys_p);

/**
 * Queue one call on @a stream of the current device. Rows of q, k, v and out are 16-byte aligned.
 * @retval RA_ERR_UNSUPPORTED  masks, shapes or alignments the kernel lacks; the message names them.
 * @retval RA_ERR_SHAPE        heads, list and state do not fit together.
 * @retval RA_ERR_DEVICE       The launch failed.
 */
ra_status_t ra_softmax_sm90_launch(const ra_softmax_cuda_call_t *call, struct CUstream_st *stream);

/** Tile sizes of the complete kernel. */
void ra_softmax_cuda_tile(int32_t *tile_rows_p, int32_t *tile_keys_p);
/** The same as ra_softmax_sm90_launch() for the complete kernel; no alignment is asked for. */
ra_status_t ra_softmax_cuda_launch(const ra_softmax_cuda_call_t *call, struct CUstream_st *stream);

/** ra_softmax_reset() and ra_softmax_finish() of a state on the device. */
ra_status_t ra_softmax_cuda_reset(int64_t rows, int32_t heads, int32_t head_dim,
                                  const ra_softmax_state_t *state, struct CUstream_st *stream);
ra_status_t ra_softmax_cuda_finish(int64_t rows, int32_t heads, int32_t head_dim,
                                   const ra_softmax_state_t *state, float *lse,
                                   struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
