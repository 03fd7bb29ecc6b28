#include "model/layer_ops.h"

#include "base/checked.h"
#include "model/row_kernels.h"
#include "moe/moe_simd.h"
#include <math.h>
#include <string.h>
#if RA_HAVE_CUDA
#include "base/device_cuda.h"
#include "model/head_cuda.h"
#include "model/row_kernels_cuda.h"
#endif

/* Rows handed to a thread at once: enough to hide the hand-over, few enough to balance. */
enum { ROWS_A_PIECE = 32, NUMBERS_A_PIECE = 4096 };

struct CUstream_st;

/* An operation's body on each device. */
typedef struct row_op {
    void (*cpu)(const void *args, int64_t begin, int64_t end);
    ra_status_t (*cuda)(const void *args, int64_t rows, struct CUstream_st *stream);
    int64_t piece; /* rows a CPU thread takes at once */
} row_op_t;

#if RA_HAVE_CUDA
#define CUDA_BODY(name) ra_##name##_cuda
#else
#define CUDA_BODY(name) NULL
#endif

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

typedef struct row_job {
    const row_op_t *op;
    const void *args;
    int64_t rows;
} row_job_t;

static void run_piece(void *arg, int64_t index)
{
    const row_job_t *job = arg;
    int64_t begin = index * job->op->piece;
    job->op->cpu(job->args, begin, ra_min_i64(begin + job->op->piece, job->rows));
}

static ra_status_t run(const row_op_t *op, const void *args, ra_dtype_t act, int64_t rows,
                       ra_stream_t *stream)
{
#if RA_HAVE_CUDA
    if (stream != NULL && ra_device_kind(ra_stream_device(stream)) == RA_DEVICE_CUDA) {
        return rows == 0 ? RA_OK : op->cuda(args, rows, ra_stream_cuda(stream));
    }
#endif
    if (act != RA_F32) {
        return ra_fail(RA_ERR_UNSUPPORTED, "model", "CPU kernels have no %s activations",
                       ra_dtype_name(act));
    }
    row_job_t job = {.op = op, .args = args, .rows = rows};
    ra_pool_for(ra_stream_pool(stream), ra_ceil_div(rows, op->piece), run_piece, &job);
    return RA_OK;
}

static void embed_rows(const void *arg, int64_t begin, int64_t end)
{
    const ra_embed_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        int64_t from = args->tokens[r] * args->channels;
        float *x = args->x + r * args->x_stride;
        if (args->table_dtype == RA_F32) {
            memcpy(x, (const float *)args->table + from, (size_t)args->channels * sizeof(*x));
            continue;
        }
        for (int64_t i = 0; i < args->channels; i++) {
            x[i] = ra_bf16_to_f32(((const uint16_t *)args->table)[from + i]);
        }
    }
}

ra_status_t ra_op_embed(const ra_tensor_t *table, const int32_t *tokens, int64_t rows, float *x,
                        int64_t x_stride, ra_stream_t *stream)
{
    static const row_op_t op = {embed_rows, CUDA_BODY(embed), ROWS_A_PIECE};
    ra_embed_args_t args = {.table = table->data,
                            .tokens = tokens,
                            .x = x,
                            .channels = table->extent[1],
                            .x_stride = x_stride,
                            .table_dtype = table->dtype};
    return run(&op, &args, RA_F32, rows, stream);
}

static void rms_norm_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->rms_norm(args, begin, end);
}

ra_status_t ra_op_rms_norm(const float *x, int64_t x_stride, int64_t rows, int64_t channels,
                           const float *weight, double eps, void *y, int64_t y_stride,
                           ra_dtype_t act, ra_stream_t *stream)
{
    static const row_op_t op = {rms_norm_rows, CUDA_BODY(rms_norm), ROWS_A_PIECE};
    ra_rms_norm_args_t args = {.x = x,
                               .weight = weight,
                               .y = y,
                               .x_stride = x_stride,
                               .y_stride = y_stride,
                               .channels = channels,
                               .eps = (float)eps,
                               .act = act};
    return run(&op, &args, act, rows, stream);
}

static void rope_table_rows(const void *arg, int64_t begin, int64_t end)
{
    const ra_rope_table_args_t *args = arg;
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

ra_status_t ra_op_rope_table(const int64_t *positions, int64_t rows, const double *inv_freq,
                             int64_t rotary_dim, double attention_factor, float *table,
                             ra_stream_t *stream)
{
    static const row_op_t op = {rope_table_rows, CUDA_BODY(rope_table), ROWS_A_PIECE};
    ra_rope_table_args_t args = {.positions = positions,
                                 .inv_freq = inv_freq,
                                 .rotary_dim = rotary_dim,
                                 .attention_factor = attention_factor,
                                 .table = table};
    return run(&op, &args, RA_F32, rows, stream);
}

static void head_rope_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->head_rope(args, begin, end);
}

