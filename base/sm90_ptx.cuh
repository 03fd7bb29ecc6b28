/**
 * @file  base/sm90_ptx.cuh
 * @brief Hopper (sm_90a) instructions that CUDA C++ has no name for: barriers, bulk tensor copies,
 *        warpgroup matrix products, register budgets. One function an instruction, nothing else.
 *
 * Shared-memory addresses are 32-bit (ra_smem_addr()). A tile is rows x 64 bf16 columns (128 bytes
 * a row) in the 128-byte swizzle at a 1024-byte aligned address; a wider operand is several such
 * boxes back to back. Element (r, c) lies at byte 128 r + ((2 c) ^ ((r & 7) << 4)).
 *
 * Source    NVIDIA PTX ISA 9.0, sections on mbarrier, cp.async.bulk.tensor, wgmma, setmaxnreg.
 */
#ifndef RA_BASE_SM90_PTX_CUH
#define RA_BASE_SM90_PTX_CUH

#include <cuda.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t ra_smem_addr(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* ---- mbarrier ------------------------------------------------------------------------------ */

static __device__ __forceinline__ void ra_mbar_init(uint32_t bar, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

/** Make initialised barriers visible to the copy engine. */
static __device__ __forceinline__ void ra_mbar_init_fence(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void ra_mbar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/** Arrive once and expect @a bytes of bulk copies before the phase may end. */
static __device__ __forceinline__ void ra_mbar_arrive_expect(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                 "r"(bytes)
                 : "memory");
}

/** Wait until the phase of @a parity has ended. A fresh barrier has ended phase 1. */
static __device__ __forceinline__ void ra_mbar_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again_%=:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again_%=;\n"
                 "}\n" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}

/* ---- named barriers ------------------------------------------------------------------------ */

static __device__ __forceinline__ void ra_bar_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void ra_bar_arrive(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- memory order -------------------------------------------------------------------------- */

/** Load with acquire at system scope: what was written before the value was is visible after. */
static __device__ __forceinline__ uint32_t ra_load_acquire_sys(const uint32_t *address)
{
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

/** Global memory seen by ordinary loads so far is also seen by later bulk copies. */
static __device__ __forceinline__ void ra_fence_proxy_async_global(void)
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* ---- bulk tensor copies -------------------------------------------------------------------- */

static __device__ __forceinline__ void ra_tma_prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Volatile, so that the policy is made where it is used and holds no registers in between. */
static __device__ __forceinline__ uint64_t ra_l2_evict_last(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

static __device__ __forceinline__ uint64_t ra_l2_evict_first(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

static __device__ __forceinline__ uint64_t ra_l2_evict_normal(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/** Load the box at (c0, c1, c2, c3) into @a shared; completion counts on @a bar. */
static __device__ __forceinline__ void ra_tma_load_4d(uint32_t shared, const CUtensorMap *map,
                                                      uint32_t bar, int c0, int c1, int c2, int c3,
                                                      uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
                 : "memory");
}

/** Store the box at (c0, c1) from @a shared, clipped to the map; see ra_bulk_commit(). */
static __device__ __forceinline__ void ra_tma_store_2d(const CUtensorMap *map, uint32_t shared,
                                                       int c0, int c1)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
            map),
        "r"(shared), "r"(c0), "r"(c1)
        : "memory");
}

static __device__ __forceinline__ void ra_bulk_commit(void)
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/** Wait until at most @a N of this thread's bulk groups still read shared memory. */
template <int N> static __device__ __forceinline__ void ra_bulk_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

/** Wait until at most @a N of this thread's bulk groups are incomplete. */
template <int N> static __device__ __forceinline__ void ra_bulk_wait(void)
{
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

/** Shared memory seen by ordinary accesses so far is also seen by later bulk copies and wgmma. */
static __device__ __forceinline__ void ra_fence_proxy_async_shared(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- copies by ordinary threads ------------------------------------------------------------- */

/** Copy @a bytes (0 or 16) to 16 bytes of @a shared, zeros behind them. */
static __device__ __forceinline__ void ra_cp_async_16(uint32_t shared, const void *global,
                                                      uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(global), "r"(bytes)
                 : "memory");
}

/** Arrive on @a bar, for which this arrival was counted, once this thread's copies are done. */
static __device__ __forceinline__ void ra_cp_async_arrive(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

/** Store four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix
 * l / 8, register j holds elements 2 (l & 3), + 1 of row l / 4 of matrix j. */
static __device__ __forceinline__ void ra_stmatrix_x4(uint32_t shared, uint32_t a0, uint32_t a1,
                                                      uint32_t a2, uint32_t a3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(a0), "r"(a1), "r"(a2), "r"(a3)
                 : "memory");
}

/* ---- registers ----------------------------------------------------------------------------- */

template <int N> static __device__ __forceinline__ void ra_regs_grow(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> static __device__ __forceinline__ void ra_regs_shrink(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- warpgroup matrix products ------------------------------------------------------------- */

static __device__ __forceinline__ void ra_wgmma_fence(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void ra_wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/** Wait until at most @a N committed groups are pending. */
template <int N> static __device__ __forceinline__ void ra_wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/** Keep the compiler from moving uses of @a regs across this point. */
template <int N> static __device__ __forceinline__ void ra_regs_pin(float (&regs)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(regs[i])::"memory");
}

/**
 * Low words of shared-memory matrix descriptors; the high word is the same for all: 128-byte
 * swizzle, 8-row groups 1024 bytes apart. Adding bytes / 16 moves a descriptor.
 * K-major: the reduction dimension is contiguous (Q and K of Q K^T). MN-major: the other one is (V
 * of P V), @a box_bytes between its 64-wide boxes.
 */
#define RA_DESC_HIGH 0x40000040u

static __device__ __forceinline__ uint32_t ra_desc_k_major(uint32_t shared)
{
    return (shared & 0x3FFFF) >> 4 | 1u << 16;
}

static __device__ __forceinline__ uint32_t ra_desc_mn_major(uint32_t shared, uint32_t box_bytes)
{
    return (shared & 0x3FFFF) >> 4 | (box_bytes >> 4) << 16;
}

/**
 * D [64, N] (+)= A [64, 16] B [16, N], bf16 operands, fp32 accumulators. ss: A from shared memory,
 * both K-major. rs: A from registers, B MN-major. Thread t of the warpgroup, w = t / 32, l = t % 32
 * holds register i of D at row 16 w + l / 4 + 8 ((i >> 1) & 1), column 8 (i >> 2) + 2 (l & 3) +
 * (i & 1); packed in pairs, the registers 8 k .. 8 k + 7 are the A operand of step k.
 */
template <int N> struct ra_wgmma;

#define RA_F4(d, i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RA_F16(d, i) RA_F4(d, i), RA_F4(d, i + 4), RA_F4(d, i + 8), RA_F4(d, i + 12)
#define RA_F32(d, i) RA_F16(d, i), RA_F16(d, i + 16)

#define RA_WGMMA_D64                                                                               \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                 \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

template <> struct ra_wgmma<64> {
    static __device__ __forceinline__ void ss(float (&d)[32], uint32_t a, uint32_t b, int add)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %34, 0;\n"
                     "mov.b64 a, {%32, %35};\n"
                     "mov.b64 b, {%33, %35};\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RA_WGMMA_D64
                     ", a, b, p, 1, 1, 0, 0;\n}\n"
                     : RA_F32(d, 0)
                     : "r"(a), "r"(b), "r"(add), "n"(RA_DESC_HIGH));
    }

    static __device__ __forceinline__ void rs(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint32_t b)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, 1, 0;\n"
                     "mov.b64 b, {%36, %37};\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RA_WGMMA_D64
                     ", {%32, %33, %34, %35}, b, p, 1, 1, 1;\n}\n"
                     : RA_F32(d, 0)
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "n"(RA_DESC_HIGH));
    }
};

