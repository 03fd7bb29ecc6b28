/*
 * Roles of a CTA (one a multiprocessor, persistent): warpgroup 0 holds one thread that takes row
 * tiles off a counter and drives the copy engine; each further warpgroup owns 64 rows. Step j of a
 * consumer overlaps the exponentials of key tile j with P V of key tile j - 1, and the warpgroups
 * take turns to issue their products, so that one's exponentials also run under the other's
 * products (Shah et al., FlashAttention-3, arXiv 2407.08608).
 *
 * The producer describes every key tile beside the barrier of its stage (step_t), so consumers need
 * to know nothing about masks but "is this tile to be tested".
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/softmax_sm90_rows.cuh"
#include "base/cuda_attribute.h"
#include "base/tensor_map.cuh"
#include <climits>
#include <cuda_runtime.h>

using namespace ra_sm90;

namespace
{

const char subsystem[] = "attention";

/*
 * Unit u of the launch: heads are cut into sections whose keys and values fit the L2 together;
 * inside a section row tiles fall in length and the heads of one tile are neighbours.
 */
__device__ __forceinline__ job_t job_of(const params_t &p, uint32_t unit, int *segment)
{
    uint32_t per_section = (uint32_t)p.section * (uint32_t)p.tile_count;
    uint32_t section = unit / per_section, rest = unit - section * per_section;
    uint32_t first = section * (uint32_t)p.section;
    uint32_t width = min((uint32_t)p.section, (uint32_t)p.heads - first);
    uint32_t tile = rest / width;
    int4 t = __ldg(reinterpret_cast<const int4 *>(p.tiles + tile));
    *segment = t.z;
    return job_t{t.x, t.y, (int32_t)(first + rest - tile * width), t.w};
}

/* What the producer knows of the gates. */
struct gates_t {
    uint32_t open; /* bit g: gate g was found open */
    int from;      /* keys of the segment from here on need no more waiting */
};

/* Wait for the gates of keys [begin, end). */
__device__ __noinline__ gates_t wait_gates(const uint32_t *ready, uint32_t epoch, int gate_keys,
                                           int begin, int end, uint32_t open)
{
    const int lowest = begin / gate_keys;
    for (int gate = lowest; gate <= (end - 1) / gate_keys; gate++) {
        if (gate < 32 && open >> gate & 1)
            continue;
        while ((int32_t)(ra_load_acquire_sys(ready + gate) - epoch) < 0)
            __nanosleep(200);
        ra_fence_proxy_async_global();
        if (gate < 32)
            open |= 1u << gate;
    }
    return gates_t{open, lowest * gate_keys};
}

