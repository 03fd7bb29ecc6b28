/*
 * moe/router_cuda.cu - ra_router_select() on the device, a warp a row: in registers for up to 256
 * experts, 32 groups and 32 choices, in shared memory beyond.
 *
 * Keys are kept as integers of the same order, so that the largest of a warp is one instruction; 0
 * is below every key and stands for "taken" and "not eligible". Each choice is one round over the
 * warp: the largest key, then the lowest index that has it.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "moe/experts_cuda.h"
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

namespace
{

const char subsystem[] = "moe";
constexpr unsigned ALL = 0xFFFFFFFFu;

struct params_t {
    ra_router_t router;
    int64_t rows;
    const float *logits, *bias;
    int32_t *expert;
    float *weight, *gap;
};

/* vf_exp() of base/simd.h, step by step: the same bits where that has fused multiply-adds. */
__device__ __forceinline__ float exp_as_cpu(float x)
{
    const float magic = 0x1.8p23f;
    x = x >= 89.0f ? 89.0f : x;
    float n = __fsub_rn(__fmaf_rn(x, 0x1.715476p+0f, magic), magic);
    float r = __fmaf_rn(n, -0.693359375f, x);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float p = 0.00139262131f;
    p = __fmaf_rn(p, r, 0.00836320315f);
    p = __fmaf_rn(p, r, 0.0416665561f);
    p = __fmaf_rn(p, r, 0.166665763f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    if (x < -87.336544f)
        return 0.0f;
    const int whole = (int)n, half = whole >> 1, rest = whole - half;
    return __fmul_rn(__fmul_rn(p, __int_as_float((half + 127) << 23)),
                     __int_as_float((rest + 127) << 23));
}

__device__ __forceinline__ float sigmoid(float x)
{
    return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_as_cpu(__fsub_rn(0.0f, x))));
}

