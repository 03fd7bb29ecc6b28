/*
 * One attention layer over a sharded document, on rings of 1, 2, 4, ... ranks.
 *
 * Flops are those that one rank would need: softmax 4 D a visible (row, key) pair and head; linear
 * 4 d^2 + 2 (C + 1) d a token and head (chunks of C). So the rate falls by whatever a ring adds:
 * waiting, summaries, imbalance. `wait` is the time a rank had nothing to compute while a transfer
 * was missing, mean over ranks, as part of its time inside the layer; ranks that share the cores of
 * one machine also wait there for each other's turn.
 */
#include "attention/linear_cpu.h"
#include "base/clock.h"
#include "benchmarks/bench.h"
#include "comm/ranks.h"
#include "ring/softmax_ring.h"
#include "ring/state_scan.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct ring_bench {
    bench_t *bench;
    bool is_softmax, reproducible;
    int64_t tokens, tile, window;
    int32_t heads, kv_heads, dim;
    ra_layout_t *layout;
    double *seconds;   /* [iters], written by rank 0 */
    double *wait_part; /* [ranks] */
    double *received;  /* [ranks] bytes a call */
    float *o;          /* [tokens, heads * dim] in document order, when checked */
} ring_bench_t;

typedef struct rank_bench {
    ring_bench_t *all;
    ra_comm_t *comm;
    ra_stream_t *stream;
    ra_softmax_ring_t *softmax;
    ra_state_scan_t *scan;
    float *q, *kv, *o, *decay;
    ra_softmax_ring_io_t softmax_io;
    ra_state_scan_io_t scan_io;
} rank_bench_t;

static ra_status_t make_softmax(rank_bench_t *r, int64_t rows)
{
    ring_bench_t *all = r->all;
    int64_t q_width = (int64_t)all->heads * all->dim, k_width = (int64_t)all->kv_heads * all->dim;
    r->kv = bench_alloc(2 * rows * k_width * 4);
    r->softmax_io = (ra_softmax_ring_io_t){
        .q = r->q, .q_stride = q_width, .kv = r->kv, .o = r->o, .o_stride = q_width};
    ra_softmax_ring_params_t params = {.layout = all->layout,
                                       .heads = all->heads,
                                       .kv_heads = all->kv_heads,
                                       .head_dim = all->dim,
                                       .scale = 1.0f / sqrtf((float)all->dim),
                                       .window = all->window,
                                       .causal = true,
                                       .reproducible = all->reproducible};
    return ra_softmax_ring_create(r->comm, r->stream, &params, &r->softmax);
}

static ra_status_t make_scan(rank_bench_t *r, int64_t rows)
{
    ring_bench_t *all = r->all;
    int64_t width = (int64_t)all->heads * all->dim;
    r->kv = bench_alloc(2 * rows * width * 4);
    r->decay = bench_alloc(all->heads * 4);
    for (int32_t h = 0; h < all->heads; h++) {
        r->decay[h] = -exp2f(-8.0f * (float)(h + 1) / (float)all->heads);
    }
    r->scan_io = (ra_state_scan_io_t){.q = r->q,
                                      .k = r->kv,
                                      .v = r->kv + rows * width,
                                      .q_stride = width,
                                      .k_stride = width,
                                      .v_stride = width,
                                      .log_decay = r->decay,
                                      .o = r->o,
                                      .o_stride = width};
    ra_state_scan_params_t params = {.layout = all->layout,
                                     .heads = all->heads,
                                     .key_dim = all->dim,
                                     .value_dim = all->dim,
                                     .scale = 1.0f / sqrtf((float)all->dim),
                                     .reproducible = all->reproducible};
    return ra_state_scan_create(r->comm, r->stream, &params, &r->scan);
}

/* The same token has the same values on whatever rank it is. */
static void fill_rows(const rank_bench_t *r, float *rows, int64_t width, uint64_t stream)
{
    int rank = ra_comm_rank(r->comm);
    const ra_run_t *runs = ra_layout_runs(r->all->layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(r->all->layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count; t++) {
            bench_fill(rows + (runs[i].local + t) * width, width,
                       stream << 40 | (uint64_t)(runs[i].start + t) * 0x10001u, -1.0f, 1.0f);
        }
    }
}

static ra_status_t run_layer(rank_bench_t *r)
{
    return r->all->is_softmax ? ra_softmax_ring_run(r->softmax, &r->softmax_io)
                              : ra_state_scan_run(r->scan, &r->scan_io);
}

static ra_ring_stats_t stats_of(const rank_bench_t *r)
{
    return r->all->is_softmax ? ra_softmax_ring_stats(r->softmax) : ra_state_scan_stats(r->scan);
}

