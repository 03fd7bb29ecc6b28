/*
 * LM head and log-sum-exp in tiles: for RA_HEAD_TILE rows, blocks of RA_HEAD_BLOCK vocabulary
 * entries are multiplied and folded into (m, l) one after another. A [tokens, vocab] matrix never
 * exists.
 */
#include "base/checked.h"
#include "base/trace.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"
#include <math.h>

/* One formula wherever a log-probability is made, so that equal parts give equal bits. */
static float log_probability(float logit, float m, float l)
{
    return (float)((double)logit - (double)m - log((double)l));
}

static ra_status_t block_logits(ra_forward_t *f, int64_t block, int64_t n, int64_t *columns_p)
{
    const ra_gemm_weight_t *weight = ra_prepared_head(f->params.weights, block);
    int64_t columns = ra_gemm_weight_out(weight);
    ra_gemm_job_t job = {.weight = weight,
                         .x = f->normed,
                         .x_stride = f->params.config->hidden_size,
                         .rows = n,
                         .y = f->head,
                         .y_stride = columns};
    *columns_p = columns;
    return ra_gemm(&job, 1, false, f->params.stream);
}

static void norm_rows(ra_forward_t *f, int64_t begin, int64_t n)
{
    int64_t hidden = f->params.config->hidden_size;
    ra_op_rms_norm(f->x + begin * hidden, hidden, n, hidden,
                   ra_prepared_final_norm(f->params.weights), f->params.config->rms_norm_eps,
                   f->normed, hidden, f->params.stream);
    for (int64_t r = 0; r < n; r++) {
        f->lse_m[r] = -INFINITY;
        f->lse_l[r] = 0.0f;
        f->picked[r] = 0.0f;
    }
}

static ra_status_t score_rows(ra_forward_t *f, const ra_forward_io_t *io, int64_t begin, int64_t n)
{
    norm_rows(f, begin, n);
    for (int64_t b = 0; ra_prepared_head(f->params.weights, b) != NULL; b++) {
        int64_t columns;
        RA_TRY(block_logits(f, b, n, &columns));
        ra_op_lse_fold(f->head, columns, n, columns, b * RA_HEAD_BLOCK, io->target + begin,
                       f->lse_m, f->lse_l, f->picked, f->params.stream);
    }
    for (int64_t r = 0; r < n; r++) {
        io->logprob[begin + r] = io->target[begin + r] < 0
                                     ? 0.0f
                                     : log_probability(f->picked[r], f->lse_m[r], f->lse_l[r]);
    }
    return RA_OK;
}

/* All log-probabilities of one row: its logits once into the output, then shifted by the
 * log-sum-exp. */
static ra_status_t vocabulary_row(ra_forward_t *f, const ra_forward_io_t *io)
{
    static const int32_t no_target = -1;
    int64_t vocab = f->params.config->vocab_size;

    norm_rows(f, io->logits_row, 1);
    for (int64_t b = 0; ra_prepared_head(f->params.weights, b) != NULL; b++) {
        int64_t columns, first = b * RA_HEAD_BLOCK;
        RA_TRY(block_logits(f, b, 1, &columns));
        ra_op_lse_fold(f->head, columns, 1, columns, first, &no_target, f->lse_m, f->lse_l,
                       f->picked, f->params.stream);
        for (int64_t j = 0; j < columns; j++) {
            io->next_logprob[first + j] = f->head[j];
        }
    }
    for (int64_t j = 0; j < vocab; j++) {
        io->next_logprob[j] = log_probability(io->next_logprob[j], f->lse_m[0], f->lse_l[0]);
    }
    return RA_OK;
}

ra_status_t ra_lm_head(ra_forward_t *f, const ra_forward_io_t *io)
{
    int64_t span = ra_trace_begin();
    for (int64_t begin = 0; io->target != NULL && begin < f->rows; begin += RA_HEAD_TILE) {
        RA_TRY(score_rows(f, io, begin, ra_min_i64(RA_HEAD_TILE, f->rows - begin)));
    }
    if (io->logits_row >= 0) {
        RA_TRY(vocabulary_row(f, io));
    }
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, "lm head", f->rows);
    return RA_OK;
}