ra_status_t ra_op_head_norm_rope(const ra_op_heads_t *parts, int count, int64_t rows,
                                 int64_t head_dim, double eps, const float *table,
                                 int64_t rotary_dim, ra_dtype_t act, ra_stream_t *stream)
{
    static const row_op_t op = {head_rope_rows, CUDA_BODY(head_rope), ROWS_A_PIECE};
    ra_head_rope_args_t args = {.parts = parts,
                                .count = count,
                                .table = table,
                                .head_dim = head_dim,
                                .rotary_dim = rotary_dim,
                                .eps = (float)eps,
                                .act = act};
    return run(&op, &args, act, rows, stream);
}

static void copy_rows(const void *arg, int64_t begin, int64_t end)
{
    const ra_copy_rows_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        memcpy((float *)args->y + r * args->y_stride, (const float *)args->x + r * args->x_stride,
               (size_t)args->channels * sizeof(float));
    }
}

ra_status_t ra_op_copy_rows(const void *x, int64_t x_stride, ra_dtype_t x_dtype, int64_t rows,
                            int64_t channels, void *y, int64_t y_stride, ra_dtype_t y_dtype,
                            ra_stream_t *stream)
{
    static const row_op_t op = {copy_rows, CUDA_BODY(copy_rows), ROWS_A_PIECE};
    ra_copy_rows_args_t args = {.x = x,
                                .y = y,
                                .x_stride = x_stride,
                                .y_stride = y_stride,
                                .channels = channels,
                                .x_dtype = x_dtype,
                                .y_dtype = y_dtype};
    return run(&op, &args, x_dtype == RA_F32 ? y_dtype : x_dtype, rows, stream);
}

static void group_gate_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->group_gate(args, begin, end);
}

ra_status_t ra_op_group_norm_gate(void *o, int64_t o_stride, int64_t rows, int64_t channels,
                                  int64_t groups, const float *weight, double eps, const void *gate,
                                  int64_t gate_stride, ra_dtype_t act, ra_stream_t *stream)
{
    static const row_op_t op = {group_gate_rows, CUDA_BODY(group_gate), ROWS_A_PIECE};
    ra_group_gate_args_t args = {.o = o,
                                 .weight = weight,
                                 .gate = gate,
                                 .o_stride = o_stride,
                                 .gate_stride = gate_stride,
                                 .channels = channels,
                                 .groups = groups,
                                 .eps = (float)eps,
                                 .act = act};
    return run(&op, &args, act, rows, stream);
}

/* The experts' own kernel: dense and expert feed-forwards are the same function. */
static void silu_mul_rows(const void *arg, int64_t begin, int64_t end)
{
    const ra_silu_mul_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        ra_moe_ops()->swiglu((float *)args->gate + r * args->gate_stride,
                             (const float *)args->up + r * args->up_stride, args->channels);
    }
}

ra_status_t ra_op_silu_mul(void *gate, int64_t gate_stride, const void *up, int64_t up_stride,
                           int64_t rows, int64_t channels, ra_dtype_t act, ra_stream_t *stream)
{
    static const row_op_t op = {silu_mul_rows, CUDA_BODY(silu_mul), ROWS_A_PIECE};
    ra_silu_mul_args_t args = {.gate = gate,
                               .up = up,
                               .gate_stride = gate_stride,
                               .up_stride = up_stride,
                               .channels = channels,
                               .act = act};
    return run(&op, &args, act, rows, stream);
}

static void fill_numbers(const void *arg, int64_t begin, int64_t end)
{
    const ra_fill_args_t *args = arg;
    for (int64_t i = begin; i < end; i++) {
        args->x[i] = args->value;
    }
}

ra_status_t ra_op_fill(float *x, int64_t n, float value, ra_stream_t *stream)
{
    static const row_op_t op = {fill_numbers, CUDA_BODY(fill), NUMBERS_A_PIECE};
    ra_fill_args_t args = {.x = x, .value = value};
    return run(&op, &args, RA_F32, n, stream);
}

static void take_least(const void *arg, int64_t begin, int64_t end)
{
    const ra_min_rows_args_t *args = arg;
    for (int64_t i = begin; i < end; i++) {
        args->least[i] = args->x[i] < args->least[i] ? args->x[i] : args->least[i];
    }
}

ra_status_t ra_op_min_rows(const float *x, int64_t n, float *least, ra_stream_t *stream)
{
    static const row_op_t op = {take_least, CUDA_BODY(min_rows), NUMBERS_A_PIECE};
    ra_min_rows_args_t args = {.x = x, .least = least};
    return run(&op, &args, RA_F32, n, stream);
}