static ra_status_t time_layer(rank_bench_t *r)
{
    ring_bench_t *all = r->all;
    const bench_t *bench = all->bench;
    int rank = ra_comm_rank(r->comm);
    ra_ring_stats_t before = {0};
    for (int i = -bench->warmup; i < bench->iters; i++) {
        if (i == 0) {
            before = stats_of(r);
        }
        RA_TRY(ra_comm_barrier(r->comm));
        double start = ra_clock_s();
        RA_TRY(run_layer(r));
        RA_TRY(ra_comm_barrier(r->comm));
        if (rank == 0 && i >= 0) {
            all->seconds[i] = ra_clock_s() - start;
        }
    }
    ra_ring_stats_t after = stats_of(r);
    double total = (double)(after.total_ns - before.total_ns);
    all->wait_part[rank] = (double)(after.wait_ns - before.wait_ns) / total;
    all->received[rank] = (double)(after.received_bytes - before.received_bytes) / bench->iters;
    if (all->o != NULL) {
        ra_layout_unpack(all->layout, rank, (int64_t)all->heads * all->dim * 4, r->o, all->o);
    }
    return RA_OK;
}

static ra_status_t bench_rank(ra_comm_t *comm, void *arg)
{
    ring_bench_t *all = arg;
    rank_bench_t r = {.all = all, .comm = comm};
    int64_t rows = all->layout->rows[ra_comm_rank(comm)];
    int64_t width = (int64_t)all->heads * all->dim;
    int64_t kv_width = all->is_softmax ? (int64_t)all->kv_heads * all->dim : width;
    RA_TRY(ra_stream_create(all->bench->device, &r.stream));
    r.q = bench_alloc(rows * width * 4);
    r.o = bench_alloc(rows * width * 4);
    ra_status_t status = all->is_softmax ? make_softmax(&r, rows) : make_scan(&r, rows);
    if (status == RA_OK) {
        fill_rows(&r, r.q, width, 1);
        fill_rows(&r, r.kv, kv_width, 2);
        fill_rows(&r, r.kv + rows * kv_width, kv_width, 3);
        status = time_layer(&r);
    }
    ra_softmax_ring_destroy(r.softmax);
    ra_state_scan_destroy(r.scan);
    ra_stream_destroy(r.stream);
    free(r.q);
    free(r.kv);
    free(r.o);
    free(r.decay);
    return status;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double useful_flops(const ring_bench_t *all)
{
    double d = all->dim, tokens = (double)all->tokens, heads = all->heads;
    if (!all->is_softmax) {
        return tokens * heads * (4 * d * d + 2 * (RA_LINEAR_CHUNK + 1) * d);
    }
    double seen = all->window > 0 ? fmin((double)all->window, tokens) : tokens;
    return 4 * d * heads * (seen * (seen + 1) / 2 + (tokens - seen) * seen);
}

static double mean(const double *values, int count)
{
    double sum = 0;
    for (int i = 0; i < count; i++) {
        sum += values[i];
    }
    return sum / count;
}

/* Against one rank: fp32 sums in another order, or the very same bits. */
static void check(ring_bench_t *all, const float *one, int ranks)
{
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < all->tokens * all->heads * all->dim; i++) {
        double error = fabs((double)all->o[i] - (double)one[i]);
        worst = error > worst || isnan(error) ? error : worst;
        largest = fmax(largest, fabs((double)one[i]));
    }
    double bound = all->reproducible ? 0.0 : 2e-5 * fmax(largest, 1.0);
    if (!(worst <= bound)) {
        bench_wrong(all->bench, "%d ranks differ from 1 by %g, at most %g is right", ranks, worst,
                    bound);
    }
}

typedef struct sweep {
    ring_bench_t base;
    const char *transport;
    int ranks_most;
} sweep_t;

static void measure(const sweep_t *sweep, ra_layout_kind_t kind, int ranks, float **one)
{
    ring_bench_t all = sweep->base;
    bench_t *bench = all.bench;
    ra_document_t document = {0, all.tokens};
    int64_t values = all.tokens * all.heads * all.dim;
    all.seconds = bench_alloc(bench->iters * 8);
    all.wait_part = bench_alloc(ranks * 8);
    all.received = bench_alloc(ranks * 8);
    all.o = bench->check ? bench_alloc(values * 4) : NULL;
    if (ra_layout_create(&document, 1, all.tile, ranks, kind, &all.layout) != RA_OK) {
        exit(2);
    }
    ra_status_t status = ra_ranks_run(sweep->transport, ranks, bench_rank, &all);
    if (status != RA_OK) {
        exit(ra_status_exit_code(status));
    }
    if (*one == NULL) {
        *one = all.o;
        all.o = NULL;
    } else if (bench->check) {
        check(&all, *one, ranks);
    }
    qsort(all.seconds, (size_t)bench->iters, sizeof(double), ascending);
    double median = all.seconds[bench->iters / 2], rate = useful_flops(&all) / median;
    bench_row(bench, (bench_cell_t[]){
                         BENCH_TEXT(all.is_softmax ? "softmax" : "linear"),
                         BENCH_TEXT(ra_layout_kind_name(kind)), BENCH_NUMBER(all.tokens),
                         BENCH_NUMBER(ranks), BENCH_NUMBER(all.dim), BENCH_NUMBER(median * 1e3),
                         BENCH_NUMBER(rate * 1e-9), BENCH_NUMBER(100.0 * rate / bench->peak_all),
                         BENCH_NUMBER(100.0 * mean(all.wait_part, ranks)),
                         BENCH_NUMBER(mean(all.received, ranks) * 1e-6)});
    ra_layout_destroy(all.layout);
    free(all.seconds);
    free(all.wait_part);
    free(all.received);
    free(all.o);
}

