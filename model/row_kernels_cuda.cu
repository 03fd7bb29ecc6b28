/*
 * Element-wise CUDA kernels of model/layer_ops.h: embedding, copies, SwiGLU, rotary tables, fills.
 * A thread owns eight neighbouring elements of a row where addresses allow it, else one.
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

constexpr int THREADS = 256;

/* f.wide(row, first of eight columns) for every eight columns of n rows. */
template <class F>
__global__ __launch_bounds__(THREADS) void each_vector(F f, int rows, int units_a_row)
{
    const unsigned unit = blockIdx.x * (unsigned)THREADS + threadIdx.x;
    const unsigned row = unit / (unsigned)units_a_row;
    if (row < (unsigned)rows) {
        f.wide((int64_t)row, (int64_t)(unit - row * (unsigned)units_a_row) * VECTOR);
    }
}

/* f.single(row, column) for every element of n rows. */
template <class F>
__global__ __launch_bounds__(THREADS) void each_element(F f, int rows, int units_a_row)
{
    const unsigned unit = blockIdx.x * (unsigned)THREADS + threadIdx.x;
    const unsigned row = unit / (unsigned)units_a_row;
    if (row < (unsigned)rows) {
        f.single((int64_t)row, (int64_t)(unit - row * (unsigned)units_a_row));
    }
}

/* f.at(begin) is f with its pointers moved to row begin. */
template <class F>
ra_status_t launch_elements(const F &f, int64_t rows, int64_t channels, const char *name,
                            cudaStream_t stream)
{
    if (channels == 0) {
        return RA_OK;
    }
    in_batches(rows, channels, [&](int64_t begin, int n) {
        const unsigned blocks = blocks_for(n * channels, THREADS);
        each_element<<<blocks, THREADS, 0, stream>>>(f.at(begin), n, (int)channels);
    });
    return ra_cuda_check_launch(name);
}

template <class F>
ra_status_t launch_vectors(const F &f, int64_t rows, int64_t channels, const char *name,
                           cudaStream_t stream)
{
    const int64_t units = channels / VECTOR;
    in_batches(rows, units, [&](int64_t begin, int n) {
        const unsigned blocks = blocks_for(n * units, THREADS);
        each_vector<<<blocks, THREADS, 0, stream>>>(f.at(begin), n, (int)units);
    });
    return ra_cuda_check_launch(name);
}

/* Rows of eight at a time where @a wide says that f allows it. */
template <class F>
ra_status_t launch_rows(const F &f, int64_t rows, int64_t channels, bool wide, const char *name,
                        cudaStream_t stream)
{
    if (wide && channels % VECTOR == 0 && channels > 0) {
        return launch_vectors(f, rows, channels, name, stream);
    }
    return launch_elements(f, rows, channels, name, stream);
}

ra_status_t refuse(ra_dtype_t dtype, const char *name)
{
    return ra_fail(RA_ERR_UNSUPPORTED, "model", "%s on CUDA takes F32 or BF16, not %s", name,
                   ra_dtype_name(dtype));
}

template <class T> struct embed_t {
    const T *table;
    const int32_t *tokens;
    float *x;
    int64_t channels, x_stride;

    embed_t at(int64_t begin) const
    {
        return {table, tokens + begin, x + begin * x_stride, channels, x_stride};
    }
    __device__ void wide(int64_t row, int64_t i) const
    {
        store(x + row * x_stride + i, load(table + tokens[row] * channels + i));
    }
    __device__ void single(int64_t row, int64_t i) const
    {
        x[row * x_stride + i] = widen(table[tokens[row] * channels + i]);
    }
};

template <class T> ra_status_t embed(const ra_embed_args_t *args, int64_t rows, cudaStream_t stream)
{
    const embed_t<T> f = {static_cast<const T *>(args->table), args->tokens, args->x,
                          args->channels, args->x_stride};
    const bool wide =
        vectors_fit<T>(f.table, args->channels) && vectors_fit<float>(f.x, f.x_stride);
    return launch_rows(f, rows, args->channels, wide, "embedding", stream);
}

template <class X, class Y> struct copy_t {
    const X *x;
    Y *y;
    int64_t x_stride, y_stride;

    copy_t at(int64_t begin) const
    {
        return {x + begin * x_stride, y + begin * y_stride, x_stride, y_stride};
    }
    __device__ void wide(int64_t row, int64_t i) const
    {
        store(y + row * y_stride + i, load(x + row * x_stride + i));
    }
    __device__ void single(int64_t row, int64_t i) const
    {
        y[row * y_stride + i] = narrow<Y>(widen(x[row * x_stride + i]));
    }
};

template <class X, class Y>
ra_status_t copy(const ra_copy_rows_args_t *args, int64_t rows, cudaStream_t stream)
{
    const copy_t<X, Y> f = {static_cast<const X *>(args->x), static_cast<Y *>(args->y),
                            args->x_stride, args->y_stride};
    const bool wide = vectors_fit<X>(f.x, f.x_stride) && vectors_fit<Y>(f.y, f.y_stride);
    return launch_rows(f, rows, args->channels, wide, "row copy", stream);
}