template <class C>
__device__ __forceinline__ void produce(const params_t &p, const CUtensorMap *q_map,
                                        const CUtensorMap *k_map, const CUtensorMap *v_map,
                                        const shared_t<C> &shared)
{
    control_t<C> *control = shared.control;
    const uint32_t units = (uint32_t)p.tile_count * (uint32_t)p.heads;
    ra_slot<C::STAGES> k_slot, v_slot;
    ra_slot<C::QSTAGES> q_slot;
    ra_slot<2> job_slot;
    uint32_t unit = blockIdx.x;
    gates_t gates = {0, 0};
    auto load = [&](const CUtensorMap *map, unsigned char *tile, uint64_t *full_bar, int key,
                    int kv_head) {
        const uint32_t full = ra_smem_addr(full_bar);
        ra_mbar_arrive_expect(full, C::KV_BYTES);
        ra_tma_load_4d(ra_smem_addr(tile), map, full, 0, key, kv_head, 0, ra_l2_evict_last());
    };
    auto load_v = [&](int key, int kv_head) {
        ra_mbar_wait(ra_smem_addr(&control->v_empty[v_slot.index]), v_slot.lap ^ 1);
        load(v_map, shared.v + v_slot.index * C::KV_BYTES, &control->v_full[v_slot.index], key,
             kv_head);
        v_slot.next();
    };
    for (;;) {
        job_t job = {0, 0, 0, -1};
        int segment = 0;
        uint32_t next = 0;
        if (unit < units) {
            job = job_of(p, unit, &segment);
            next = gridDim.x + atomicAdd(&p.head->next, 1u);
        }
        ra_mbar_wait(ra_smem_addr(&control->job_empty[job_slot.index]), job_slot.lap ^ 1);
        control->job[job_slot.index] = job;
        ra_mbar_arrive(ra_smem_addr(&control->job_full[job_slot.index]));
        job_slot.next();
        if (job.steps < 0)
            break;
        const int kv_head = job.head / p.group;
        int done = 0, v_key = 0;
#pragma unroll 1
        for (; done < job.steps; segment++) {
            const int4 s = __ldg(reinterpret_cast<const int4 *>(p.segments + segment));
            const int key_first = __ldg(&p.segments[segment].key_first);
            const int shift = __ldg(&p.segments[segment].pos_shift);
            /* One comparison a tile: what holds this thread up holds up the products. */
            gates.from = p.ready ? INT_MAX : INT_MIN;
#pragma unroll 1
            for (int t = 0; t < s.z; t++, done++) {
                const int key = s.x - t * C::BN;
                if (key < gates.from)
                    gates = wait_gates(p.ready, p.epoch, p.gate_keys, max(key, 0),
                                       min(key + C::BN, s.y), gates.open);
                int flags = s.w & RA_TILE_MASK;
                if (t == s.z - 1)
                    flags |= s.w & RA_TILE_SPAN_END;
                ra_mbar_wait(ra_smem_addr(&control->k_empty[k_slot.index]), k_slot.lap ^ 1);
                control->step[k_slot.index] =
                    step_t{key, max(0, key_first - key), min(C::BN, s.y - key), flags, shift};
                load(k_map, shared.k + k_slot.index * C::KV_BYTES, &control->k_full[k_slot.index],
                     key, kv_head);
                k_slot.next();
                if (done == 0) {
#pragma unroll 1
                    for (int w = 0; w < C::WG; w++) {
                        uint32_t q_full = ra_smem_addr(&control->q_full[q_slot.index][w]);
                        ra_mbar_wait(ra_smem_addr(&control->q_empty[q_slot.index][w]),
                                     q_slot.lap ^ 1);
                        ra_mbar_arrive_expect(q_full, C::Q_BYTES);
                        ra_tma_load_4d(
                            ra_smem_addr(shared.q + (q_slot.index * C::WG + w) * C::Q_BYTES), q_map,
                            q_full, 0, job.row_begin + 64 * w, job.head, 0, ra_l2_evict_first());
                    }
                    q_slot.next();
                } else {
                    load_v(v_key, kv_head);
                }
                v_key = key;
            }
        }
        if (job.steps > 0)
            load_v(v_key, kv_head);
        unit = next;
    }
    /* Every CTA ends once; the last one clears the counters for the next launch. */
    __threadfence();
    if (atomicAdd(&p.head->done, 1u) == gridDim.x - 1) {
        p.head->next = 0;
        p.head->done = 0;
    }
}

/* The warp's products are done with what @a bar guards (all lanes waited for them together). */
__device__ __forceinline__ void release(uint64_t *bar)
{
    ra_slot_release(ra_smem_addr(bar));
}

/* Read @a words from shared memory by the lane that will also arrive for the warp. */
template <class T> __device__ __forceinline__ T read_shared(const T *shared)
{
    constexpr int words = sizeof(T) / 4;
    int value[words] = {};
    if ((threadIdx.x & 31) == 0)
#pragma unroll
        for (int i = 0; i < words; i++)
            value[i] = reinterpret_cast<const int *>(shared)[i];
#pragma unroll
    for (int i = 0; i < words; i++)
        value[i] = __shfl_sync(0xFFFFFFFF, value[i], 0);
    T result;
    memcpy(&result, value, sizeof(T));
    return result;
}

template <class C>
__device__ __forceinline__ void issue_scores(float (&s)[C::BN / 2], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < C::D / 16; i++) {
        const int in_box = (i & 3) * 2, box = i >> 2;
        ra_wgmma<C::BN>::ss(s, q + in_box + box * (64 * 128 / 16), k + in_box + box * (C::BOX / 16),
                            i > 0);
    }
    ra_wgmma_commit();
}

template <class C>
__device__ __forceinline__ void issue_output(float (&o)[C::D / 2],
                                             const uint32_t (&pairs)[C::BN / 4], uint32_t v)
{
#pragma unroll
    for (int i = 0; i < C::BN / 16; i++)
        ra_wgmma<C::D>::rs(o, pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3],
                           v + i * (2048 / 16));
    ra_wgmma_commit();
}

