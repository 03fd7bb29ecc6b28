/**
 * @file  attention/linear_tile.h
 * @brief The three products of a linear chunk on register tiles, each with its scaling fused in.
 *
 *     score   P_ij = W_ij sum_d q_id k_jd                               j <= i
 *     output  o_ie = f_i sum_d q_id S_de + sum_j P_ij v_je
 *     state   S_de = f S_de + sum_j k~_jd v_je
 *
 * For sources of ra_isa_sources(). A tile is RA_LINEAR_ROWS rows by RA_TILE_VECS vectors, as in
 * base/gemm_tile.h. Every element is one chain of vf_fma over ascending depth, so its bits do not
 * depend on which rows share a tile.
 */
#ifndef RA_ATTENTION_LINEAR_TILE_H
#define RA_ATTENTION_LINEAR_TILE_H

#include "base/checked.h"
#include "base/gemm_tile.h"
#include "base/simd.h"
#include <float.h>

enum {
    RA_LINEAR_ROWS = 6,
    RA_LINEAR_UNROLL = 4,
    RA_LINEAR_PIECE = 64 /* floats fetched ahead at a time */
};

/** Rows of one head in memory. */
typedef struct ra_linear_rows {
    const float *at;
    int64_t step, width; /**< floats between rows, floats of a row */
} ra_linear_rows_t;

/**
 * What the next chunk will read and write. A head's part of a row lies far from the next row's,
 * which hardware does not foresee, so the products fetch the rows piece by piece as they go.
 */
typedef struct ra_linear_ahead {
    ra_linear_rows_t source[4]; /**< k, v and, for outputs, q, o */
    int sources;
    int64_t rows;
    int64_t steps; /**< of a product from one piece to the next, a multiple of RA_LINEAR_UNROLL */
    int next;      /**< piece to fetch: source, row and first float */
    int64_t row, at;
} ra_linear_ahead_t;

/** A chunk of n tokens, packed. Columns round up to whole vectors, the rest of which is 0. */
typedef struct ra_linear_chunk {
    int64_t tokens, key_dim, value_dim;
    int64_t key_step;         /**< floats between rows of query and of key_decayed */
    int64_t value_step;       /**< of value and of state */
    int64_t score_step;       /**< of score and of key_columns */
    const float *query;       /**< [n, key_dim] scaled */
    const float *key_columns; /**< [key_dim, n] k */
    const float *key_decayed; /**< [n, key_dim] k~_j = e^{b_n - b_j} k_j */
    const float *value;       /**< [n, value_dim] */
    float *state;             /**< [key_dim, value_dim] */
    float *score;             /**< [n, n] */
    const float *weight;      /**< W: row i at weight + i * weight_step, 0 right of the diagonal */
    int64_t weight_step;      /**< may be negative */
    const float *row_factor;  /**< [n] e^{b_i} */
    float state_factor;       /**< e^{b_n} */
    float *o;                 /**< [n, value_dim] */
    int64_t o_step;
    ra_linear_ahead_t *ahead;
} ra_linear_chunk_t;

typedef enum ra_linear_product {
    RA_LINEAR_SCORE,
    RA_LINEAR_OUTPUT,
    RA_LINEAR_STATE
} ra_linear_product_t;

/* The registers of a tile. */
typedef struct ra_linear_acc {
    vf at[RA_LINEAR_ROWS][RA_TILE_VECS];
} ra_linear_acc_t;

RA_INLINE void ra_linear_clear(ra_linear_acc_t *acc, const int mr, const int nv)
{
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc->at[i][j] = vf_zero();
        }
    }
}

/* One piece of the next chunk into the L2 cache. */
RA_INLINE void ra_linear_fetch(ra_linear_ahead_t *ahead)
{
    enum { LINE = 16, PIECE = RA_LINEAR_PIECE }; /* floats */
    if (ahead->row == ahead->rows) {
        return;
    }
    const ra_linear_rows_t *source = &ahead->source[ahead->next];
    const float *piece = source->at + ahead->row * source->step + ahead->at;
    RA_UNROLL
    for (int i = 0; i < PIECE; i += LINE) {
        __builtin_prefetch(piece + i, 0, 2);
    }
    ahead->at += PIECE;
    if (ahead->at >= source->width) {
        ahead->at = 0;
        ahead->next++;
        if (ahead->next == ahead->sources) {
            ahead->next = 0;
            ahead->row++;
        }
    }
}

