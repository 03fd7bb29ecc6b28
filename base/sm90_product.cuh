/**
 * @file  base/sm90_product.cuh
 * @brief Users' side of a ring of stages that hold k-slices of two operands: 64 x 256 products.
 *
 * A stage is A [rows, 64] and B [256, 64], bf16, K-major tiles of base/sm90_ptx.cuh; A_BYTES and
 * B_BYTES lie between stages. A warpgroup multiplies 64 rows of A; each of its warps arrives once
 * on a stage's "empty".
 */
#ifndef RA_BASE_SM90_PRODUCT_CUH
#define RA_BASE_SM90_PRODUCT_CUH

#include "base/sm90_slot.cuh"

/**
 * D [64, 256] = sum of A B^T over @a steps stages from @a slot on, one product in flight while the
 * stage before is given back.
 * @tparam COPIED  Threads fill A with ordinary copies, which products do not see without a fence.
 * @param full, empty  Barriers of stage 0, those of a stage 8 bytes after the one before.
 * @param a0, b0       Descriptors of this warpgroup's rows and of B in stage 0.
 */
template <int A_BYTES, int B_BYTES, bool COPIED, int STAGES>
static __device__ __forceinline__ void ra_multiply_stages(float (&d)[128], int steps, uint32_t full,
                                                          uint32_t empty, uint32_t a0, uint32_t b0,
                                                          ra_slot<STAGES> &slot)
{
    uint32_t last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        ra_mbar_wait(full + 8 * slot.index, slot.lap);
        if (COPIED)
            ra_fence_proxy_async_shared();
        ra_regs_pin(d);
        ra_wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
            ra_wgmma<256>::ss(d, a0 + slot.index * (A_BYTES / 16) + 2 * i,
                              b0 + slot.index * (B_BYTES / 16) + 2 * i, step > 0 || i > 0);
        ra_wgmma_commit();
        if (step > 0) {
            ra_wgmma_wait<1>();
            ra_slot_release(last);
        }
        ra_regs_pin(d);
        last = empty + 8 * slot.index;
        slot.next();
    }
    ra_wgmma_wait<0>();
    ra_regs_pin(d);
    ra_slot_release(last);
}

/** Give @a steps stages back unread: rows of a tile that do not exist. By reference, so that a
 * kernel parameter is read where it is compared. */
template <int STAGES>
static __device__ __forceinline__ void ra_skip_stages(const int &steps, uint32_t full,
                                                      uint32_t empty, ra_slot<STAGES> &slot)
{
    for (int step = 0; step < steps; step++) {
        ra_mbar_wait(full + 8 * slot.index, slot.lap);
        ra_slot_release(empty + 8 * slot.index);
        slot.next();
    }
}

#endif