template <class C>
__device__ __forceinline__ void consume(const params_t &p, const shared_t<C> &shared, int wg)
{
    control_t<C> *control = shared.control;
    const int row = 64 * wg + 16 * ((threadIdx.x >> 5) & 3) + ((threadIdx.x & 31) >> 2);
    ra_slot<C::STAGES> k_slot, v_slot;
    ra_slot<C::QSTAGES> q_slot;
    ra_slot<2> job_slot;
    const uint32_t q_desc0 = ra_desc_k_major(ra_smem_addr(shared.q) + wg * C::Q_BYTES);
    const uint32_t k_desc0 = ra_desc_k_major(ra_smem_addr(shared.k));
    const uint32_t v_desc0 = ra_desc_mn_major(ra_smem_addr(shared.v), C::BOX);
    const int my_turn = 1 + wg, next_turn = 1 + (wg + 1) % C::WG;
    if (wg == C::WG - 1)
        ra_bar_arrive(next_turn, 256);
    for (;;) {
        ra_mbar_wait(ra_smem_addr(&control->job_full[job_slot.index]), job_slot.lap);
        const job_t *const job_at = &control->job[job_slot.index];
        job_t job = read_shared(job_at);
        const int steps = job.steps;
        if (steps < 0)
            break;
        rows_t rows;
        float o[C::D / 2];
        if (p.fresh) {
#pragma unroll
            for (int i = 0; i < C::D / 2; i++)
                o[i] = 0.0f;
            rows.m[0] = rows.m[1] = -INFINITY;
            rows.l[0] = rows.l[1] = 0.0f;
        } else {
            load_state<C>(p, job, row, rows, o);
        }
        if (steps > 0) {
            const intervals_t early = load_intervals(p, job, row);
            const uint32_t q_desc = q_desc0 + q_slot.index * (C::WG * C::Q_BYTES / 16);
            float s[C::BN / 2], alpha[2];
            uint32_t pairs[C::BN / 4];
            ra_mbar_wait(ra_smem_addr(&control->q_full[q_slot.index][wg]), q_slot.lap);
            ra_mbar_wait(ra_smem_addr(&control->k_full[k_slot.index]), k_slot.lap);
            int flags = read_shared(&control->step[k_slot.index].flags);
            ra_regs_pin(s);
            ra_wgmma_fence();
            issue_scores<C>(s, q_desc, k_desc0 + k_slot.index * (C::KV_BYTES / 16));
            ra_wgmma_wait<0>();
            ra_regs_pin(s);
            if (flags & RA_TILE_MASK)
                hide(p, read_shared(&control->step[k_slot.index]), early, s);
            release(&control->k_empty[k_slot.index]);
            k_slot.next();
            soften<C>(p.scale, rows, s, alpha);
            close_span(flags, rows);
            pack(s, pairs);
            if (!p.fresh)
                rescale(o, alpha);
            for (int j = 1; j < steps; j++) {
                ra_mbar_wait(ra_smem_addr(&control->k_full[k_slot.index]), k_slot.lap);
                flags = read_shared(&control->step[k_slot.index].flags);
                ra_bar_sync(my_turn, 256);
                ra_regs_pin(s);
                ra_wgmma_fence();
                issue_scores<C>(s, q_desc, k_desc0 + k_slot.index * (C::KV_BYTES / 16));
                ra_mbar_wait(ra_smem_addr(&control->v_full[v_slot.index]), v_slot.lap);
                ra_regs_pin(o);
                ra_wgmma_fence();
                issue_output<C>(o, pairs, v_desc0 + v_slot.index * (C::KV_BYTES / 16));
                ra_bar_arrive(next_turn, 256);
                ra_wgmma_wait<1>();
                ra_regs_pin(s);
                if (flags & RA_TILE_MASK)
                    hide(p, read_shared(&control->step[k_slot.index]),
                         load_intervals(p, read_shared(job_at), row), s);
                release(&control->k_empty[k_slot.index]);
                k_slot.next();
                soften<C>(p.scale, rows, s, alpha);
                close_span(flags, rows);
                ra_wgmma_wait<0>();
                ra_regs_pin(o);
                release(&control->v_empty[v_slot.index]);
                v_slot.next();
                pack(s, pairs);
                rescale(o, alpha);
            }
            release(&control->q_empty[q_slot.index][wg]);
            q_slot.next();
            ra_mbar_wait(ra_smem_addr(&control->v_full[v_slot.index]), v_slot.lap);
            ra_regs_pin(o);
            ra_wgmma_fence();
            issue_output<C>(o, pairs, v_desc0 + v_slot.index * (C::KV_BYTES / 16));
            ra_wgmma_wait<0>();
            ra_regs_pin(o);
            release(&control->v_empty[v_slot.index]);
            v_slot.next();
        }
        job = read_shared(job_at); /* again, rather than in registers all the way */
        if (p.out)
            store_out<C>(p, job, row, rows, o);
        else if (steps > 0 || p.fresh)
            store_state<C>(p, job, row, rows, o);
        release(&control->job_empty[job_slot.index]);
        job_slot.next();
    }
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    softmax_kernel(const __grid_constant__ params_t p, const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map)
{
    extern __shared__ __align__(1024) unsigned char base[];
    const shared_t<C> shared(base);
    const int warpgroup = __shfl_sync(0xFFFFFFFF, (int)threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
        ra_tma_prefetch_map(&q_map);
        ra_tma_prefetch_map(&k_map);
        ra_tma_prefetch_map(&v_map);
        init_barriers<C>(shared.control);
    }
    __syncthreads();
    if (warpgroup == 0) {
        ra_regs_shrink<C::PRODUCER_REGS>();
        if (threadIdx.x == 0)
            produce<C>(p, &q_map, &k_map, &v_map, shared);
    } else {
        ra_regs_grow<C::CONSUMER_REGS>();
        consume<C>(p, shared, warpgroup - 1);
    }
}

/* ---- host side ----------------------------------------------------------------------------- */

struct kernel_t {
    int32_t head_dim, tile_rows, tile_keys, threads, shared;
    void (*run)(params_t, CUtensorMap, CUtensorMap, CUtensorMap);
};

template <class C> constexpr kernel_t kernel_of()
{
    return {C::D, C::BM, C::BN, C::THREADS, shared_bytes<C>(), softmax_kernel<C>};
}

const kernel_t kernels[] = {
    kernel_of<config_t<128, 160, 2, 2, 2>>(),
    kernel_of<config_t<64, 128, 3, 2, 2>>(),
};

const kernel_t *find_kernel(int32_t head_dim)
{
    for (const kernel_t &kernel : kernels)
        if (kernel.head_dim == head_dim)
            return &kernel;
    return nullptr;
}

bool misaligned(const void *pointer, int64_t stride, int64_t element)
{
    return ((uintptr_t)pointer | (uintptr_t)(stride * element)) % 16 != 0;
}

ra_status_t check_call(const ra_softmax_cuda_call_t *call, const kernel_t *kernel)
{
    const ra_softmax_block_t *block = call->block;
    const int64_t out_bytes = call->out_dtype == RA_F32 ? 4 : 2;
    if (block->dtype != RA_BF16 || !(block->scale > 0.0f))
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "the sm90 kernel needs bf16 and a positive scale");
    if (block->mask.key_score || block->mask.row_threshold || block->mask.key_bias)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "the sm90 kernel has no key scores, thresholds or biases");
    if (block->kv_heads < 1 || block->heads % block->kv_heads != 0)
        return ra_fail(RA_ERR_SHAPE, subsystem, "%d heads over %d kv heads", block->heads,
                       block->kv_heads);
    if (call->layout->tile_rows != kernel->tile_rows ||
        call->layout->tile_keys != kernel->tile_keys)
        return ra_fail(RA_ERR_SHAPE, subsystem, "tile list is %dx%d, kernel is %dx%d",
                       call->layout->tile_rows, call->layout->tile_keys, kernel->tile_rows,
                       kernel->tile_keys);
    if (misaligned(block->q, block->q_stride, 2) || misaligned(block->k, block->k_stride, 2) ||
        misaligned(block->v, block->v_stride, 2) ||
        (call->out && misaligned(call->out, call->out_stride, out_bytes)))
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "q, k, v and out rows need 16-byte alignment");
    if ((!call->fresh || !call->out) &&
        (!call->state || ((uintptr_t)call->state->o | (uintptr_t)(call->state->o_stride * 4)) % 8))
        return ra_fail(RA_ERR_SHAPE, subsystem, "state is missing or its rows are misaligned");
    if (call->out && call->out_dtype != RA_F32 && call->out_dtype != RA_BF16)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "out is F32 or BF16");
    if (call->ready && call->gate_keys < 1)
        return ra_fail(RA_ERR_SHAPE, subsystem, "gates of %lld keys", (long long)call->gate_keys);
    if (call->layout->tile_count * block->heads > INT32_MAX)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "more than 2^31 tiles");
    return RA_OK;
}

