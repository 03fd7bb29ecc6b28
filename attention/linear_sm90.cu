/*
 * Roles of a CTA (persistent): one thread takes units (a head of a part) off a counter and drives
 * the copy engine; each further warpgroup keeps S^T [64 value columns, D] of the unit at hand in
 * registers, chunk after chunk of 64 tokens:
 *
 *     P    = scale W . (q k^T)        W_ij = e^{g (i - j)}, j <= i      -> bf16, shared memory
 *     O^T  = scale e^{g (i + 1)} S^T q^T  +  v^T P^T                    S^T, v^T from registers
 *     S^T  = e^{g n} S^T + v~^T k           v~_j = e^{g (n - 1 - j)} v_j
 *
 * Transposed, the state is an operand straight from its accumulators and never goes through shared
 * memory; warpgroups share q and k and wait for each other nowhere but at a short last chunk. A
 * chunk takes a multiprocessor about as long as memory takes to bring it
 * (benchmarks/PERFORMANCE.md).
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/linear_cuda.h"
#include "attention/linear_sm90_plan.cuh"
#include "attention/linear_sm90_thread.cuh"
#include "base/cuda_attribute.h"

using namespace ra_linear;

namespace
{

const char subsystem[] = "linear";

/* ---- producer ------------------------------------------------------------------------------ */

template <class C>
__device__ __forceinline__ void produce(const params_t &p, const CUtensorMap *q_map,
                                        const CUtensorMap *k_map, const CUtensorMap *v_map,
                                        unsigned char *base)
{
    control_t<C> *control = reinterpret_cast<control_t<C> *>(base + C::CONTROL);
    const uint32_t units = (uint32_t)p.part_count * (uint32_t)p.heads;
    ra_slot<C::STAGES> slot;
    uint32_t unit = blockIdx.x;
    while (unit < units) {
        const uint32_t next = gridDim.x + atomicAdd(p.next, 1u);
        uint32_t at = unit / (uint32_t)p.heads, head = unit - at * (uint32_t)p.heads;
        if (p.order) {
            const uint32_t rank = unit / (uint32_t)p.part_count;
            at = unit - rank * (uint32_t)p.part_count;
            head = (uint32_t)p.order[rank];
        }
        const part_t part = p.parts[at];
        const int begin = part.from_tail ? tail_begin(p.decay[head], part.rows) : 0;
#pragma unroll 1
        for (int done = begin; done < part.rows; done += CHUNK) {
            const int row = part.row + done, n = min(CHUNK, part.rows - done);
            const uint32_t full = ra_smem_addr(&control->full[slot.index]);
            const uint32_t stage = ra_smem_addr(base) + slot.index * C::STAGE;
            ra_mbar_wait(ra_smem_addr(&control->empty[slot.index]), slot.lap ^ 1);
            control->step[slot.index] = step_t{row, (int32_t)at, (int32_t)head,
                                               n | (done == begin ? STEP_FIRST : 0) |
                                                   (done + CHUNK >= part.rows ? STEP_LAST : 0)};
            ra_mbar_arrive_expect(full, C::STAGE);
            ra_tma_load_4d(stage + C::K, k_map, full, 0, row, (int)head, 0, ra_l2_evict_first());
            if (!C::STATE_ONLY)
                ra_tma_load_4d(stage + C::Q, q_map, full, 0, row, (int)head, 0,
                               ra_l2_evict_first());
            ra_tma_load_4d(stage + C::V, v_map, full, 0, row, (int)head, 0, ra_l2_evict_first());
            if (done + AHEAD < part.rows) {
                ra_tma_prefetch_4d(k_map, 0, row + AHEAD, (int)head, 0);
                if (!C::STATE_ONLY)
                    ra_tma_prefetch_4d(q_map, 0, row + AHEAD, (int)head, 0);
                ra_tma_prefetch_4d(v_map, 0, row + AHEAD, (int)head, 0);
            }
            slot.next();
        }
        unit = next;
    }
    ra_mbar_wait(ra_smem_addr(&control->empty[slot.index]), slot.lap ^ 1);
    control->step[slot.index] = step_t{0, 0, 0, CHUNK | STEP_END};
    ra_mbar_arrive(ra_smem_addr(&control->full[slot.index]));
}