/* acc[i][j] += row[i][at] * b[j] */
RA_INLINE void ra_linear_step(ra_linear_acc_t *acc, const int mr, const int nv,
                              const float *const *row, int64_t at, const float *b)
{
    vf bv[RA_TILE_VECS];
    RA_UNROLL
    for (int j = 0; j < nv; j++) {
        bv[j] = vf_load(b + j * RA_VF_WIDTH);
    }
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        vf av = vf_set1(row[i][at]);
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc->at[i][j] = vf_fma(av, bv[j], acc->at[i][j]);
        }
    }
}

/* acc[i][j] += sum_k a[i * a_row + k * a_step] * b[k * b_step + j] */
RA_INLINE void ra_linear_add(ra_linear_acc_t *acc, const int mr, const int nv, const float *a,
                             int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
                             int64_t depth, ra_linear_ahead_t *ahead)
{
    const float *row[RA_LINEAR_ROWS];
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        row[i] = a + i * a_row;
    }
    int64_t at = 0;
    for (int64_t k = 0; k < depth;) {
        ra_linear_fetch(ahead);
        int64_t end = ra_min_i64(k + ahead->steps, depth);
        for (; k + RA_LINEAR_UNROLL <= end; k += RA_LINEAR_UNROLL) {
            RA_UNROLL
            for (int u = 0; u < RA_LINEAR_UNROLL; u++, b += b_step) {
                ra_linear_step(acc, mr, nv, row, at + u * a_step, b);
            }
            at += RA_LINEAR_UNROLL * a_step;
        }
        for (; k < end; k++, at += a_step, b += b_step) {
            ra_linear_step(acc, mr, nv, row, at, b);
        }
    }
}

RA_INLINE void ra_linear_score_tile(const ra_linear_chunk_t *c, int64_t row, int64_t col,
                                    const int mr, const int nv)
{
    const vf smallest = vf_set1(FLT_MIN);
    ra_linear_acc_t acc;
    ra_linear_clear(&acc, mr, nv);
    ra_linear_add(&acc, mr, nv, c->query + row * c->key_step, c->key_step, 1, c->key_columns + col,
                  c->score_step, c->key_dim, c->ahead);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        const float *weight = c->weight + (row + i) * c->weight_step + col;
        float *score = c->score + (row + i) * c->score_step + col;
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            vf w = vf_load(weight + j * RA_VF_WIDTH);
            /* not the product alone: a later token's overflow must not reach row i as inf * 0 */
            vf p = vf_select(vf_ge(w, smallest), vf_mul(w, acc.at[i][j]), vf_zero());
            vf_store(score + j * RA_VF_WIDTH, p);
        }
    }
}

RA_INLINE void ra_linear_output_tile(const ra_linear_chunk_t *c, int64_t row, int64_t col,
                                     const int mr, const int nv)
{
    ra_linear_acc_t acc;
    ra_linear_clear(&acc, mr, nv);
    ra_linear_add(&acc, mr, nv, c->query + row * c->key_step, c->key_step, 1, c->state + col,
                  c->value_step, c->key_dim, c->ahead);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        vf factor = vf_set1(c->row_factor[row + i]);
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc.at[i][j] = vf_mul(factor, acc.at[i][j]);
        }
    }
    /* Up to the diagonal of the last row; the others meet zeros of the score. */
    ra_linear_add(&acc, mr, nv, c->score + row * c->score_step, c->score_step, 1, c->value + col,
                  c->value_step, row + mr, c->ahead);
    int last = (int)ra_min_i64(c->value_dim - col - (nv - 1) * RA_VF_WIDTH, RA_VF_WIDTH);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        float *o = c->o + (row + i) * c->o_step + col;
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            if (j < nv - 1 || last == RA_VF_WIDTH) {
                vf_store(o + j * RA_VF_WIDTH, acc.at[i][j]);
            } else {
                vf_store_n(o + j * RA_VF_WIDTH, acc.at[i][j], last);
            }
        }
    }
}

