/* ra_softmax_fold() over one block: flops are 4 D for each visible (row, key) pair and head. */
#include "attention/softmax_block.h"
#include "benchmarks/bench.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct attention {
    ra_softmax_block_t block;
    ra_softmax_state_t state;
    float *lse;
    float *q, *k, *v;
    int64_t *row_lo, *row_hi, *key_pos;
    ra_row_group_t group;
    ra_key_span_t span;
    const ra_softmax_kernel_t *kernel;
    ra_stream_t *stream;
    double pairs; /* visible, of one head */
} attention_t;

/* window 0: none. */
static void attention_make(attention_t *a, int64_t tokens, int32_t heads, int32_t kv_heads,
                           int32_t dim, bool causal, int64_t window)
{
    int64_t q_width = (int64_t)heads * dim, k_width = (int64_t)kv_heads * dim;
    a->q = bench_alloc(tokens * q_width * 4);
    a->k = bench_alloc(tokens * k_width * 4);
    a->v = bench_alloc(tokens * k_width * 4);
    bench_fill(a->q, tokens * q_width, 1, -2.0f, 2.0f);
    bench_fill(a->k, tokens * k_width, 2, -2.0f, 2.0f);
    bench_fill(a->v, tokens * k_width, 3, -1.0f, 1.0f);
    a->row_lo = bench_alloc(tokens * 8);
    a->row_hi = bench_alloc(tokens * 8);
    a->key_pos = bench_alloc(tokens * 8);
    for (int64_t t = 0; t < tokens; t++) {
        a->key_pos[t] = t;
        a->row_hi[t] = causal ? t + 1 : tokens;
        a->row_lo[t] = window > 0 && t >= window ? t + 1 - window : 0;
        a->pairs += (double)(a->row_hi[t] - a->row_lo[t]);
    }
    a->group = (ra_row_group_t){0, tokens, 0, 1};
    a->span = (ra_key_span_t){0, tokens};
    a->block = (ra_softmax_block_t){
        .rows = tokens,
        .keys = tokens,
        .heads = heads,
        .kv_heads = kv_heads,
        .head_dim = dim,
        .scale = 1.0f / sqrtf((float)dim),
        .dtype = RA_F32,
        .q = a->q,
        .k = a->k,
        .v = a->v,
        .q_stride = q_width,
        .k_stride = k_width,
        .v_stride = k_width,
        .mask = {.row_lo = a->row_lo, .row_hi = a->row_hi, .key_pos = a->key_pos},
        .groups = &a->group,
        .group_count = 1,
        .spans = &a->span,
    };
    a->state = (ra_softmax_state_t){.m = bench_alloc(heads * tokens * 4),
                                    .l = bench_alloc(heads * tokens * 4),
                                    .o = bench_alloc(tokens * q_width * 4),
                                    .o_stride = q_width};
    a->lse = bench_alloc(heads * tokens * 4);
}

static void attention_free(attention_t *a)
{
    free(a->q);
    free(a->k);
    free(a->v);
    free(a->row_lo);
    free(a->row_hi);
    free(a->key_pos);
    free(a->state.m);
    free(a->state.l);
    free(a->state.o);
    free(a->lse);
}

static void attend(void *arg)
{
    attention_t *a = arg;
    const ra_softmax_block_t *b = &a->block;
    if (ra_softmax_reset(b->rows, b->heads, b->head_dim, &a->state, a->stream) != RA_OK ||
        ra_softmax_fold(a->kernel, b, &a->state, a->stream) != RA_OK ||
        ra_softmax_finish(b->rows, b->heads, b->head_dim, &a->state, a->lse, a->stream) != RA_OK) {
        exit(5);
    }
}

/* Rows `row` of a fresh state folded by the oracle. Scores stay below about 10: see the test. */
static void check_row(bench_t *bench, const attention_t *a, int64_t row)
{
    const ra_softmax_kernel_t *ref;
    ra_softmax_block_t one = a->block;
    ra_row_group_t group = {row, 1, 0, 1};
    int64_t width = (int64_t)one.heads * one.head_dim;
    ra_softmax_state_t state = {bench_alloc(one.heads * one.rows * 4),
                                bench_alloc(one.heads * one.rows * 4),
                                bench_alloc(one.rows * width * 4), width};
    if (ra_softmax_select("ref", RA_DEVICE_CPU, &one, &ref) != RA_OK) {
        exit(2);
    }
    one.groups = &group;
    ra_softmax_reset(one.rows, one.heads, one.head_dim, &state, NULL);
    ra_softmax_fold(ref, &one, &state, NULL);
    double worst = 0.0;
    for (int64_t i = 0; i < width; i++) {
        double want = (double)state.o[row * width + i] / state.l[i / one.head_dim * one.rows + row];
        double error = fabs((double)a->state.o[row * width + i] - want);
        worst = error > worst || isnan(error) ? error : worst;
    }
    if (!(worst <= 4e-5)) {
        bench_wrong(bench, "row %lld is off by %g", (long long)row, worst);
    }
    free(state.m);
    free(state.l);
    free(state.o);
}

