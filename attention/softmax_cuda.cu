/*
 * The complete kernel: any mask of softmax_block.h, F32 or BF16, any head size up to 256, any
 * device that CUDA still builds for. fp32 arithmetic throughout, on ordinary instructions; the row
 * a caller falls back to, and what softmax_sm90.cu is compared with.
 *
 * A block of 128 threads owns one row tile of one head and walks its key tiles in shared memory:
 * scores (a thread a key, half the rows), softmax (a warp for every fourth row), output (a thread a
 * column, all or some of the rows).
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/softmax_cuda.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace
{

const char subsystem[] = "attention";
constexpr int BM = 16, BN = 64, THREADS = 128, WARPS = THREADS / 32;

struct params_t {
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride, rows, keys;
    const ra_softmax_tile_t *tiles;
    const ra_softmax_segment_t *segments;
    const int2 *row_interval;
    const int32_t *key_pos;
    const float *key_score, *row_threshold, *key_bias;
    float *m, *l, *o;
    void *out;
    float *lse;
    int64_t o_stride, out_stride;
    float scale;
    int32_t group, head_dim, pitch; /* pitch: floats between rows in shared memory */
    int32_t fresh, out_is_f32;
};

struct shared_t {
    float *q, *kv, *s; /* [BM, pitch], [BN, pitch], [BM, BN + 4] */
    float *m, *l, *alpha;
    __device__ shared_t(float *base, int pitch)
    {
        q = base;
        kv = q + BM * pitch;
        s = kv + BN * pitch;
        m = s + BM * (BN + 4);
        l = m + BM;
        alpha = l + BM;
    }
};

size_t shared_bytes(int pitch)
{
    return ((BM + BN) * (size_t)pitch + BM * (BN + 4) + 3 * BM) * sizeof(float);
}

__device__ __forceinline__ float widen(float x)
{
    return x;
}

__device__ __forceinline__ float widen(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

/* Rows [first, first + count) of one head as floats; rows outside [low, high) become 0. */
template <class T>
__device__ void load_rows(float *to, const void *from, int64_t stride, int64_t offset,
                          int64_t first, int count, int64_t low, int64_t high, const params_t &p)
{
    const T *base = static_cast<const T *>(from) + offset;
    for (int i = threadIdx.x; i < count * p.pitch; i += THREADS) {
        const int r = i / p.pitch, d = i - r * p.pitch;
        const int64_t row = first + r;
        const bool there = d < p.head_dim && row >= low && row < high;
        to[i] = there ? widen(base[row * stride + d]) : 0.0f;
    }
}

__device__ bool visible(const params_t &p, const ra_softmax_segment_t &segment, int64_t key,
                        int64_t row, int head)
{
    if (key < segment.key_first || key >= segment.key_end)
        return false;
    const int kind = segment.flags & RA_TILE_MASK;
    if (kind != RA_TILE_FULL) {
        const int2 interval = p.row_interval[row];
        const int position = kind == RA_TILE_SHIFT ? (int)key + segment.pos_shift : p.key_pos[key];
        if (position < interval.x || position >= interval.y)
            return false;
    }
    return !p.key_score || p.key_score[head * p.keys + key] >= p.row_threshold[head * p.rows + row];
}

__device__ void scores(const params_t &p, const shared_t &shared,
                       const ra_softmax_segment_t &segment, const ra_softmax_tile_t &tile,
                       int64_t key0, int head)
{
    constexpr int ROWS = BM * BN / THREADS;
    const int column = threadIdx.x % BN, row0 = threadIdx.x / BN * ROWS;
    float sum[ROWS] = {};
    for (int d = 0; d < p.pitch - 4; d += 4) {
        const float4 k = *reinterpret_cast<const float4 *>(shared.kv + column * p.pitch + d);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 q = *reinterpret_cast<const float4 *>(shared.q + (row0 + r) * p.pitch + d);
            sum[r] = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, sum[r]))));
        }
    }
    const int64_t key = key0 + column;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float score = -INFINITY;
        if (row0 + r < tile.row_count && visible(p, segment, key, tile.row_begin + row0 + r, head))
            score = sum[r] * p.scale + (p.key_bias ? p.key_bias[key] : 0.0f);
        shared.s[(row0 + r) * (BN + 4) + column] = score;
    }
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int lane = 16; lane > 0; lane /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, lane));
    return x;
}

__device__ __forceinline__ float warp_sum(float x)
{
    for (int lane = 16; lane > 0; lane /= 2)
        x += __shfl_xor_sync(0xFFFFFFFF, x, lane);
    return x;
}

__device__ void soften(const shared_t &shared)
{
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < BM; r += WARPS) {
        float *s = shared.s + r * (BN + 4);
        const float a = s[lane], b = s[lane + 32], before = shared.m[r];
        const float m = fmaxf(before, warp_max(fmaxf(a, b)));
        const float base = m == -INFINITY ? 0.0f : m;
        const float pa = expf(a - base), pb = expf(b - base), sum = warp_sum(pa + pb);
        s[lane] = pa;
        s[lane + 32] = pb;
        __syncwarp(); /* every lane has read m */
        if (lane == 0) {
            const float alpha = before == m ? 1.0f : expf(before - base);
            shared.alpha[r] = alpha;
            shared.l[r] = shared.l[r] * alpha + sum;
            shared.m[r] = m;
        }
    }
}

