/*
 * attention/linear_chunk_simd.c - one head of one segment, chunk by chunk; once an instruction set.
 *
 * Contract   attention/linear_chunk.h; oracle linear_ref.c.
 * A chunk of n <= C tokens, S [Dk, Dv] the state entering it:
 *     O  = Q S                        register tiles; the rows of S are the panel
 *     o  = (scale e^{b_i}) O_i        written to its place
 *     P  = (Q K^T) * W                W_ij = scale e^{b_i - b_j} for j <= i, else 0
 *     o += P V                        blocks of BLOCK rows stop at the diagonal
 *     S  = e^{b_n} S + K^T V~         V~_j = e^{b_n - b_j} v_j
 * V is packed first, so o may lie on v. The state needs K, V and W's last row only, and the same
 * code makes it with and without outputs.
 *
 * Decay      Constant: W is Toeplitz, one table of e^{g m} read at a shifting offset. Per token:
 *            W_ij = W_{i-1,j} e^{g_i}, a product of factors <= 1, exact for e^{-inf} = 0. Factors
 *            that would be denormal count as 0. Nothing divides by a decay, nothing overflows.
 */
#include "attention/linear_cpu.h"

#include "base/checked.h"
#include "base/gemm_tile.h"
#include "base/simd.h"
#include "base/simd_transpose.h"
#include <float.h>
#include <math.h>

enum {
    CHUNK = RA_LINEAR_CHUNK,
    BLOCK = 16, /* rows of P that share a diagonal */
    ALIGN = 16  /* floats in a cache line and in the widest vector */
};

/* Working memory of a task; widths rounded up so that whole vectors can be read. */
typedef struct work {
    const ra_linear_task_t *task;
    int64_t key_dim, value_dim;
    int64_t value_pad;   /* floats between rows of state, value and output */
    float *state;        /* [key_dim, value_pad] */
    float *value;        /* [CHUNK, value_pad] v, then V~ */
    float *output;       /* [CHUNK, value_pad] Q S */
    float *key;          /* [key_dim, CHUNK] K^T */
    float *score;        /* [CHUNK, CHUNK] P */
    float *weight;       /* decay per token: [CHUNK, CHUNK] e^{b_i - b_j}, 0 above the diagonal */
    float *power;        /* constant decay: [2 CHUNK] e^{g (CHUNK - 1 - x)}, 0 from CHUNK on */
    float *row_factor;   /* [CHUNK] e^{b_i} */
    float chunk_decay;   /* e^{b_n} */
    int64_t power_count; /* tokens that the constant decay's tables serve; 0: per token */
} work_t;

static int64_t pad(int64_t n)
{
    return ra_ceil_div(n, ALIGN) * ALIGN;
}

static ra_status_t work_init(work_t *work, const ra_linear_task_t *task)
{
    int64_t key_dim = task->args->key_dim, value_pad = pad(task->args->value_dim);
    int64_t floats = key_dim * value_pad + 2 * CHUNK * value_pad + key_dim * CHUNK +
                     2 * CHUNK * CHUNK + 3 * CHUNK;
    float *at = ra_scratch(0, floats * (int64_t)sizeof(*at));
    if (at == NULL) {
        return RA_ERR_NOMEM;
    }
    *work = (work_t){.task = task,
                     .key_dim = key_dim,
                     .value_dim = task->args->value_dim,
                     .value_pad = value_pad};
    work->state = at;
    work->value = work->state + key_dim * value_pad;
    work->output = work->value + CHUNK * value_pad;
    work->key = work->output + CHUNK * value_pad;
    work->score = work->key + key_dim * CHUNK;
    work->weight = work->score + CHUNK * CHUNK;
    work->power = work->weight + CHUNK * CHUNK;
    work->row_factor = work->power + 2 * CHUNK;
    return RA_OK;
}

static void state_load(work_t *work)
{
    const float *from = work->task->segment->state_in;
    int64_t width = work->value_dim;
    memset(work->state, 0, (size_t)(work->key_dim * work->value_pad) * sizeof(*work->state));
    if (from == NULL) {
        return;
    }
    from += work->task->head * work->key_dim * width;
    for (int64_t d = 0; d < work->key_dim; d++) {
        memcpy(work->state + d * work->value_pad, from + d * width, (size_t)width * sizeof(*from));
    }
}

