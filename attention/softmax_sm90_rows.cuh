/**
 * @file  attention/softmax_sm90_rows.cuh
 * @brief What one consumer thread of the Hopper softmax kernel does to its two rows between matrix
 *        products: masks, running softmax, state and answer. Internal to softmax_sm90.cu.
 *
 * A thread holds rows row and row + 8 of its warpgroup's fragment (ra_wgmma); the four lanes of a
 * quad hold a row together.
 */
#ifndef RA_ATTENTION_SOFTMAX_SM90_ROWS_CUH
#define RA_ATTENTION_SOFTMAX_SM90_ROWS_CUH

#include "attention/softmax_sm90_shared.cuh"
#include <cuda_bf16.h>

namespace ra_sm90
{

constexpr float LOG2E = 1.44269504088896340736f;

/* Running softmax of one thread's two rows. m in natural units of scaled scores. */
struct rows_t {
    float m[2], l[2];
};

struct intervals_t {
    int2 row[2];
};

__device__ __forceinline__ intervals_t load_intervals(const params_t &p, const job_t &job, int row)
{
    intervals_t intervals;
#pragma unroll
    for (int r = 0; r < 2; r++)
        intervals.row[r] = row + 8 * r < job.row_count
                               ? __ldg(p.row_interval + job.row_begin + row + 8 * r)
                               : make_int2(0, 0);
    return intervals;
}

/* Visible columns [x, y) of a key tile for both rows, when positions are consecutive. */
__device__ __forceinline__ void columns_by_shift(const step_t &step, const intervals_t &intervals,
                                                 int2 (&columns)[2])
{
    const int first = step.key_begin + step.pos_shift;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        columns[r].x = max(intervals.row[r].x - first, step.first);
        columns[r].y = min(intervals.row[r].y - first, step.end);
    }
}

/* The same by binary search; each lane of the quad finds one of the four bounds. */
__device__ __forceinline__ int search_bound(const int32_t *pos, int begin, int end, int want)
{
    while (begin < end) {
        int middle = (begin + end) >> 1;
        if (__ldg(pos + middle) < want)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

__device__ __forceinline__ void columns_by_search(const params_t &p, const step_t &step,
                                                  const intervals_t &intervals, int2 (&columns)[2])
{
    const int2 mine = threadIdx.x & 2 ? intervals.row[1] : intervals.row[0];
    const int bound = search_bound(p.key_pos + step.key_begin, step.first, step.end,
                                   threadIdx.x & 1 ? mine.y : mine.x);
    columns[0].x = __shfl_sync(0xFFFFFFFF, bound, 0, 4);
    columns[0].y = __shfl_sync(0xFFFFFFFF, bound, 1, 4);
    columns[1].x = __shfl_sync(0xFFFFFFFF, bound, 2, 4);
    columns[1].y = __shfl_sync(0xFFFFFFFF, bound, 3, 4);
}

/* Scores of invisible keys become -inf. */
template <int N>
__device__ __forceinline__ void hide(const params_t &p, const step_t &step,
                                     const intervals_t &intervals, float (&s)[N])
{
    int2 columns[2];
    if ((step.flags & RA_TILE_MASK) == RA_TILE_SHIFT)
        columns_by_shift(step, intervals, columns);
    else
        columns_by_search(p, step, intervals, columns);
    const int column0 = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int column = column0 + 8 * (i >> 2) + (i & 1);
        const int2 c = columns[(i >> 1) & 1];
        if (column < c.x || column >= c.y)
            s[i] = -INFINITY;
    }
}

__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

/* Scores to probabilities in place; alpha is what the state before is to be multiplied by. */
template <class C, int N>
__device__ __forceinline__ void soften(float scale, rows_t &rows, float (&s)[N], float (&alpha)[2])
{
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
        top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
    const float slope = scale * LOG2E;
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float seen = quad_max(top[r]) * scale;
        const float m = seen > rows.m[r] + RA_SOFTMAX_SLACK ? seen : rows.m[r];
        base[r] = m == -INFINITY ? 0.0f : m * LOG2E;
        alpha[r] = m == rows.m[r] ? 1.0f : ra_exp2(rows.m[r] * LOG2E - base[r]);
        rows.m[r] = m;
        rows.l[r] *= alpha[r];
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        s[i] = ra_exp2(s[i] * slope - base[(i >> 1) & 1]);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        rows.l[0] += s[i] + s[i + 1];
        rows.l[1] += s[i + 2] + s[i + 3];
    }
}

template <int N> __device__ __forceinline__ void rescale(float (&o)[N], const float (&alpha)[2])
{
    if (__any_sync(0xFFFFFFFF, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < N; i++)
            o[i] *= alpha[(i >> 1) & 1];
    }
}