/* ---- consumers ----------------------------------------------------------------------------- */

__device__ __forceinline__ step_t read_step(const step_t *shared)
{
    int4 value = {};
    if ((threadIdx.x & 31) == 0)
        value = *reinterpret_cast<const int4 *>(shared);
    return step_t{__shfl_sync(0xFFFFFFFF, value.x, 0), __shfl_sync(0xFFFFFFFF, value.y, 0),
                  __shfl_sync(0xFFFFFFFF, value.z, 0), __shfl_sync(0xFFFFFFFF, value.w, 0)};
}

/* Wait for a stage and make its tail zero. */
template <class C>
__device__ __forceinline__ step_t open_step(unsigned char *base, const ra_slot<C::STAGES> &slot)
{
    control_t<C> *control = reinterpret_cast<control_t<C> *>(base + C::CONTROL);
    ra_mbar_wait(ra_smem_addr(&control->full[slot.index]), slot.lap);
    const step_t step = read_step(&control->step[slot.index]);
    if ((step.n_flags & STEP_N) < CHUNK)
        clear_tail<C>(base + slot.index * C::STAGE, step.n_flags & STEP_N,
                      threadIdx.x & (128 * C::WG - 1));
    return step;
}

/* q k^T of the stage at @a stage. */
template <class C> __device__ __forceinline__ void issue_scores(float (&sc)[32], uint32_t stage)
{
    const uint32_t q = ra_desc_k_major(stage + C::Q), k = ra_desc_k_major(stage + C::K);
    ra_regs_pin(sc);
    ra_wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::D / 16; i++) {
        const int at = (i & 3) * 2 + (i >> 2) * (BOX / 16);
        ra_wgmma<64>::ss(sc, q + at, k + at, i > 0);
    }
    ra_wgmma_commit();
}

/* O^T = S^T q^T. */
template <class C>
__device__ __forceinline__ void issue_far(float (&o)[32], const uint32_t (&state)[C::D / 4],
                                          uint32_t q)
{
    ra_regs_pin(o);
    ra_wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::D / 16; i++)
        ra_wgmma64_rs_k(o, state[4 * i], state[4 * i + 1], state[4 * i + 2], state[4 * i + 3],
                        q + (i & 3) * 2 + (i >> 2) * (BOX / 16), i > 0);
    ra_wgmma_commit();
}

/* S^T += v~^T k. */
template <class C>
__device__ __forceinline__ void issue_state(float (&s)[C::D / 2], const uint32_t (&decayed)[4][4],
                                            uint32_t k)
{
    const uint32_t rows = ra_desc_mn_major(k, BOX);
#pragma unroll
    for (int i = 0; i < 4; i++)
        ra_wgmma<C::D>::rs(s, decayed[i][0], decayed[i][1], decayed[i][2], decayed[i][3],
                           rows + i * (2048 / 16));
    ra_wgmma_commit();
}

template <class C>
__device__ __forceinline__ void enter_part(const params_t &p, const step_t &step, int value,
                                           const thread_t &t, float (&s)[C::D / 2])
{
    const float *in = p.parts[step.part].in;
    load_state(in ? in + (int64_t)step.head * (C::D * C::D) : nullptr, value, t, s);
}

template <class C>
__device__ __forceinline__ void leave_part(const params_t &p, const step_t &step, int value,
                                           const thread_t &t, const float (&s)[C::D / 2])
{
    float *out = p.parts[step.part].out;
    if (out)
        store_state(out + (int64_t)step.head * (C::D * C::D), value, t, s);
}

/*
 * Products are queued so that the matrix units have one while this warpgroup does something else:
 * the next chunk's scores run while O^T is scaled, the state's update while outputs are written and
 * the next scores become weights.
 */
