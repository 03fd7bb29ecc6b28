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
constexpr int HEADS_A_THREAD = 2; /* loads in flight before the first use */
constexpr int MAX_BLOCKS = 132 * 16;

ra_status_t refuse(ra_dtype_t dtype, const char *name)
{
    return ra_fail(RA_ERR_UNSUPPORTED, "model", "%s on CUDA takes F32 or BF16, not %s", name,
                   ra_dtype_name(dtype));
}

/* Sum over the block; @a slot is [NORM_WARPS] of shared memory that nobody else uses until the
 * barrier after next. */
__device__ __forceinline__ float sum_block(float x, float *slot)
{
    x = sum_lanes(x, 32);
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
    int64_t x_stride, y_stride, rows;
    int channels;
    float eps;
};

/* A block a row; NV vectors a thread hold the row and its weights. */
template <class T, int NV>
__global__ __launch_bounds__(NORM_THREADS) void rms_norm_wide(rms_norm_t<T> p)
{
    __shared__ float slots[2][NORM_WARPS];
    vector_t weight[NV];
#pragma unroll
    for (int k = 0; k < NV; k++) {
        const int i = (k * NORM_THREADS + (int)threadIdx.x) * VECTOR;
        weight[k] = i < p.channels ? load(p.weight + i) : vector_t{};
    }
    int parity = 0;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
        vector_t x[NV];
        float sum = 0;
#pragma unroll
        for (int k = 0; k < NV; k++) {
            const int i = (k * NORM_THREADS + (int)threadIdx.x) * VECTOR;
            x[k] = i < p.channels ? load(p.x + row * p.x_stride + i) : vector_t{};
        }
#pragma unroll
        for (int k = 0; k < NV; k++) {
            sum += sum_of_squares(x[k]);
        }
        const float f = inverse_rms(sum_block(sum, slots[parity]), p.channels, p.eps);
#pragma unroll
        for (int k = 0; k < NV; k++) {
            const int i = (k * NORM_THREADS + (int)threadIdx.x) * VECTOR;
            if (i < p.channels) {
#pragma unroll
                for (int j = 0; j < VECTOR; j++) {
                    x[k].x[j] = x[k].x[j] * f * weight[k].x[j];
                }
                store(p.y + row * p.y_stride + i, x[k]);
            }
        }
    }
}

template <class T> __global__ __launch_bounds__(NORM_THREADS) void rms_norm_any(rms_norm_t<T> p)
{
    __shared__ float slots[2][NORM_WARPS];
    int parity = 0;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
        const float *x = p.x + row * p.x_stride;
        float sum = 0;
        for (int i = threadIdx.x; i < p.channels; i += NORM_THREADS) {
            sum = fmaf(x[i], x[i], sum);
        }
        const float f = inverse_rms(sum_block(sum, slots[parity]), p.channels, p.eps);
        for (int i = threadIdx.x; i < p.channels; i += NORM_THREADS) {
            p.y[row * p.y_stride + i] = narrow<T>(x[i] * f * p.weight[i]);
        }
    }
}

template <class T>
ra_status_t rms_norm(const ra_rms_norm_args_t *args, int64_t rows, cudaStream_t stream)
{
    const rms_norm_t<T> p = {
        args->x,        args->weight, static_cast<T *>(args->y), args->x_stride,
        args->y_stride, rows,         (int)args->channels,       args->eps};
    const unsigned blocks = (unsigned)(rows < MAX_BLOCKS ? rows : MAX_BLOCKS);
    const int64_t vectors = (args->channels + NORM_THREADS * VECTOR - 1) / (NORM_THREADS * VECTOR);
    const bool wide = args->channels % VECTOR == 0 && vectors_fit<float>(p.x, p.x_stride) &&
                      vectors_fit<float>(p.weight, 0) && vectors_fit<T>(p.y, p.y_stride);
    if (wide && vectors <= 1) {
        rms_norm_wide<T, 1><<<blocks, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 2) {
        rms_norm_wide<T, 2><<<blocks, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 4) {
        rms_norm_wide<T, 4><<<blocks, NORM_THREADS, 0, stream>>>(p);
    } else if (wide && vectors <= 8) {
        rms_norm_wide<T, 8><<<blocks, NORM_THREADS, 0, stream>>>(p);
    } else {
        rms_norm_any<T><<<blocks, NORM_THREADS, 0, stream>>>(p);
    }
    return ra_cuda_check_launch("RMSNorm");
}

/* Where one head of one row is. */
template <class T> struct head_t {
    const T *x;
    T *y;
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
    float eps;

    __device__ __forceinline__ head_t<T> find(int row, int head) const
    {
        head_t<T> found = {};
#pragma unroll
        for (int i = RA_OP_HEADS_MAX - 1; i >= 0; i--) {
            if (head < last[i]) {
                const int64_t at = (head - (i > 0 ? last[i - 1] : 0)) * (int64_t)head_dim;
                found.x = static_cast<const T *>(part[i].x) + row * part[i].x_stride + at;
                found.y = static_cast<T *>(part[i].y) + row * part[i].y_stride + at;
                found.weight = part[i].weight;
                found.rotate = part[i].rotate;
            }
        }
        return found;
    }
};

