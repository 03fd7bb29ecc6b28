/*
 * Linear attention chunks, attention/linear_chunk.h, on one device.
 *
 * Flops a token and head, Dk = Dv = d, chunks of C tokens: the state takes 2 d^2 to update and 2
 * d^2 to read; inside its chunk a token meets (C + 1) / 2 keys on average, 4 d flops each: forward
 * 4 d^2 + 2 (C + 1) d      summarise 2 d^2 Visible pairs only; what the kernel computes above the
 * diagonal does not count.
 */
#include "attention/linear_chunk.h"
#include "attention/linear_cpu.h"
#include "benchmarks/bench.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct timed {
    ra_linear_args_t args;
    const ra_linear_kernel_t *kernel;
    bool state_only;
    ra_stream_t *stream;
} timed_t;

static void run(void *arg)
{
    timed_t *timed = arg;
    ra_status_t status = timed->state_only
                             ? ra_linear_summarise(timed->kernel, &timed->args, timed->stream)
                             : ra_linear_forward(timed->kernel, &timed->args, timed->stream);
    if (status != RA_OK) {
        exit(5);
    }
}

static double flops(const timed_t *timed, int64_t tokens)
{
    double d = timed->args.key_dim, each = 2 * d * d;
    if (!timed->state_only) {
        each += 2 * d * d + 2 * (RA_LINEAR_CHUNK + 1) * d;
    }
    return each * (double)tokens * timed->args.heads;
}

/* The first tokens of the first segment against the oracle. */
static void check(bench_t *bench, const timed_t *timed)
{
    enum { CHECKED = 200 };
    const ra_linear_kernel_t *ref;
    ra_linear_segment_t head = {.row_count = CHECKED};
    ra_linear_args_t args = timed->args;
    int64_t count = CHECKED * args.o_stride;
    float *want = bench_alloc(count * (int64_t)sizeof(*want));
    args.o = want;
    args.segments = &head;
    args.segment_count = 1;
    if (ra_linear_select("ref", RA_DEVICE_CPU, &args, &ref) != RA_OK ||
        ra_linear_forward(ref, &args, NULL) != RA_OK) {
        exit(5);
    }
    double largest = 0, error = 0;
    for (int64_t i = 0; i < count; i++) {
        largest = fmax(largest, fabs((double)want[i]));
        double off = fabs((double)((const float *)timed->args.o)[i] - (double)want[i]);
        error = off > error || isnan(off) ? off : error;
    }
    if (!(error <= 1.2e-5 * largest)) {
        bench_wrong(bench, "d %d: error %g beside values up to %g", args.key_dim, error, largest);
    }
    free(want);
}

static const bench_column_t columns[] = {
    {"op", "%s"},          {"decay", "%s"},        {"isa", "%s"},           {"heads", "%.0f"},
    {"d", "%.0f"},         {"tokens", "%.0f"},     {"segment", "%.0f"},     {"chunk", "%.0f"},
    {"ms", "%.2f"},        {"mtok_per_s", "%.3f"}, {"gflop_per_s", "%.1f"}, {"pct_peak", "%.1f"},
    {"pct_least", "%.1f"}, {"pct_most", "%.1f"},   {"pct_core", "%.1f"}};

typedef struct data {
    float *q, *k, *v, *o, *token_decay, *state;
    ra_linear_segment_t *segments;
    int64_t tokens, segment;
} data_t;