/* TX threads along the columns, CN columns each; the others split the rows. */
template <int TX, int CN> struct output_t {
    static constexpr int ROWS = BM * TX / THREADS;
    float o[CN][ROWS];
    int column, row0;

    __device__ output_t()
    {
        column = threadIdx.x % TX;
        row0 = threadIdx.x / TX * ROWS;
    }
    __device__ void load(const params_t &p, const ra_softmax_tile_t &tile, int head)
    {
        for (int c = 0; c < CN; c++)
            for (int r = 0; r < ROWS; r++) {
                const int d = column + c * TX;
                const bool mine = !p.fresh && d < p.head_dim && row0 + r < tile.row_count;
                o[c][r] = mine ? p.o[(tile.row_begin + row0 + r) * p.o_stride +
                                     (int64_t)head * p.head_dim + d]
                               : 0.0f;
            }
    }
    __device__ void fold(const params_t &p, const shared_t &shared)
    {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < CN; c++)
                o[c][r] *= shared.alpha[row0 + r];
        for (int j = 0; j < BN; j += 4) {
            float v[CN][4];
#pragma unroll
            for (int c = 0; c < CN; c++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int d = column + c * TX;
                    v[c][i] = d < p.head_dim ? shared.kv[(j + i) * p.pitch + d] : 0.0f;
                }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 w =
                    *reinterpret_cast<const float4 *>(shared.s + (row0 + r) * (BN + 4) + j);
#pragma unroll
                for (int c = 0; c < CN; c++)
                    o[c][r] =
                        fmaf(w.x, v[c][0],
                             fmaf(w.y, v[c][1], fmaf(w.z, v[c][2], fmaf(w.w, v[c][3], o[c][r]))));
            }
        }
    }
    __device__ void store(const params_t &p, const shared_t &shared, const ra_softmax_tile_t &tile,
                          int head)
    {
        for (int c = 0; c < CN; c++)
            for (int r = 0; r < ROWS; r++) {
                const int d = column + c * TX;
                if (d >= p.head_dim || row0 + r >= tile.row_count)
                    continue;
                const int64_t row = tile.row_begin + row0 + r;
                const int64_t inside = (int64_t)head * p.head_dim + d;
                const float l = shared.l[row0 + r], x = l > 0.0f ? o[c][r] / l : 0.0f;
                if (!p.out)
                    p.o[row * p.o_stride + inside] = o[c][r];
                else if (p.out_is_f32)
                    static_cast<float *>(p.out)[row * p.out_stride + inside] = x;
                else
                    static_cast<__nv_bfloat16 *>(p.out)[row * p.out_stride + inside] =
                        __float2bfloat16(x);
            }
    }
};

__device__ void load_rows_state(const params_t &p, const shared_t &shared,
                                const ra_softmax_tile_t &tile, int head)
{
    const int r = threadIdx.x;
    if (r < BM) {
        const bool mine = !p.fresh && r < tile.row_count;
        shared.m[r] = mine ? p.m[head * p.rows + tile.row_begin + r] : -INFINITY;
        shared.l[r] = mine ? p.l[head * p.rows + tile.row_begin + r] : 0.0f;
        shared.alpha[r] = 1.0f;
    }
}

__device__ void store_rows_state(const params_t &p, const shared_t &shared,
                                 const ra_softmax_tile_t &tile, int head)
{
    const int r = threadIdx.x;
    if (r >= tile.row_count)
        return;
    const int64_t at = head * p.rows + tile.row_begin + r;
    if (!p.out) {
        p.m[at] = shared.m[r];
        p.l[at] = shared.l[r];
    } else if (p.lse) {
        p.lse[at] = shared.l[r] > 0.0f ? shared.m[r] + logf(shared.l[r]) : -INFINITY;
    }
}

template <class T, int TX, int CN> __global__ void __launch_bounds__(THREADS) fold(params_t p)
{
    extern __shared__ __align__(16) float base[];
    const shared_t shared(base, p.pitch);
    const ra_softmax_tile_t tile = p.tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / p.group;
    if (tile.steps == 0 && !p.fresh && !p.out)
        return;
    output_t<TX, CN> output;
    output.load(p, tile, head);
    load_rows_state(p, shared, tile, head);
    load_rows<T>(shared.q, p.q, p.q_stride, (int64_t)head * p.head_dim, tile.row_begin, BM, 0,
                 tile.row_begin + tile.row_count, p);
    const int64_t offset = (int64_t)kv_head * p.head_dim;
    for (int done = 0, at = tile.segment_begin; done < tile.steps; at++) {
        const ra_softmax_segment_t segment = p.segments[at];
        for (int t = 0; t < segment.tiles; t++, done++) {
            const int64_t key = segment.key_begin - (int64_t)t * BN;
            __syncthreads();
            load_rows<T>(shared.kv, p.k, p.k_stride, offset, key, BN, segment.key_first,
                         segment.key_end, p);
            __syncthreads();
            scores(p, shared, segment, tile, key, head);
            __syncthreads();
            load_rows<T>(shared.kv, p.v, p.v_stride, offset, key, BN, segment.key_first,
                         segment.key_end, p);
            soften(shared);
            __syncthreads();
            output.fold(p, shared);
        }
    }
    __syncthreads();
    output.store(p, shared, tile, head);
    store_rows_state(p, shared, tile, head);
}

