/*
 * attention/linear_chunk_simd.c - some heads of one segment, chunk by chunk; once an instruction
 * set.
 *
 * Contract   attention/linear_chunk.h; oracle linear_ref.c; products in linear_tile.h.
 * A chunk of n <= C tokens: pack k and v of the head, then scores, outputs, state. Packing makes
 * rows adjacent (rows H D floats apart fall into few cache sets) and lets o lie on v. The state
 * needs k and v only and takes the same path with and without outputs.
 *
 * Decay      W_ij = e^{b_i - b_j}. Constant: W is Toeplitz, one table of e^{g m} read at a shifting
 *            offset. Per token: W_ij = W_{i-1,j} e^{g_i}, a product of factors <= 1, exact for
 *            e^{-inf} = 0. Factors that would be denormal count as 0. Nothing divides by a decay,
 *            nothing overflows.
 */
#include "attention/linear_cpu.h"

#include "attention/linear_tile.h"
#include "base/checked.h"
#include "base/simd.h"
#include "base/simd_transpose.h"
#include <float.h>
#include <math.h>

enum {
    CHUNK = RA_LINEAR_CHUNK,
    ALIGN = 16 /* floats in a cache line and in the widest vector */
};

/* Working memory of a task. */
typedef struct work {
    const ra_linear_task_t *task;
    ra_linear_chunk_t chunk; /* of the head at hand */
    int64_t head;
    float *states;              /* [heads of the task, key_dim, value_step] */
    float *key_columns, *value; /* writable views of the chunk's */
    float *weight;              /* decay per token: [CHUNK, CHUNK] W, 0 above the diagonal */
    float *power;      /* constant decay: [heads, 2 CHUNK] e^{g (CHUNK - 1 - x)}, 0 from CHUNK on */
    float *row_factor; /* [heads, CHUNK] e^{b_i} */
    const float **piece; /* [most_pieces()] */
    int64_t chances;
    ra_linear_ahead_t ahead;
} work_t;

static int64_t pad(int64_t n)
{
    return ra_ceil_div(n, ALIGN) * ALIGN;
}

/* Times that the products of a head's chunk look whether a piece is due; a few more in truth. */
static int64_t fetch_chances(const work_t *work)
{
    const ra_linear_chunk_t *c = &work->chunk;
    int64_t panels = ra_ceil_div(c->value_dim, RA_TILE_COLS), rows = CHUNK / RA_LINEAR_ROWS;
    int64_t steps = c->key_dim / RA_LINEAR_ROWS * panels * CHUNK;
    if (!work->task->state_only) {
        steps += rows * (c->key_dim + panels * (c->key_dim + CHUNK / 2));
    }
    return ra_max_i64(steps / RA_LINEAR_UNROLL, 1);
}

/* Of a head's share of CHUNK rows of all sources and heads. */
static int64_t most_pieces(const ra_linear_task_t *task)
{
    int64_t keys = ra_ceil_div(task->head_count * task->args->key_dim, RA_LINEAR_PIECE);
    int64_t values = ra_ceil_div(task->head_count * task->args->value_dim, RA_LINEAR_PIECE);
    return ra_ceil_div(CHUNK, task->head_count) * 2 * (keys + values);
}

static ra_status_t work_init(work_t *work, const ra_linear_task_t *task)
{
    const ra_linear_args_t *args = task->args;
    int64_t key_dim = args->key_dim, value_step = pad(args->value_dim);
    int64_t state = key_dim * value_step, heads = task->head_count;
    int64_t floats = heads * (state + 3 * CHUNK) + CHUNK * value_step + key_dim * CHUNK +
                     RA_LINEAR_ROWS * CHUNK + CHUNK * CHUNK;
    int64_t piece_bytes = most_pieces(task) * (int64_t)sizeof(float *);
    float *at = ra_scratch(0, floats * (int64_t)sizeof(*at) + piece_bytes);
    if (at == NULL) {
        return RA_ERR_NOMEM;
    }
    *work = (work_t){.task = task,
                     .chunk = {.key_dim = key_dim,
                               .value_dim = args->value_dim,
                               .value_step = value_step,
                               .score_step = CHUNK,
                               .scale = args->scale,
                               .query_step = args->q_stride,
                               .o_step = args->o_stride}};
    work->states = at;
    work->value = at + heads * state;
    work->key_columns = work->value + CHUNK * value_step;
    work->chunk.score = work->key_columns + key_dim * CHUNK;
    work->weight = work->chunk.score + RA_LINEAR_ROWS * CHUNK;
    work->power = work->weight + CHUNK * CHUNK;
    work->row_factor = work->power + heads * 2 * CHUNK;
    work->piece = (const float **)(work->row_factor + heads * CHUNK);
    work->chunk.value = work->value;
    work->chunk.key_columns = work->key_columns;
    work->chunk.ahead = &work->ahead;
    work->chances = fetch_chances(work);
    return RA_OK;
}