__device__ __forceinline__ uint32_t key_of(float c)
{
    const uint32_t bits = c == 0.0f ? 0u : __float_as_uint(c);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key)
{
    return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

/* How far a choice was from another, by the keys chosen last and not chosen (0: none). */
__device__ __forceinline__ float distance_of(uint32_t last, uint32_t next)
{
    if (next == 0)
        return INFINITY;
    const float distance = __fsub_rn(value_of(last), value_of(next));
    return isnan(distance) ? 0.0f : distance;
}

/* Sum of the two largest keys of the warp, whose lanes give their own two largest; the largest
 * alone for a group of one. */
__device__ __forceinline__ uint32_t sum_of_two(uint32_t first, uint32_t second, int size, int lane)
{
    const uint32_t best = __reduce_max_sync(ALL, first);
    if (size == 1)
        return best;
    const unsigned holders = __ballot_sync(ALL, first == best);
    if (lane == __ffs(holders) - 1)
        first = second;
    return key_of(__fadd_rn(value_of(best), value_of(__reduce_max_sync(ALL, first))));
}

/* ---- in registers -------------------------------------------------------------------------- */

/* Expert e is key e / 32 of lane e % 32. */
template <int N> struct keys_t {
    uint32_t key[N];

    __device__ __forceinline__ uint32_t best() const
    {
        uint32_t mine = key[0];
#pragma unroll
        for (int i = 1; i < N; i++)
            mine = max(mine, key[i]);
        return __reduce_max_sync(ALL, mine);
    }
    __device__ __forceinline__ uint32_t take(int lane, int *index_p)
    {
        const uint32_t largest = best();
        int at = INT_MAX;
#pragma unroll
        for (int i = N - 1; i >= 0; i--)
            at = key[i] == largest ? 32 * i + lane : at;
        *index_p = __reduce_min_sync(ALL, at);
#pragma unroll
        for (int i = 0; i < N; i++)
            key[i] = 32 * i + lane == *index_p ? 0 : key[i];
        return largest;
    }
    __device__ __forceinline__ float margin(uint32_t last) const
    {
        return distance_of(last, best());
    }
};

constexpr int SMALL = 8; /* keys of a lane */

__device__ __forceinline__ float keep_small_groups(const ra_router_t &router, keys_t<SMALL> &keys,
                                                   int lane)
{
    const int size = router.experts / router.groups;
    keys_t<1> group = {{0}};
    if (router.groups == router.top_groups)
        return INFINITY;
    if (size == 32) { /* group g is key g of every lane */
#pragma unroll
        for (int g = 0; g < SMALL; g++) {
            const uint32_t score = sum_of_two(keys.key[g], 0, size, lane);
            group.key[0] = lane == g && g < router.groups ? score : group.key[0];
        }
    } else {
        for (int g = 0; g < router.groups; g++) {
            uint32_t first = 0, second = 0;
#pragma unroll
            for (int i = 0; i < SMALL; i++) {
                const int e = 32 * i + lane;
                const uint32_t key = e >= g * size && e < (g + 1) * size ? keys.key[i] : 0;
                second = max(second, min(first, key));
                first = max(first, key);
            }
            const uint32_t score = sum_of_two(first, second, size, lane);
            group.key[0] = lane == g ? score : group.key[0];
        }
    }
    uint32_t last = 0;
    int index;
    for (int i = 0; i < router.top_groups; i++)
        last = group.take(lane, &index);
    const float gap = group.margin(last);
    const unsigned dropped = __ballot_sync(ALL, group.key[0] != 0);
#pragma unroll
    for (int i = 0; i < SMALL; i++)
        if (size == 32)
            keys.key[i] = dropped >> i & 1 ? 0 : keys.key[i];
        else
            keys.key[i] = dropped >> ((32 * i + lane) / size & 31) & 1 ? 0 : keys.key[i];
    return gap;
}

/* @a chosen: lane j's is choice j. */
__device__ __forceinline__ void write_small_row(const params_t &p, int64_t row, int chosen,
                                                bool has_nan, int lane)
{
    const int k = p.router.top_k;
    int rank = 0;
    for (int j = 0; j < k; j++)
        rank += __shfl_sync(ALL, chosen, j) < chosen;
    rank = lane < k ? rank : 32;
    float score = 0.0f, sum = 0.0f;
    if (lane < k)
        score = sigmoid(__ldg(p.logits + row * p.router.experts + chosen));
    for (int j = 0; j < k; j++)
        sum = __fadd_rn(sum, __shfl_sync(ALL, score, __ffs(__ballot_sync(ALL, rank == j)) - 1));
    sum = __fadd_rn(sum, 1e-20f);
    if (lane < k) {
        const float one = p.router.normalise ? __fdiv_rn(score, sum) : score;
        p.expert[row * k + rank] = chosen;
        p.weight[row * k + rank] = has_nan ? NAN : __fmul_rn(one, p.router.scale);
    }
}

__global__ void __launch_bounds__(256) select_small_kernel(const params_t p)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int experts = p.router.experts;
    for (int64_t row = blockIdx.x * (int64_t)warps + warp; row < p.rows;
         row += (int64_t)gridDim.x * warps) {
        keys_t<SMALL> keys;
        bool nan_here = false;
#pragma unroll
        for (int i = 0; i < SMALL; i++) {
            const int e = 32 * i + lane;
            keys.key[i] = 0;
            if (e < experts) {
                float c = sigmoid(__ldg(p.logits + row * experts + e));
                if (p.bias)
                    c = __fadd_rn(c, __ldg(p.bias + e));
                nan_here |= isnan(c);
                keys.key[i] = key_of(isnan(c) ? -INFINITY : c);
            }
        }
        const bool has_nan = __any_sync(ALL, nan_here);
        const float group_gap = keep_small_groups(p.router, keys, lane);
        uint32_t last = 0;
        int chosen = 0;
        for (int j = 0; j < p.router.top_k; j++) {
            int index;
            last = keys.take(lane, &index);
            chosen = lane == j ? index : chosen;
        }
        const float gap = fminf(group_gap, keys.margin(last));
        if (p.gap && lane == 0)
            p.gap[row] = has_nan ? 0.0f : gap;
        write_small_row(p, row, chosen, has_nan, lane);
    }
}

/* ---- in shared memory ---------------------------------------------------------------------- */

