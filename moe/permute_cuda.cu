/*
 * moe/permute_cuda.cu - slots sorted by expert, and their results summed by token.
 *
 * A stable counting sort in four launches: tokens are cut into chunks; a chunk's tokens of one
 * expert are a bit mask, whose population counts give both the chunk's count and a slot's rank in
 * it, in token order whatever the order of the threads.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "moe/experts_cuda.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace
{

const char subsystem[] = "moe";

constexpr int SORT_THREADS = 256, TABLE_THREADS = 1024;

struct sort_t {
    ra_moe_cuda_sort_t call;
    int32_t experts, words, chunks; /* words: of 32 tokens, a chunk */
    int32_t *before; /* [experts, chunks] slots of the expert in this chunk; then in earlier ones */
    int32_t *total;  /* [experts] */
    int32_t *begin;  /* [experts] first row */
};

int32_t words_of(int32_t experts)
{
    return experts <= 1024 ? 4 : 1;
}

int64_t chunks_of(int64_t rows, int32_t experts)
{
    const int64_t chunk = 32 * words_of(experts);
    return (rows + chunk - 1) / chunk;
}

/* Bit t of mask[expert]: the chunk's token t chose it. */
__device__ void mark_choices(const sort_t &s, uint32_t *mask, int64_t row, int rows)
{
    for (int i = threadIdx.x; i < s.experts * s.words; i += blockDim.x)
        mask[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * s.call.top_k; i += blockDim.x) {
        const int t = i / s.call.top_k, e = s.call.expert[row * s.call.top_k + i] - s.call.first;
        if (e >= 0 && e < s.experts)
            atomicOr(mask + e * s.words + (t >> 5), 1u << (t & 31));
    }
    __syncthreads();
}

__global__ void __launch_bounds__(SORT_THREADS) count_kernel(const sort_t s)
{
    extern __shared__ uint32_t mask[];
    const int64_t row = (int64_t)blockIdx.x * 32 * s.words;
    mark_choices(s, mask, row, (int)min((int64_t)32 * s.words, s.call.rows - row));
    for (int e = threadIdx.x; e < s.experts; e += blockDim.x) {
        int count = 0;
        for (int w = 0; w < s.words; w++)
            count += __popc(mask[e * s.words + w]);
        s.before[(int64_t)e * s.chunks + blockIdx.x] = count;
    }
}

/* Exclusive sum over the block's threads. @a sums: [32] shared. */
__device__ __forceinline__ int scan_block(int value, int *sums, int *total_p)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    int sum = value;
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        sum += lane >= d ? other : 0;
    }
    __syncthreads(); /* the last call's sums have been read */
    if (lane == 31)
        sums[warp] = sum;
    __syncthreads();
    int below = 0, total = 0;
    for (int w = 0; w < warps; w++) {
        below += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    *total_p = total;
    return below + sum - value;
}

/* One expert a block: counts of chunks to counts of the chunks before. */
__global__ void __launch_bounds__(SORT_THREADS) chunks_kernel(const sort_t s)
{
    __shared__ int sums[32];
    int32_t *before = s.before + (int64_t)blockIdx.x * s.chunks;
    int carry = 0;
    for (int at = 0; at < s.chunks; at += SORT_THREADS) {
        const int i = at + threadIdx.x;
        int total;
        const int sum = scan_block(i < s.chunks ? before[i] : 0, sums, &total);
        if (i < s.chunks)
            before[i] = carry + sum;
        carry += total;
    }
    if (threadIdx.x == 0)
        s.total[blockIdx.x] = carry;
}

