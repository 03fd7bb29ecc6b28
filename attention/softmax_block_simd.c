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
#include "attention/softmax_product.h"
#include "base/checked.h"
#include "base/simd_transpose.h"
#include <math.h>

enum {
    KEY_TILE = 128,
    ROW_TILE = 24,
    WIDTH = RA_VF_WIDTH,
    PANEL = RA_PRODUCT_COLS,
    GROUP = RA_PRODUCT_ROWS, /* rows of a register tile */
    ROWS_AHEAD = 16,         /* fetched before they are copied */
    EXP_VECS = 4,            /* exponentials side by side */
};

/* Rounded up to whole vectors. */
#define PADDED(n) (((n) + WIDTH - 1) / WIDTH * WIDTH)

/* Keys [first, end) of the micro tile are visible to a row (first >= end: none). */
typedef struct seen {
    int32_t first, end;
} seen_t;

/* Positions visible to any and to all of some rows. */
typedef struct bounds {
    int64_t lo, hi, all_lo, all_hi;
} bounds_t;

/* Working memory of one task. Rows are numbered token * stacked + head. */
typedef struct work {
    const ra_softmax_block_t *block;
    const ra_softmax_state_t *state;
    const ra_softmax_task_t *task;
    int64_t stacked;       /* query heads on this kv head */
    int64_t rows;          /* tokens * stacked */
    int64_t dim, padded;   /* head size, and rounded up to whole vectors */
    bounds_t bounds;       /* of all rows */
    bounds_t *tile_bounds; /* of every ROW_TILE rows */
    bool biased;           /* what a row sees depends on more than positions, or has a bias */
    float *q;              /* [groups of GROUP rows][dim][GROUP], scaled */
    float *o;              /* [rows, padded] */
    float *m, *l;          /* [rows] */
    float *keys;           /* panels [dim][PANEL] of KEY_TILE keys */
    float *values;         /* panels [KEY_TILE][PANEL] of `padded` columns */
    float *scores;         /* [ROW_TILE, KEY_TILE] */
    seen_t seen[ROW_TILE]; /* of the rows at hand */
    bool values_finite;
    int64_t key_begin, key_count; /* the micro tile at hand */
    int64_t next_count;           /* keys of the one after it */
    int64_t fetched, fetch_step;  /* rows of k and v of the latter, and how many at a time */
} work_t;

static ra_status_t work_alloc(work_t *work)
{
    int64_t groups = ra_ceil_div(work->rows, GROUP), panels = ra_ceil_div(work->padded, PANEL);
    int64_t queries = PADDED(groups * GROUP * work->dim), values = panels * PANEL * KEY_TILE;
    int64_t tiles = ra_ceil_div(work->rows, ROW_TILE);
    int64_t bounds = PADDED(tiles * (int64_t)(sizeof(bounds_t) / sizeof(float)));
    int64_t floats = bounds + ROW_TILE * KEY_TILE + KEY_TILE * work->dim + values + queries +
                     work->rows * work->padded + 2 * work->rows;
    float *memory = ra_scratch(0, floats * (int64_t)sizeof(*memory));
    if (memory == NULL) {
        return RA_ERR_NOMEM;
    }
    work->tile_bounds = (bounds_t *)(void *)memory;
    work->scores = memory + bounds;
    work->keys = work->scores + ROW_TILE * KEY_TILE;
    work->values = work->keys + KEY_TILE * work->dim;
    work->q = work->values + values;
    work->o = work->q + queries;
    work->m = work->o + work->rows * work->padded;
    work->l = work->m + work->rows;
    return RA_OK;
}

static int64_t row_of(const work_t *work, int64_t i)
{
    return work->task->row_begin + i / work->stacked;
}

static int64_t head_of(const work_t *work, int64_t i)
{
    return work->task->kv_head * work->stacked + i % work->stacked;
}

static const float *query_of(const work_t *work, int64_t i)
{
    return (const float *)work->block->q + row_of(work, i) * work->block->q_stride +
           head_of(work, i) * work->dim;
}

static float *output_of(const work_t *work, int64_t i)
{
    return work->state->o + row_of(work, i) * work->state->o_stride + head_of(work, i) * work->dim;
}

/*
 * Have a head's part of a row brought to the L2 cache. It lies far from the next row's, which
 * hardware does not foresee. (Inline by force: gcc drops calls that do nothing but prefetch.)
 */
RA_INLINE void fetch(const float *at, int64_t floats)
{
    enum { LINE = 16 };
    for (int64_t d = 0; d < floats; d += LINE) {
        __builtin_prefetch(at + d, 0, 2);
    }
}