template <int N> __device__ __forceinline__ void pack(const float (&s)[N], uint32_t (&pairs)[N / 2])
{
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        pairs[i] = ra_pack_bf16(s[2 * i], s[2 * i + 1]);
}

/* At the end of a span the row sum is one number, held by lane 0 of the quad. */
__device__ __forceinline__ void close_span(int flags, rows_t &rows)
{
    if (flags & RA_TILE_SPAN_END) {
        const bool holder = (threadIdx.x & 3) == 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float sum = quad_sum(rows.l[r]);
            rows.l[r] = holder ? sum : 0.0f;
        }
    }
}

template <class C>
__device__ __forceinline__ void load_state(const params_t &p, const job_t &job, int row,
                                           rows_t &rows, float (&o)[C::D / 2])
{
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t at = (int64_t)job.row_begin + row + 8 * r;
        const bool mine = row + 8 * r < job.row_count;
        const int64_t flat = job.head * p.rows + at;
        const float *o_row = p.o + at * p.o_stride + job.head * C::D + 2 * lane;
        rows.m[r] = mine ? p.m[flat] : -INFINITY;
        rows.l[r] = mine && lane == 0 ? p.l[flat] : 0.0f;
#pragma unroll
        for (int c = 0; c < C::D / 8; c++) {
            float2 pair = {0.0f, 0.0f};
            if (mine)
                pair = *reinterpret_cast<const float2 *>(o_row + 8 * c);
            o[4 * c + 2 * r] = pair.x;
            o[4 * c + 2 * r + 1] = pair.y;
        }
    }
}

template <class C>
__device__ __forceinline__ void store_state(const params_t &p, const job_t &job, int row,
                                            const rows_t &rows, const float (&o)[C::D / 2])
{
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t at = (int64_t)job.row_begin + row + 8 * r;
        const int64_t flat = job.head * p.rows + at;
        float *o_row = p.o + at * p.o_stride + job.head * C::D + 2 * lane;
        const float sum = quad_sum(rows.l[r]);
        if (row + 8 * r >= job.row_count)
            continue;
        if (lane == 0) {
            p.m[flat] = rows.m[r];
            p.l[flat] = sum;
        }
#pragma unroll
        for (int c = 0; c < C::D / 8; c++)
            *reinterpret_cast<float2 *>(o_row + 8 * c) =
                make_float2(o[4 * c + 2 * r], o[4 * c + 2 * r + 1]);
    }
}

/* Transpose a 4 x 4 matrix of words held by a quad, one row a lane. */
__device__ __forceinline__ uint4 quad_transpose(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32_t x = __shfl_xor_sync(0xFFFFFFFF, odd ? a : b, 1);
    uint32_t y = __shfl_xor_sync(0xFFFFFFFF, odd ? c : d, 1);
    if (odd) {
        a = x;
        c = y;
    } else {
        b = x;
        d = y;
    }
    x = __shfl_xor_sync(0xFFFFFFFF, high ? a : c, 2);
    y = __shfl_xor_sync(0xFFFFFFFF, high ? b : d, 2);
    if (high) {
        a = x;
        b = y;
    } else {
        c = x;
        d = y;
    }
    return make_uint4(a, b, c, d);
}

template <class C>
__device__ __forceinline__ void store_out(const params_t &p, const job_t &job, int row,
                                          const rows_t &rows, float (&o)[C::D / 2])
{
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t at = (int64_t)job.row_begin + row + 8 * r;
        const bool mine = row + 8 * r < job.row_count;
        const float sum = quad_sum(rows.l[r]);
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        if (mine && lane == 0 && p.lse)
            p.lse[job.head * p.rows + at] = sum > 0.0f ? rows.m[r] + __logf(sum) : -INFINITY;
        const int64_t first = at * p.out_stride + job.head * C::D;
        if (p.out_is_f32) {
            float *out = static_cast<float *>(p.out) + first + 2 * lane;
#pragma unroll
            for (int c = 0; c < C::D / 8; c++)
                if (mine)
                    *reinterpret_cast<float2 *>(out + 8 * c) =
                        make_float2(o[4 * c + 2 * r] * inverse, o[4 * c + 2 * r + 1] * inverse);
        } else {
            __nv_bfloat16 *out = static_cast<__nv_bfloat16 *>(p.out) + first + 8 * lane;
#pragma unroll
            for (int c = 0; c < C::D / 8; c += 4) {
                uint32_t pair[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    pair[i] = ra_pack_bf16(o[4 * (c + i) + 2 * r] * inverse,
                                           o[4 * (c + i) + 2 * r + 1] * inverse);
                uint4 line = quad_transpose(pair[0], pair[1], pair[2], pair[3]);
                if (mine)
                    *reinterpret_cast<uint4 *>(out + 8 * c) = line;
            }
        }
    }
}

} // namespace ra_sm90

#endif
