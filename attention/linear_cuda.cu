/*
 * The complete kernel: any decay, dtype and sizes to 256, fp32 with ordinary instructions; the row
 * a caller falls back to, and what linear_sm90.cu is compared with.
 *
 * A block owns 32 value columns of one head of one segment and walks its chunks of 32 tokens with
 * the state in shared memory. Decays inside a chunk are products of factors <= 1 (W_ij = W_{i-1,j}
 * e^{g_i}), never differences of sums, so that e^{-inf} = 0 is as good as any.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/linear_cuda.h"
#include "attention/linear_cuda_scratch.cuh"
#include <cuda_bf16.h>
#include <vector>

using namespace ra_linear;

namespace
{

const char subsystem[] = "linear";
constexpr int C = 32, COLUMNS = 32, THREADS = 256, GROUPS = THREADS / COLUMNS, MOST_DIM = 256;

struct segment_t {
    int64_t row, rows;
    const float *in;
    float *out;
};

struct params_t {
    const segment_t *segments;
    const void *q, *k, *v;
    const float *decay;
    void *o;
    int64_t q_stride, k_stride, v_stride, o_stride, decay_stride;
    float scale;
    int32_t heads, key_dim, value_dim, panels, pitch, state_only;
};

struct shared_t {
    float *state, *q, *k, *v, *score, *weight, *factor, *reach; /* pitch: floats a row of q, k */
    __device__ shared_t(float *base, int pitch)
    {
        state = base;                      /* [key_dim, COLUMNS] */
        q = state + (pitch - 1) * COLUMNS; /* [C, pitch] */
        k = q + C * pitch;                 /* [C, pitch] */
        v = k + C * pitch;                 /* [C, COLUMNS] */
        score = v + C * COLUMNS;           /* [C, C + 1] P */
        weight = score + C * (C + 1);      /* [C, C + 1] W */
        factor = weight + C * (C + 1);     /* [C] e^{g_i} */
        reach = factor + C;                /* [C] e^{b_i} */
    }
};

size_t shared_bytes(int pitch)
{
    return ((pitch - 1) * (size_t)COLUMNS + 2 * C * (size_t)pitch + C * COLUMNS + 2 * C * (C + 1) +
            2 * C) *
           sizeof(float);
}

__device__ __forceinline__ float widen(float x)
{
    return x;
}

