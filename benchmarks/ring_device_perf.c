/*
 * ring_device_perf TRANSPORT RANKS CASE:TOKENS[:HEADS[:KEYS]]...
 *
 * One bf16 attention layer of HEADS (32) heads of 128 over RANKS GPUs (rank r on GPU r modulo their
 * number), against one GPU that has the same tokens all to itself, in the same run. KEYS: of a
 * launch (part_keys of ring/softmax_ring.h).
 *
 *     CASE   softmax  one document, causal, a key/value head for 4 query heads, zigzag
 *            walk     the same by blocks that go round
 *            packs    documents of 1k to 64k tokens, log-uniform from a fixed seed
 *            window   one document, rows see 4096 tokens, contiguous
 *            linear   one document, decays as in lightning attention, contiguous
 *            bits     softmax with `reproducible`, contiguous
 *
 * Layers are queued one after another and the wall clock of all ranks is divided by their number.
 * Rounds of the ring follow rounds of every GPU with all tokens (or 2^20) to itself, all GPUs at
 * once, so that both find the GPUs as hot as each other: from rest, a GPU loses 3 % of its rate
 * over some seconds. Medians. Layers of more than a second are run once. Flops: softmax 4 D a
 * visible pair and head, linear 4 D^2 a token and head. `still` is the part of the ring's time in
 * which the compute stream of the slowest rank waited for transfers outside kernels. `ratio` is the
 * rate a GPU over the rate of the slowest GPU alone. Some rows of the result are compared with
 * those of one GPU, beyond 2^20 tokens those of the first 2^20, which causality makes the same.
 */
#include "base/checked.h"
#include "base/clock.h"
#include "base/dtype.h"
#include "comm/ranks.h"
#include "ring/softmax_ring.h"
#include "ring/state_scan.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS_MOST = 64, GROUP = 4, DIM = 128, TILE = 256 };
enum { PATTERN = 4096, SAMPLES = 512, ROUNDS = 5, DOCUMENTS_MOST = 4096, ALONE_MOST = 1 << 20 };
enum { RANKS_MOST = 256 };
static const double long_layer = 1.0, warm_up = 3.0, warm_by_itself = 10.0; /* seconds */

typedef struct bench_case {
    const char *name;
    ra_layout_kind_t kind;
    bool packs, linear, walk, reproducible;
    int64_t window;
} bench_case_t;

static const bench_case_t cases[] = {
    {.name = "softmax", .kind = RA_LAYOUT_ZIGZAG},
    {.name = "walk", .kind = RA_LAYOUT_ZIGZAG, .walk = true},
    {.name = "packs", .kind = RA_LAYOUT_ZIGZAG, .packs = true},
    {.name = "window", .window = 4096},
    {.name = "linear", .linear = true},
    {.name = "bits", .reproducible = true},
};

/* Documents over some GPUs. */
typedef struct problem {
    ra_layout_t *layout;
    double flops;
    double seconds[ROUNDS]; /* of a layer on the slowest GPU */
    uint16_t *samples;      /* [SAMPLES][width], all over the first alone_tokens */
} problem_t;

typedef struct bench {
    const bench_case_t *c;
    int heads;
    int64_t width; /* heads * DIM */
    int64_t part_keys;
    int64_t tokens, alone_tokens;
    int ranks, devices, rounds;
    problem_t alone, ring;
    double still, received; /* a layer of the ring */
} bench_t;

/* What a GPU has of a problem. */
typedef struct share {
    bench_t *b;
    problem_t *problem;
    ra_comm_t *comm;
    ra_stream_t *stream;
    int64_t rows;
    char *q, *kv, *o, *pattern; /* kv: where the ring has no place for k and v */
    char *k, *v;
    int64_t width, kv_width;
    float decay[HEADS_MOST];
    ra_softmax_ring_t *softmax;
    ra_state_scan_t *scan;
} share_t;

/* @a alone only where this is the GPU's first rank. */
typedef struct rank {
    bench_t *b;
    ra_comm_t *comm;
    ra_device_t *device;
    bool is_first;
    share_t alone, ring;
} rank_t;