/* Scale and transpose `count` rows of q from row i on: a register tile reads them side by side. */
static void load_queries(work_t *work, int64_t i, int64_t count)
{
    const ra_softmax_block_t *block = work->block;
    const float *q[WIDTH];
    float square[WIDTH * WIDTH] = {0}, turned[WIDTH * WIDTH];
    for (int64_t j = 0; j < count; j++) {
        q[j] = query_of(work, i + j);
        if (i + j + ROWS_AHEAD < work->rows) {
            fetch(query_of(work, i + j + ROWS_AHEAD), work->dim);
        }
    }
    for (int64_t d = 0; d < work->dim; d += WIDTH) {
        int n = (int)ra_min_i64(WIDTH, work->dim - d);
        for (int64_t j = 0; j < count; j++) {
            vf_store(square + j * WIDTH, vf_mul(vf_load_n(q[j] + d, n), vf_set1(block->scale)));
        }
        ra_transpose_square(square, WIDTH, turned, WIDTH);
        float *to = work->q + i / GROUP * GROUP * work->dim + d * GROUP + i % GROUP;
        for (int64_t k = 0; k < n; k++) {
            vf_store_n(to + k * GROUP, vf_load(turned + k * WIDTH), (int)count);
        }
    }
}

/* Positions that rows [row, row + rows) see. */
static bounds_t find_bounds(const work_t *work, int64_t row, int64_t rows)
{
    const ra_attention_mask_t *mask = &work->block->mask;
    bounds_t bounds = {INT64_MAX, INT64_MIN, INT64_MIN, INT64_MAX};
    int64_t end = row_of(work, row + rows - 1);
    for (int64_t token = row_of(work, row); token <= end; token++) {
        bounds.lo = ra_min_i64(bounds.lo, mask->row_lo[token]);
        bounds.hi = ra_max_i64(bounds.hi, mask->row_hi[token]);
        bounds.all_lo = ra_max_i64(bounds.all_lo, mask->row_lo[token]);
        bounds.all_hi = ra_min_i64(bounds.all_hi, mask->row_hi[token]);
    }
    return bounds;
}

/* Copy the task's rows of q and of the state in, or of the state out. */
static void load_rows(work_t *work)
{
    const ra_softmax_block_t *block = work->block;
    for (int64_t i = 0, n; i < work->rows; i += n) {
        n = ra_min_i64(ra_min_i64(GROUP - i % GROUP, WIDTH), work->rows - i);
        load_queries(work, i, n);
    }
    for (int64_t i = 0; i < work->rows; i++) {
        int64_t row = row_of(work, i), head = head_of(work, i);
        const float *o = output_of(work, i);
        for (int64_t d = 0; d < work->padded; d += WIDTH) {
            int n = (int)ra_min_i64(WIDTH, work->dim - d);
            vf_store(work->o + i * work->padded + d, vf_load_n(o + d, n));
        }
        if (i + ROWS_AHEAD < work->rows) {
            fetch(output_of(work, i + ROWS_AHEAD), work->dim);
        }
        work->m[i] = work->state->m[head * block->rows + row];
        work->l[i] = work->state->l[head * block->rows + row];
    }
}

