/**
 * @file  attention/linear_cuda.h
 * @brief Launch contract of the CUDA linear attention kernels: ra_linear_args_t's formula on device
 *        memory, queued on a stream.
 *
 * Two kernels take the same call. sm90: Hopper, bf16, Dk = Dv = 64 or 128, one decay a head; the
 * fast one. cuda: F32 or BF16, Dk and Dv to 256, any decay, any device; fp32 arithmetic.
 *
 * Memory    q, k, v, o, states and per-token log-decays (fp32) lie on the device; segments and a
 * constant log_decay [H] on the host, read before the call returns. o may lie exactly on v. Tables,
 * and working memory where scratch has no room, are allocated in stream order; nothing waits for
 * the device.
 *
 * Parts (sm90)   A segment longer than a part is cut into parts by its own length and the head
 * count alone, and each part is a unit of work: (1) what each part adds to the state, all at once;
 * (2) the states between parts, S <- e^{G} S + B; (3) the outputs of all parts at once. Step 1 of
 * a head reads only the tail of a part where e^{g n} >= 2^-48; older tokens weigh less than that.
 *
 * Numerics    cuda: fp32 throughout. sm90: products of bf16 operands summed in fp32; the state is
 * carried and stored in fp32; rounded to bf16 are the scores with their decay, v with its decay to
 * the chunk's end, and the state where q meets it (chunks of 64). Relative L2 error of o about
 * 3e-3, o's own rounding included. Decays are e^{x}, x <= 0, with relative error 2^-22.
 * Bits    of a segment depend on its tokens, its incoming state and H. The state of summarise is
 * the state of forward, bit for bit.
 */
#ifndef RA_ATTENTION_LINEAR_CUDA_H
#define RA_ATTENTION_LINEAR_CUDA_H

#include "attention/linear_chunk.h"
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/** Whether the kernel takes heads, dims, dtype and kind of decay, on the current device. */
bool ra_linear_sm90_fits(const ra_linear_args_t *shape);
bool ra_linear_cuda_fits(const ra_linear_args_t *shape);

/**
 * Queue one call on @a stream of the current device.
 * @param state_only  Only state_out of each segment; q and o are not touched.
 * @param part_rows   Rows of a part, a multiple of 64, for measurements; 0: chosen.
 * @retval RA_ERR_UNSUPPORTED  a shape that does not fit, q, k, v or o rows not 16-byte aligned, or
 *                             more than 2^31 rows.
 * @retval RA_ERR_NOMEM        Working memory cannot be allocated.
 * @retval RA_ERR_DEVICE       A launch failed.
 */
ra_status_t ra_linear_sm90_launch(const ra_linear_args_t *args, bool state_only, int64_t part_rows,
                                  struct CUstream_st *stream);
/** Bytes of the states between parts: ra_linear_scratch_bytes() of parts that are chosen. */
int64_t ra_linear_sm90_scratch(const ra_linear_args_t *args);
/** The same for the complete kernel; no alignment is asked for. */
ra_status_t ra_linear_cuda_launch(const ra_linear_args_t *args, bool state_only,
                                  struct CUstream_st *stream);
/** ra_linear_carry() with all three arrays on the device. */
ra_status_t ra_linear_cuda_carry(int32_t heads, int64_t state_per_head,
                                 const float *total_log_decay, const float *before, float *after,
                                 struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
