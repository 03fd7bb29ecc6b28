#include "model/layer_ops.h"

#include "base/checked.h"
#include "model/row_kernels.h"
#include "moe/moe_simd.h"
#include <math.h>
#include <string.h>

/* Rows handed to a thread at once: enough to hide the hand-over, few enough to balance. */
enum { ROWS_A_PIECE = 32 };

static const ra_row_kernels_t *kernels(void)
{
#if defined(__x86_64__)
    static const ra_row_kernels_t *const table[RA_CPU_ISA_COUNT] = {
        &ra_row_kernels_generic, &ra_row_kernels_avx2, &ra_row_kernels_avx512};
    return table[ra_cpu_isa()];
#else
    return &ra_row_kernels_generic;
#endif
}

/* A row kernel and its arguments, cut into pieces of rows. */
typedef struct row_job {
    void (*body)(const void *args, int64_t begin, int64_t end);
    const void *args;
    int64_t rows;
} row_job_t;

static void run_piece(void *arg, int64_t index)
{
    const row_job_t *job = arg;
    int64_t begin = index * ROWS_A_PIECE;
    job->body(job->args, begin, ra_min_i64(begin + ROWS_A_PIECE, job->rows));
}

static void run_rows(void (*body)(const void *, int64_t, int64_t), const void *args, int64_t rows,
                     ra_stream_t *stream)
{
    row_job_t job = {.body = body, .args = args, .rows = rows};
    ra_pool_for(ra_stream_pool(stream), ra_ceil_div(rows, ROWS_A_PIECE), run_piece, &job);
}

typedef struct embed_args {
    const ra_tensor_t *table;
    const int32_t *tokens;
    float *x;
    int64_t x_stride;
} embed_args_t;

static void embed_rows(const void *arg, int64_t begin, int64_t end)
{
    const embed_args_t *args = arg;
    int64_t channels = args->table->extent[1];
    for (int64_t r = begin; r < end; r++) {
        int64_t from = args->tokens[r] * channels;
        float *x = args->x + r * args->x_stride;
        if (args->table->dtype == RA_F32) {
            memcpy(x, (const float *)args->table->data + from, (size_t)channels * sizeof(*x));
            continue;
        }
        for (int64_t i = 0; i < channels; i++) {
            x[i] = ra_bf16_to_f32(((const uint16_t *)args->table->data)[from + i]);
        }
    }
}

void ra_op_embed(const ra_tensor_t *table, const int32_t *tokens, int64_t rows, float *x,
                 int64_t x_stride, ra_stream_t *stream)
{
    embed_args_t args = {.table = table, .tokens = tokens, .x = x, .x_stride = x_stride};
    run_rows(embed_rows, &args, rows, stream);
}

static void rms_norm_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->rms_norm(args, begin, end);
}

void ra_op_rms_norm(const float *x, int64_t x_stride, int64_t rows, int64_t channels,
                    const float *weight, double eps, float *y, int64_t y_stride,
                    ra_stream_t *stream)
{
    ra_rms_norm_args_t args = {.x = x,
                               .weight = weight,
                               .y = y,
                               .x_stride = x_stride,
                               .y_stride = y_stride,
                               .channels = channels,
                               .eps = (float)eps};
    run_rows(rms_norm_rows, &args, rows, stream);
}

typedef struct rope_table_args {
    const int64_t *positions;
    const double *inv_freq;
    int64_t rotary_dim;
    double attention_factor;
    float *table;
} rope_table_args_t;

static void rope_table_rows(const void *arg, int64_t begin, int64_t end)
{
    const rope_table_args_t *args = arg;
    int64_t half = args->rotary_dim / 2;
    for (int64_t r = begin; r < end; r++) {
        float *cosine = args->table + r * args->rotary_dim;
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)args->positions[r] * args->inv_freq[i];
            cosine[i] = (float)(cos(angle) * args->attention_factor);
            cosine[half + i] = (float)(sin(angle) * args->attention_factor);
        }
    }
}