static uint64_t mix(uint64_t *seed)
{
    uint64_t z = (*seed += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static bool cut_documents(const bench_t *b, int64_t tokens, int ranks, problem_t *problem)
{
    static ra_document_t documents[DOCUMENTS_MOST];
    uint64_t seed = 1;
    int64_t left = tokens, count = 0;
    problem->flops = 0;
    while (left > 0 && count < DOCUMENTS_MOST) {
        double u = (double)(mix(&seed) >> 11) * 0x1p-53;
        int64_t length = b->c->packs ? (int64_t)(1024.0 * exp2(6.0 * u)) : tokens;
        length = ra_min_i64(length, left);
        double n = (double)length, seen = b->c->window > 0 ? fmin((double)b->c->window, n) : n;
        documents[count++] = (ra_document_t){0, length};
        problem->flops += b->c->linear
                              ? 4.0 * DIM * DIM * b->heads * n
                              : 4.0 * DIM * b->heads * (seen * (seen + 1) / 2 + (n - seen) * seen);
        left -= length;
    }
    return ra_layout_create(documents, count, TILE, ranks, b->c->kind, &problem->layout) == RA_OK;
}

/* Rows of the pattern, by position, for every run of this rank. */
static ra_status_t fill_rows(const share_t *share, char *rows, int64_t width, int64_t skip)
{
    const ra_layout_t *layout = share->problem->layout;
    int rank = ra_comm_rank(share->comm);
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    int64_t row_bytes = 2 * width;
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count;) {
            int64_t from = (runs[i].start + t + skip) % PATTERN;
            int64_t count = ra_min_i64(PATTERN - from, runs[i].count - t);
            RA_TRY(ra_stream_copy(share->stream, rows + (runs[i].local + t) * row_bytes,
                                  share->pattern + from * row_bytes, count * row_bytes));
            t += count;
        }
    }
    return RA_OK;
}

/* As a model does: where the ring wants them. */
static ra_status_t place_keys(share_t *share)
{
    int64_t plane_rows = share->rows;
    if (share->softmax != NULL) {
        share->k = ra_softmax_ring_own_kv(share->softmax, &plane_rows);
    }
    if (share->k == NULL) {
        RA_TRY(ra_device_alloc(ra_stream_device(share->stream), 4 * share->rows * share->kv_width,
                               (void **)&share->kv));
        share->k = share->kv;
    }
    share->v = share->k + plane_rows * share->kv_width * 2;
    return RA_OK;
}

static ra_status_t make_inputs(share_t *share)
{
    ra_device_t *device = ra_stream_device(share->stream);
    int64_t row_bytes = share->width * 2, values = PATTERN * share->width;
    uint16_t *host = malloc((size_t)values * 2);
    uint64_t seed = 7;
    for (int64_t i = 0; host != NULL && i < values; i++) {
        host[i] = ra_bf16_from_f32((float)((double)(mix(&seed) >> 11) * 0x1p-52 - 1.0));
    }
    RA_TRY(ra_device_alloc(device, share->rows * row_bytes, (void **)&share->q));
    RA_TRY(ra_device_alloc(device, share->rows * row_bytes, (void **)&share->o));
    RA_TRY(place_keys(share));
    RA_TRY(ra_device_alloc(device, values * 2, (void **)&share->pattern));
    RA_TRY(ra_stream_copy(share->stream, share->pattern, host, values * 2));
    RA_TRY(fill_rows(share, share->q, share->width, 0));
    RA_TRY(fill_rows(share, share->k, share->kv_width, 1001));
    RA_TRY(fill_rows(share, share->v, share->kv_width, 2002));
    free(host);
    return ra_stream_sync(share->stream);
}

