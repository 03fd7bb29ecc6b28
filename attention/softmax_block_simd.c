/*
 * One task of the "cpu" softmax row, compiled once for every instruction set.
 *
 * For each micro tile of KEY_TILE keys (counted from its span's start) the keys are transposed and
 * the values packed into panels of the register tile, once for all rows of the task; then
 * ROW_TILE rows at a time
 *     S = (scale Q) K^T;   m, l, P = online softmax of S;   O += P V
 * with S in the L1 cache. Rows lie token by token, the query heads of the kv head side by side.
 *
 * Bits  A row changes by one update for each micro tile in which it sees a key. Its scores, its
 * maximum and its sum are computed lane by lane at the keys' fixed places in the micro tile, the
 * products are chains over ascending keys, and a hidden key enters as an exact 0 (or not at all).
 * So nothing depends on the other rows. A micro tile holding inf or NaN values is multiplied row by
 * row over its visible keys, because 0 * NaN is not 0.
 */
#include "attention/softmax_cpu.h"
#include "base/checked.h"
#include "base/gemm_tile.h"
#include "base/simd_transpose.h"
#include <math.h>

enum {
    KEY_TILE = 128,
    ROW_TILE = 24,
    WIDTH = RA_VF_WIDTH,
    PANEL = RA_TILE_COLS,
};

/* Keys [first, end) of the micro tile are visible to a row (first >= end: none). */
typedef struct seen {
    int32_t first, end;
} seen_t;

/* Working memory of one task. Rows are numbered token * stacked + head. */
typedef struct work {
    const ra_softmax_block_t *block;
    const ra_softmax_state_t *state;
    const ra_softmax_task_t *task;
    int64_t stacked;        /* query heads on this kv head */
    int64_t rows;           /* tokens * stacked */
    int64_t dim, padded;    /* head size, and rounded up to whole vectors */
    int64_t lo, hi;         /* positions visible to any token */
    int64_t all_lo, all_hi; /* positions visible to all tokens */
    bool masked;            /* some row may not see all of the micro tile, or scores are biased */
    float *q, *o;           /* [rows, padded] */
    float *m, *l;           /* [rows] */
    float *keys;            /* panels [dim][PANEL] of KEY_TILE keys */
    float *values;          /* panels [KEY_TILE][<= PANEL] of `padded` columns */
    float *scores;          /* [ROW_TILE, KEY_TILE] */
    seen_t seen[ROW_TILE];  /* of the rows at hand */
    bool values_finite;
    int64_t key_begin, key_count; /* the micro tile at hand */
} work_t;

static ra_status_t work_alloc(work_t *work)
{
    int64_t floats = 2 * work->rows * work->padded + 2 * (work->rows + 16) +
                     KEY_TILE * (work->dim + work->padded + ROW_TILE) + 4 * 16;
    float *memory = ra_scratch(0, floats * (int64_t)sizeof(*memory));
    if (memory == NULL) {
        return RA_ERR_NOMEM;
    }
    work->scores = memory;
    work->keys = work->scores + ROW_TILE * KEY_TILE;
    work->values = work->keys + KEY_TILE * work->dim;
    work->q = work->values + KEY_TILE * work->padded;
    work->o = work->q + work->rows * work->padded;
    work->m = work->o + work->rows * work->padded;
    work->l = work->m + work->rows;
    return RA_OK;
}

/* Copy the task's rows of q (scaled) and of the state in, or of the state out. */
static void load_rows(work_t *work)
{
    const ra_softmax_block_t *block = work->block;
    for (int64_t i = 0; i < work->rows; i++) {
        int64_t row = work->task->row_begin + i / work->stacked;
        int64_t head = work->task->kv_head * work->stacked + i % work->stacked;
        const float *q = (const float *)block->q + row * block->q_stride + head * work->dim;
        const float *o = work->state->o + row * work->state->o_stride + head * work->dim;
        for (int64_t d = 0; d < work->padded; d += WIDTH) {
            int n = (int)ra_min_i64(WIDTH, work->dim - d);
            vf scaled = vf_mul(vf_load_n(q + d, n), vf_set1(block->scale));
            vf_store(work->q + i * work->padded + d, scaled);
            vf_store(work->o + i * work->padded + d, vf_load_n(o + d, n));
        }
        work->m[i] = work->state->m[head * block->rows + row];
        work->l[i] = work->state->l[head * block->rows + row];
    }
}

