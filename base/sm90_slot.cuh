/**
 * @file  base/sm90_slot.cuh
 * @brief A ring of stages in shared memory between the warps that fill and those that use them: who
 *        waits for which phase of a stage's two barriers ("full", "empty").
 *
 * Fillers wait for ra_mbar_wait(empty, lap ^ 1), users for ra_mbar_wait(full, lap); both then go on
 * to the next slot. In the first lap fillers do not wait, for a fresh barrier has ended phase 1.
 */
#ifndef RA_BASE_SM90_SLOT_CUH
#define RA_BASE_SM90_SLOT_CUH

#include "base/sm90_ptx.cuh"

/** A position in a ring of N stages and the parity of its current lap. */
template <int N> struct ra_slot {
    int index = 0;
    uint32_t lap = 0;
    __device__ __forceinline__ void next()
    {
        if (++index == N) {
            index = 0;
            lap ^= 1;
        }
    }
};

/** The calling warp is done with a stage: one arrival on its "empty". */
static __device__ __forceinline__ void ra_slot_release(uint32_t empty)
{
    if ((threadIdx.x & 31) == 0)
        ra_mbar_arrive(empty);
}

#endif