static void measure(bench_t *bench, const data_t *data, int32_t heads, int32_t dim, bool per_token,
                    bool state_only)
{
    float head_decay[64];
    int64_t width = (int64_t)heads * dim, count = 0;
    for (int32_t h = 0; h < heads; h++) {
        head_decay[h] = -exp2f(-8.0F * (float)(h + 1) / (float)heads); /* ALiBi slopes */
    }
    for (int64_t row = 0; row < data->tokens; row += data->segment, count++) {
        int64_t left = data->tokens - row;
        data->segments[count] =
            (ra_linear_segment_t){.row_begin = row,
                                  .row_count = left < data->segment ? left : data->segment,
                                  .state_out = data->state + count * width * dim};
    }
    timed_t timed = {.args = {.heads = heads,
                              .key_dim = dim,
                              .value_dim = dim,
                              .scale = 1 / sqrtf((float)dim),
                              .q = data->q,
                              .k = data->k,
                              .v = data->v,
                              .q_stride = width,
                              .k_stride = width,
                              .v_stride = width,
                              .log_decay = per_token ? data->token_decay : head_decay,
                              .log_decay_stride = per_token ? heads : 0,
                              .o = data->o,
                              .o_stride = width,
                              .segments = data->segments,
                              .segment_count = count},
                     .state_only = state_only,
                     .stream = bench->stream};
    if (ra_linear_select("cpu", RA_DEVICE_CPU, &timed.args, &timed.kernel) != RA_OK) {
        exit(5);
    }
    for (int64_t i = 0; i < data->tokens * width; i++) {
        data->o[i] = NAN;
    }
    bench_time_t time = bench_run(bench, run, &timed);
    if (bench->check && !state_only) {
        check(bench, &timed);
    }
    double work = flops(&timed, data->tokens);
    bench_row(bench, (bench_cell_t[]){
                         BENCH_TEXT(state_only ? "summarise" : "forward"),
                         BENCH_TEXT(per_token ? "token" : "head"),
                         BENCH_TEXT(ra_cpu_isa_name(ra_cpu_isa())), BENCH_NUMBER(heads),
                         BENCH_NUMBER(dim), BENCH_NUMBER(data->tokens), BENCH_NUMBER(data->segment),
                         BENCH_NUMBER(RA_LINEAR_CHUNK), BENCH_NUMBER(time.median * 1e3),
                         BENCH_NUMBER((double)data->tokens / time.median * 1e-6),
                         BENCH_NUMBER(work / time.median * 1e-9),
                         BENCH_NUMBER(100 * work / time.peak_flops),
                         BENCH_NUMBER(100 * work / time.peak_flops_most),
                         BENCH_NUMBER(100 * work / time.peak_flops_least),
                         BENCH_NUMBER(100 * work / time.core_flops)});
}

static void measure_dim(bench_t *bench, int64_t tokens, int64_t segment, int32_t heads, int32_t dim)
{
    int64_t count = tokens * heads * dim, segments = (tokens + segment - 1) / segment;
    data_t data = {.q = bench_alloc(count * 4),
                   .k = bench_alloc(count * 4),
                   .v = bench_alloc(count * 4),
                   .o = bench_alloc(count * 4),
                   .token_decay = bench_alloc(tokens * heads * 4),
                   .state = bench_alloc(segments * heads * dim * dim * 4),
                   .segments = bench_alloc(segments * (int64_t)sizeof(ra_linear_segment_t)),
                   .tokens = tokens,
                   .segment = segment};
    bench_fill(data.q, count, 1, -1, 1);
    bench_fill(data.k, count, 2, -1, 1);
    bench_fill(data.v, count, 3, -1, 1);
    bench_fill(data.token_decay, tokens * heads, 4, -0.5F, 0);
    measure(bench, &data, heads, dim, false, false);
    measure(bench, &data, heads, dim, false, true);
    measure(bench, &data, heads, dim, true, false);
    free(data.q);
    free(data.k);
    free(data.v);
    free(data.o);
    free(data.token_decay);
    free(data.state);
    free(data.segments);
}

int main(int argc, char **argv)
{
    bench_flag_t flags[] = {{"--tokens", "8k", "tokens"},
                            {"--segment", "8k", "tokens of a segment (a run of the ring)"},
                            {"--isa", "widest", "widest|all: also the lower instruction sets"},
                            {"--heads", "0", "heads; 0 for 4, and 16 with size 128"},
                            {"--head-dim", "0", "head size; 0 measures 32, 64, 128 and 256"}};
    bench_t *bench = bench_open(argc, argv, "linear_perf",
                                "linear attention; flops a token and head: forward 4 d^2 + 2 (C+1) "
                                "d, summarise 2 d^2, chunk C",
                                flags, (int)RA_ARRAY_LEN(flags));
    int64_t tokens = bench_int(&flags[0]), segment = bench_int(&flags[1]);
    int64_t heads = bench_int(&flags[3]), dim = bench_int(&flags[4]);
    if (tokens < 200 || segment < 200 || heads > 64) {
        fprintf(stderr,
                "linear_perf: --tokens and --segment are at least 200, --heads at most 64\n");
        bench_close(bench);
        return 2;
    }
    bench_table(bench, "linear chunks", columns, (int)RA_ARRAY_LEN(columns));
    bool all = strcmp(flags[2].value, "all") == 0;
    for (int isa = all ? 0 : (int)bench->isa; isa <= (int)bench->isa; isa++) {
        ra_cpu_isa_force((ra_cpu_isa_t)isa);
        for (int64_t d = dim > 0 ? dim : 32; d <= (dim > 0 ? dim : 256); d *= 2) {
            int64_t h = heads > 0 ? heads : d == 128 ? 16 : 4;
            measure_dim(bench, tokens, segment, (int32_t)h, (int32_t)d);
        }
    }
    return bench_close(bench);
}
