/**
 * @file  attention/linear_sm90_ptx.cuh
 * @brief Instructions only the Hopper linear attention kernel needs; see base/sm90_ptx.cuh.
 */
#ifndef RA_ATTENTION_LINEAR_SM90_PTX_CUH
#define RA_ATTENTION_LINEAR_SM90_PTX_CUH

#include "base/sm90_ptx.cuh"

/** D [64, 64] (+)= A [64, 16] B [16, 64], A from registers, B K-major in shared memory. */
static __device__ __forceinline__ void ra_wgmma64_rs_k(float (&d)[32], uint32_t a0, uint32_t a1,
                                                       uint32_t a2, uint32_t a3, uint32_t b,
                                                       int add)
{
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %37, 0;\n"
                 "mov.b64 b, {%36, %38};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RA_WGMMA_D64
                 ", {%32, %33, %34, %35}, b, p, 1, 1, 0;\n}\n"
                 : RA_F32(d, 0)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "r"(add), "n"(RA_DESC_HIGH));
}

/** Load four 8 x 8 matrices transposed; lane l gives the address of row l % 8 of matrix l / 8,
 * register j holds elements of rows 2 (l & 3), + 1 and column l / 4 of matrix j. */
static __device__ __forceinline__ void ra_ldmatrix_x4_trans(uint32_t (&a)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared)
                 : "memory");
}

/** ra_stmatrix_x4() of the transposed matrices: register j goes to rows 2 (l & 3), + 1 and column
 * l / 4 of matrix j. */
static __device__ __forceinline__ void ra_stmatrix_x4_trans(uint32_t shared, uint32_t a0,
                                                            uint32_t a1, uint32_t a2, uint32_t a3)
{
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
        "r"(a0), "r"(a1), "r"(a2), "r"(a3)
        : "memory");
}

/** Fetch the box at (c0, c1, c2, c3) into the L2 cache. */
static __device__ __forceinline__ void ra_tma_prefetch_4d(const CUtensorMap *map, int c0, int c1,
                                                          int c2, int c3)
{
    asm volatile(
        "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
        "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

#endif
