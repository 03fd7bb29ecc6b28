/**
 * @file  attention/linear_sm90_shared.cuh
 * @brief What producer and consumers of the Hopper linear attention kernel share: parameters, tile
 *        sizes, the layout of shared memory, its barriers. Internal to linear_sm90.cu.
 */
#ifndef RA_ATTENTION_LINEAR_SM90_SHARED_CUH
#define RA_ATTENTION_LINEAR_SM90_SHARED_CUH

#include "attention/linear_sm90_ptx.cuh"
#include "base/sm90_slot.cuh"
#include <cuda_runtime.h>

namespace ra_linear
{

constexpr int CHUNK = 64;        /* tokens */
constexpr int BOX = CHUNK * 128; /* bytes of 64 rows of 64 bf16 */
constexpr int AHEAD = 2 * CHUNK; /* tokens fetched into the L2 before a stage is free for them */
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float NEGLIGIBLE = 48.0f; /* a tail starts where decay has fallen to 2^-48 */

/* Rows of one segment that are one unit of work a head. */
struct part_t {
    int32_t row, rows;
    int32_t from_tail, unused; /* from_tail: no state before it, so begin where it still counts */
    const float *in;           /* state before it [H, D, D], or NULL for zero */
    float *out;                /* state after it, or NULL */
};

/* The parts of one segment, state after state. */
struct fold_t {
    float *slots; /* [parts, H, D, D]: what part p adds becomes the state before part p */
    const float *in;
    float *out;
    int32_t parts, part_rows, last_rows, unused;
};

struct params_t {
    const part_t *parts;
    const float *decay;   /* [H] log-decays, finite */
    const int32_t *order; /* [H] heads by falling tail length, or NULL: head varies fastest */
    uint32_t *next;       /* units taken beyond the first of every CTA */
    void *o;
    int64_t o_stride;
    int32_t part_count, heads;
    float scale;
};

/* What lies in a stage: tokens [row, row + n) of one head. */
struct step_t {
    int32_t row, part;
    int32_t head;
    int32_t n_flags; /* n and the flags below */
};

enum { STEP_N = 0xFF, STEP_FIRST = 1 << 8, STEP_LAST = 1 << 9, STEP_END = 1 << 10 };

/* A warpgroup owns 64 value columns of the state, transposed: S^T [64, D]. */
template <int D_, bool STATE_ONLY_, int STAGES_> struct config_t {
    static constexpr int D = D_, STAGES = STAGES_, WG = D / 64, BOXES = D / 64;
    static constexpr bool STATE_ONLY = STATE_ONLY_;
    static constexpr int CTAS = D == 64 ? 2 : 1; /* a multiprocessor */
    static constexpr int THREADS = 128 * (WG + 1);
    static constexpr int PRODUCER_REGS = 24, CONSUMER_REGS = D == 64 ? 216 : 240;
    static constexpr int TILE = BOXES * BOX;
    static constexpr int Q = 0, K = STATE_ONLY ? 0 : TILE, V = K + TILE, STAGE = V + TILE;
    static constexpr int SCORES = STAGES * STAGE; /* one box a warpgroup */
    static constexpr int OUTPUT = SCORES + (STATE_ONLY ? 0 : WG * BOX);
    static constexpr int CONTROL = OUTPUT + (STATE_ONLY ? 0 : WG * BOX);
};

template <class C> struct __align__(16) control_t
{
    step_t step[C::STAGES];
    uint64_t full[C::STAGES], empty[C::STAGES];
};

template <class C> constexpr int shared_bytes()
{
    return C::CONTROL + (int)sizeof(control_t<C>);
}

/* First token of a part that still counts at its end, at a chunk's boundary. */
__device__ __forceinline__ int tail_begin(float log_decay, int rows)
{
    const float reach =
        log_decay < 0.0f ? NEGLIGIBLE / (-log_decay * LOG2E) : INFINITY; /* tokens */
    return reach < (float)rows ? (rows - 1 - (int)reach) / CHUNK * CHUNK : 0;
}

} // namespace ra_linear

#endif