typedef void (*kernel_t)(params_t);

template <class T> kernel_t kernel_for(int32_t head_dim)
{
    if (head_dim <= 32)
        return fold<T, 32, 1>;
    if (head_dim <= 64)
        return fold<T, 64, 1>;
    if (head_dim <= 128)
        return fold<T, 128, 1>;
    return fold<T, 128, 2>;
}

params_t params_of(const ra_softmax_cuda_call_t *call)
{
    const ra_softmax_block_t *block = call->block;
    const ra_softmax_tiles_layout_t *layout = call->layout;
    unsigned char *list = static_cast<unsigned char *>(call->tiles);
    params_t p = {};
    p.q = block->q;
    p.k = block->k;
    p.v = block->v;
    p.q_stride = block->q_stride;
    p.k_stride = block->k_stride;
    p.v_stride = block->v_stride;
    p.rows = block->rows;
    p.keys = block->keys;
    p.tiles = reinterpret_cast<ra_softmax_tile_t *>(list + layout->tiles);
    p.segments = reinterpret_cast<ra_softmax_segment_t *>(list + layout->segments);
    p.row_interval = reinterpret_cast<int2 *>(list + layout->row_interval);
    if (layout->key_pos >= 0)
        p.key_pos = reinterpret_cast<int32_t *>(list + layout->key_pos);
    p.key_score = block->mask.key_score;
    p.row_threshold = block->mask.row_threshold;
    p.key_bias = block->mask.key_bias;
    if (call->state) {
        p.m = call->state->m;
        p.l = call->state->l;
        p.o = call->state->o;
        p.o_stride = call->state->o_stride;
    }
    p.out = call->out;
    p.lse = call->lse;
    p.out_stride = call->out_stride;
    p.out_is_f32 = call->out_dtype == RA_F32;
    p.scale = block->scale;
    p.group = block->heads / block->kv_heads;
    p.head_dim = block->head_dim;
    p.pitch = (block->head_dim + 3) / 4 * 4 + 4;
    p.fresh = call->fresh;
    return p;
}

ra_status_t check_call(const ra_softmax_cuda_call_t *call)
{
    const ra_softmax_block_t *block = call->block;
    if (block->dtype != RA_F32 && block->dtype != RA_BF16)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "CUDA softmax takes F32 or BF16");
    if (block->head_dim < 1 || block->head_dim > 256)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "CUDA softmax takes head_dim 1 to 256, not %d", block->head_dim);
    if (block->kv_heads < 1 || block->heads % block->kv_heads != 0 || block->heads > 65535)
        return ra_fail(RA_ERR_SHAPE, subsystem, "%d heads over %d kv heads", block->heads,
                       block->kv_heads);
    if (call->layout->tile_rows != BM || call->layout->tile_keys != BN)
        return ra_fail(RA_ERR_SHAPE, subsystem, "tile list is %dx%d, kernel is %dx%d",
                       call->layout->tile_rows, call->layout->tile_keys, BM, BN);
    if ((!call->fresh || !call->out) && !call->state)
        return ra_fail(RA_ERR_SHAPE, subsystem, "state is missing");
    if (call->out && call->out_dtype != RA_F32 && call->out_dtype != RA_BF16)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "out is F32 or BF16");
    if (call->ready)
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                       "only the sm90 kernel waits for keys on the way");
    return RA_OK;
}

} // namespace

void ra_softmax_cuda_tile(int32_t *tile_rows_p, int32_t *tile_keys_p)
{
    *tile_rows_p = BM;
    *tile_keys_p = BN;
}

ra_status_t ra_softmax_cuda_launch(const ra_softmax_cuda_call_t *call, struct CUstream_st *stream)
{
    const ra_softmax_block_t *block = call->block;
    RA_TRY(check_call(call));
    if (call->layout->tile_count == 0)
        return RA_OK;
    const params_t p = params_of(call);
    const kernel_t kernel = block->dtype == RA_F32 ? kernel_for<float>(block->head_dim)
                                                   : kernel_for<__nv_bfloat16>(block->head_dim);
    const size_t bytes = shared_bytes(p.pitch);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error == cudaSuccess) {
        kernel<<<dim3((unsigned)call->layout->tile_count, (unsigned)block->heads), THREADS, bytes,
                 stream>>>(p);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "softmax launch, %zu bytes shared: %s", bytes,
                       cudaGetErrorString(error));
    return RA_OK;
}