/* Turn to head `index` of the task. */
static void select_head(work_t *work, int64_t index)
{
    ra_linear_chunk_t *c = &work->chunk;
    work->head = work->task->head + index;
    c->state = work->states + index * c->key_dim * c->value_step;
    c->row_factor = work->row_factor + index * CHUNK;
}

static void state_load(work_t *work)
{
    const ra_linear_chunk_t *c = &work->chunk;
    const float *from = work->task->segment->state_in;
    memset(c->state, 0, (size_t)(c->key_dim * c->value_step) * sizeof(*c->state));
    if (from == NULL) {
        return;
    }
    from += work->head * c->key_dim * c->value_dim;
    for (int64_t d = 0; d < c->key_dim; d++) {
        memcpy(c->state + d * c->value_step, from + d * c->value_dim,
               (size_t)c->value_dim * sizeof(*from));
    }
}

static void state_store(const work_t *work)
{
    const ra_linear_chunk_t *c = &work->chunk;
    float *to = work->task->segment->state_out;
    if (to == NULL) {
        return;
    }
    to += work->head * c->key_dim * c->value_dim;
    for (int64_t d = 0; d < c->key_dim; d++) {
        memcpy(to + d * c->value_dim, c->state + d * c->value_step,
               (size_t)c->value_dim * sizeof(*to));
    }
}

/* e^x without denormals. */
static float decay_factor(double x)
{
    double factor = exp(x);
    return factor < (double)FLT_MIN ? 0 : (float)factor;
}

/* Once a head: the first chunk is the longest. */
static void make_powers(work_t *work, int64_t index, int64_t n)
{
    double g = (double)work->task->args->log_decay[work->task->head + index];
    float *power = work->power + index * 2 * CHUNK, *factor = work->row_factor + index * CHUNK;
    memset(power + CHUNK, 0, CHUNK * sizeof(*power));
    power[CHUNK - 1] = 1;
    for (int64_t m = 1; m <= n; m++) {
        factor[m - 1] = decay_factor(g * (double)m);
        if (m < CHUNK) {
            power[CHUNK - 1 - m] = factor[m - 1];
        }
    }
}

static void constant_decay(work_t *work, int64_t index)
{
    work->chunk.weight = work->power + index * 2 * CHUNK + CHUNK - 1;
    work->chunk.weight_step = -1;
}

static void token_decay(work_t *work, int64_t row, int64_t n)
{
    const ra_linear_args_t *args = work->task->args;
    const float *g = args->log_decay + row * args->log_decay_stride + work->head;
    float *row_factor = work->row_factor + (work->head - work->task->head) * CHUNK;
    const vf smallest = vf_set1(FLT_MIN);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float *w = work->weight + i * CHUNK;
        double step = (double)g[i * args->log_decay_stride];
        vf factor = vf_set1(decay_factor(step));
        sum += step;
        row_factor[i] = decay_factor(sum);
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
    work->chunk.weight = work->weight;
    work->chunk.weight_step = CHUNK;
}

/* to = factor * from, in whole vectors. */
RA_INLINE void pack_row(const float *from, int64_t width, float factor, float *to)
{
    vf f = vf_set1(factor);
    int64_t at = 0;
    for (; at + RA_VF_WIDTH <= width; at += RA_VF_WIDTH) {
        vf_store(to + at, vf_mul(f, vf_load(from + at)));
    }
    if (at < width) {
        vf_store(to + at, vf_mul(f, vf_load_n(from + at, (int)(width - at))));
    }
}

/* v, or what the state needs: v~. */
static void pack_value(work_t *work, int64_t row, bool decayed)
{
    const ra_linear_args_t *args = work->task->args;
    const ra_linear_chunk_t *c = &work->chunk;
    const float *v = (const float *)args->v + row * args->v_stride + work->head * c->value_dim;
    const float *to_end = c->weight + (c->tokens - 1) * c->weight_step;
    for (int64_t j = 0; j < c->tokens; j++) {
        pack_row(v + j * args->v_stride, c->value_dim, decayed ? to_end[j] : 1,
                 work->value + j * c->value_step);
    }
}

/* v becomes v~. */
static void decay_value(work_t *work)
{
    const ra_linear_chunk_t *c = &work->chunk;
    const float *to_end = c->weight + (c->tokens - 1) * c->weight_step;
    for (int64_t j = 0; j < c->tokens; j++) {
        float *row = work->value + j * c->value_step;
        pack_row(row, c->value_step, to_end[j], row);
    }
}