RA_INLINE void ra_linear_state_tile(const ra_linear_chunk_t *c, int64_t row, int64_t col,
                                    const int mr, const int nv)
{
    ra_linear_acc_t acc;
    float *state = c->state + row * c->value_step + col;
    vf factor = vf_set1(c->state_factor);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc.at[i][j] = vf_mul(factor, vf_load(state + i * c->value_step + j * RA_VF_WIDTH));
        }
    }
    ra_linear_add(&acc, mr, nv, c->key_decayed + row, 1, c->key_step, c->value + col, c->value_step,
                  c->tokens, c->ahead);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            vf_store(state + i * c->value_step + j * RA_VF_WIDTH, acc.at[i][j]);
        }
    }
}

RA_INLINE void ra_linear_tile(const ra_linear_chunk_t *c, const ra_linear_product_t product,
                              int64_t row, int64_t col, const int mr, const int nv)
{
    if (product == RA_LINEAR_SCORE) {
        ra_linear_score_tile(c, row, col, mr, nv);
    } else if (product == RA_LINEAR_OUTPUT) {
        ra_linear_output_tile(c, row, col, mr, nv);
    } else {
        ra_linear_state_tile(c, row, col, mr, nv);
    }
}

/* The tiles of mr rows over columns [0, cols). */
RA_INLINE void ra_linear_row_tiles(const ra_linear_chunk_t *c, const ra_linear_product_t product,
                                   int64_t row, int64_t cols, const int mr)
{
    for (int64_t col = 0; col < cols; col += RA_TILE_COLS) {
        int64_t vecs = ra_ceil_div(cols - col, RA_VF_WIDTH);
        if (vecs == 1) {
            ra_linear_tile(c, product, row, col, mr, 1);
        } else if (vecs == 2 || RA_TILE_VECS == 2) {
            ra_linear_tile(c, product, row, col, mr, 2);
        } else if (vecs == 3) {
            ra_linear_tile(c, product, row, col, mr, RA_TILE_VECS - 1);
        } else {
            ra_linear_tile(c, product, row, col, mr, RA_TILE_VECS);
        }
    }
}

/* All rows; the columns of a score end at the diagonal. */
RA_INLINE void ra_linear_all_tiles(const ra_linear_chunk_t *c, const ra_linear_product_t product,
                                   int64_t rows, int64_t cols)
{
    const bool causal = product == RA_LINEAR_SCORE;
    int64_t row = 0;
    for (; row + RA_LINEAR_ROWS <= rows; row += RA_LINEAR_ROWS) {
        ra_linear_row_tiles(c, product, row, causal ? row + RA_LINEAR_ROWS : cols, RA_LINEAR_ROWS);
    }
    if (row + 4 <= rows) {
        ra_linear_row_tiles(c, product, row, causal ? row + 4 : cols, 4);
        row += 4;
    }
    for (; row < rows; row++) {
        ra_linear_row_tiles(c, product, row, causal ? row + 1 : cols, 1);
    }
}

/** P of the whole chunk. */
static __attribute__((noinline)) void ra_linear_scores(const ra_linear_chunk_t *c)
{
    ra_linear_all_tiles(c, RA_LINEAR_SCORE, c->tokens, c->tokens);
}

/** o of the whole chunk, from P and the state before it. */
static __attribute__((noinline)) void ra_linear_outputs(const ra_linear_chunk_t *c)
{
    ra_linear_all_tiles(c, RA_LINEAR_OUTPUT, c->tokens, c->value_dim);
}

/** The state after the chunk. */
static __attribute__((noinline)) void ra_linear_update(const ra_linear_chunk_t *c)
{
    ra_linear_all_tiles(c, RA_LINEAR_STATE, c->key_dim, c->value_dim);
}

#endif