static void store_rows(const work_t *work)
{
    for (int64_t i = 0; i < work->rows; i++) {
        int64_t row = work->task->row_begin + i / work->stacked;
        int64_t head = work->task->kv_head * work->stacked + i % work->stacked;
        memcpy(work->state->o + row * work->state->o_stride + head * work->dim,
               work->o + i * work->padded, (size_t)work->dim * sizeof(float));
        work->state->m[head * work->block->rows + row] = work->m[i];
        work->state->l[head * work->block->rows + row] = work->l[i];
    }
}

/* A call of its own keeps the sixteen row addresses out of the caller's registers. */
static __attribute__((noinline)) void transpose_square(const float *from, int64_t step, float *to)
{
    ra_transpose_square(from, step, to, PANEL);
}

/* keys[panel][d][j] = K[key j][d]; lanes of the last vector without a key are 0. */
static void pack_keys(work_t *work)
{
    const ra_softmax_block_t *block = work->block;
    const float *k = (const float *)block->k + work->key_begin * block->k_stride +
                     work->task->kv_head * work->dim;
    for (int64_t at = 0; at < work->key_count; at += PANEL) {
        int64_t n = ra_min_i64(PANEL, work->key_count - at);
        float *panel = work->keys + at * work->dim;
        const float *from = k + at * block->k_stride;
        int64_t whole = work->dim % WIDTH == 0 ? n / WIDTH * WIDTH : 0;
        for (int64_t j = 0; j < whole; j += WIDTH) {
            for (int64_t d = 0; d < work->dim; d += WIDTH) {
                transpose_square(from + j * block->k_stride + d, block->k_stride,
                                 panel + d * PANEL + j);
            }
        }
        ra_transpose(from + whole * block->k_stride, block->k_stride, n - whole, work->dim,
                     panel + whole, PANEL);
        for (int64_t j = n; j < RA_TILE_PADDED(n); j++) {
            for (int64_t d = 0; d < work->dim; d++) {
                panel[d * PANEL + j] = 0.0f;
            }
        }
    }
}

/* values[panel][key][c], and whether all are finite: x * 0 is 0 for finite x only. */
static void pack_values(work_t *work)
{
    const ra_softmax_block_t *block = work->block;
    const float *v = (const float *)block->v + work->key_begin * block->v_stride +
                     work->task->kv_head * work->dim;
    vf zeros = vf_zero();
    for (int64_t at = 0; at < work->padded; at += PANEL) {
        int64_t width = ra_min_i64(PANEL, work->padded - at);
        float *panel = work->values + at * KEY_TILE;
        for (int64_t j = 0; j < work->key_count; j++) {
            for (int64_t c = 0; c < width; c += WIDTH) {
                int64_t left = work->dim - at - c;
                const float *from = v + j * block->v_stride + at + c;
                vf value = left >= WIDTH ? vf_load(from) : vf_load_n(from, (int)left);
                vf_store(panel + j * width + c, value);
                zeros = vf_fma(value, vf_zero(), zeros);
            }
        }
    }
    work->values_finite = vf_hsum(zeros) == 0.0f;
}

/* Which keys each of `rows` rows from `row` on sees; returns their hull. */
static seen_t find_seen(work_t *work, int64_t row, int64_t rows)
{
    if (!work->masked) {
        return (seen_t){0, (int32_t)work->key_count};
    }
    const ra_attention_mask_t *mask = &work->block->mask;
    const int64_t *pos = mask->key_pos + work->key_begin;
    int64_t n = work->key_count;
    seen_t hull = {KEY_TILE, 0}, seen = {0, 0};
    int64_t last_token = -1;
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = work->task->row_begin + (row + i) / work->stacked;
        if (token != last_token) {
            int64_t lo = mask->row_lo[token], hi = mask->row_hi[token];
            seen.first = pos[0] >= lo ? 0 : (int32_t)ra_softmax_lower_bound(pos, n, lo);
            seen.end = pos[n - 1] < hi ? (int32_t)n : (int32_t)ra_softmax_lower_bound(pos, n, hi);
            last_token = token;
        }
        work->seen[i] = seen;
        if (seen.first < seen.end) {
            hull.first = seen.first < hull.first ? seen.first : hull.first;
            hull.end = seen.end > hull.end ? seen.end : hull.end;
        }
    }
    return hull;
}