static void pack_key_columns(work_t *work, int64_t row)
{
    const ra_linear_args_t *args = work->task->args;
    const ra_linear_chunk_t *c = &work->chunk;
    const float *k = (const float *)args->k + row * args->k_stride + work->head * c->key_dim;
    ra_transpose(k, args->k_stride, c->tokens, c->key_dim, work->key_columns, CHUNK);
    int64_t rest = pad(c->tokens) - c->tokens;
    for (int64_t d = 0; rest > 0 && d < c->key_dim; d++) {
        memset(work->key_columns + d * CHUNK + c->tokens, 0, (size_t)rest * sizeof(float));
    }
}

/* Add the pieces of the row at @a rows + @a at. @return pieces so far. */
static int64_t add_pieces(work_t *work, const void *rows, int64_t at, int64_t width, int64_t count)
{
    const float *row = (const float *)rows + at;
    for (int64_t i = 0; i < width; i += RA_LINEAR_PIECE) {
        work->piece[count++] = row + i;
    }
    return count;
}

/*
 * Have the tiles of the chunk at hand fetch a share of the next one's rows, `count` from `row` on:
 * the share of head `index`, but of all heads, which lie side by side and in the same pages.
 */
static void look_ahead(work_t *work, int64_t index, int64_t row, int64_t count)
{
    const ra_linear_task_t *task = work->task;
    const ra_linear_args_t *args = task->args;
    const ra_linear_chunk_t *c = &work->chunk;
    int64_t rows = ra_max_i64(ra_min_i64(count, CHUNK), 0), pieces = 0;
    int64_t end = row + rows * (index + 1) / task->head_count;
    int64_t keys = task->head_count * c->key_dim, values = task->head_count * c->value_dim;
    int64_t key_at = task->head * c->key_dim, value_at = task->head * c->value_dim;
    for (int64_t r = row + rows * index / task->head_count; r < end; r++) {
        pieces = add_pieces(work, args->k, r * args->k_stride + key_at, keys, pieces);
        pieces = add_pieces(work, args->v, r * args->v_stride + value_at, values, pieces);
        if (!task->state_only) {
            pieces = add_pieces(work, args->q, r * args->q_stride + key_at, keys, pieces);
            pieces = add_pieces(work, args->o, r * args->o_stride + value_at, values, pieces);
        }
    }
    work->ahead = (ra_linear_ahead_t){
        .piece = work->piece,
        .end = work->piece + pieces,
        .rate = (uint32_t)(UINT32_MAX * fmin((double)pieces / (double)work->chances, 1.0))};
}

/* One head of the chunk that starts `done` tokens into the segment. */
static void run_chunk(work_t *work, int64_t index, int64_t done)
{
    const ra_linear_task_t *task = work->task;
    const ra_linear_args_t *args = task->args;
    ra_linear_chunk_t *c = &work->chunk;
    int64_t row = task->segment->row_begin + done, left = task->segment->row_count - done;
    select_head(work, index);
    c->tokens = ra_min_i64(left, CHUNK);
    if (args->log_decay_stride > 0) {
        token_decay(work, row, c->tokens);
    } else {
        constant_decay(work, index);
    }
    look_ahead(work, index, row + c->tokens, left - c->tokens);
    c->state_factor = c->row_factor[c->tokens - 1];
    pack_value(work, row, task->state_only);
    pack_key_columns(work, row);
    if (!task->state_only) {
        c->query = (const float *)args->q + row * args->q_stride + work->head * c->key_dim;
        c->o = (float *)args->o + row * args->o_stride + work->head * c->value_dim;
        ra_linear_outputs(c);
        decay_value(work);
    }
    ra_linear_update(c);
}

ra_status_t RA_ISA_FN(ra_linear_task)(const ra_linear_task_t *task)
{
    work_t work;
    RA_TRY(work_init(&work, task));
    for (int64_t h = 0; h < task->head_count; h++) {
        select_head(&work, h);
        state_load(&work);
        if (task->args->log_decay_stride == 0) {
            make_powers(&work, h, ra_min_i64(task->segment->row_count, CHUNK));
        }
    }
    for (int64_t done = 0; done < task->segment->row_count; done += CHUNK) {
        for (int64_t h = 0; h < task->head_count; h++) {
            run_chunk(&work, h, done);
        }
    }
    for (int64_t h = 0; h < task->head_count; h++) {
        select_head(&work, h);
        state_store(&work);
    }
    return RA_OK;
}