template <class C>
__device__ __forceinline__ void consume(const params_t &p, unsigned char *base, int wg)
{
    constexpr int D = C::D;
    control_t<C> *control = reinterpret_cast<control_t<C> *>(base + C::CONTROL);
    const thread_t t;
    const int value = 64 * wg + t.row, barrier = 2 + wg;
    unsigned char *weighed = base + C::SCORES + wg * BOX, *output = base + C::OUTPUT + wg * BOX;
    ra_slot<C::STAGES> slot;
    weights_t weights;
    value_weights_t value_weights;
    float s[D / 2], sc[32], o[32];
    step_t step = open_step<C>(base, slot);
    if (step.n_flags & STEP_END)
        return;
    weights.set(p.decay[step.head], p.scale, t);
    issue_scores<C>(sc, ra_smem_addr(base) + slot.index * C::STAGE);
    ra_wgmma_wait<0>();
    ra_regs_pin(sc);
    store_scores(sc, weights, t, ra_smem_addr(weighed));
    while (!(step.n_flags & STEP_END)) {
        if (step.n_flags & STEP_FIRST) {
            enter_part<C>(p, step, value, t, s);
            value_weights.set(p.decay[step.head], t);
        }
        const uint32_t stage = ra_smem_addr(base) + slot.index * C::STAGE;
        uint64_t *const empty = &control->empty[slot.index];
        uint32_t state[D / 4], vt[4][4], decayed[4][4];
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            state[i] = ra_pack_bf16(s[2 * i], s[2 * i + 1]);
        issue_far<C>(o, state, ra_desc_k_major(stage + C::Q));
        load_values(vt, stage + C::V + wg * BOX, t);
        const float decay = value_weights.apply(vt, step.n_flags & STEP_N, t, decayed);
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            s[i] *= decay;
        slot.next();
        const step_t after = open_step<C>(base, slot);
        ra_fence_proxy_async_shared(); /* the weights of this chunk */
        ra_bar_sync(barrier, 128);
        issue_scores<C>(sc, ra_smem_addr(base) + slot.index * C::STAGE);
        ra_wgmma_wait<1>();
        ra_regs_pin(o);
        float far[2] = {weights.output[0], weights.output[1]};
#pragma unroll
        for (int i = 0; i < 32; i++) {
            o[i] *= far[i & 1];
            if ((i & 3) >= 2)
                far[i & 1] *= weights.eight;
        }
        const uint32_t weights_desc = ra_desc_k_major(ra_smem_addr(weighed));
        ra_regs_pin(o);
        ra_regs_pin(s);
        ra_wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
            ra_wgmma64_rs_k(o, vt[i][0], vt[i][1], vt[i][2], vt[i][3], weights_desc + 2 * i, 1);
        ra_wgmma_commit();
        issue_state<C>(s, decayed, stage + C::K);
        ra_wgmma_wait<1>();
        ra_regs_pin(o);
        ra_regs_pin(sc);
        store_output(p, step, o, t, output,
                     static_cast<__nv_bfloat16 *>(p.o) + step.head * D + 64 * wg, barrier);
        if (after.n_flags & STEP_FIRST)
            weights.set(p.decay[after.head], p.scale, t);
        store_scores(sc, weights, t, ra_smem_addr(weighed));
        ra_wgmma_wait<0>();
        ra_regs_pin(s);
        ra_slot_release(ra_smem_addr(empty));
        if (step.n_flags & STEP_LAST)
            leave_part<C>(p, step, value, t, s);
        step = after;
    }
}