static void state_store(const work_t *work)
{
    float *to = work->task->segment->state_out;
    int64_t width = work->value_dim;
    if (to == NULL) {
        return;
    }
    to += work->task->head * work->key_dim * width;
    for (int64_t d = 0; d < work->key_dim; d++) {
        memcpy(to + d * width, work->state + d * work->value_pad, (size_t)width * sizeof(*to));
    }
}

/* e^x without denormals. */
static float decay_factor(double x)
{
    double factor = exp(x);
    return factor < (double)FLT_MIN ? 0 : (float)factor;
}

/* Tables for chunks of up to n tokens; the first chunk is the longest. */
static void constant_decay(work_t *work, int64_t n)
{
    if (work->power_count == 0) {
        double g = (double)work->task->args->log_decay[work->task->head];
        memset(work->power + CHUNK, 0, CHUNK * sizeof(*work->power));
        work->power[CHUNK - 1] = 1;
        for (int64_t m = 1; m <= n; m++) {
            work->row_factor[m - 1] = decay_factor(g * (double)m);
            if (m < CHUNK) {
                work->power[CHUNK - 1 - m] = work->row_factor[m - 1];
            }
        }
        work->power_count = n;
    }
    work->chunk_decay = work->row_factor[n - 1];
}

static void token_decay(work_t *work, int64_t row, int64_t n)
{
    const ra_linear_args_t *args = work->task->args;
    const float *g = args->log_decay + row * args->log_decay_stride + work->task->head;
    const vf smallest = vf_set1(FLT_MIN);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float *w = work->weight + i * CHUNK;
        double step = (double)g[i * args->log_decay_stride];
        vf factor = vf_set1(decay_factor(step));
        sum += step;
        work->row_factor[i] = decay_factor(sum);
        int64_t j = 0;
        for (; j < i; j += RA_VF_WIDTH) {
            vf product = vf_mul(vf_load(w - CHUNK + j), factor);
            vf_store(w + j, vf_select(vf_ge(product, smallest), product, vf_zero()));
        }
        for (; j < CHUNK; j++) {
            w[j] = 0;
        }
        w[i] = 1;
    }
    work->chunk_decay = work->row_factor[n - 1];
}

/* Row i of e^{b_i - b_j}, j = 0 .. CHUNK-1. */
static const float *weight_row(const work_t *work, int64_t i)
{
    return work->power_count > 0 ? work->power + CHUNK - 1 - i : work->weight + i * CHUNK;
}

static void pack_value(work_t *work, int64_t row, int64_t n)
{
    const ra_linear_args_t *args = work->task->args;
    const float *v = args->v + row * args->v_stride + work->task->head * work->value_dim;
    for (int64_t j = 0; j < n; j++) {
        float *to = work->value + j * work->value_pad;
        memcpy(to, v + j * args->v_stride, (size_t)work->value_dim * sizeof(*v));
        for (int64_t e = work->value_dim; e < work->value_pad; e++) {
            to[e] = 0;
        }
    }
}

static void product(const ra_tile_t *whole)
{
    for (int64_t col = 0; col < whole->cols; col += RA_TILE_COLS) {
        ra_tile_t panel = *whole;
        panel.cols = ra_min_i64(whole->cols - col, RA_TILE_COLS);
        panel.b = (const float *)whole->b + col;
        panel.c = whole->c + col;
        ra_tile_f32(&panel);
    }
}

/* S <- e^{b_n} S + K^T V~ */
static void update_state(work_t *work, const float *k, int64_t n)
{
    const float *w = weight_row(work, n - 1);
    for (int64_t j = 0; j < n; j++) {
        vf factor = vf_set1(w[j]);
        float *v = work->value + j * work->value_pad;
        for (int64_t e = 0; e < work->value_pad; e += RA_VF_WIDTH) {
            vf_store(v + e, vf_mul(factor, vf_load(v + e)));
        }
    }
    vf decay = vf_set1(work->chunk_decay);
    for (int64_t i = 0; i < work->key_dim * work->value_pad; i += RA_VF_WIDTH) {
        vf_store(work->state + i, vf_mul(decay, vf_load(work->state + i)));
    }
    product(&(ra_tile_t){.rows = work->key_dim,
                         .cols = work->value_dim,
                         .depth = n,
                         .a = k,
                         .a_row = 1,
                         .a_step = work->task->args->k_stride,
                         .b = work->value,
                         .b_step = work->value_pad,
                         .c = work->state,
                         .c_row = work->value_pad,
                         .accumulate = true});
}