template <class T> struct silu_mul_t {
    T *gate;
    const T *up;
    int64_t gate_stride, up_stride;

    silu_mul_t at(int64_t begin) const
    {
        return {gate + begin * gate_stride, up + begin * up_stride, gate_stride, up_stride};
    }
    __device__ void wide(int64_t row, int64_t i) const
    {
        vector_t a = load(gate + row * gate_stride + i);
        const vector_t b = load(up + row * up_stride + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            a.x[j] = a.x[j] * sigmoid(a.x[j]) * b.x[j];
        }
        store(gate + row * gate_stride + i, a);
    }
    __device__ void single(int64_t row, int64_t i) const
    {
        T *g = gate + row * gate_stride + i;
        const float a = widen(*g);
        *g = narrow<T>(a * sigmoid(a) * widen(up[row * up_stride + i]));
    }
};

template <class T>
ra_status_t silu_mul(const ra_silu_mul_args_t *args, int64_t rows, cudaStream_t stream)
{
    const silu_mul_t<T> f = {static_cast<T *>(args->gate), static_cast<const T *>(args->up),
                             args->gate_stride, args->up_stride};
    const bool wide = vectors_fit<T>(f.gate, f.gate_stride) && vectors_fit<T>(f.up, f.up_stride);
    return launch_rows(f, rows, args->channels, wide, "SwiGLU", stream);
}

constexpr int PAIRS = 128; /* frequencies that travel with a launch */

struct rope_table_t {
    const int64_t *positions;
    float *table;
    double factor;
    int64_t rotary_dim, first; /* this launch: pairs from first on */
    double inv_freq[PAIRS];

    rope_table_t at(int64_t begin) const
    {
        rope_table_t moved = *this;
        moved.positions += begin;
        moved.table += begin * rotary_dim;
        return moved;
    }
    __device__ void single(int64_t row, int64_t i) const
    {
        float *cosine = table + row * rotary_dim + first + i;
        double s, c;
        sincos((double)positions[row] * inv_freq[i], &s, &c);
        cosine[0] = (float)(c * factor);
        cosine[rotary_dim / 2] = (float)(s * factor);
    }
};

struct fill_t {
    float *x;
    float value;

    fill_t at(int64_t begin) const
    {
        return {x + begin, value};
    }
    __device__ void single(int64_t row, int64_t) const
    {
        x[row] = value;
    }
};

struct min_rows_t {
    const float *x;
    float *least;

    min_rows_t at(int64_t begin) const
    {
        return {x + begin, least + begin};
    }
    __device__ void single(int64_t row, int64_t) const
    {
        const float a = x[row], b = least[row];
        least[row] = a < b ? a : b;
    }
};

} // namespace

ra_status_t ra_embed_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_embed_args_t *args = static_cast<const ra_embed_args_t *>(arg);
    switch (args->table_dtype) {
    case RA_F32:
        return embed<float>(args, rows, stream);
    case RA_BF16:
        return embed<bf16>(args, rows, stream);
    default:
        return refuse(args->table_dtype, "embedding");
    }
}

ra_status_t ra_copy_rows_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_copy_rows_args_t *args = static_cast<const ra_copy_rows_args_t *>(arg);
    const bool x_f32 = args->x_dtype == RA_F32, y_f32 = args->y_dtype == RA_F32;
    if (!x_f32 && args->x_dtype != RA_BF16) {
        return refuse(args->x_dtype, "row copy");
    }
    if (!y_f32 && args->y_dtype != RA_BF16) {
        return refuse(args->y_dtype, "row copy");
    }
    if (x_f32) {
        return y_f32 ? copy<float, float>(args, rows, stream)
                     : copy<float, bf16>(args, rows, stream);
    }
    return y_f32 ? copy<bf16, float>(args, rows, stream) : copy<bf16, bf16>(args, rows, stream);
}

ra_status_t ra_silu_mul_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_silu_mul_args_t *args = static_cast<const ra_silu_mul_args_t *>(arg);
    switch (args->act) {
    case RA_F32:
        return silu_mul<float>(args, rows, stream);
    case RA_BF16:
        return silu_mul<bf16>(args, rows, stream);
    default:
        return refuse(args->act, "SwiGLU");
    }
}

ra_status_t ra_rope_table_cuda(const void *arg, int64_t rows, struct CUstream_st *stream)
{
    const ra_rope_table_args_t *args = static_cast<const ra_rope_table_args_t *>(arg);
    const int64_t half = args->rotary_dim / 2;
    for (int64_t first = 0; first < half; first += PAIRS) {
        const int64_t n = half - first < PAIRS ? half - first : PAIRS;
        rope_table_t f = {args->positions,  args->table, args->attention_factor,
                          args->rotary_dim, first,       {}};
        for (int64_t i = 0; i < n; i++) {
            f.inv_freq[i] = args->inv_freq[first + i];
        }
        RA_TRY(launch_elements(f, rows, n, "rotary table", stream));
    }
    return RA_OK;
}

ra_status_t ra_fill_cuda(const void *arg, int64_t n, struct CUstream_st *stream)
{
    const ra_fill_args_t *args = static_cast<const ra_fill_args_t *>(arg);
    return launch_elements(fill_t{args->x, args->value}, n, 1, "fill", stream);
}

ra_status_t ra_min_rows_cuda(const void *arg, int64_t n, struct CUstream_st *stream)
{
    const ra_min_rows_args_t *args = static_cast<const ra_min_rows_args_t *>(arg);
    return launch_elements(min_rows_t{args->x, args->least}, n, 1, "least rows", stream);
}