#define RA_WGMMA_D128                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                 \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                  \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                  \
    "%62, %63}"

template <> struct ra_wgmma<128> {
    static __device__ __forceinline__ void ss(float (&d)[64], uint32_t a, uint32_t b, int add)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %66, 0;\n"
                     "mov.b64 a, {%64, %67};\n"
                     "mov.b64 b, {%65, %67};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " RA_WGMMA_D128
                     ", a, b, p, 1, 1, 0, 0;\n}\n"
                     : RA_F32(d, 0), RA_F32(d, 32)
                     : "r"(a), "r"(b), "r"(add), "n"(RA_DESC_HIGH));
    }

    static __device__ __forceinline__ void rs(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint32_t b)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, 1, 0;\n"
                     "mov.b64 b, {%68, %69};\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " RA_WGMMA_D128
                     ", {%64, %65, %66, %67}, b, p, 1, 1, 1;\n}\n"
                     : RA_F32(d, 0), RA_F32(d, 32)
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "n"(RA_DESC_HIGH));
    }
};

#define RA_WGMMA_D160                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                 \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                  \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                  \
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, "                  \
    "%77, %78, %79}"

template <> struct ra_wgmma<160> {
    static __device__ __forceinline__ void ss(float (&d)[80], uint32_t a, uint32_t b, int add)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %82, 0;\n"
                     "mov.b64 a, {%80, %83};\n"
                     "mov.b64 b, {%81, %83};\n"
                     "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 " RA_WGMMA_D160
                     ", a, b, p, 1, 1, 0, 0;\n}\n"
                     : RA_F32(d, 0), RA_F32(d, 32), RA_F16(d, 64)
                     : "r"(a), "r"(b), "r"(add), "n"(RA_DESC_HIGH));
    }
};

#define RA_WGMMA_D256                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                 \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                  \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                  \
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, "                  \
    "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "                  \
    "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "                 \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "                     \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

template <> struct ra_wgmma<256> {
    static __device__ __forceinline__ void ss(float (&d)[128], uint32_t a, uint32_t b, int add)
    {
        asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %130, 0;\n"
                     "mov.b64 a, {%128, %131};\n"
                     "mov.b64 b, {%129, %131};\n"
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " RA_WGMMA_D256
                     ", a, b, p, 1, 1, 0, 0;\n}\n"
                     : RA_F32(d, 0), RA_F32(d, 32), RA_F32(d, 64), RA_F32(d, 96)
                     : "r"(a), "r"(b), "r"(add), "n"(RA_DESC_HIGH));
    }
};

/* ---- arithmetic ---------------------------------------------------------------------------- */

static __device__ __forceinline__ float ra_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/** Two floats to a bf16 pair, @a lo in the low half, round to nearest even. */
static __device__ __forceinline__ uint32_t ra_pack_bf16(float lo, float hi)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

#endif