__device__ __forceinline__ float widen(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

__device__ __forceinline__ void narrow(float x, float *to)
{
    *to = x;
}

__device__ __forceinline__ void narrow(float x, __nv_bfloat16 *to)
{
    *to = __float2bfloat16(x);
}

/* n rows of width elements, zeros below. */
template <class T>
__device__ void load_rows(float *to, int pitch, const void *from, int64_t stride, int64_t offset,
                          int64_t row, int n, int width)
{
    const T *base = static_cast<const T *>(from) + row * stride + offset;
    for (int i = threadIdx.x; i < C * width; i += THREADS) {
        const int r = i / width, d = i - r * width;
        to[r * pitch + d] = r < n ? widen(base[r * stride + d]) : 0.0f;
    }
}

/* W and e^{b_i} of a chunk: lane j of the first warp walks column j. */
__device__ void weigh(const params_t &p, const shared_t &shared, int64_t row, int head, int n)
{
    const int lane = threadIdx.x;
    if (lane >= C)
        return;
    shared.factor[lane] =
        lane < n ? expf(p.decay[p.decay_stride > 0 ? (row + lane) * p.decay_stride + head : head])
                 : 1.0f;
    __syncwarp();
    float w = 0.0f, reach = 1.0f;
    for (int i = 0; i < C; i++) {
        const float f = shared.factor[i];
        w = i == lane ? 1.0f : w * f;
        shared.weight[i * (C + 1) + lane] = w;
        reach *= f;
        if (i == lane)
            shared.reach[i] = reach;
    }
}

__device__ void scores(const shared_t &shared, int key_dim, int pitch, float scale)
{
    for (int i = threadIdx.x; i < C * C; i += THREADS) {
        const int row = i / C, column = i % C;
        float sum = 0.0f;
        for (int d = 0; column <= row && d < key_dim; d++)
            sum = fmaf(shared.q[row * pitch + d], shared.k[column * pitch + d], sum);
        const float w = shared.weight[row * (C + 1) + column];
        shared.score[row * (C + 1) + column] = w > 0.0f ? scale * w * sum : 0.0f;
    }
}

template <class T>
__device__ void outputs(const params_t &p, const shared_t &shared, int64_t row, int head,
                        int column0, int n)
{
    const int column = threadIdx.x % COLUMNS;
    for (int i = threadIdx.x / COLUMNS; i < n; i += GROUPS) {
        float far = 0.0f, near = 0.0f;
        for (int d = 0; d < p.key_dim; d++)
            far = fmaf(shared.q[i * p.pitch + d], shared.state[d * COLUMNS + column], far);
        for (int j = 0; j <= i; j++)
            near = fmaf(shared.score[i * (C + 1) + j], shared.v[j * COLUMNS + column], near);
        const float reach = shared.reach[i];
        const float all = near + (reach > 0.0f ? p.scale * reach * far : 0.0f);
        if (column0 + column < p.value_dim)
            narrow(all, static_cast<T *>(p.o) + (row + i) * p.o_stride +
                            (int64_t)head * p.value_dim + column0 + column);
    }
}

__device__ void update(const shared_t &shared, int key_dim, int pitch, int n)
{
    const int column = threadIdx.x % COLUMNS;
    const float reach = shared.reach[n - 1];
    const float *weight = shared.weight + (n - 1) * (C + 1);
    for (int d = threadIdx.x / COLUMNS; d < key_dim; d += GROUPS) {
        float sum = 0.0f;
        for (int j = 0; j < n; j++)
            sum = fmaf(shared.k[j * pitch + d] * weight[j], shared.v[j * COLUMNS + column], sum);
        float *state = &shared.state[d * COLUMNS + column];
        *state = reach > 0.0f ? fmaf(reach, *state, sum) : sum;
    }
}

template <class T> __global__ void __launch_bounds__(THREADS) linear_kernel(params_t p)
{
    extern __shared__ __align__(16) float base[];
    const shared_t shared(base, p.pitch);
    const int panel = blockIdx.x % p.panels, column0 = panel * COLUMNS;
    const int64_t unit = blockIdx.x / p.panels;
    const int head = (int)(unit % p.heads);
    const segment_t segment = p.segments[unit / p.heads];
    const int columns = min(COLUMNS, p.value_dim - column0);
    const int64_t state_at = (int64_t)head * p.key_dim * p.value_dim + column0;
    const int64_t key_at = (int64_t)head * p.key_dim, value_at = (int64_t)head * p.value_dim;
    for (int i = threadIdx.x; i < p.key_dim * COLUMNS; i += THREADS) {
        const int d = i / COLUMNS, e = i % COLUMNS;
        shared.state[i] =
            segment.in && e < columns ? segment.in[state_at + d * p.value_dim + e] : 0.0f;
    }
    for (int i = threadIdx.x; i < C * COLUMNS; i += THREADS)
        shared.v[i] = 0.0f; /* columns behind the last stay 0 */
    for (int64_t done = 0; done < segment.rows; done += C) {
        const int64_t row = segment.row + done;
        const int n = (int)min((int64_t)C, segment.rows - done);
        __syncthreads();
        weigh(p, shared, row, head, n);
        load_rows<T>(shared.k, p.pitch, p.k, p.k_stride, key_at, row, n, p.key_dim);
        load_rows<T>(shared.v, COLUMNS, p.v, p.v_stride, value_at + column0, row, n, columns);
        if (!p.state_only) {
            load_rows<T>(shared.q, p.pitch, p.q, p.q_stride, key_at, row, n, p.key_dim);
            __syncthreads();
            scores(shared, p.key_dim, p.pitch, p.scale);
            __syncthreads();
            outputs<T>(p, shared, row, head, column0, n);
        }
        __syncthreads();
        update(shared, p.key_dim, p.pitch, n);
    }
    __syncthreads();
    for (int i = threadIdx.x; segment.out && i < p.key_dim * COLUMNS; i += THREADS) {
        const int d = i / COLUMNS, e = i % COLUMNS;
        if (e < columns)
            segment.out[state_at + d * p.value_dim + e] = shared.state[i];
    }
}

__global__ void __launch_bounds__(256)
    carry_kernel(int64_t count, int64_t state_per_head, const float *total, const float *before,
                 float *after)
{
    const int64_t at = blockIdx.x * 256ll + threadIdx.x;
    if (at < count) {
        const float decay = (float)exp((double)total[at / state_per_head]);
        after[at] = decay * before[at] + after[at];
    }
}

params_t params_of(const ra_linear_args_t *args, bool state_only)
{
    params_t p = {};
    p.q = args->q;
    p.k = args->k;
    p.v = args->v;
    p.o = args->o;
    p.q_stride = args->q_stride;
    p.k_stride = args->k_stride;
    p.v_stride = args->v_stride;
    p.o_stride = args->o_stride;
    p.decay = args->log_decay;
    p.decay_stride = args->log_decay_stride;
    p.scale = args->scale;
    p.heads = args->heads;
    p.key_dim = args->key_dim;
    p.value_dim = args->value_dim;
    p.panels = (args->value_dim + COLUMNS - 1) / COLUMNS;
    p.pitch = args->key_dim + 1;
    p.state_only = state_only;
    return p;
}

/* Segments and, when constant, decays. */
cudaError_t place(const ra_linear_args_t *args, const std::vector<segment_t> &segments,
                  scratch_t *scratch, params_t *p)
{
    const size_t segment_bytes = segments.size() * sizeof(segment_t);
    const size_t decay_bytes = args->log_decay_stride > 0 ? 0 : args->heads * sizeof(float);
    std::vector<char> host(segment_bytes + decay_bytes);
    memcpy(host.data(), segments.data(), segment_bytes);
    if (decay_bytes > 0)
        memcpy(host.data() + segment_bytes, args->log_decay, decay_bytes);
    cudaError_t error = scratch->take(host.size());
    if (error != cudaSuccess)
        return error;
    p->segments = static_cast<const segment_t *>(scratch->data);
    if (decay_bytes > 0)
        p->decay =
            reinterpret_cast<const float *>(static_cast<char *>(scratch->data) + segment_bytes);
    return upload(scratch->data, host.data(), host.size(), scratch->stream);
}

} // namespace