static void lse_reset_rows(const void *arg, int64_t begin, int64_t end)
{
    const ra_lse_reset_args_t *args = arg;
    for (int64_t r = begin; r < end; r++) {
        args->m[r] = -INFINITY;
        args->l[r] = 0.0f;
        args->picked[r] = 0.0f;
    }
}

ra_status_t ra_op_lse_reset(float *m, float *l, float *picked, int64_t rows, ra_stream_t *stream)
{
    static const row_op_t op = {lse_reset_rows, CUDA_BODY(lse_reset), NUMBERS_A_PIECE};
    ra_lse_reset_args_t args = {.m = m, .l = l, .picked = picked};
    return run(&op, &args, RA_F32, rows, stream);
}

static void lse_fold_rows(const void *args, int64_t begin, int64_t end)
{
    kernels()->lse_fold(args, begin, end);
}

ra_status_t ra_op_lse_fold(const float *logits, int64_t stride, int64_t rows, int64_t columns,
                           int64_t first, const int32_t *target, float *m, float *l, float *picked,
                           ra_stream_t *stream)
{
    static const row_op_t op = {lse_fold_rows, CUDA_BODY(lse_fold), ROWS_A_PIECE};
    ra_lse_fold_args_t args = {.logits = logits,
                               .stride = stride,
                               .columns = columns,
                               .first = first,
                               .target = target,
                               .m = m,
                               .l = l,
                               .picked = picked};
    return run(&op, &args, RA_F32, rows, stream);
}

#if RA_HAVE_CUDA
/* The fused kernel's call for a product. */
static ra_head_fold_t fused_call(const ra_gemm_job_t *job)
{
    ra_dtype_t dtype;
    const void *weight = ra_gemm_weight_on_device(job->weight, &dtype);
    bool bf16 = dtype == RA_BF16 && job->x_dtype == RA_BF16;
    return (ra_head_fold_t){.x = job->x,
                            .x_stride = job->x_stride,
                            .rows = job->rows,
                            .channels = ra_gemm_weight_in(job->weight),
                            .weight = bf16 ? weight : NULL,
                            .columns = ra_gemm_weight_out(job->weight),
                            .parts = job->y};
}

static bool is_fused(const ra_head_fold_t *call)
{
    return call->weight != NULL && ra_head_sm90_takes(call);
}
#endif

int64_t ra_op_head_scratch(const ra_gemm_job_t *job)
{
    int64_t columns = ra_gemm_weight_out(job->weight);
#if RA_HAVE_CUDA
    ra_head_fold_t call = fused_call(job);
    if (is_fused(&call)) {
        return ra_head_sm90_parts(job->rows, columns);
    }
#endif
    return job->rows * columns * (int64_t)sizeof(float);
}

ra_status_t ra_op_head_fold(const ra_gemm_job_t *job, int64_t first, const int32_t *target,
                            float *m, float *l, float *picked, ra_stream_t *stream)
{
    int64_t columns = ra_gemm_weight_out(job->weight);
#if RA_HAVE_CUDA
    ra_head_fold_t call = fused_call(job);
    if (is_fused(&call)) {
        call.first = first;
        call.target = target;
        call.m = m;
        call.l = l;
        call.picked = picked;
        return ra_head_sm90_fold(&call, ra_stream_cuda(stream));
    }
#endif
    RA_TRY(ra_gemm(job, 1, false, stream));
    return ra_op_lse_fold(job->y, job->y_stride, job->rows, columns, first, target, m, l, picked,
                          stream);
}

/* One formula wherever a log-probability is made, so that equal parts give equal bits. */
static void log_prob_numbers(const void *arg, int64_t begin, int64_t end)
{
    const ra_log_prob_args_t *args = arg;
    for (int64_t i = begin; i < end; i++) {
        if (args->target != NULL && args->target[i] < 0) {
            args->logprob[i] = 0.0f;
            continue;
        }
        double m = (double)args->m[i * args->part_stride];
        double l = (double)args->l[i * args->part_stride];
        args->logprob[i] = (float)((double)args->logit[i] - m - log(l));
    }
}

ra_status_t ra_op_log_prob(const float *logit, const int32_t *target, const float *m,
                           const float *l, int64_t part_stride, int64_t n, float *logprob,
                           ra_stream_t *stream)
{
    static const row_op_t op = {log_prob_numbers, CUDA_BODY(log_prob), NUMBERS_A_PIECE};
    ra_log_prob_args_t args = {.logit = logit,
                               .m = m,
                               .l = l,
                               .target = target,
                               .part_stride = part_stride,
                               .logprob = logprob};
    return run(&op, &args, RA_F32, n, stream);
}