/* y = the vector rotated; lanes [0, half / 8) hold the first elements of pairs, as many after them
 * the second. */
__device__ __forceinline__ void rotate_lanes(vector_t *v, const float *table, int half, int lane,
                                             int lanes, bool rotate)
{
    const int pairs = half / VECTOR;
    const bool first = lane < pairs, second = !first && lane < 2 * pairs;
    const int partner = first ? lane + pairs : second ? lane - pairs : lane;
    vector_t other;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        other.x[j] = __shfl_sync(ALL_LANES, v->x[j], partner, lanes);
    }
    if (rotate && (first || second)) {
        const int i = (first ? lane : partner) * VECTOR;
        const vector_t c = load(table + i), s = load(table + half + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const float turn = other.x[j] * s.x[j];
            v->x[j] = fmaf(v->x[j], c.x[j], first ? -turn : turn);
        }
    }
}

/* `lanes` threads a head, one vector each; a thread works on HEADS_A_THREAD heads at once. */
template <class T>
__global__ __launch_bounds__(THREADS) void head_rope_wide(heads_t<T> p, int lanes)
{
    const int lane = (int)threadIdx.x % lanes, heads_a_pass = THREADS / lanes;
    const int64_t first = (int64_t)blockIdx.x * heads_a_pass * HEADS_A_THREAD;
    const bool inside = lane * VECTOR < p.head_dim;
    head_t<T> head[HEADS_A_THREAD];
    int row[HEADS_A_THREAD];
    vector_t v[HEADS_A_THREAD];
#pragma unroll
    for (int k = 0; k < HEADS_A_THREAD; k++) {
        const unsigned unit =
            (unsigned)first + (unsigned)(k * heads_a_pass) + threadIdx.x / (unsigned)lanes;
        row[k] = (int)(unit / (unsigned)p.heads);
        head[k] = row[k] < p.rows ? p.find(row[k], (int)(unit % (unsigned)p.heads)) : head_t<T>{};
        v[k] = inside && head[k].x ? load(head[k].x + lane * VECTOR) : vector_t{};
    }
#pragma unroll
    for (int k = 0; k < HEADS_A_THREAD; k++) {
        const float sum = sum_lanes(sum_of_squares(v[k]), lanes);
        if (head[k].weight != nullptr && inside) {
            const float f = inverse_rms(sum, p.head_dim, p.eps);
            const vector_t weight = load(head[k].weight + lane * VECTOR);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                v[k].x[j] = v[k].x[j] * f * weight.x[j];
            }
        }
        rotate_lanes(&v[k], p.table + (int64_t)row[k] * 2 * p.half, p.half, lane, lanes,
                     head[k].rotate);
        if (inside && head[k].x) {
            store(head[k].y + lane * VECTOR, v[k]);
        }
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
    const head_t<T> head = p.find(row, (int)(unit % (unsigned)p.heads));
    const float *cosine = p.table + (int64_t)row * 2 * p.half, *sine = cosine + p.half;
    const int half = head.rotate ? p.half : 0;
    float sum = 0, f = 1;
    for (int i = lane; i < p.head_dim; i += 32) {
        const float x = widen(head.x[i]);
        sum = fmaf(x, x, sum);
    }
    sum = sum_lanes(sum, 32);
    if (head.weight != nullptr) {
        f = inverse_rms(sum, p.head_dim, p.eps);
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
    bool wide = args->head_dim % VECTOR == 0 && args->head_dim <= 32 * VECTOR &&
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

template <class T>
ra_status_t head_rope(const ra_head_rope_args_t *args, int64_t rows, cudaStream_t stream)
{
    heads_t<T> all = {};
    const bool wide = collect_heads(args, &all);
    if (all.heads == 0) {
        return RA_OK;
    }
    all.head_dim = (int)args->head_dim;
    all.half = (int)args->rotary_dim / 2;
    all.eps = args->eps;
    int lanes = 1;
    while (lanes * VECTOR < args->head_dim) {
        lanes *= 2;
    }
    in_batches(rows, all.heads, [&](int64_t begin, int n) {
        heads_t<T> p = all;
        p.table = args->table + begin * args->rotary_dim;
        p.rows = n;
        for (int i = 0; i < args->count; i++) {
            p.part[i].x = static_cast<const T *>(all.part[i].x) + begin * all.part[i].x_stride;
            p.part[i].y = static_cast<T *>(all.part[i].y) + begin * all.part[i].y_stride;
        }
        const int64_t units = (int64_t)n * p.heads;
        if (wide) {
            const unsigned blocks = blocks_for(units, THREADS / lanes * HEADS_A_THREAD);
            head_rope_wide<T><<<blocks, THREADS, 0, stream>>>(p, lanes);
        } else {
            head_rope_any<T><<<blocks_for(units, WARPS), THREADS, 0, stream>>>(p);
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
    float eps;
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
    const float f = inverse_rms(sum_lanes(sum, 32), p.n, p.eps);
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
    const float f = inverse_rms(sum_lanes(sum, 32), p.n, p.eps);
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