static ra_status_t make_plan(share_t *share)
{
    const bench_case_t *c = share->b->c;
    float scale = 1.0f / sqrtf((float)DIM);
    int heads = share->b->heads;
    for (int h = 0; h < heads; h++) {
        share->decay[h] = -exp2f(-8.0f * (float)(h + 1) / (float)heads);
    }
    if (c->linear) {
        ra_state_scan_params_t scan = {.layout = share->problem->layout,
                                       .heads = heads,
                                       .key_dim = DIM,
                                       .value_dim = DIM,
                                       .scale = scale,
                                       .dtype = RA_BF16};
        return ra_state_scan_create(share->comm, share->stream, &scan, &share->scan);
    }
    ra_softmax_ring_params_t softmax = {.layout = share->problem->layout,
                                        .heads = heads,
                                        .kv_heads = heads / GROUP,
                                        .head_dim = DIM,
                                        .scale = scale,
                                        .window = c->window,
                                        .causal = true,
                                        .reproducible = c->reproducible,
                                        .dtype = RA_BF16,
                                        .walk = c->walk,
                                        .part_keys = share->b->part_keys};
    return ra_softmax_ring_create(share->comm, share->stream, &softmax, &share->softmax);
}

static ra_status_t run_layer(const share_t *share)
{
    if (share->scan != NULL) {
        ra_state_scan_io_t io = {.q = share->q,
                                 .k = share->k,
                                 .v = share->v,
                                 .q_stride = share->width,
                                 .k_stride = share->width,
                                 .v_stride = share->width,
                                 .log_decay = share->decay,
                                 .o = share->o,
                                 .o_stride = share->width};
        return ra_state_scan_run(share->scan, &io);
    }
    ra_softmax_ring_io_t io = {.q = share->q,
                               .q_stride = share->width,
                               .kv = share->k,
                               .o = share->o,
                               .o_stride = share->width};
    return ra_softmax_ring_run(share->softmax, &io);
}

/* Seconds of a layer, by the clock of the slowest rank. */
static ra_status_t time_layers(const rank_t *r, const share_t *share, int layers, double *seconds)
{
    double mine, all[RANKS_MOST] = {0};
    RA_TRY(ra_comm_barrier(r->comm));
    double begin = ra_clock_s();
    for (int i = 0; i < layers && share->stream != NULL; i++) {
        RA_TRY(run_layer(share));
    }
    if (share->stream != NULL) {
        RA_TRY(ra_stream_sync(share->stream));
    }
    mine = (ra_clock_s() - begin) / layers;
    RA_TRY(ra_comm_allgather(r->comm, &mine, sizeof(mine), all));
    *seconds = 0;
    for (int i = 0; i < r->b->ranks; i++) {
        *seconds = fmax(*seconds, all[i]);
    }
    return RA_OK;
}

/* Of one layer, about. */
static double guess_seconds(const problem_t *problem, const bench_t *b)
{
    return problem->flops / problem->layout->ranks / (b->c->linear ? 100e12 : 600e12);
}

static int layers_of_round(double guess)
{
    return (int)fmin(100.0, fmax(1.0, 0.3 / guess));
}

static ra_status_t keep_samples(const share_t *share)
{
    const bench_t *b = share->b;
    const ra_layout_t *layout = share->problem->layout;
    int rank = ra_comm_rank(share->comm);
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        int64_t begin = layout->document_row[runs[i].document] + runs[i].start;
        for (int64_t s = 0; s < SAMPLES; s++) {
            int64_t apart = b->alone_tokens / SAMPLES;
            int64_t token = s * apart + s % ra_min_i64(191, apart), at = token - begin;
            if (at >= 0 && at < runs[i].count) {
                RA_TRY(ra_stream_copy(share->stream, share->problem->samples + s * b->width,
                                      share->o + (runs[i].local + at) * b->width * 2,
                                      b->width * 2));
            }
        }
    }
    return ra_stream_sync(share->stream);
}