/* scores[i][j] for all vectors of keys that the hull touches. */
static void multiply_keys(const work_t *work, int64_t row, int64_t rows, seen_t hull)
{
    for (int64_t at = hull.first / PANEL * PANEL; at < hull.end; at += PANEL) {
        ra_tile_t tile = {
            .rows = rows,
            .cols = RA_TILE_PADDED(ra_min_i64(PANEL, hull.end - at)),
            .depth = work->dim,
            .a = work->q + row * work->padded,
            .a_row = work->padded,
            .b = work->keys + at * work->dim,
            .b_step = PANEL,
            .c = work->scores + at,
            .c_row = KEY_TILE,
        };
        ra_tile_f32(&tile);
    }
}

/* Add the bias to a row's scores and replace those of hidden keys by -inf. */
static void mask_scores(const work_t *work, int64_t row, seen_t seen, seen_t hull, float *s)
{
    const ra_attention_mask_t *mask = &work->block->mask;
    int64_t token = work->task->row_begin + row / work->stacked;
    int64_t head = work->task->kv_head * work->stacked + row % work->stacked;
    const float *bias = mask->key_bias;
    const float *key_score = mask->key_score;
    vf first = vf_set1((float)seen.first), last = vf_set1((float)(seen.end - 1));
    vf threshold = vf_zero();
    if (key_score != NULL) {
        key_score += head * work->block->keys + work->key_begin;
        threshold = vf_set1(mask->row_threshold[head * work->block->rows + token]);
    }
    for (int64_t j = hull.first / WIDTH * WIDTH; j < hull.end; j += WIDTH) {
        int n = (int)ra_min_i64(WIDTH, work->key_count - j);
        vf at = vf_add(vf_lane(), vf_set1((float)j));
        vm visible = vm_and(vf_ge(at, first), vf_ge(last, at));
        vf score = vf_load(s + j);
        if (bias != NULL) {
            score = vf_add(score, vf_load_n(bias + work->key_begin + j, n));
        }
        if (key_score != NULL) {
            visible = vm_and(visible, vf_ge(vf_load_n(key_score + j, n), threshold));
        }
        vf_store(s + j, vf_select(visible, score, vf_set1(-INFINITY)));
    }
}

/* The new maximum of one row; where it changed, l and O are rescaled to it. */
RA_INLINE void raise_maximum(work_t *work, int64_t row, seen_t hull, const float *s)
{
    int64_t begin = hull.first / WIDTH * WIDTH;
    vf top = vf_load(s + begin);
    for (int64_t j = begin + WIDTH; j < hull.end; j += WIDTH) {
        top = vf_max(top, vf_load(s + j));
    }
    float old = work->m[row], highest = vf_hmax(top);
    if (highest > old) {
        vf factor = vf_exp_below_88(vf_set1(old - highest));
        float *o = work->o + row * work->padded;
        for (int64_t d = 0; d < work->padded; d += WIDTH) {
            vf_store(o + d, vf_mul(vf_load(o + d), factor));
        }
        float lanes[WIDTH];
        vf_store(lanes, factor);
        work->l[row] *= lanes[0];
        work->m[row] = highest;
    }
}

/* p in place of one row's scores, and their sum into l. */
RA_INLINE void exponentiate(work_t *work, int64_t row, seen_t hull, float *s)
{
    float m = work->m[row];
    vf shift = vf_set1(m == -INFINITY ? 0.0f : m), sum = vf_zero();
    for (int64_t j = hull.first / WIDTH * WIDTH; j < hull.end; j += WIDTH) {
        vf p = vf_exp_negative(vf_sub(vf_load(s + j), shift));
        vf_store(s + j, p);
        sum = vf_add(sum, p);
    }
    work->l[row] += vf_hsum(sum);
}