bool ra_linear_cuda_fits(const ra_linear_args_t *shape)
{
    return (shape->dtype == RA_F32 || shape->dtype == RA_BF16) && shape->key_dim <= MOST_DIM &&
           shape->value_dim <= MOST_DIM;
}

ra_status_t ra_linear_cuda_launch(const ra_linear_args_t *args, bool state_only,
                                  struct CUstream_st *stream)
{
    if (!ra_linear_cuda_fits(args))
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "CUDA linear attention takes F32 or BF16 and dims 1 to %d, not %d and %d",
                       MOST_DIM, args->key_dim, args->value_dim);
    std::vector<segment_t> segments;
    for (int64_t i = 0; i < args->segment_count; i++) {
        const ra_linear_segment_t &s = args->segments[i];
        if (!state_only || s.state_out)
            segments.push_back({s.row_begin, s.row_count, s.state_in, s.state_out});
    }
    params_t p = params_of(args, state_only);
    const int64_t units = (int64_t)segments.size() * args->heads * p.panels;
    if (units == 0)
        return RA_OK;
    if (units > INT32_MAX)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "%lld units of work", (long long)units);
    scratch_t scratch(stream);
    cudaError_t error = place(args, segments, &scratch, &p);
    void (*kernel)(params_t) =
        args->dtype == RA_F32 ? linear_kernel<float> : linear_kernel<__nv_bfloat16>;
    const size_t bytes = shared_bytes(p.pitch);
    if (error == cudaSuccess)
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error == cudaSuccess) {
        kernel<<<(unsigned)units, THREADS, bytes, stream>>>(p);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        return ra_fail(error == cudaErrorMemoryAllocation ? RA_ERR_NOMEM : RA_ERR_DEVICE, subsystem,
                       "linear attention, %lld units, %zu bytes shared: %s", (long long)units,
                       bytes, cudaGetErrorString(error));
    return RA_OK;
}

ra_status_t ra_linear_cuda_carry(int32_t heads, int64_t state_per_head,
                                 const float *total_log_decay, const float *before, float *after,
                                 struct CUstream_st *stream)
{
    const int64_t count = heads * state_per_head;
    if (!before || count == 0)
        return RA_OK;
    carry_kernel<<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(
        count, state_per_head, total_log_decay, before, after);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "carry of %lld values: %s", (long long)count,
                       cudaGetErrorString(error));
    return RA_OK;
}
