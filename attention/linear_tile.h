/**
 * @file  attention/linear_tile.h
 * @brief The three products of a linear chunk on register tiles, each with its scaling fused in.
 *
 *     score   P_ij = scale W_ij sum_d q_id k_jd                         j <= i
 *     output  o_ie = scale f_i sum_d q_id S_de + sum_j P_ij v_je
 *     state   S_de = f S_de + sum_j k_jd v~_je                          v~_j = e^{b_n - b_j} v_j
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

/**
 * What the next chunk will read and write, in pieces. A head's part of a row lies far from the next
 * row's, which hardware does not foresee, so the products fetch the pieces as they go, evenly: one
 * whenever `due`, to which each RA_LINEAR_UNROLL steps add `rate`, passes 2^32.
 */
typedef struct ra_linear_ahead {
    const float *const *piece, *const *end; /**< those not fetched yet */
    uint32_t due, rate;
} ra_linear_ahead_t;

/** A chunk of n tokens. All but query and o is packed: its columns round up to whole vectors, the
 * rest of which is 0. */
typedef struct ra_linear_chunk {
    int64_t tokens, key_dim, value_dim;
    float scale;
    int64_t query_step, o_step; /**< floats between rows of query and of o */
    int64_t value_step;         /**< of value and of state */
    int64_t score_step;         /**< of score and of key_columns */
    const float *query;         /**< [n, key_dim] */
    const float *key_columns;   /**< [key_dim, n] k */
    const float *value;         /**< [n, value_dim] v; for the state v~ */
    float *state;               /**< [key_dim, value_dim] */
    float *score;               /**< [RA_LINEAR_ROWS, n] of the rows at hand */
    const float *weight;        /**< W: row i at i * weight_step, 0 right of the diagonal */
    int64_t weight_step;        /**< may be negative */
    const float *row_factor;    /**< [n] e^{b_i} */
    float state_factor;         /**< e^{b_n} */
    float *o;                   /**< [n, value_dim] */
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

/* A piece of the next chunk into the L2 cache, where one is due. */
RA_INLINE void ra_linear_fetch(ra_linear_ahead_t *ahead)
{
    enum { LINE = 16 }; /* floats */
    if (!__builtin_add_overflow(ahead->due, ahead->rate, &ahead->due) ||
        ahead->piece == ahead->end) {
        return;
    }
    const float *piece = *ahead->piece++;
    RA_UNROLL
    for (int i = 0; i < RA_LINEAR_PIECE; i += LINE) {
        __builtin_prefetch(piece + i, 0, 2);
    }
}

/* acc[i][j] += a[i * a_row] * b[j] */
RA_INLINE void ra_linear_step(ra_linear_acc_t *acc, const int mr, const int nv, const float *a,
                              int64_t a_row, const float *b)
{
    vf bv[RA_TILE_VECS];
    RA_UNROLL
    for (int j = 0; j < nv; j++) {
        bv[j] = vf_load(b + j * RA_VF_WIDTH);
    }
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        vf av = vf_set1(a[i * a_row]);
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc->at[i][j] = vf_fma(av, bv[j], acc->at[i][j]);
        }
    }
}

/* acc[i][j] += sum_k a[i * a_row + k] * b[k * b_step + j] */
RA_INLINE void ra_linear_add(ra_linear_acc_t *acc, const int mr, const int nv, const float *a,
                             int64_t a_row, const float *b, int64_t b_step, int64_t depth,
                             ra_linear_ahead_t *ahead)
{
    int64_t k = 0;
    for (; k + RA_LINEAR_UNROLL <= depth; k += RA_LINEAR_UNROLL) {
        ra_linear_fetch(ahead);
        RA_UNROLL
        for (int u = 0; u < RA_LINEAR_UNROLL; u++, a++, b += b_step) {
            ra_linear_step(acc, mr, nv, a, a_row, b);
        }
    }
    for (; k < depth; k++, a++, b += b_step) {
        ra_linear_step(acc, mr, nv, a, a_row, b);
    }
}

