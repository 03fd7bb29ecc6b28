/* Carried softmax states in device memory: the start and the end of a sequence of folds. */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/softmax_cuda.h"
#include <cuda_runtime.h>

namespace
{

constexpr int THREADS = 256;

/* A block takes one row at a time: its m and l of every head, then its outputs. */
__global__ void __launch_bounds__(THREADS)
    reset(int64_t rows, int heads, int head_dim, ra_softmax_state_t state)
{
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        for (int h = threadIdx.x; h < heads; h += THREADS) {
            state.m[h * rows + r] = -INFINITY;
            state.l[h * rows + r] = 0.0f;
        }
        for (int i = threadIdx.x; i < heads * head_dim; i += THREADS)
            state.o[r * state.o_stride + i] = 0.0f;
    }
}

/* l = 0 only for rows that saw no key: m is -inf then and O is 0. */
__global__ void __launch_bounds__(THREADS)
    finish(int64_t rows, int heads, int head_dim, ra_softmax_state_t state, float *lse)
{
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        for (int i = threadIdx.x; i < heads * head_dim; i += THREADS) {
            const float l = state.l[i / head_dim * rows + r];
            float *o = state.o + r * state.o_stride + i;
            *o = l == 0.0f ? 0.0f : *o / l;
        }
        for (int h = threadIdx.x; lse && h < heads; h += THREADS) {
            const float m = state.m[h * rows + r], l = state.l[h * rows + r];
            lse[h * rows + r] = l == 0.0f ? -INFINITY : m + logf(l);
        }
    }
}

unsigned blocks_for(int64_t rows)
{
    return (unsigned)(rows < 65536 ? rows : 65536);
}

ra_status_t check_launch(const char *what)
{
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return ra_fail(RA_ERR_DEVICE, "attention", "softmax %s: %s", what,
                       cudaGetErrorString(error));
    return RA_OK;
}

} // namespace

ra_status_t ra_softmax_cuda_reset(int64_t rows, int32_t heads, int32_t head_dim,
                                  const ra_softmax_state_t *state, struct CUstream_st *stream)
{
    if (rows == 0)
        return RA_OK;
    reset<<<blocks_for(rows), THREADS, 0, stream>>>(rows, heads, head_dim, *state);
    return check_launch("reset");
}

ra_status_t ra_softmax_cuda_finish(int64_t rows, int32_t heads, int32_t head_dim,
                                   const ra_softmax_state_t *state, float *lse,
                                   struct CUstream_st *stream)
{
    if (rows == 0)
        return RA_OK;
    finish<<<blocks_for(rows), THREADS, 0, stream>>>(rows, heads, head_dim, *state, lse);
    return check_launch("finish");
}