/* One block: where each expert begins, its tiles, and the gap behind it. */
__global__ void __launch_bounds__(TABLE_THREADS) table_kernel(const sort_t s)
{
    __shared__ int sums[32];
    __shared__ int first_tile[RA_ROUTER_MAX_EXPERTS];
    int rows = 0, tiles = 0;
    for (int at = 0; at < s.experts; at += TABLE_THREADS) {
        const int e = at + threadIdx.x, count = e < s.experts ? s.total[e] : 0;
        int all_rows, all_tiles;
        const int row = scan_block((count + RA_MOE_ROW_PAD - 1) / RA_MOE_ROW_PAD * RA_MOE_ROW_PAD,
                                   sums, &all_rows);
        const int tile =
            scan_block((count + RA_MOE_TILE_ROWS - 1) / RA_MOE_TILE_ROWS, sums, &all_tiles);
        if (e < s.experts) {
            s.begin[e] = rows + row;
            first_tile[e] = tiles + tile;
        }
        rows += all_rows;
        tiles += all_tiles;
    }
    if (threadIdx.x == 0)
        *s.call.tile_count = tiles;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (int e = threadIdx.x >> 5; e < s.experts; e += TABLE_THREADS / 32) {
        const int count = s.total[e], begin = s.begin[e];
        for (int i = lane; i * RA_MOE_TILE_ROWS < count; i += 32) {
            const int done = i * RA_MOE_TILE_ROWS;
            s.call.tiles[first_tile[e] + i] =
                ra_moe_tile_t{begin + done, min(count - done, (int)RA_MOE_TILE_ROWS), e, 0};
        }
        const int padded = (count + RA_MOE_ROW_PAD - 1) / RA_MOE_ROW_PAD * RA_MOE_ROW_PAD;
        for (int i = count + lane; i < padded; i += 32)
            s.call.source[begin + i] = -1;
    }
}

__global__ void __launch_bounds__(SORT_THREADS) place_kernel(const sort_t s)
{
    extern __shared__ uint32_t mask[];
    const int64_t row = (int64_t)blockIdx.x * 32 * s.words;
    const int rows = (int)min((int64_t)32 * s.words, s.call.rows - row);
    mark_choices(s, mask, row, rows);
    for (int i = threadIdx.x; i < rows * s.call.top_k; i += blockDim.x) {
        const int64_t slot = row * s.call.top_k + i;
        const int t = i / s.call.top_k, e = s.call.expert[slot] - s.call.first;
        int position = -1;
        if (e >= 0 && e < s.experts) {
            const uint32_t *bits = mask + e * s.words;
            position = s.begin[e] + s.before[(int64_t)e * s.chunks + blockIdx.x] +
                       __popc(bits[t >> 5] & ((1u << (t & 31)) - 1));
            for (int w = 0; w < t >> 5; w++)
                position += __popc(bits[w]);
            s.call.source[position] = (int32_t)(row + t);
        }
        s.call.position[slot] = position;
    }
}

ra_status_t check(const char *what)
{
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, subsystem, "%s launch: %s", what, cudaGetErrorString(error));
    return RA_OK;
}

} // namespace

int64_t ra_moe_cuda_sorted_rows(int64_t slots, int32_t experts)
{
    const int64_t used = slots < experts ? slots : experts;
    return (slots + used * (RA_MOE_ROW_PAD - 1)) / RA_MOE_ROW_PAD * RA_MOE_ROW_PAD;
}

int64_t ra_moe_cuda_tiles(int64_t slots, int32_t experts)
{
    return slots / RA_MOE_TILE_ROWS + (slots < experts ? slots : experts);
}

int64_t ra_moe_cuda_sort_scratch(int64_t rows, int32_t experts)
{
    return experts * (chunks_of(rows, experts) + 2);
}

ra_status_t ra_moe_cuda_sort(const ra_moe_cuda_sort_t *call, struct CUstream_st *stream)
{
    const int32_t experts = call->last - call->first;
    if (call->rows < 0 || call->rows * call->top_k > INT32_MAX / 2 || experts < 0 ||
        experts > RA_ROUTER_MAX_EXPERTS)
        return ra_fail(RA_ERR_SHAPE, subsystem, "%lld rows of %d choices among %d experts",
                       (long long)call->rows, call->top_k, experts);
    sort_t s = {*call};
    s.experts = experts;
    s.words = words_of(experts);
    s.chunks = (int32_t)chunks_of(call->rows, experts);
    s.before = call->scratch;
    s.total = s.before + (int64_t)experts * s.chunks;
    s.begin = s.total + experts;
    const unsigned mask_bytes = (unsigned)(experts * s.words) * 4;
    if (s.chunks > 0)
        count_kernel<<<s.chunks, SORT_THREADS, mask_bytes, stream>>>(s);
    if (experts > 0)
        chunks_kernel<<<experts, SORT_THREADS, 0, stream>>>(s);
    table_kernel<<<1, TABLE_THREADS, 0, stream>>>(s);
    if (s.chunks > 0)
        place_kernel<<<s.chunks, SORT_THREADS, mask_bytes, stream>>>(s);
    return check("slot sort");
}