static void measure(bench_t *bench, const char *kernel, attention_t *a, const char *mask)
{
    const ra_softmax_block_t *b = &a->block;
    a->stream = bench->stream;
    if (ra_softmax_select(kernel, RA_DEVICE_CPU, b, &a->kernel) != RA_OK) {
        exit(2);
    }
    bench_time_t time = bench_run(bench, attend, a);
    for (int64_t i = 0; i < 5 && bench->check; i++) {
        check_row(bench, a, (b->rows - 1) * i / 4);
    }
    double flops = 4.0 * b->head_dim * b->heads * a->pairs, rate = flops / time.median;
    bench_row(bench, (bench_cell_t[]){
                         BENCH_TEXT(ra_softmax_kernel_name(a->kernel)), BENCH_TEXT(mask),
                         BENCH_NUMBER(b->rows), BENCH_NUMBER(b->heads), BENCH_NUMBER(b->kv_heads),
                         BENCH_NUMBER(b->head_dim), BENCH_NUMBER(time.median * 1e3),
                         BENCH_NUMBER(rate * 1e-9), BENCH_NUMBER(100.0 * flops / time.peak_flops),
                         BENCH_NUMBER(100.0 * flops / time.peak_flops_most),
                         BENCH_NUMBER(100.0 * flops / time.peak_flops_least),
                         BENCH_NUMBER(100.0 * flops / time.core_flops)});
}

int main(int argc, char **argv)
{
    enum { BEGIN, END, FACTOR, HEADS, KV_HEADS, DIM, MASK, WINDOW, KERNEL };
    bench_flag_t flags[] = {
        [BEGIN] = {"-b", "8k", "tokens of the first size"},
        [END] = {"-e", "8k", "tokens of the last size"},
        [FACTOR] = {"-f", "2", "factor between sizes"},
        [HEADS] = {"--heads", "8", "query heads"},
        [KV_HEADS] = {"--kv-heads", "0", "key/value heads; 0 measures 2 and as many as heads"},
        [DIM] = {"--head-dim", "0", "head size; 0 measures 64 and 128"},
        [MASK] = {"--mask", "causal", "causal|full"},
        [WINDOW] = {"--window", "0", "keys a row sees at most; 0 for no window"},
        [KERNEL] = {"--kernel", "auto", "row of the softmax table"},
    };
    static const bench_column_t columns[] = {
        {"kernel", "%s"},     {"mask", "%s"},        {"tokens", "%.0f"},    {"heads", "%.0f"},
        {"kv_heads", "%.0f"}, {"head_dim", "%.0f"},  {"median_ms", "%.1f"}, {"gflop_per_s", "%.1f"},
        {"pct_peak", "%.1f"}, {"pct_least", "%.1f"}, {"pct_most", "%.1f"},  {"pct_core", "%.1f"}};
    bench_t *bench = bench_open(argc, argv, "attention_perf",
                                "softmax attention over one block, 4 D flops a visible pair", flags,
                                (int)RA_ARRAY_LEN(flags));
    int64_t heads = bench_int(&flags[HEADS]), factor = bench_int(&flags[FACTOR]);
    int64_t kv_heads = bench_int(&flags[KV_HEADS]), dim = bench_int(&flags[DIM]);
    int64_t first_kv = kv_heads > 0 ? kv_heads : 2, last_kv = kv_heads > 0 ? kv_heads : heads;
    int64_t first_dim = dim > 0 ? dim : 64, last_dim = dim > 0 ? dim : 128;
    bool causal = strcmp(flags[MASK].value, "full") != 0;

    bench_table(bench, "softmax block", columns, (int)RA_ARRAY_LEN(columns));
    for (int64_t n = bench_int(&flags[BEGIN]); n <= bench_int(&flags[END]);
         n *= factor > 1 ? factor : 2) {
        for (int64_t d = first_dim; d <= last_dim; d *= 2) {
            for (int64_t g = first_kv; g <= last_kv; g = g < last_kv ? last_kv : g + 1) {
                attention_t a = {0};
                attention_make(&a, n, (int32_t)heads, (int32_t)g, (int32_t)d, causal,
                               bench_int(&flags[WINDOW]));
                measure(bench, flags[KERNEL].value, &a, flags[MASK].value);
                attention_free(&a);
            }
        }
    }
    return bench_close(bench);
}