/* O[i] += sum over keys [first, end) of scores[i][key] V[key]. */
static void multiply_values(const work_t *work, int64_t row, int64_t i, int64_t rows, seen_t keys)
{
    for (int64_t at = 0; at < work->padded; at += PANEL) {
        int64_t width = ra_min_i64(PANEL, work->padded - at);
        ra_tile_t tile = {
            .rows = rows,
            .cols = width,
            .depth = keys.end - keys.first,
            .a = work->scores + i * KEY_TILE + keys.first,
            .a_row = KEY_TILE,
            .b = work->values + at * KEY_TILE + keys.first * width,
            .b_step = width,
            .c = work->o + (row + i) * work->padded + at,
            .c_row = work->padded,
            .accumulate = true,
        };
        ra_tile_f32(&tile);
    }
}

static void fold_rows(work_t *work, int64_t row, int64_t rows)
{
    seen_t hull = find_seen(work, row, rows);
    if (hull.first >= hull.end) {
        return;
    }
    multiply_keys(work, row, rows, hull);
    if (work->masked) {
        for (int64_t i = 0; i < rows; i++) {
            mask_scores(work, row + i, work->seen[i], hull, work->scores + i * KEY_TILE);
        }
    }
    /* Two loops: exponentials of one row do not wait for the maximum of the next. */
    for (int64_t i = 0; i < rows; i++) {
        raise_maximum(work, row + i, hull, work->scores + i * KEY_TILE);
    }
    for (int64_t i = 0; i < rows; i++) {
        exponentiate(work, row + i, hull, work->scores + i * KEY_TILE);
    }
    if (work->values_finite || !work->masked) {
        multiply_values(work, row, 0, rows, hull);
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
        if (work->seen[i].first < work->seen[i].end) {
            multiply_values(work, row, i, 1, work->seen[i]);
        }
    }
}

static void fold_span(work_t *work, const ra_key_span_t *span)
{
    const int64_t *pos = work->block->mask.key_pos + span->key_begin;
    bool biased = work->block->mask.key_bias != NULL || work->block->mask.key_score != NULL;
    int64_t begin = ra_softmax_lower_bound(pos, span->key_count, work->lo);
    int64_t end = ra_softmax_lower_bound(pos, span->key_count, work->hi);
    for (int64_t key = begin / KEY_TILE * KEY_TILE; begin < end && key < end; key += KEY_TILE) {
        work->key_begin = span->key_begin + key;
        work->key_count = ra_min_i64(KEY_TILE, span->key_count - key);
        pack_keys(work);
        pack_values(work);
        work->masked = biased || work->key_count < KEY_TILE || pos[key] < work->all_lo ||
                       pos[key + KEY_TILE - 1] >= work->all_hi;
        for (int64_t row = 0; row < work->rows; row += ROW_TILE) {
            fold_rows(work, row, ra_min_i64(ROW_TILE, work->rows - row));
        }
    }
}

ra_status_t RA_ISA_FN(ra_softmax_task)(const ra_softmax_block_t *block,
                                       const ra_softmax_state_t *state,
                                       const ra_softmax_task_t *task)
{
    const ra_row_group_t *group = &block->groups[task->group];
    int64_t stacked = block->heads / block->kv_heads;
    work_t work = {
        .block = block,
        .state = state,
        .task = task,
        .stacked = stacked,
        .rows = task->row_count * stacked,
        .dim = block->head_dim,
        .padded = RA_TILE_PADDED(block->head_dim),
        .lo = INT64_MAX,
        .hi = INT64_MIN,
        .all_lo = INT64_MIN,
        .all_hi = INT64_MAX,
    };
    RA_TRY(work_alloc(&work));
    for (int64_t r = task->row_begin; r < task->row_begin + task->row_count; r++) {
        work.lo = ra_min_i64(work.lo, block->mask.row_lo[r]);
        work.hi = ra_max_i64(work.hi, block->mask.row_hi[r]);
        work.all_lo = ra_max_i64(work.all_lo, block->mask.row_lo[r]);
        work.all_hi = ra_min_i64(work.all_hi, block->mask.row_hi[r]);
    }
    load_rows(&work);
    for (int64_t s = 0; s < group->span_count; s++) {
        fold_span(&work, &block->spans[group->span_begin + s]);
    }
    store_rows(&work);
    return RA_OK;
}