/* Query heads whose keys and values together stay in half the L2, in whole kv heads. */
int32_t section_heads(const ra_softmax_block_t *block, int64_t l2_bytes)
{
    const int64_t kv_bytes = block->keys * block->head_dim * 4;
    int64_t kv = kv_bytes > 0 ? l2_bytes / 2 / kv_bytes : block->kv_heads;
    kv = kv < 1 ? 1 : kv > block->kv_heads ? block->kv_heads : kv;
    return (int32_t)kv * (block->heads / block->kv_heads);
}

params_t params_of(const ra_softmax_cuda_call_t *call, int64_t l2_bytes)
{
    const ra_softmax_block_t *block = call->block;
    const ra_softmax_tiles_layout_t *layout = call->layout;
    unsigned char *list = static_cast<unsigned char *>(call->tiles);
    params_t p = {};
    p.head = reinterpret_cast<ra_softmax_tiles_head_t *>(list);
    p.tiles = reinterpret_cast<ra_softmax_tile_t *>(list + layout->tiles);
    p.segments = reinterpret_cast<ra_softmax_segment_t *>(list + layout->segments);
    p.row_interval = reinterpret_cast<int2 *>(list + layout->row_interval);
    p.key_pos = layout->key_pos < 0 ? nullptr : reinterpret_cast<int32_t *>(list + layout->key_pos);
    if (call->state) {
        p.m = call->state->m;
        p.l = call->state->l;
        p.o = call->state->o;
        p.o_stride = call->state->o_stride;
    }
    p.out = call->out;
    p.out_stride = call->out_stride;
    p.out_is_f32 = call->out_dtype == RA_F32;
    p.lse = call->lse;
    p.rows = block->rows;
    p.scale = block->scale;
    p.tile_count = (int32_t)layout->tile_count;
    p.heads = block->heads;
    p.group = block->heads / block->kv_heads;
    p.section = section_heads(block, l2_bytes);
    p.fresh = call->fresh;
    p.ready = call->ready;
    p.epoch = call->epoch;
    p.gate_keys = (int32_t)(call->gate_keys < INT32_MAX ? call->gate_keys : INT32_MAX);
    return p;
}

} // namespace