/* ---- combine ------------------------------------------------------------------------------- */

namespace
{

template <class T, int N> struct values_t;

template <> struct values_t<__nv_bfloat16, 8> {
    static __device__ __forceinline__ void load(const __nv_bfloat16 *from, float (&to)[8])
    {
        const uint4 raw = __ldg(reinterpret_cast<const uint4 *>(from));
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = __uint_as_float(words[i] << 16);
            to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
        }
    }
};

template <class T> struct values_t<T, 1> {
    static __device__ __forceinline__ void load(const T *from, float (&to)[1])
    {
        to[0] = (float)*from;
    }
};

template <int N>
__device__ __forceinline__ void put(float *y, const float (&sum)[N], bool accumulate)
{
    if (N == 8) {
        float4 *to = reinterpret_cast<float4 *>(y);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float4 old = accumulate ? to[i] : make_float4(0, 0, 0, 0);
            const float *s = sum + 4 * i;
            to[i] = accumulate ? make_float4(old.x + s[0], old.y + s[1], old.z + s[2], old.w + s[3])
                               : make_float4(s[0], s[1], s[2], s[3]);
        }
    } else {
        for (int i = 0; i < N; i++)
            y[i] = accumulate ? y[i] + sum[i] : sum[i];
    }
}

template <class T, int N> __global__ void combine_kernel(const ra_moe_cuda_combine_t c)
{
    const int64_t row = blockIdx.x;
    const T *out = static_cast<const T *>(c.out), *shared = static_cast<const T *>(c.shared);
    const int32_t *position = c.position + row * c.top_k;
    const float *weight = c.weight + row * c.top_k;
    for (int64_t at = (int64_t)threadIdx.x * N; at < c.hidden; at += (int64_t)blockDim.x * N) {
        float sum[N], value[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            sum[i] = 0.0f;
#pragma unroll 8
        for (int j = 0; j < c.top_k; j++) {
            values_t<T, N>::load(out + __ldg(position + j) * c.hidden + at, value);
            const float w = __ldg(weight + j);
#pragma unroll
            for (int i = 0; i < N; i++)
                sum[i] = __fmaf_rn(w, value[i], sum[i]);
        }
        if (shared) {
            values_t<T, N>::load(shared + row * c.hidden + at, value);
#pragma unroll
            for (int i = 0; i < N; i++)
                sum[i] = __fadd_rn(sum[i], value[i]);
        }
        put(c.y + row * c.y_stride + at, sum, c.accumulate);
    }
}

} // namespace

ra_status_t ra_moe_cuda_combine(const ra_moe_cuda_combine_t *call, struct CUstream_st *stream)
{
    if (call->rows == 0)
        return RA_OK;
    const unsigned rows = (unsigned)call->rows;
    const bool wide =
        call->dtype == RA_BF16 && call->hidden % 8 == 0 && call->y_stride % 4 == 0 &&
        ((uintptr_t)call->out | (uintptr_t)call->shared | (uintptr_t)call->y) % 16 == 0;
    if (wide)
        combine_kernel<__nv_bfloat16, 8><<<rows, 256, 0, stream>>>(*call);
    else if (call->dtype == RA_BF16)
        combine_kernel<__nv_bfloat16, 1><<<rows, 256, 0, stream>>>(*call);
    else
        combine_kernel<float, 1><<<rows, 256, 0, stream>>>(*call);
    return check("combine");
}