/* Keys of which the warp picks the largest, one after another. */
struct contest_t {
    uint32_t *keys;
    int count, lane;
    uint32_t mine = 0; /* the lane's largest, at `at` */
    int at = 0;

    __device__ contest_t(uint32_t *from, int n, int l) : keys(from), count(n), lane(l)
    {
        scan();
    }
    __device__ __forceinline__ void scan()
    {
        mine = 0;
        for (int i = lane; i < count; i += 32) {
            if (keys[i] > mine) {
                mine = keys[i];
                at = i;
            }
        }
    }
    /* 0 when none is left. */
    __device__ __forceinline__ uint32_t best(int *index_p) const
    {
        const uint32_t key = __reduce_max_sync(ALL, mine);
        *index_p = __reduce_min_sync(ALL, mine == key ? at : INT_MAX);
        return key;
    }
    __device__ __forceinline__ uint32_t take(int *index_p)
    {
        const uint32_t key = best(index_p);
        if (mine == key && at == *index_p) {
            keys[at] = 0;
            scan();
        }
        return key;
    }
    __device__ __forceinline__ float margin(uint32_t last) const
    {
        int index;
        return distance_of(last, best(&index));
    }
};

/* Sum of the two largest of @a size keys. */
__device__ __forceinline__ uint32_t score_group(const uint32_t *keys, int size, int lane)
{
    uint32_t first = 0, second = 0;
    for (int i = lane; i < size; i += 32) {
        const uint32_t key = keys[i];
        second = max(second, min(first, key));
        first = max(first, key);
    }
    return sum_of_two(first, second, size, lane);
}

/* Drop the keys of all but the best groups. Returns how far that choice is from changing. */
__device__ float keep_groups(const ra_router_t &router, uint32_t *keys, uint32_t *group, int lane)
{
    const int size = router.experts / router.groups;
    if (router.groups == router.top_groups)
        return INFINITY;
    for (int g = 0; g < router.groups; g++) {
        const uint32_t score = score_group(keys + g * size, size, lane);
        if (lane == g % 32)
            group[g] = score;
    }
    __syncwarp();
    contest_t contest(group, router.groups, lane);
    uint32_t last = 0;
    int index;
    for (int i = 0; i < router.top_groups; i++)
        last = contest.take(&index);
    const float gap = contest.margin(last);
    __syncwarp();
    for (int g = 0; g < router.groups; g++)
        for (int i = lane; group[g] != 0 && i < size; i += 32)
            keys[g * size + i] = 0;
    __syncwarp();
    return gap;
}

/* The chosen experts' weights; @a chosen is in order of choice. */
__device__ void write_row(const params_t &p, int64_t row, const int *chosen, float *score,
                          bool has_nan, int lane)
{
    const int k = p.router.top_k;
    int32_t *expert = p.expert + row * k;
    for (int j = lane; j < k; j += 32) {
        int rank = 0;
        for (int i = 0; i < k; i++)
            rank += chosen[i] < chosen[j];
        expert[rank] = chosen[j];
        score[rank] = sigmoid(__ldg(p.logits + row * p.router.experts + chosen[j]));
    }
    __syncwarp();
    float sum = 0.0f;
    for (int j = 0; j < k; j++)
        sum = __fadd_rn(sum, score[j]);
    sum = __fadd_rn(sum, 1e-20f);
    for (int j = lane; j < k; j += 32) {
        const float one = p.router.normalise ? __fdiv_rn(score[j], sum) : score[j];
        p.weight[row * k + j] = has_nan ? NAN : __fmul_rn(one, p.router.scale);
    }
    __syncwarp();
}

