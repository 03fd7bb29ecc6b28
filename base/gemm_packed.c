/* The row-invariant row: packs a weight once; the arithmetic is in gemm_packed_cpu.c. */
#include "base/checked.h"
#include "base/gemm_kernels.h"
#include <stdlib.h>

#if defined(__x86_64__)
static const ra_gemm_packed_ops_t *const packed_ops[RA_CPU_ISA_COUNT] = {
    &ra_gemm_packed_ops_generic, &ra_gemm_packed_ops_avx2, &ra_gemm_packed_ops_avx512};
#else
static const ra_gemm_packed_ops_t *const packed_ops[RA_CPU_ISA_COUNT] = {
    &ra_gemm_packed_ops_generic};
#endif

static ra_status_t packed_prepare(ra_gemm_weight_t *weight)
{
    const ra_gemm_packed_ops_t *ops = packed_ops[weight->isa];
    int64_t padded = ra_ceil_div(weight->out, ops->panel) * ops->panel, bytes;
    if (!ra_mul_ok(padded, weight->in, &bytes) ||
        !ra_mul_ok(bytes, ra_dtype_bytes(weight->dtype), &bytes) || bytes > INT64_MAX - 64) {
        return ra_fail(RA_ERR_SHAPE, "gemm", "a weight of %lld x %lld is too large",
                       (long long)weight->out, (long long)weight->in);
    }
    weight->packed = aligned_alloc(64, (size_t)(bytes + 64) / 64 * 64);
    if (weight->packed == NULL) {
        return ra_fail(RA_ERR_NOMEM, "gemm", "cannot allocate %lld bytes for a packed weight",
                       (long long)bytes);
    }
    ops->pack(weight, weight->packed);
    return RA_OK;
}

static ra_status_t packed_run(const ra_gemm_piece_t *piece)
{
    return packed_ops[piece->job->weight->isa]->run(piece);
}

const ra_gemm_kernel_t ra_gemm_packed = {
    .name = "packed",
    .doc = "register-tiled, weights packed once, the same bits for any number of rows",
    .row_invariant = true,
    .row_block = 192,
    .out_block = 256,
    .prepare = packed_prepare,
    .run = packed_run,
};
