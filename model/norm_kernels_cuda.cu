/*
 * CUDA kernels of model/layer_ops.h that norm rows: RMSNorm, per-head norm with rotation, group
 * norm with gate. A row, head or group is read once into registers where its size and addresses
 * allow it, and twice otherwise; sums go through shuffles in one fixed order.
 */
#include "model/row_kernels_cuda.h"

extern "C" { /* C headers without a C++ guard of their own */
#include "base/device_cuda.h"
#include "model/row_kernels.h"
}
#include "model/row_vectors.cuh"
#include <cuda_runtime.h>

namespace
{

using namespace ra_row;

constexpr int NORM_THREADS = 128, NORM_WARPS = NORM_THREADS / 32;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROWS = 8; /* that a block of head_rope_wide() walks */

ra_status_t refuse(ra_dtype_t dtype, const char *name)
{
    return ra_fail(RA_ERR_UNSUPPORTED, "model", "%s on CUDA takes F32 or BF16, not %s", name,
                   ra_dtype_name(dtype));
}

/* Sum over the block; called once in a kernel. */
__device__ __forceinline__ float sum_block(float x)
{
    __shared__ float slot[NORM_WARPS];
    x = sum_lanes<32>(x);
    if (threadIdx.x % 32 == 0) {
        slot[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = slot[0];
#pragma unroll
    for (int w = 1; w < NORM_WARPS; w++) {
        sum += slot[w];
    }
    return sum;
}

template <class T> struct rms_norm_t {
    const float *x, *weight;
    T *y;
    int64_t x_stride, y_stride;
    int channels;
    float share, eps; /* share: 1 / channels */
};

/* A block a row, which NV vectors a thread hold. */
template <class T, int NV>
__global__ __launch_bounds__(NORM_THREADS) void rms_norm_wide(rms_norm_t<T> p)
{
    const float *from = p.x + blockIdx.x * p.x_stride;
    T *y = p.y + blockIdx.x * p.y_stride;
    vector_t x[NV];
    float sum = 0;
#pragma unroll
    for (int k = 0; k < NV; k++) {
        const int i = (k * NORM_THREADS + (int)threadIdx.x) * VECTOR;
        x[k] = i < p.channels ? load(from + i) : vector_t{};
    }
#pragma unroll
    for (int k = 0; k < NV; k++) {
        sum += sum_of_squares(x[k]);
    }
    const float f = inverse_rms(sum_block(sum), p.share, p.eps);
#pragma unroll
    for (int k = 0; k < NV; k++) {
        const int i = (k * NORM_THREADS + (int)threadIdx.x) * VECTOR;
        if (i < p.channels) {
            const vector_t weight = load(p.weight + i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                x[k].x[j] *= f * weight.x[j];
            }
            store(y + i, x[k]);
        }
    }
}

template <class T> __global__ __launch_bounds__(NORM_THREADS) void rms_norm_any(rms_norm_t<T> p)
{
    const float *x = p.x + blockIdx.x * p.x_stride;
    T *y = p.y + blockIdx.x * p.y_stride;
    float sum = 0;
    for (int i = threadIdx.x; i < p.channels; i += NORM_THREADS) {
        sum = fmaf(x[i], x[i], sum);
    }
    const float f = inverse_rms(sum_block(sum), p.share, p.eps);
    for (int i = threadIdx.x; i < p.channels; i += NORM_THREADS) {
        y[i] = narrow<T>(x[i] * (f * p.weight[i]));
    }
}

template <class T>
void launch_rms_norm(const rms_norm_t<T> &p, unsigned rows, bool wide, cudaStream_t stream)
{
    const int64_t vectors = (p.channels + NORM_THREADS * VECTOR - 1) / (NORM_THREADS * VECTOR);
    if (wide && vectors <= 1) {
        rms_norm_wide<T, 1><<<rows, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 2) {
        rms_norm_wide<T, 2><<<rows, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 4) {
        rms_norm_wide<T, 4><<<rows, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 8) {
        rms_norm_wide<T, 8><<<rows, NORM_THREADS, 0, stream>>>(p);
    } else {
        rms_norm_any<T><<<rows, NORM_THREADS, 0, stream>>>(p);
    }
}

template <class T>
ra_status_t rms_norm(const ra_rms_norm_args_t *args, int64_t rows, cudaStream_t stream)
{
    T *y = static_cast<T *>(args->y);
    const bool wide = args->channels % VECTOR == 0 && vectors_fit<float>(args->x, args->x_stride) &&
                      vectors_fit<float>(args->weight, 0) && vectors_fit<T>(y, args->y_stride);
    in_batches(rows, 1, [&](int64_t begin, int n) {
        const rms_norm_t<T> p = {args->x + begin * args->x_stride,
                                 args->weight,
                                 y + begin * args->y_stride,
                                 args->x_stride,
                                 args->y_stride,
                                 (int)args->channels,
                                 1.0f / (float)args->channels,
                                 args->eps};
        launch_rms_norm(p, (unsigned)n, wide, stream);
    });
    return ra_cuda_check_launch("RMSNorm");
}

/* Where one head of row 0 is, and how far the next row. */
template <class T> struct head_t {
    const T *x;
    T *y;
    int64_t x_stride, y_stride;
    const float *weight;
    bool rotate;
};

/* Heads of all parts, numbered through: part i holds heads [last[i - 1], last[i]) of a row. */
template <class T> struct heads_t {
    ra_op_heads_t part[RA_OP_HEADS_MAX];
    int last[RA_OP_HEADS_MAX];
    const float *table;
    int heads, rows; /* heads of a row in all parts */
    int head_dim, half;
    float share, eps; /* share: 1 / head_dim */

    __device__ __forceinline__ head_t<T> find(int head) const
    {
        head_t<T> found = {};
#pragma unroll
        for (int i = RA_OP_HEADS_MAX - 1; i >= 0; i--) {
            if (head < last[i]) {
                const int64_t at = (head - (i > 0 ? last[i - 1] : 0)) * (int64_t)head_dim;
                found = {static_cast<const T *>(part[i].x) + at,
                         static_cast<T *>(part[i].y) + at,
                         part[i].x_stride,
                         part[i].y_stride,
                         part[i].weight,
                         part[i].rotate};
            }
        }
        return found;
    }
};

/* Norm the two vectors of a head that a lane holds, w their weights, and rotate their eight pairs
 * where there is a table. */
template <int LANES, class T>
__device__ __forceinline__ void norm_and_turn(const heads_t<T> &p, vector_t (&v)[2],
                                              const vector_t (&w)[2], bool norm, const float *table)
{
    float f = sum_lanes<LANES>(sum_of_squares(v[0]) + sum_of_squares(v[1]));
    f = norm ? inverse_rms(f, p.share, p.eps) : 1.0f;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        v[0].x[j] *= f * w[0].x[j];
        v[1].x[j] *= f * w[1].x[j];
    }
    if (table != nullptr) {
        const vector_t c = load(table), s = load(table + p.half);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const float a = v[0].x[j], b = v[1].x[j];
            v[0].x[j] = fmaf(a, c.x[j], -b * s.x[j]);
            v[1].x[j] = fmaf(b, c.x[j], a * s.x[j]);
        }
    }
}

/* LANES threads a head, which keep it while their block walks ROWS rows, the next row on its way. A
 * lane holds two vectors of channels: where heads are rotated the first and the second elements of
 * eight pairs, so that no lane needs another's. */
template <class T, int LANES>
__global__ __launch_bounds__(THREADS, 3) void head_rope_wide(heads_t<T> p, int heads_a_block)
{
    const int lane = (int)threadIdx.x % LANES, slot = (int)threadIdx.x / LANES;
    const int index = (int)blockIdx.y * heads_a_block + slot, turning = p.half / VECTOR;
    const int low = VECTOR * (lane < turning ? lane : 2 * lane);
    const int high = lane < turning ? p.half + low : low + VECTOR;
    const bool live = slot < heads_a_block && index < p.heads && low < p.head_dim;
    const head_t<T> head = p.find(live ? index : 0);
    const bool norm = head.weight != nullptr;
    vector_t w[2] = {{{1, 1, 1, 1, 1, 1, 1, 1}}, {{1, 1, 1, 1, 1, 1, 1, 1}}};
    if (norm && live) {
        w[0] = load(head.weight + low);
        w[1] = load(head.weight + high);
    }
    const int begin = (int)blockIdx.x * ROWS, end = min(begin + ROWS, p.rows);
    const T *x = head.x + begin * head.x_stride + (live ? low : 0);
    T *y = head.y + begin * head.y_stride + low;
    const int apart = live ? high - low : 0;
    const float *table = live && head.rotate && lane < turning
                             ? p.table + (int64_t)begin * 2 * p.half + low
                             : nullptr;
    decltype(load_raw(x)) next[2] = {load_raw(x), load_raw(x + apart)};
    for (int row = begin; row < end; row++) {
        vector_t v[2] = {widen(next[0]), widen(next[1])};
        if (row + 1 < end) {
            x += head.x_stride;
            next[0] = load_raw(x);
            next[1] = load_raw(x + apart);
        }
        if (!live) {
            v[0] = v[1] = vector_t{};
        }
        norm_and_turn<LANES>(p, v, w, norm, table);
        if (live) {
            store(y, v[0]);
            store(y + apart, v[1]);
        }
        y += head.y_stride;
        table += table != nullptr ? 2 * p.half : 0;
    }
}

/* A warp a head, any head size and alignment; a lane owns both elements of a pair. */
template <class T> __global__ __launch_bounds__(THREADS) void head_rope_any(heads_t<T> p)
{
    const unsigned unit = blockIdx.x * (unsigned)WARPS + threadIdx.x / 32;
    const int row = (int)(unit / (unsigned)p.heads), lane = threadIdx.x % 32;
    if (row >= p.rows) {
        return;
    }
    head_t<T> head = p.find((int)(unit % (unsigned)p.heads));
    head.x += row * head.x_stride;
    head.y += row * head.y_stride;
    const float *cosine = p.table + (int64_t)row * 2 * p.half, *sine = cosine + p.half;
    const int half = head.rotate ? p.half : 0;
    float sum = 0, f = 1;
    for (int i = lane; i < p.head_dim; i += 32) {
        const float x = widen(head.x[i]);
        sum = fmaf(x, x, sum);
    }
    sum = sum_lanes<32>(sum);
    if (head.weight != nullptr) {
        f = inverse_rms(sum, p.share, p.eps);
    }
    for (int i = lane; i < half; i += 32) {
        float a = widen(head.x[i]) * f, b = widen(head.x[half + i]) * f;
        if (head.weight != nullptr) {
            a *= head.weight[i];
            b *= head.weight[half + i];
        }
        head.y[i] = narrow<T>(fmaf(a, cosine[i], -b * sine[i]));
        head.y[half + i] = narrow<T>(fmaf(b, cosine[i], a * sine[i]));
    }
    for (int i = 2 * half + lane; i < p.head_dim; i += 32) {
        const float a = widen(head.x[i]) * f;
        head.y[i] = narrow<T>(head.weight != nullptr ? a * head.weight[i] : a);
    }
}

/* Number the heads of all parts through; says whether all of them can be read in vectors. */
template <class T> bool collect_heads(const ra_head_rope_args_t *args, heads_t<T> *p)
{
    bool wide = args->head_dim % (2 * VECTOR) == 0 && args->head_dim <= 64 * VECTOR &&
                args->rotary_dim % (2 * VECTOR) == 0 && vectors_fit<float>(args->table, 0);
    for (int i = 0; i < RA_OP_HEADS_MAX; i++) {
        if (i < args->count) {
            const ra_op_heads_t *part = &args->parts[i];
            p->part[i] = *part;
            p->heads += (int)part->heads;
            wide = wide && vectors_fit<T>(part->x, part->x_stride) &&
                   vectors_fit<T>(part->y, part->y_stride) && vectors_fit<float>(part->weight, 0);
        }
        p->last[i] = p->heads;
    }
    return wide;
}

template <class T, int LANES> void launch_wide(const heads_t<T> &p, cudaStream_t stream)
{
    const unsigned y = blocks_for(p.heads, THREADS / LANES);
    const int heads_a_block = (int)blocks_for(p.heads, y);
    const unsigned threads = blocks_for(heads_a_block * LANES, 32) * 32;
    head_rope_wide<T, LANES>
        <<<dim3(blocks_for(p.rows, ROWS), y), threads, 0, stream>>>(p, heads_a_block);
}

template <class T>
ra_status_t head_rope(const ra_head_rope_args_t *args, int64_t rows, cudaStream_t stream)
{
    heads_t<T> all = {};
    const bool wide = collect_heads(args, &all);
    if (all.heads == 0) {
        return RA_OK;
    }
    all.head_dim = (int)args->head_dim;
    all.share = 1.0f / (float)args->head_dim;
    all.half = (int)args->rotary_dim / 2;
    all.eps = args->eps;
    in_batches(rows, all.heads, [&](int64_t begin, int n) {
        heads_t<T> p = all;
        p.table = args->table + begin * args->rotary_dim;
        p.rows = n;
        for (int i = 0; i < args->count; i++) {
            p.part[i].x = static_cast<const T *>(all.part[i].x) + begin * all.part[i].x_stride;
            p.part[i].y = static_cast<T *>(all.part[i].y) + begin * all.part[i].y_stride;
        }
        if (!wide) {
            head_rope_any<T><<<blocks_for((int64_t)n * p.heads, WARPS), THREADS, 0, stream>>>(p);
        } else if (p.head_dim <= 8 * VECTOR) {
            launch_wide<T, 4>(p, stream);
        } else if (p.head_dim <= 16 * VECTOR) {
            launch_wide<T, 8>(p, stream);
        } else {
            launch_wide<T, 32>(p, stream);
        }
    });
    return ra_cuda_check_launch("head norm and rotation");
}

template <class T> struct group_gate_t {
    T *o;
    const T *gate;
    const float *weight;
    int64_t o_stride, gate_stride;
    int rows, groups, n; /* n: channels of a group */
    float share, eps;    /* share: 1 / n */
};

/* A warp a group; NV vectors a lane hold it. */
template <class T, int NV>
__global__ __launch_bounds__(THREADS) void group_gate_wide(group_gate_t<T> p)
{
    const unsigned unit = blockIdx.x * (unsigned)WARPS + threadIdx.x / 32;
    const unsigned row = unit / (unsigned)p.groups;
    const int from = (int)(unit - row * (unsigned)p.groups) * p.n;
    if (row >= (unsigned)p.rows) {
        return;
    }
    T *o = p.o + row * p.o_stride + from;
    const T *gate = p.gate + row * p.gate_stride + from;
    vector_t v[NV], g[NV];
    float sum = 0;
#pragma unroll
    for (int k = 0; k < NV; k++) {
        const int i = (k * 32 + (int)threadIdx.x % 32) * VECTOR;
        v[k] = i < p.n ? load(o + i) : vector_t{};
        g[k] = i < p.n ? load(gate + i) : vector_t{};
    }
#pragma unroll
    for (int k = 0; k < NV; k++) {
        sum += sum_of_squares(v[k]);
    }
    const float f = inverse_rms(sum_lanes<32>(sum), p.share, p.eps);
#pragma unroll
    for (int k = 0; k < NV; k++) {
        const int i = (k * 32 + (int)threadIdx.x % 32) * VECTOR;
        if (i < p.n) {
            const vector_t weight = load(p.weight + from + i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                v[k].x[j] = v[k].x[j] * f * weight.x[j] * sigmoid(g[k].x[j]);
            }
            store(o + i, v[k]);
        }
    }
}

template <class T> __global__ __launch_bounds__(THREADS) void group_gate_any(group_gate_t<T> p)
{
    const unsigned unit = blockIdx.x * (unsigned)WARPS + threadIdx.x / 32;
    const unsigned row = unit / (unsigned)p.groups;
    const int64_t from = (int64_t)(unit - row * (unsigned)p.groups) * p.n;
    if (row >= (unsigned)p.rows) {
        return;
    }
    T *o = p.o + row * p.o_stride + from;
    const T *gate = p.gate + row * p.gate_stride + from;
    float sum = 0;
    for (int i = threadIdx.x % 32; i < p.n; i += 32) {
        sum = fmaf(widen(o[i]), widen(o[i]), sum);
    }
    const float f = inverse_rms(sum_lanes<32>(sum), p.share, p.eps);
    for (int i = threadIdx.x % 32; i < p.n; i += 32) {
        o[i] = narrow<T>(widen(o[i]) * f * p.weight[from + i] * sigmoid(widen(gate[i])));
    }
}

template <class T> void launch_group_gate(const group_gate_t<T> &p, bool wide, cudaStream_t stream)
{
    const unsigned blocks = blocks_for((int64_t)p.rows * p.groups, WARPS);
    const int vectors = (p.n + 32 * VECTOR - 1) / (32 * VECTOR);
    if (wide && vectors <= 1) {
        group_gate_wide<T, 1><<<blocks, THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 2) {
        group_gate_wide<T, 2><<<blocks, THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 4) {
        group_gate_wide<T, 4><<<blocks, THREADS, 0, stream>>>(p);
    } else {
        group_gate_any<T><<<blocks, THREADS, 0, stream>>>(p);
    }
}

template <class T>
ra_status_t group_gate(const ra_group_gate_args_t *args, int64_t rows, cudaStream_t stream)
{
    T *o = static_cast<T *>(args->o);
    const T *gate = static_cast<const T *>(args->gate);
    const int64_t n = args->channels / args->groups;
    const bool wide = n % VECTOR == 0 && vectors_fit<T>(o, args->o_stride) &&
                      vectors_fit<T>(gate, args->gate_stride) &&
                      vectors_fit<float>(args->weight, 0);
    in_batches(rows, args->groups, [&](int64_t begin, int count) {
        const group_gate_t<T> p = {o + begin * args->o_stride,
                                   gate + begin * args->gate_stride,
                                   args->weight,
                                   args->o_stride,
                                   args->gate_stride,
                                   count,
                                   (int)args->groups,
                                   (int)n,
                                   1.0f / (float)n,
                                   args->eps};
        launch_group_gate(p, wide, stream);
    });
    return ra_cuda_check_launch("group norm and gate");
}

} // namespace