__global__ void select_kernel(const params_t p)
{
    extern __shared__ uint32_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int experts = p.router.experts, k = p.router.top_k;
    uint32_t *keys = shared + warp * (experts + p.router.groups + 2 * RA_ROUTER_MAX_TOP_K);
    uint32_t *group = keys + experts;
    int *chosen = reinterpret_cast<int *>(group + p.router.groups);
    float *score = reinterpret_cast<float *>(chosen + RA_ROUTER_MAX_TOP_K);
    for (int64_t row = blockIdx.x * (int64_t)warps + warp; row < p.rows;
         row += (int64_t)gridDim.x * warps) {
        bool nan_here = false;
        for (int e = lane; e < experts; e += 32) {
            float c = sigmoid(__ldg(p.logits + row * experts + e));
            if (p.bias)
                c = __fadd_rn(c, __ldg(p.bias + e));
            nan_here |= isnan(c);
            keys[e] = key_of(isnan(c) ? -INFINITY : c);
        }
        const bool has_nan = __any_sync(ALL, nan_here);
        __syncwarp();
        const float group_gap = keep_groups(p.router, keys, group, lane);
        contest_t contest(keys, experts, lane);
        uint32_t last = 0;
        for (int j = 0; j < k; j++) {
            int index;
            last = contest.take(&index);
            if (lane == 0)
                chosen[j] = index;
        }
        const float gap = fminf(group_gap, contest.margin(last));
        if (p.gap && lane == 0)
            p.gap[row] = has_nan ? 0.0f : gap;
        __syncwarp();
        write_row(p, row, chosen, score, has_nan, lane);
    }
}

/* ---- replay -------------------------------------------------------------------------------- */

/* ra_router_replay(), a thread a row. */
__global__ void replay_kernel(const params_t p, const ra_router_replay_t replay)
{
    const int64_t row = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    const int k = p.router.top_k;
    if (row >= p.rows)
        return;
    int32_t *expert = p.expert + row * k;
    float *weight = p.weight + row * k, sum = 0.0f;
    if (replay.chosen)
        for (int j = 0; j < k; j++)
            replay.chosen[row * replay.stride + j] = expert[j];
    if (!replay.forced || replay.forced[row * replay.stride] < 0)
        return;
    const bool has_nan = isnan(weight[0]); /* the whole row is */
    for (int j = 0; j < k; j++) {
        expert[j] = replay.forced[row * replay.stride + j];
        weight[j] = sigmoid(p.logits[row * p.router.experts + expert[j]]);
        sum = __fadd_rn(sum, weight[j]);
    }
    sum = __fadd_rn(sum, 1e-20f);
    for (int j = 0; j < k; j++) {
        const float one = p.router.normalise ? __fdiv_rn(weight[j], sum) : weight[j];
        weight[j] = has_nan ? NAN : __fmul_rn(one, p.router.scale);
    }
}

} // namespace

ra_status_t ra_moe_cuda_replay(const ra_router_t *router, const ra_router_replay_t *replay,
                               int64_t rows, const float *logits, int32_t *expert, float *weight,
                               struct CUstream_st *stream)
{
    if (rows == 0 || (!replay->forced && !replay->chosen))
        return RA_OK;
    const params_t p = {*router, rows, logits, NULL, expert, weight, NULL};
    replay_kernel<<<(unsigned)((rows + 127) / 128), 128, 0, stream>>>(p, *replay);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "replay launch: %s", cudaGetErrorString(error));
    return RA_OK;
}

ra_status_t ra_moe_cuda_select(const ra_router_t *router, int64_t rows, const float *logits,
                               const float *bias, int32_t *expert_p, float *weight_p, float *gap_p,
                               struct CUstream_st *stream)
{
    RA_TRY(ra_router_check(router));
    if (rows == 0)
        return RA_OK;
    const params_t p = {*router, rows, logits, bias, expert_p, weight_p, gap_p};
    const int64_t words = router->experts + router->groups + 2 * RA_ROUTER_MAX_TOP_K;
    const int64_t fit = 48 * 1024 / (4 * words);
    const unsigned warps = fit < 1 ? 1 : fit > 8 ? 8 : (unsigned)fit;
    const int64_t blocks = (rows + warps - 1) / warps;
    const unsigned grid = (unsigned)(blocks < 65536 ? blocks : 65536);
    if (router->experts <= 32 * SMALL && router->groups <= 32 && router->top_k <= 32)
        select_small_kernel<<<grid, 32 * warps, 0, stream>>>(p);
    else
        select_kernel<<<grid, 32 * warps, warps * words * 4, stream>>>(p);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "router launch: %s", cudaGetErrorString(error));
    return RA_OK;
}
