/**
 * @file  attention/linear_sm90_thread.cuh
 * @brief What one consumer thread of the Hopper linear attention kernel does to its fragments
 *        between matrix products: decays, state, scores, outputs. Internal to linear_sm90.cu.
 *
 * Fragments are those of ra_wgmma. Powers of a decay are e^{g n} with n >= 0, each from one
 * exponential or a product of two or more of them, never a quotient.
 */
#ifndef RA_ATTENTION_LINEAR_SM90_THREAD_CUH
#define RA_ATTENTION_LINEAR_SM90_THREAD_CUH

#include "attention/linear_sm90_shared.cuh"
#include <cuda_bf16.h>

namespace ra_linear
{

/* Where a thread stands in the fragments of its warpgroup. */
struct thread_t {
    int warp, lane, row, column; /* of accumulator 0 */
    __device__ __forceinline__ thread_t()
    {
        warp = (threadIdx.x >> 5) & 3;
        lane = threadIdx.x & 31;
        row = 16 * warp + (lane >> 2);
        column = 2 * (lane & 3);
    }
    /* Byte offset in a box of this lane's line of matrices (row0, column0), of which four make up
     * 16 x 16: to the right second (rows_first = 0) or below second (rows_first = 1). */
    __device__ __forceinline__ uint32_t line(int row0, int column0, int rows_first) const
    {
        const int matrix = lane >> 3, low = matrix & 1, high = matrix >> 1;
        const int r = row0 + 8 * (rows_first ? low : high) + (lane & 7);
        const int c = column0 + 8 * (rows_first ? high : low);
        return (uint32_t)(128 * r + ((2 * c) ^ ((r & 7) << 4)));
    }
};

/* Weights of scores and outputs of one head. */
struct weights_t {
    float score[9][2]; /* scale e^{g (i - j)} of accumulator (c, r, b) at [r - c + 7][b] */
    float output[2];   /* scale e^{g (i + 1)}, column i of accumulator (0, r, b) at [b] */
    float eight;       /* e^{8 g}, from one column block to the next */
    __device__ __forceinline__ void set(float log_decay, float scale, const thread_t &t)
    {
        const float log2_decay = log_decay * LOG2E;
#pragma unroll
        for (int d = 0; d < 9; d++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int apart = t.row - (t.column + b) + 8 * (d - 7);
                score[d][b] = apart < 0 ? 0.0f : scale * ra_exp2(log2_decay * (float)apart);
            }
        eight = ra_exp2(log2_decay * 8.0f);
#pragma unroll
        for (int b = 0; b < 2; b++)
            output[b] = scale * ra_exp2(log2_decay * (float)(t.column + b + 1));
    }
};

template <int N>
__device__ __forceinline__ void load_state(const float *in, int value, const thread_t &t,
                                           float (&s)[N])
{
    constexpr int D = 2 * N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int key = 8 * (i >> 2) + t.column + (i & 1);
        s[i] = in ? in[key * D + value + 8 * ((i >> 1) & 1)] : 0.0f;
    }
}

template <int N>
__device__ __forceinline__ void store_state(float *out, int value, const thread_t &t,
                                            const float (&s)[N])
{
    constexpr int D = 2 * N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int key = 8 * (i >> 2) + t.column + (i & 1);
        out[key * D + value + 8 * ((i >> 1) & 1)] = s[i];
    }
}

/* Rows of k and v behind the last token may hold anything; they count as zero. The barrier in front
 * orders nothing that the stage's own barriers leave open; racecheck does not see that a lane which
 * gives a stage back speaks for its warp. */
template <class C>
__device__ __forceinline__ void clear_tail(unsigned char *stage, int n, int thread)
{
    ra_bar_sync(1, 128 * C::WG);
    const int lines = (CHUNK - n) * 8;
    for (int i = thread; i < 2 * C::BOXES * lines; i += 128 * C::WG) {
        const int box = i / lines, line = i - box * lines;
        *reinterpret_cast<uint4 *>(stage + C::K + box * BOX + n * 128 + line * 16) =
            make_uint4(0, 0, 0, 0);
    }
    ra_fence_proxy_async_shared();
    ra_bar_sync(1, 128 * C::WG);
}