ra_status_t ra_rms_norm_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_rms_norm_args_t *args = static_cast<const ra_rms_norm_args_t *>(arg);
    switch (args->act) {
    case RA_F32:
        return rms_norm<float>(args, rows, stream);
    case RA_BF16:
        return rms_norm<bf16>(args, rows, stream);
    default:
        return refuse(args->act, "RMSNorm");
    }
}

ra_status_t ra_head_rope_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_head_rope_args_t *args = static_cast<const ra_head_rope_args_t *>(arg);
    if (args->count > RA_OP_HEADS_MAX) {
        return ra_fail(RA_ERR_SHAPE, "model", "%d groups of heads in one call, at most %d",
                       args->count, (int)RA_OP_HEADS_MAX);
    }
    switch (args->act) {
    case RA_F32:
        return head_rope<float>(args, rows, stream);
    case RA_BF16:
        return head_rope<bf16>(args, rows, stream);
    default:
        return refuse(args->act, "head norm");
    }
}

ra_status_t ra_group_gate_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_group_gate_args_t *args = static_cast<const ra_group_gate_args_t *>(arg);
    switch (args->act) {
    case RA_F32:
        return group_gate<float>(args, rows, stream);
    case RA_BF16:
        return group_gate<bf16>(args, rows, stream);
    default:
        return refuse(args->act, "group norm");
    }
}