void ra_op_rope_table(const int64_t *positions, int64_t rows, const double *inv_freq,
                      int64_t rotary_dim, double attention_factor, float *table,
                      ra_stream_t *stream)
{
    rope_table_args_t args = {.positions = positions,
                              .inv_freq = inv_freq,
                              .rotary_dim = rotary_dim,
                              .attention_factor = attention_factor,
                              .table = table};
    run_rows(rope_table_rows, &args, rows, stream);
}

static void head_rope_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->head_rope(args, begin, end);
}

void ra_op_head_norm_rope(const float *x, int64_t x_stride, int64_t rows, int64_t heads,
                          int64_t head_dim, const float *weight, double eps, const float *table,
                          int64_t rotary_dim, float *y, int64_t y_stride, ra_stream_t *stream)
{
    ra_head_rope_args_t args = {.x = x,
                                .weight = weight,
                                .table = table,
                                .y = y,
                                .x_stride = x_stride,
                                .y_stride = y_stride,
                                .heads = heads,
                                .head_dim = head_dim,
                                .rotary_dim = rotary_dim,
                                .eps = (float)eps};
    run_rows(head_rope_rows, &args, rows, stream);
}

typedef struct copy_args {
    const float *x;
    float *y;
    int64_t x_stride, y_stride, channels;
} copy_args_t;

static void copy_rows(const void *arg, int64_t begin, int64_t end)
{
    const copy_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        memcpy(args->y + r * args->y_stride, args->x + r * args->x_stride,
               (size_t)args->channels * sizeof(float));
    }
}

void ra_op_copy_rows(const float *x, int64_t x_stride, int64_t rows, int64_t channels, float *y,
                     int64_t y_stride, ra_stream_t *stream)
{
    copy_args_t args = {
        .x = x, .y = y, .x_stride = x_stride, .y_stride = y_stride, .channels = channels};
    run_rows(copy_rows, &args, rows, stream);
}

static void group_gate_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->group_gate(args, begin, end);
}

void ra_op_group_norm_gate(float *o, int64_t o_stride, int64_t rows, int64_t channels,
                           int64_t groups, const float *weight, double eps, const float *gate,
                           int64_t gate_stride, ra_stream_t *stream)
{
    ra_group_gate_args_t args = {.o = o,
                                 .weight = weight,
                                 .gate = gate,
                                 .o_stride = o_stride,
                                 .gate_stride = gate_stride,
                                 .channels = channels,
                                 .groups = groups,
                                 .eps = (float)eps};
    run_rows(group_gate_rows, &args, rows, stream);
}

typedef struct silu_mul_args {
    float *gate;
    const float *up;
    int64_t gate_stride, up_stride, channels;
} silu_mul_args_t;

/* The experts' own kernel: dense and expert feed-forwards are the same function. */
static void silu_mul_rows(const void *arg, int64_t begin, int64_t end)
{
    const silu_mul_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        ra_moe_ops()->swiglu(args->gate + r * args->gate_stride, args->up + r * args->up_stride,
                             args->channels);
    }
}

void ra_op_silu_mul(float *gate, int64_t gate_stride, const float *up, int64_t up_stride,
                    int64_t rows, int64_t channels, ra_stream_t *stream)
{
    silu_mul_args_t args = {.gate = gate,
                            .up = up,
                            .gate_stride = gate_stride,
                            .up_stride = up_stride,
                            .channels = channels};
    run_rows(silu_mul_rows, &args, rows, stream);
}

static void lse_fold_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->lse_fold(args, begin, end);
}

void ra_op_lse_fold(const float *logits, int64_t stride, int64_t rows, int64_t columns,
                    int64_t first, const int32_t *target, float *m, float *l, float *picked,
                    ra_stream_t *stream)
{
    ra_lse_fold_args_t args = {.logits = logits,
                               .stride = stride,
                               .columns = columns,
                               .first = first,
                               .target = target,
                               .m = m,
                               .l = l,
                               .picked = picked};
    run_rows(lse_fold_rows, &args, rows, stream);
}