/* v~: v^T in operand registers times the decay to the end of the chunk. */
struct value_weights_t {
    float last[2][2]; /* e^{g (63 - j)} of tokens j = 48 + 8 h + column + b */
    float sixteen, over_chunk, log2_decay;

    __device__ __forceinline__ void set(float log_decay, const thread_t &t)
    {
        log2_decay = log_decay * LOG2E;
        over_chunk = expf(log_decay * CHUNK);
        sixteen = ra_exp2(log2_decay * 16.0f);
#pragma unroll
        for (int i = 0; i < 4; i++)
            last[i >> 1][i & 1] =
                ra_exp2(log2_decay * (float)(15 - 8 * (i >> 1) - (t.column + (i & 1))));
    }

    static __device__ __forceinline__ void scale(const uint32_t (&v)[4], const float (&w)[2][2],
                                                 uint32_t (&to)[4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
            to[i] = ra_pack_bf16(__uint_as_float(v[i] << 16) * w[i >> 1][0],
                                 __uint_as_float(v[i] & 0xFFFF0000u) * w[i >> 1][1]);
    }

    /* @return the state's decay over the chunk's n tokens. */
    __device__ __forceinline__ float apply(const uint32_t (&v)[4][4], int n, const thread_t &t,
                                           uint32_t (&to)[4][4]) const
    {
        float w[2][2];
        if (n == CHUNK) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i >> 1][i & 1] = last[i >> 1][i & 1];
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                scale(v[i], w, to[i]);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    w[j >> 1][j & 1] *= sixteen;
            }
            return over_chunk;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int after = n - 1 - (16 * i + 8 * (j >> 1) + t.column + (j & 1));
                w[j >> 1][j & 1] = after < 0 ? 0.0f : ra_exp2(log2_decay * (float)after);
            }
            scale(v[i], w, to[i]);
        }
        return ra_exp2(log2_decay * (float)n);
    }
};

/* 64 tokens of v^T, 16 rows a warp. */
__device__ __forceinline__ void load_values(uint32_t (&v)[4][4], uint32_t box, const thread_t &t)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        ra_ldmatrix_x4_trans(v[i], box + t.line(16 * i, 16 * t.warp, 0));
}

/* Scores to bf16 weights of v, in rows of 64 in shared memory. */
__device__ __forceinline__ void store_scores(const float (&sc)[32], const weights_t &weights,
                                             const thread_t &t, uint32_t box)
{
    uint32_t pair[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int d = (i & 1) - (i >> 1) + 7;
        pair[i] =
            ra_pack_bf16(sc[2 * i] * weights.score[d][0], sc[2 * i + 1] * weights.score[d][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        ra_stmatrix_x4(box + t.line(16 * t.warp, 16 * i, 1), pair[4 * i], pair[4 * i + 1],
                       pair[4 * i + 2], pair[4 * i + 3]);
}

/* O^T of one chunk to rows of o, by way of shared memory so that lines are written whole. */
__device__ __forceinline__ void store_output(const params_t &p, const step_t &step,
                                             const float (&o)[32], const thread_t &t,
                                             unsigned char *box, __nv_bfloat16 *to, int barrier)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        ra_stmatrix_x4_trans(
            ra_smem_addr(box) + t.line(16 * i, 16 * t.warp, 0),
            ra_pack_bf16(o[8 * i], o[8 * i + 1]), ra_pack_bf16(o[8 * i + 2], o[8 * i + 3]),
            ra_pack_bf16(o[8 * i + 4], o[8 * i + 5]), ra_pack_bf16(o[8 * i + 6], o[8 * i + 7]));
    const int n = step.n_flags & STEP_N, thread = threadIdx.x & 127;
    ra_bar_sync(barrier, 128);
    const int row = thread >> 3, line = thread & 7;
    const unsigned char *from = box + 128 * row + ((line ^ (row & 7)) << 4);
    to += (step.row + row) * p.o_stride + 8 * line;
#pragma unroll
    for (int i = 0; i < 4; i++, from += 16 * 128, to += 16 * p.o_stride)
        if (16 * i + row < n)
            __stcs(reinterpret_cast<uint4 *>(to), *reinterpret_cast<const uint4 *>(from));
}

} // namespace ra_linear

#endif