/* The same for the state alone. */
template <class C>
__device__ __forceinline__ void summarise(const params_t &p, unsigned char *base, int wg)
{
    control_t<C> *control = reinterpret_cast<control_t<C> *>(base + C::CONTROL);
    const thread_t t;
    const int value = 64 * wg + t.row;
    ra_slot<C::STAGES> slot;
    value_weights_t value_weights;
    float s[C::D / 2];
    for (;;) {
        const step_t step = open_step<C>(base, slot);
        if (step.n_flags & STEP_END)
            break;
        if (step.n_flags & STEP_FIRST) {
            enter_part<C>(p, step, value, t, s);
            value_weights.set(p.decay[step.head], t);
        }
        const uint32_t stage = ra_smem_addr(base) + slot.index * C::STAGE;
        uint32_t vt[4][4], decayed[4][4];
        load_values(vt, stage + C::V + wg * BOX, t);
        const float decay = value_weights.apply(vt, step.n_flags & STEP_N, t, decayed);
#pragma unroll
        for (int i = 0; i < C::D / 2; i++)
            s[i] *= decay;
        ra_regs_pin(s);
        ra_wgmma_fence();
        issue_state<C>(s, decayed, stage + C::K);
        ra_wgmma_wait<0>();
        ra_regs_pin(s);
        ra_slot_release(ra_smem_addr(&control->empty[slot.index]));
        slot.next();
        if (step.n_flags & STEP_LAST)
            leave_part<C>(p, step, value, t, s);
    }
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS)
    linear_kernel(const __grid_constant__ params_t p, const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map)
{
    extern __shared__ __align__(1024) unsigned char base[];
    const int warpgroup = __shfl_sync(0xFFFFFFFF, (int)threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
        control_t<C> *control = reinterpret_cast<control_t<C> *>(base + C::CONTROL);
        for (int i = 0; i < C::STAGES; i++) {
            ra_mbar_init(ra_smem_addr(&control->full[i]), 1);
            ra_mbar_init(ra_smem_addr(&control->empty[i]), 4 * C::WG);
        }
        ra_mbar_init_fence();
    }
    __syncthreads();
    if (warpgroup == C::WG) {
        ra_regs_shrink<C::PRODUCER_REGS>();
        if (threadIdx.x == 128 * C::WG)
            produce<C>(p, &q_map, &k_map, &v_map, base);
    } else {
        ra_regs_grow<C::CONSUMER_REGS>();
        if constexpr (C::STATE_ONLY)
            summarise<C>(p, base, warpgroup);
        else
            consume<C>(p, base, warpgroup);
    }
}

/* Step 2: a thread walks one element of one head through the parts of a segment. */
__global__ void __launch_bounds__(256)
    fold_kernel(const fold_t *folds, const float *decay, int heads, int state_size)
{
    const fold_t fold = folds[blockIdx.y];
    const int64_t stride = (int64_t)heads * state_size;
    const int64_t at = blockIdx.x * 256ll + threadIdx.x;
    if (at >= stride)
        return;
    const double g = decay[at / state_size];
    const float over_part = (float)exp(g * fold.part_rows);
    const float over_last = (float)exp(g * fold.last_rows);
    float state = fold.in ? fold.in[at] : 0.0f;
    float *slot = fold.slots + at;
#pragma unroll 8
    for (int p = 0; p < fold.parts - 1; p++) {
        const float added = slot[p * stride];
        slot[p * stride] = state;
        state = over_part * state + added;
    }
    if (fold.parts > 0) {
        slot += (fold.parts - 1) * stride;
        const float added = fold.out ? *slot : 0.0f;
        *slot = state;
        state = over_last * state + added;
    }
    if (fold.out)
        fold.out[at] = state;
}

/* ---- host side ----------------------------------------------------------------------------- */

struct kernel_t {
    int32_t threads, shared, ctas;
    void (*run)(params_t, CUtensorMap, CUtensorMap, CUtensorMap);
};

template <class C> constexpr kernel_t kernel_of()
{
    return {C::THREADS, shared_bytes<C>(), C::CTAS, linear_kernel<C>};
}

/* [head_dim 128][state only] */
const kernel_t kernels[2][2] = {
    {kernel_of<config_t<64, false, 4>>(), kernel_of<config_t<64, true, 6>>()},
    {kernel_of<config_t<128, false, 4>>(), kernel_of<config_t<128, true, 6>>()},
};

cudaError_t launch(const kernel_t &kernel, const params_t &p, const maps_t &maps, int processors,
                   cudaStream_t stream)
{
    const int64_t units = (int64_t)p.part_count * p.heads;
    if (units == 0)
        return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(
        kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared);
    if (error != cudaSuccess)
        return error;
    const int64_t most = (int64_t)processors * kernel.ctas;
    kernel.run<<<(unsigned)(units < most ? units : most), kernel.threads, kernel.shared, stream>>>(
        p, maps.q, maps.k, maps.v);
    return cudaGetLastError();
}