/* o_i = scale e^{b_i} S^T q_i */
static void output_of_state(work_t *work, const float *q, float *o, int64_t n)
{
    const ra_linear_args_t *args = work->task->args;
    product(&(ra_tile_t){.rows = n,
                         .cols = work->value_dim,
                         .depth = work->key_dim,
                         .a = q,
                         .a_row = args->q_stride,
                         .a_step = 1,
                         .b = work->state,
                         .b_step = work->value_pad,
                         .c = work->output,
                         .c_row = work->value_pad});
    int64_t whole = work->value_dim - work->value_dim % RA_VF_WIDTH;
    int last = (int)(work->value_dim - whole);
    for (int64_t i = 0; i < n; i++) {
        vf factor = vf_set1(args->scale * work->row_factor[i]);
        const float *from = work->output + i * work->value_pad;
        float *to = o + i * args->o_stride;
        for (int64_t e = 0; e < whole; e += RA_VF_WIDTH) {
            vf_store(to + e, vf_mul(factor, vf_load(from + e)));
        }
        if (last > 0) {
            vf_store_n(to + whole, vf_mul(factor, vf_load_n(from + whole, last)), last);
        }
    }
}

/* P rows [begin, end), columns [0, end). */
static void scores(work_t *work, const float *q, int64_t begin, int64_t end)
{
    const ra_linear_args_t *args = work->task->args;
    float *score = work->score + begin * CHUNK;
    product(&(ra_tile_t){.rows = end - begin,
                         .cols = end,
                         .depth = work->key_dim,
                         .a = q + begin * args->q_stride,
                         .a_row = args->q_stride,
                         .a_step = 1,
                         .b = work->key,
                         .b_step = CHUNK,
                         .c = score,
                         .c_row = CHUNK});
    const vf smallest = vf_set1(FLT_MIN), scale = vf_set1(args->scale);
    for (int64_t i = begin; i < end; i++, score += CHUNK) {
        const float *w = weight_row(work, i);
        for (int64_t j = 0; j < end; j += RA_VF_WIDTH) {
            vf weight = vf_load(w + j);
            vf decayed = vf_mul(vf_mul(scale, weight), vf_load(score + j));
            /* not weight * score alone: a later token's overflow must not reach row i as inf * 0 */
            vf_store(score + j, vf_select(vf_ge(weight, smallest), decayed, vf_zero()));
        }
    }
}

/* o += P V */
static void output_of_chunk(work_t *work, const float *q, const float *k, float *o, int64_t n)
{
    const ra_linear_args_t *args = work->task->args;
    ra_transpose(k, args->k_stride, n, work->key_dim, work->key, CHUNK);
    for (int64_t d = 0; n % ALIGN != 0 && d < work->key_dim; d++) {
        memset(work->key + d * CHUNK + n, 0, (size_t)(pad(n) - n) * sizeof(*work->key));
    }
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = ra_min_i64(begin + BLOCK, n);
        scores(work, q, begin, end);
        product(&(ra_tile_t){.rows = end - begin,
                             .cols = work->value_dim,
                             .depth = end,
                             .a = work->score + begin * CHUNK,
                             .a_row = CHUNK,
                             .a_step = 1,
                             .b = work->value,
                             .b_step = work->value_pad,
                             .c = o + begin * args->o_stride,
                             .c_row = args->o_stride,
                             .accumulate = true});
    }
}

ra_status_t RA_ISA_FN(ra_linear_task)(const ra_linear_task_t *task)
{
    const ra_linear_args_t *args = task->args;
    work_t work;
    RA_TRY(work_init(&work, task));
    state_load(&work);
    for (int64_t done = 0; done < task->segment->row_count; done += CHUNK) {
        int64_t n = ra_min_i64(task->segment->row_count - done, CHUNK);
        int64_t row = task->segment->row_begin + done;
        const float *k = args->k + row * args->k_stride + task->head * work.key_dim;
        if (args->log_decay_stride > 0) {
            token_decay(&work, row, n);
        } else {
            constant_decay(&work, n);
        }
        pack_value(&work, row, n);
        if (!task->state_only) {
            const float *q = args->q + row * args->q_stride + task->head * work.key_dim;
            float *o = args->o + row * args->o_stride + task->head * work.value_dim;
            output_of_state(&work, q, o, n);
            output_of_chunk(&work, q, k, o, n);
        }
        update_state(&work, k, n);
    }
    state_store(&work);
    return RA_OK;
}