static void store_rows(const work_t *work)
{
    for (int64_t i = 0; i < work->rows; i++) {
        int64_t row = row_of(work, i), head = head_of(work, i);
        memcpy(output_of(work, i), work->o + i * work->padded, (size_t)work->dim * sizeof(float));
        if (i + ROWS_AHEAD < work->rows) {
            fetch(output_of(work, i + ROWS_AHEAD), work->dim);
        }
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
        for (int64_t j = n; j < PADDED(n); j++) {
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
    for (int64_t j = 0; j < work->key_count; j++) {
        const float *from = v + j * block->v_stride;
        for (int64_t c = 0; c < work->padded; c += WIDTH) {
            int64_t left = work->dim - c;
            vf value = left >= WIDTH ? vf_load(from + c) : vf_load_n(from + c, (int)left);
            vf_store(work->values + c / PANEL * PANEL * KEY_TILE + j * PANEL + c % PANEL, value);
            zeros = vf_fma(value, vf_zero(), zeros);
        }
    }
    work->values_finite = vf_hsum(zeros) == 0.0f;
}

/* Fetch some of the keys and values after the micro tile at hand. */
RA_INLINE void fetch_next(work_t *work)
{
    const ra_softmax_block_t *block = work->block;
    int64_t head = work->task->kv_head * work->dim;
    int64_t end = ra_min_i64(work->fetched + work->fetch_step, 2 * work->next_count);
    for (; work->fetched < end; work->fetched++) {
        int64_t key = work->key_begin + work->key_count + work->fetched / 2;
        fetch(head + (work->fetched % 2 == 0 ? (const float *)block->k + key * block->k_stride
                                             : (const float *)block->v + key * block->v_stride),
              work->dim);
    }
}

/*
 * Which keys each of `rows` rows from `row` on sees; returns their hull. *whole: all see the whole
 * micro tile, and work->seen is not set.
 */
static seen_t find_seen(work_t *work, int64_t row, int64_t rows, bool *whole)
{
    const ra_attention_mask_t *mask = &work->block->mask;
    const bounds_t *bounds = &work->tile_bounds[row / ROW_TILE];
    const int64_t *pos = mask->key_pos + work->key_begin;
    int64_t n = work->key_count, token = row_of(work, row), head = row % work->stacked;
    seen_t hull = {KEY_TILE, 0}, seen = {0, 0};
    if (pos[n - 1] < bounds->lo || pos[0] >= bounds->hi) {
        return hull;
    }
    *whole =
        !work->biased && n == KEY_TILE && pos[0] >= bounds->all_lo && pos[n - 1] < bounds->all_hi;
    if (*whole) {
        return (seen_t){0, KEY_TILE};
    }
    for (int64_t i = 0; i < rows; i++) {
        if (i == 0 || head == 0) {
            int64_t lo = mask->row_lo[token], hi = mask->row_hi[token];
            seen.first = pos[0] >= lo ? 0 : (int32_t)ra_softmax_lower_bound(pos, n, lo);
            seen.end = pos[n - 1] < hi ? (int32_t)n : (int32_t)ra_softmax_lower_bound(pos, n, hi);
        }
        work->seen[i] = seen;
        if (seen.first < seen.end) {
            hull.first = seen.first < hull.first ? seen.first : hull.first;
            hull.end = seen.end > hull.end ? seen.end : hull.end;
        }
        head = head + 1 == work->stacked ? 0 : head + 1;
        token += head == 0;
    }
    return hull;
}

/* scores[i][j] for all vectors of keys that the hull touches. */
static __attribute__((noinline)) void multiply_keys(work_t *work, int64_t row, int64_t rows,
                                                    seen_t hull)
{
    for (int64_t at = hull.first / PANEL * PANEL; at < hull.end; at += PANEL) {
        for (int64_t i = 0; i < rows; i += GROUP) {
            ra_product_t product = {
                .rows = ra_min_i64(GROUP, rows - i),
                .vecs = hull.end - at > WIDTH ? 2 : 1,
                .depth = work->dim,
                .a = work->q + (row + i) * work->dim,
                .b = work->keys + at * work->dim,
                .c = work->scores + i * KEY_TILE + at,
                .c_row = KEY_TILE,
            };
            ra_product(&product, 1, GROUP, false);
            fetch_next(work);
        }
    }
}

/* Add the bias to a row's scores and replace those of hidden keys by -inf. */
static void mask_scores(const work_t *work, int64_t row, seen_t seen, seen_t hull, float *s)
{
    const ra_attention_mask_t *mask = &work->block->mask;
    int64_t token = row_of(work, row), head = head_of(work, row);
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

/* A higher maximum of one row: l and O are rescaled to it. */
static __attribute__((noinline)) void raise_maximum(work_t *work, int64_t row, float highest)
{
    vf factor = vf_exp_below_88(vf_set1(work->m[row] - highest));
    float *o = work->o + row * work->padded, lanes[WIDTH];
    for (int64_t d = 0; d < work->padded; d += WIDTH) {
        vf_store(o + d, vf_mul(vf_load(o + d), factor));
    }
    vf_store(lanes, factor);
    work->l[row] *= lanes[0];
    work->m[row] = highest;
}

/* Few rows find a higher maximum; the others need no maximum over lanes. */
RA_INLINE void find_maximum(work_t *work, int64_t row, seen_t hull, const float *s)
{
    int64_t j = hull.first / WIDTH * WIDTH;
    vf top = vf_load(s + j);
    for (j += WIDTH; j < hull.end; j += WIDTH) {
        top = vf_max(top, vf_load(s + j));
    }
    if (vf_any_greater(top, vf_set1(work->m[row]))) {
        float highest = vf_hmax(top);
        if (highest > work->m[row]) {
            raise_maximum(work, row, highest);
        }
    }
}

/* p in place of n vectors of scores, added to sum vector by vector. */
RA_INLINE vf exponentiate_some(float *s, vf shift, vf sum, const int n)
{
    vf x[8];
    RA_UNROLL
    for (int i = 0; i < n; i++) {
        x[i] = vf_sub(vf_load(s + i * WIDTH), shift);
    }
    vf_exp_negative_each(x, n);
    RA_UNROLL
    for (int i = 0; i < n; i++) {
        vf_store(s + i * WIDTH, x[i]);
        sum = vf_add(sum, x[i]);
    }
    return sum;
}

/* p in place of one row's scores, and their sum into l. */
RA_INLINE void exponentiate(work_t *work, int64_t row, seen_t hull, float *s)
{
    float m = work->m[row];
    vf shift = vf_set1(m == -INFINITY ? 0.0f : m), sum = vf_zero();
    int64_t j = hull.first / WIDTH * WIDTH;
    for (; j + (EXP_VECS - 1) * WIDTH < hull.end; j += EXP_VECS * WIDTH) {
        sum = exponentiate_some(s + j, shift, sum, EXP_VECS);
    }
    for (; j < hull.end; j += WIDTH) {
        sum = exponentiate_some(s + j, shift, sum, 1);
    }
    work->l[row] += vf_hsum(sum);
}

/* O[i] += sum over keys [first, end) of scores[i][key] V[key]. */
static __attribute__((noinline)) void multiply_values(work_t *work, int64_t row, int64_t i,
                                                      int64_t rows, seen_t keys)
{
    for (int64_t at = 0; at < work->padded; at += PANEL) {
        for (int64_t j = i; j < i + rows; j += GROUP) {
            ra_product_t product = {
                .rows = ra_min_i64(GROUP, i + rows - j),
                .vecs = work->padded - at > WIDTH ? 2 : 1,
                .depth = keys.end - keys.first,
                .a = work->scores + j * KEY_TILE + keys.first,
                .b = work->values + at * KEY_TILE + keys.first * PANEL,
                .c = work->o + (row + j) * work->padded + at,
                .c_row = work->padded,
            };
            ra_product(&product, KEY_TILE, 1, true);
            fetch_next(work);
        }
    }
}

static void fold_rows(work_t *work, int64_t row, int64_t rows)
{
    bool whole = false;
    seen_t hull = find_seen(work, row, rows, &whole);
    if (hull.first >= hull.end) {
        return;
    }
    multiply_keys(work, row, rows, hull);
    for (int64_t i = 0; i < rows && !whole; i++) {
        mask_scores(work, row + i, work->seen[i], hull, work->scores + i * KEY_TILE);
    }
    /* Two loops: exponentials of one row do not wait for the maximum of the next. */
    for (int64_t i = 0; i < rows; i++) {
        find_maximum(work, row + i, hull, work->scores + i * KEY_TILE);
    }
    for (int64_t i = 0; i < rows; i++) {
        exponentiate(work, row + i, hull, work->scores + i * KEY_TILE);
    }
    if (work->values_finite || whole) {
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
    int64_t begin = ra_softmax_lower_bound(pos, span->key_count, work->bounds.lo);
    int64_t end = ra_softmax_lower_bound(pos, span->key_count, work->bounds.hi);
    int64_t products =
        ra_ceil_div(work->rows, GROUP) * (KEY_TILE / PANEL + ra_ceil_div(work->padded, PANEL));
    for (int64_t key = begin / KEY_TILE * KEY_TILE; begin < end && key < end; key += KEY_TILE) {
        work->key_begin = span->key_begin + key;
        work->key_count = ra_min_i64(KEY_TILE, span->key_count - key);
        work->next_count = ra_max_i64(ra_min_i64(KEY_TILE, end - key - KEY_TILE), 0);
        work->fetched = 0;
        work->fetch_step = ra_ceil_div(2 * work->next_count, products);
        pack_keys(work);
        pack_values(work);
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
        .padded = PADDED(block->head_dim),
        .biased = block->mask.key_bias != NULL || block->mask.key_score != NULL,
    };
    RA_TRY(work_alloc(&work));
    work.bounds = find_bounds(&work, 0, work.rows);
    for (int64_t row = 0; row < work.rows; row += ROW_TILE) {
        work.tile_bounds[row / ROW_TILE] =
            find_bounds(&work, row, ra_min_i64(ROW_TILE, work.rows - row));
    }
    load_rows(&work);
    for (int64_t s = 0; s < group->span_count; s++) {
        fold_span(&work, &block->spans[group->span_begin + s]);
    }
    store_rows(&work);
    return RA_OK;
}