ra_status_t check_args(const ra_linear_args_t *args, bool state_only)
{
    auto misaligned = [](const void *pointer, int64_t stride) {
        return ((uintptr_t)pointer | (uintptr_t)(stride * 2)) % 16 != 0;
    };
    if (!ra_linear_sm90_fits(args))
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "the sm90 kernel needs compute capability 9.0, bf16, one decay a head and "
                       "Dk = Dv = 64 or 128, not %d and %d",
                       args->key_dim, args->value_dim);
    if (misaligned(args->k, args->k_stride) || misaligned(args->v, args->v_stride) ||
        (!state_only &&
         (misaligned(args->q, args->q_stride) || misaligned(args->o, args->o_stride))))
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "q, k, v and o rows need 16-byte alignment");
    for (int64_t i = 0; i < args->segment_count; i++)
        if (args->segments[i].row_begin + args->segments[i].row_count > INT32_MAX - CHUNK)
            return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "more than 2^31 rows");
    return RA_OK;
}

cudaError_t fold(const plan_t &plan, const tables_t &tables, const ra_linear_args_t *args,
                 cudaStream_t stream)
{
    const int state_size = args->key_dim * args->value_dim;
    const unsigned blocks = (unsigned)(((int64_t)args->heads * state_size + 255) / 256);
    const int64_t count = (int64_t)plan.folds.size();
    for (int64_t at = 0; at < count; at += 65535) {
        const unsigned some = (unsigned)(count - at < 65535 ? count - at : 65535);
        fold_kernel<<<dim3(blocks, some), 256, 0, stream>>>(tables.folds + at, tables.decay,
                                                            args->heads, state_size);
    }
    return cudaGetLastError();
}

} // namespace

bool ra_linear_sm90_fits(const ra_linear_args_t *shape)
{
    return shape->dtype == RA_BF16 && shape->log_decay_stride == 0 &&
           shape->key_dim == shape->value_dim && (shape->key_dim == 64 || shape->key_dim == 128) &&
           ra_cuda_is_sm90();
}

int64_t ra_linear_sm90_scratch(const ra_linear_args_t *args)
{
    return plan_t::slot_bytes(args, false, 0);
}

ra_status_t ra_linear_sm90_launch(const ra_linear_args_t *args, bool state_only, int64_t part_rows,
                                  struct CUstream_st *stream)
{
    RA_TRY(check_args(args, state_only));
    plan_t plan;
    tables_t tables = {};
    scratch_t slots(stream), scratch(stream);
    cudaError_t error = plan.make(args, state_only, part_rows, &slots);
    if (error == cudaSuccess && plan.parts.empty() && plan.summaries.empty() && plan.folds.empty())
        return RA_OK;
    maps_t maps;
    RA_TRY(make_maps(args, state_only, plan.rows_end, &maps));
    const int processors = ra_cuda_attribute(cudaDevAttrMultiProcessorCount);
    if (error == cudaSuccess)
        error = plan.place(args, &scratch, &tables);
    const kernel_t(&pair)[2] = kernels[args->key_dim == 128];
    params_t p = {};
    p.decay = tables.decay;
    p.o = args->o;
    p.o_stride = args->o_stride;
    p.heads = args->heads;
    p.scale = args->scale;
    if (error == cudaSuccess) {
        p.parts = tables.summaries;
        p.part_count = (int32_t)plan.summaries.size();
        p.order = tables.order;
        p.next = tables.next;
        error = launch(pair[1], p, maps, processors, stream);
    }
    if (error == cudaSuccess && !plan.folds.empty())
        error = fold(plan, tables, args, stream);
    if (error == cudaSuccess) {
        p.parts = tables.parts;
        p.part_count = (int32_t)plan.parts.size();
        p.order = nullptr;
        p.next = tables.next + 1;
        error = launch(pair[0], p, maps, processors, stream);
    }
    if (error != cudaSuccess)
        return ra_fail(error == cudaErrorMemoryAllocation ? RA_ERR_NOMEM : RA_ERR_DEVICE, subsystem,
                       "linear attention of %d heads, %zu parts: %s", args->heads,
                       plan.parts.size() + plan.summaries.size(), cudaGetErrorString(error));
    return RA_OK;
}
