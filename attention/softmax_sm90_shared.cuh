/**
 * @file  attention/softmax_sm90_shared.cuh
 * @brief What producer and consumers of the Hopper softmax kernel share: parameters, tile sizes,
 *        the layout of shared memory, its barriers. Internal to softmax_sm90.cu.
 */
#ifndef RA_ATTENTION_SOFTMAX_SM90_SHARED_CUH
#define RA_ATTENTION_SOFTMAX_SM90_SHARED_CUH

#include "attention/softmax_cuda.h"
#include "base/sm90_slot.cuh"
#include <cuda_runtime.h>

namespace ra_sm90
{

struct params_t {
    ra_softmax_tiles_head_t *head;
    const ra_softmax_tile_t *tiles;
    const ra_softmax_segment_t *segments;
    const int2 *row_interval;
    const int32_t *key_pos;
    float *m, *l, *o;
    void *out;
    float *lse;
    int64_t rows, o_stride, out_stride;
    float scale;
    int32_t tile_count, heads, group, section, head_dim; /* heads per kv head; per L2 section */
    int32_t fresh, out_is_f32;
    const uint32_t *ready;
    uint32_t epoch;
    int32_t gate_keys;
};

/* One key tile as consumers see it: columns [first, end) hold keys of the span. */
struct step_t {
    int32_t key_begin, first, end, flags, pos_shift;
};

/* One unit of work; steps < 0 ends the kernel. */
struct job_t {
    int32_t row_begin, row_count, head, steps;
};

/* head_dim, keys of a tile, warpgroups of 64 rows, stages of K and V and of Q. */
template <int D_, int BN_, int WG_, int STAGES_, int QSTAGES_> struct config_t {
    static constexpr int D = D_, BN = BN_, WG = WG_, BM = 64 * WG_, STAGES = STAGES_,
                         QSTAGES = QSTAGES_;
    static constexpr int THREADS = 128 * (WG + 1);
    static constexpr int PRODUCER_REGS = WG == 2 ? 24 : 32, CONSUMER_REGS = WG == 2 ? 240 : 160;
    static constexpr int Q_BYTES = 64 * D * 2, KV_BYTES = BN * D * 2, BOX = BN * 128;
};

template <class C> struct __align__(16) control_t
{
    uint64_t q_full[C::QSTAGES][C::WG], q_empty[C::QSTAGES][C::WG];
    uint64_t k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
    uint64_t job_full[2], job_empty[2];
    step_t step[C::STAGES];
    job_t job[2];
};

template <class C> constexpr int shared_bytes()
{
    return C::WG * C::QSTAGES * C::Q_BYTES + 2 * C::STAGES * C::KV_BYTES +
           (int)sizeof(control_t<C>);
}

template <class C> struct shared_t {
    unsigned char *q, *k, *v;
    control_t<C> *control;
    __device__ __forceinline__ explicit shared_t(unsigned char *base)
    {
        q = base;
        k = q + C::WG * C::QSTAGES * C::Q_BYTES;
        v = k + C::STAGES * C::KV_BYTES;
        control = reinterpret_cast<control_t<C> *>(v + C::STAGES * C::KV_BYTES);
    }
};

template <class C> __device__ __forceinline__ void init_barriers(control_t<C> *control)
{
    constexpr int warps = 4 * C::WG;
    for (int s = 0; s < C::QSTAGES; s++)
        for (int w = 0; w < C::WG; w++) {
            ra_mbar_init(ra_smem_addr(&control->q_full[s][w]), 1);
            ra_mbar_init(ra_smem_addr(&control->q_empty[s][w]), 4);
        }
    for (int s = 0; s < C::STAGES; s++) {
        ra_mbar_init(ra_smem_addr(&control->k_full[s]), 1);
        ra_mbar_init(ra_smem_addr(&control->v_full[s]), 1);
        ra_mbar_init(ra_smem_addr(&control->k_empty[s]), warps);
        ra_mbar_init(ra_smem_addr(&control->v_empty[s]), warps);
    }
    for (int s = 0; s < 2; s++) {
        ra_mbar_init(ra_smem_addr(&control->job_full[s]), 1);
        ra_mbar_init(ra_smem_addr(&control->job_empty[s]), warps);
    }
    ra_mbar_init_fence();
}

} // namespace ra_sm90

#endif