RA_INLINE void ra_linear_score_tile(const ra_linear_chunk_t *c, int64_t row, int64_t col,
                                    const int mr, const int nv)
{
    const vf smallest = vf_set1(FLT_MIN), scale = vf_set1(c->scale);
    ra_linear_acc_t acc;
    ra_linear_clear(&acc, mr, nv);
    ra_linear_add(&acc, mr, nv, c->query + row * c->query_step, c->query_step, c->key_columns + col,
                  c->score_step, c->key_dim, c->ahead);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        const float *weight = c->weight + (row + i) * c->weight_step + col;
        float *score = c->score + i * c->score_step + col;
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            vf w = vf_load(weight + j * RA_VF_WIDTH);
            /* not the product alone: a later token's overflow must not reach row i as inf * 0 */
            vf p = vf_mul(w, vf_mul(scale, acc.at[i][j]));
            p = vf_select(vf_ge(w, smallest), p, vf_zero());
            vf_store(score + j * RA_VF_WIDTH, p);
        }
    }
}

RA_INLINE void ra_linear_output_tile(const ra_linear_chunk_t *c, int64_t row, int64_t col,
                                     const int mr, const int nv)
{
    ra_linear_acc_t acc;
    ra_linear_clear(&acc, mr, nv);
    ra_linear_add(&acc, mr, nv, c->query + row * c->query_step, c->query_step, c->state + col,
                  c->value_step, c->key_dim, c->ahead);
    RA_UNROLL
    for (int i = 0; i < mr; i++) {
        vf factor = vf_set1(c->scale * c->row_factor[row + i]);
        RA_UNROLL
        for (int j = 0; j < nv; j++) {
            acc.at[i][j] = vf_mul(factor, acc.at[i][j]);
        }
    }
    /* Up to the diagonal of the last row; the others meet zeros of the score. */
    ra_linear_add(&acc, mr, nv, c->score, c->score_step, c->value + col, c->value_step, row + mr,
                  c->ahead);
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
    ra_linear_add(&acc, mr, nv, c->key_columns + row * c->score_step, c->score_step, c->value + col,
                  c->value_step, c->tokens, c->ahead);
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

/* Outputs follow their rows' scores, which end at the diagonal, while the rows of q are at hand. */
RA_INLINE void ra_linear_some_rows(const ra_linear_chunk_t *c, const ra_linear_product_t product,
                                   int64_t row, int64_t cols, const int mr)
{
    if (product == RA_LINEAR_OUTPUT) {
        ra_linear_row_tiles(c, RA_LINEAR_SCORE, row, row + mr, mr);
    }
    ra_linear_row_tiles(c, product, row, cols, mr);
}

RA_INLINE void ra_linear_all_rows(const ra_linear_chunk_t *c, const ra_linear_product_t product,
                                  int64_t rows, int64_t cols)
{
    int64_t row = 0;
    for (; row + RA_LINEAR_ROWS <= rows; row += RA_LINEAR_ROWS) {
        ra_linear_some_rows(c, product, row, cols, RA_LINEAR_ROWS);
    }
    if (row + 4 <= rows) {
        ra_linear_some_rows(c, product, row, cols, 4);
        row += 4;
    }
    for (; row < rows; row++) {
        ra_linear_some_rows(c, product, row, cols, 1);
    }
}

/** P and o of the whole chunk, from the state before it. */
static __attribute__((noinline)) void ra_linear_outputs(const ra_linear_chunk_t *c)
{
    ra_linear_all_rows(c, RA_LINEAR_OUTPUT, c->tokens, c->value_dim);
}

/** The state after the chunk. */
static __attribute__((noinline)) void ra_linear_update(const ra_linear_chunk_t *c)
{
    ra_linear_all_rows(c, RA_LINEAR_STATE, c->key_dim, c->value_dim);
}

#endif