ra_status_t ra_softmax_sm90_tile(int32_t head_dim, int32_t *tile_rows_p, int32_t *tile_keys_p)
{
    const kernel_t *kernel = find_kernel(head_dim);
    if (!ra_cuda_is_sm90() || !kernel)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "no sm90 softmax kernel for head_dim %d on compute capability %d.x",
                       head_dim, ra_cuda_attribute(cudaDevAttrComputeCapabilityMajor));
    *tile_rows_p = kernel->tile_rows;
    *tile_keys_p = kernel->tile_keys;
    return RA_OK;
}

ra_status_t ra_softmax_sm90_launch(const ra_softmax_cuda_call_t *call, struct CUstream_st *stream)
{
    const ra_softmax_block_t *block = call->block;
    const kernel_t *kernel = find_kernel(block->head_dim);
    if (!kernel)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "no sm90 softmax kernel for head_dim %d",
                       block->head_dim);
    RA_TRY(check_call(call, kernel));
    const int64_t units = call->layout->tile_count * block->heads;
    if (units == 0)
        return RA_OK;
    const int processors = ra_cuda_attribute(cudaDevAttrMultiProcessorCount);
    const int l2_bytes = ra_cuda_attribute(cudaDevAttrL2CacheSize);
    CUtensorMap q_map, k_map, v_map;
    RA_TRY(ra_tensor_map_heads(subsystem, block->q, block->rows, block->q_stride, block->heads,
                               block->head_dim, 64, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &q_map));
    RA_TRY(ra_tensor_map_heads(subsystem, block->k, block->keys, block->k_stride, block->kv_heads,
                               block->head_dim, kernel->tile_keys,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &k_map));
    RA_TRY(ra_tensor_map_heads(subsystem, block->v, block->keys, block->v_stride, block->kv_heads,
                               block->head_dim, kernel->tile_keys,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &v_map));
    cudaError_t error = cudaFuncSetAttribute(
        kernel->run, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel->shared);
    if (error == cudaSuccess) {
        const int64_t most = processors > call->spare ? processors - call->spare : 1;
        const unsigned grid = (unsigned)(units < most ? units : most);
        kernel->run<<<grid, kernel->threads, kernel->shared, stream>>>(params_of(call, l2_bytes),
                                                                       q_map, k_map, v_map);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "softmax launch, %d bytes shared: %s",
                       kernel->shared, cudaGetErrorString(error));
    return RA_OK;
}