/* Rounds of the GPUs alone and of the ring in turn; ring->seconds of rank 0 are kept. */
static ra_status_t measure_rounds(const rank_t *r)
{
    bench_t *b = r->b;
    double guess = guess_seconds(&b->ring, b), alone_guess = guess_seconds(&b->alone, b);
    int layers = layers_of_round(guess), alone_layers = layers_of_round(alone_guess);
    int rounds = fmax(guess, alone_guess) < long_layer ? ROUNDS : 1;
    double seconds, alone_seconds, still = 0, all[RANKS_MOST] = {0};
    for (double spent = 0; guess < warm_by_itself && spent < warm_up;) {
        RA_TRY(time_layers(r, &r->ring, layers, &seconds));
        spent += seconds * layers;
    }
    RA_TRY(ra_comm_measure_waits(r->comm, true));
    for (int i = 0; i < rounds; i++) {
        RA_TRY(time_layers(r, &r->alone, alone_layers, &alone_seconds));
        RA_TRY(time_layers(r, &r->ring, layers, &seconds));
        if (ra_comm_rank(r->comm) == 0) {
            b->alone.seconds[i] = alone_seconds;
            b->ring.seconds[i] = seconds;
        }
    }
    RA_TRY(ra_comm_waited(r->comm, &still));
    still /= (double)rounds * layers;
    RA_TRY(ra_comm_allgather(r->comm, &still, sizeof(still), all));
    if (ra_comm_rank(r->comm) == 0) {
        b->rounds = rounds;
        for (int i = 0; i < b->ranks; i++) {
            b->still = fmax(b->still, all[i]);
        }
    }
    return RA_OK;
}

static ra_status_t make_share(rank_t *r, ra_comm_t *comm, problem_t *problem, share_t *share)
{
    bench_t *b = r->b;
    *share = (share_t){.b = b, .problem = problem, .comm = comm};
    share->rows = problem->layout->rows[ra_comm_rank(comm)];
    share->width = b->width;
    share->kv_width = b->c->linear ? b->width : b->width / GROUP;
    RA_TRY(ra_stream_create(r->device, &share->stream));
    RA_TRY(ra_comm_attach(comm, share->stream));
    RA_TRY(make_plan(share));
    return make_inputs(share);
}

static void free_share(rank_t *r, share_t *share)
{
    ra_softmax_ring_destroy(share->softmax);
    ra_state_scan_destroy(share->scan);
    char *memory[] = {share->q, share->kv, share->o, share->pattern};
    for (size_t i = 0; i < RA_ARRAY_LEN(memory); i++) {
        ra_device_free(r->device, memory[i]);
    }
    ra_stream_destroy(share->stream);
}

/* @a alone is a world of this rank only. */
static ra_status_t measure_rank(ra_comm_t *alone, void *arg)
{
    rank_t *r = arg;
    bench_t *b = r->b;
    ra_status_t status = RA_OK;
    if (r->is_first) {
        RA_TRY_GOTO(make_share(r, alone, &b->alone, &r->alone), out);
    }
    RA_TRY_GOTO(make_share(r, r->comm, &b->ring, &r->ring), out);
    RA_TRY_GOTO(measure_rounds(r), out);
    RA_TRY_GOTO(keep_samples(&r->ring), out);
    if (ra_comm_rank(r->comm) == 0) {
        ra_ring_stats_t stats = r->ring.scan != NULL ? ra_state_scan_stats(r->ring.scan)
                                                     : ra_softmax_ring_stats(r->ring.softmax);
        b->received = (double)stats.received_bytes / (double)stats.calls;
        RA_TRY_GOTO(keep_samples(&r->alone), out);
    }
out:
    free_share(r, &r->alone);
    free_share(r, &r->ring);
    return status;
}

static ra_status_t rank_main(ra_comm_t *comm, void *arg)
{
    bench_t *b = arg;
    int rank = ra_comm_rank(comm);
    rank_t r = {.b = b, .comm = comm, .is_first = rank < b->devices};
    RA_TRY(ra_device_open("cuda", rank % b->devices, NULL, &r.device));
    ra_status_t status = ra_ranks_run("peer", 1, measure_rank, &r);
    ra_device_close(r.device);
    return status;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Flops a second. */
static double rate_of(problem_t *problem, int rounds)
{
    qsort(problem->seconds, (size_t)rounds, sizeof(double), ascending);
    return problem->flops / problem->seconds[rounds / 2];
}

/* Relative L2 distance of the samples. */
static double difference(const uint16_t *got, const uint16_t *want, int64_t count)
{
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        double w = (double)ra_bf16_to_f32(want[i]), e = (double)ra_bf16_to_f32(got[i]) - w;
        error += e * e;
        norm += w * w;
    }
    return sqrt(error / norm);
}

