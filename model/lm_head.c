/*
 * LM head and log-sum-exp in tiles: for a tile of rows, blocks of ra_head_block() vocabulary
 * entries are multiplied and folded into (m, l) one after another. A [tokens, vocab] matrix never
 * exists.
 */
#include "base/checked.h"
#include "base/trace.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"

/* y [n, columns] = logits of the normed rows for a block of the vocabulary. */
static ra_gemm_job_t block_product(const ra_forward_t *f, const ra_gemm_weight_t *block, int64_t n,
                                   float *y)
{
    return (ra_gemm_job_t){.weight = block,
                           .x = f->normed,
                           .x_stride = f->params.config->hidden_size,
                           .x_dtype = f->act,
                           .rows = n,
                           .y = y,
                           .y_stride = ra_gemm_weight_out(block)};
}

int64_t ra_lm_head_scratch(const ra_forward_t *f, int64_t head_tile)
{
    const ra_gemm_weight_t *block;
    int64_t most = 0;
    for (int64_t b = 0; (block = ra_prepared_head(f->params.weights, b)) != NULL; b++) {
        ra_gemm_job_t job = block_product(f, block, head_tile, NULL);
        most = ra_max_i64(most, ra_op_head_scratch(&job));
    }
    return most;
}

static ra_status_t norm_rows(ra_forward_t *f, int64_t begin, int64_t n)
{
    int64_t hidden = f->params.config->hidden_size;
    RA_TRY(ra_op_rms_norm(f->x + begin * hidden, hidden, n, hidden,
                          ra_prepared_final_norm(f->params.weights), f->params.config->rms_norm_eps,
                          f->normed, hidden, f->act, f->params.stream));
    return ra_op_lse_reset(f->lse_m, f->lse_l, f->picked, n, f->params.stream);
}

static ra_status_t score_rows(ra_forward_t *f, const ra_forward_io_t *io, int64_t begin, int64_t n)
{
    RA_TRY(norm_rows(f, begin, n));
    const ra_gemm_weight_t *block;
    int64_t first = 0;
    for (int64_t b = 0; (block = ra_prepared_head(f->params.weights, b)) != NULL; b++) {
        ra_gemm_job_t job = block_product(f, block, n, f->head);
        RA_TRY(ra_op_head_fold(&job, first, io->target + begin, f->lse_m, f->lse_l, f->picked,
                               f->params.stream));
        first += ra_gemm_weight_out(block);
    }
    return ra_op_log_prob(f->picked, io->target + begin, f->lse_m, f->lse_l, 1, n,
                          io->logprob + begin, f->params.stream);
}

/* All log-probabilities of one row: its logits once into the output, then shifted by the
 * log-sum-exp. */
static ra_status_t vocabulary_row(ra_forward_t *f, const ra_forward_io_t *io)
{
    RA_TRY(norm_rows(f, io->logits_row, 1));
    const ra_gemm_weight_t *block;
    int64_t first = 0;
    for (int64_t b = 0; (block = ra_prepared_head(f->params.weights, b)) != NULL; b++) {
        int64_t columns = ra_gemm_weight_out(block);
        float *logits = io->next_logprob + first;
        ra_gemm_job_t job = block_product(f, block, 1, logits);
        RA_TRY(ra_gemm(&job, 1, false, f->params.stream));
        RA_TRY(ra_op_lse_fold(logits, columns, 1, columns, first, NULL, f->lse_m, f->lse_l,
                              f->picked, f->params.stream));
        first += columns;
    }
    return ra_op_log_prob(io->next_logprob, NULL, f->lse_m, f->lse_l, 0,
                          f->params.config->vocab_size, io->next_logprob, f->params.stream);
}

ra_status_t ra_lm_head(ra_forward_t *f, const ra_forward_io_t *io)
{
    ra_span_t span = ra_trace_begin("lm head");
    for (int64_t begin = 0; io->target != NULL && begin < f->rows; begin += f->head_tile) {
        RA_TRY(score_rows(f, io, begin, ra_min_i64(f->head_tile, f->rows - begin)));
    }
    if (io->logits_row >= 0) {
        RA_TRY(vocabulary_row(f, io));
    }
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, f->rows);
    return RA_OK;
}