static void measure_kinds(const sweep_t *sweep, const char *layout)
{
    float *one = NULL;
    measure(sweep, RA_LAYOUT_CONTIGUOUS, 1, &one);
    for (int kind = RA_LAYOUT_CONTIGUOUS; kind <= (int)RA_LAYOUT_ZIGZAG; kind++) {
        bool asked = strcmp(layout, "both") == 0 ||
                     strcmp(layout, ra_layout_kind_name((ra_layout_kind_t)kind)) == 0;
        bool possible = kind == RA_LAYOUT_CONTIGUOUS || !sweep->base.reproducible;
        for (int ranks = 2; asked && possible && ranks <= sweep->ranks_most; ranks *= 2) {
            measure(sweep, (ra_layout_kind_t)kind, ranks, &one);
        }
    }
    free(one);
}

int main(int argc, char **argv)
{
    enum { BEGIN, END, FACTOR, OP, RANKS, LAYOUT, TILE, WINDOW, HEADS, KV_HEADS, DIM, TRANSPORT };
    enum { REPRODUCIBLE = TRANSPORT + 1 };
    bench_flag_t flags[] = {
        [BEGIN] = {"-b", "8k", "tokens of the first size"},
        [END] = {"-e", "8k", "tokens of the last size"},
        [FACTOR] = {"-f", "2", "factor between sizes"},
        [OP] = {"--op", "both", "softmax|linear|both"},
        [RANKS] = {"--ranks", "4", "most ranks; 1, 2, 4, ... are measured"},
        [LAYOUT] = {"--layout", "both", "contiguous|zigzag|both"},
        [TILE] = {"--tile", "256", "tokens of a tile"},
        [WINDOW] = {"--window", "0", "softmax: tokens a row sees; 0 for all before it"},
        [HEADS] = {"--heads", "8", "query heads, and heads of linear attention"},
        [KV_HEADS] = {"--kv-heads", "2", "key/value heads"},
        [DIM] = {"--head-dim", "64", "head size"},
        [TRANSPORT] = {"--transport", "local", "row of the transport table"},
        [REPRODUCIBLE] = {"--reproducible", "off", "on: the same bits for every rank count"},
    };
    static const bench_column_t columns[] = {
        {"op", "%s"},         {"layout", "%s"},      {"tokens", "%.0f"},      {"ranks", "%.0f"},
        {"head_dim", "%.0f"}, {"median_ms", "%.1f"}, {"gflop_per_s", "%.1f"}, {"pct_peak", "%.1f"},
        {"wait_pct", "%.1f"}, {"rank_mb_in", "%.2f"}};
    bench_t *bench = bench_open(argc, argv, "ring_perf",
                                "one attention layer over a document sharded over a ring of ranks",
                                flags, (int)RA_ARRAY_LEN(flags));
    sweep_t sweep = {.base = {.bench = bench,
                              .tile = bench_int(&flags[TILE]),
                              .window = bench_int(&flags[WINDOW]),
                              .heads = (int32_t)bench_int(&flags[HEADS]),
                              .kv_heads = (int32_t)bench_int(&flags[KV_HEADS]),
                              .dim = (int32_t)bench_int(&flags[DIM]),
                              .reproducible = strcmp(flags[REPRODUCIBLE].value, "on") == 0},
                     .transport = flags[TRANSPORT].value,
                     .ranks_most = (int)bench_int(&flags[RANKS])};
    int64_t factor = bench_int(&flags[FACTOR]);
    bench_table(bench, "ring of ranks", columns, (int)RA_ARRAY_LEN(columns));
    for (int64_t n = bench_int(&flags[BEGIN]); n <= bench_int(&flags[END]);
         n *= factor > 1 ? factor : 2) {
        sweep.base.tokens = n;
        for (int op = 0; op < 2; op++) {
            sweep.base.is_softmax = op == 0;
            if (strcmp(flags[OP].value, op == 0 ? "linear" : "softmax") != 0) {
                measure_kinds(&sweep, flags[LAYOUT].value);
            }
        }
    }
    return bench_close(bench);
}