static bool report(bench_t *b, const char *transport)
{
    int gpus = b->ranks < b->devices ? b->ranks : b->devices;
    double alone = rate_of(&b->alone, b->rounds), rate = rate_of(&b->ring, b->rounds) / gpus;
    double wrong = difference(b->ring.samples, b->alone.samples, SAMPLES * b->width);
    double seconds = b->ring.seconds[b->rounds / 2];
    bool right = wrong < 4e-3;
    printf(
        "%-8s %-5s heads %d ranks %d gpus %d tokens %-8lld documents %-4lld %9.3f ms %6.1f TFLOP/s"
        " a GPU | one GPU %6.1f | ratio %.3f | still %4.1f %% | %7.1f MB in | difference %.1e%s\n",
        b->c->name, transport, b->heads, b->ranks, gpus, (long long)b->tokens,
        (long long)b->ring.layout->document_count, seconds * 1e3, rate * 1e-12, alone * 1e-12,
        rate / alone, 100.0 * b->still / seconds, b->received * 1e-6, wrong, right ? "" : " WRONG");
    fflush(stdout);
    return right;
}

static bool measure(bench_t *b, const char *transport)
{
    size_t bytes = (size_t)(SAMPLES * b->width) * 2;
    b->alone_tokens = ra_min_i64(b->tokens, ALONE_MOST);
    b->still = 0;
    bool fits = cut_documents(b, b->alone_tokens, 1, &b->alone) &&
                cut_documents(b, b->tokens, b->ranks, &b->ring);
    memset(b->alone.samples, 0xff, bytes);
    memset(b->ring.samples, 0xff, bytes);
    ra_status_t status = fits ? ra_ranks_run(transport, b->ranks, rank_main, b) : RA_ERR_NOMEM;
    if (status != RA_OK) {
        exit(ra_status_exit_code(status));
    }
    bool right = report(b, transport);
    ra_layout_destroy(b->alone.layout);
    ra_layout_destroy(b->ring.layout);
    return right;
}

static bool measure_named(bench_t *b, const char *text, const char *transport)
{
    const char *colon = strchr(text, ':');
    for (size_t i = 0; i < RA_ARRAY_LEN(cases) && colon != NULL; i++) {
        if (strncmp(text, cases[i].name, (size_t)(colon - text)) == 0) {
            char *end = NULL;
            b->c = &cases[i];
            b->tokens = strtoll(colon + 1, &end, 10);
            b->heads = *end == ':' ? (int)strtol(end + 1, &end, 10) : 32;
            b->part_keys = *end == ':' ? strtoll(end + 1, &end, 10) : 0;
            b->width = (int64_t)b->heads * DIM;
            if (*end != '\0' || b->part_keys < 0 || b->tokens < SAMPLES || b->heads < GROUP ||
                b->heads > HEADS_MOST || b->heads % GROUP != 0) {
                break;
            }
            return measure(b, transport);
        }
    }
    fprintf(stderr, "ring_device_perf: cannot run '%s'\n", text);
    exit(2);
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: ring_device_perf TRANSPORT RANKS CASE:TOKENS[:HEADS[:KEYS]]...\n"
                        "cases: softmax walk packs window linear bits\n");
        return 2;
    }
    static bench_t b;
    bool right = true;
    b.ranks = atoi(argv[2]);
    if (b.ranks < 1 || b.ranks > RANKS_MOST) {
        fprintf(stderr, "ring_device_perf: 1 to %d ranks, not '%s'\n", RANKS_MOST, argv[2]);
        return 2;
    }
    ra_status_t status = ra_device_count("cuda", &b.devices);
    if (status != RA_OK) {
        return ra_status_exit_code(status);
    }
    b.alone.samples = malloc((size_t)SAMPLES * HEADS_MOST * DIM * 2);
    b.ring.samples = malloc((size_t)SAMPLES * HEADS_MOST * DIM * 2);
    if (b.alone.samples == NULL || b.ring.samples == NULL) {
        return 5;
    }
    for (int i = 3; i < argc; i++) {
        right = measure_named(&b, argv[i], argv[1]) && right;
    }
    free(b.alone.samples);
    free(b.ring.samples);
    return right ? 0 : 1;
}
