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
 * Layers are queued one after another and the wall clock of all ranks is divided by their number;
 * medians. A GPU that has rested runs at a higher clock until its power, averaged over about a
 * second, meets the limit, so everything is timed after more than a second of the same work.
 * Flops: softmax 4 D a visible pair and head, linear 4 D^2 a token and head. `still` is
 * the part of that time in which the compute stream of the slowest rank waited for transfers
 * outside kernels. `ratio` is the rate a GPU over the rate of the slowest GPU alone. Some rows of
 * the result are compared with those of one GPU. Layers of more than a second are run once, without
 * a warm-up, and alone on the first GPU only. One GPU gets 2^20 tokens at most: beyond, its rate at
 * that length is taken, and rows of the first 2^20 tokens are compared, which causality makes the
 * same.
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
enum { PATTERN = 4096, SAMPLES = 512, ROUNDS = 3, DOCUMENTS_MOST = 4096, ALONE_MOST = 1 << 20 };
enum { RANKS_MOST = 256 };
static const double long_layer = 1.0, warm_up = 1.2; /* seconds */

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

typedef struct bench {
    const bench_case_t *c;
    int heads;
    int64_t width; /* heads * DIM */
    int64_t part_keys;
    ra_document_t documents[DOCUMENTS_MOST];
    int64_t document_count, tokens, alone_tokens;
    double flops;
    /* One world. */
    ra_layout_t *layout;
    int first_device, devices;
    double seconds[ROUNDS], still, received;
    int rounds;
    uint16_t *samples; /* [SAMPLES][width], all over the first alone_tokens */
} bench_t;

typedef struct rank {
    bench_t *b;
    ra_comm_t *comm;
    ra_stream_t *stream;
    int64_t rows;
    char *q, *kv, *o, *pattern; /* kv: where the ring has no place for k and v */
    char *k, *v;
    int64_t width, kv_width;
    float decay[HEADS_MOST];
    ra_softmax_ring_t *softmax;
    ra_state_scan_t *scan;
} rank_t;

static uint64_t mix(uint64_t *seed)
{
    uint64_t z = (*seed += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void cut_documents(bench_t *b)
{
    uint64_t seed = 1;
    int64_t left = b->tokens;
    b->document_count = 0;
    b->flops = 0;
    while (left > 0 && b->document_count < DOCUMENTS_MOST) {
        double u = (double)(mix(&seed) >> 11) * 0x1p-53;
        int64_t length = b->c->packs ? (int64_t)(1024.0 * exp2(6.0 * u)) : b->tokens;
        length = ra_min_i64(length, left);
        double n = (double)length, seen = b->c->window > 0 ? fmin((double)b->c->window, n) : n;
        b->documents[b->document_count++] = (ra_document_t){0, length};
        b->flops += b->c->linear
                        ? 4.0 * DIM * DIM * b->heads * n
                        : 4.0 * DIM * b->heads * (seen * (seen + 1) / 2 + (n - seen) * seen);
        left -= length;
    }
}

/* Rows of the pattern, by position, for every run of this rank. */
static ra_status_t fill_rows(const rank_t *r, char *rows, int64_t width, int64_t skip)
{
    const ra_layout_t *layout = r->b->layout;
    int rank = ra_comm_rank(r->comm);
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    int64_t row_bytes = 2 * width;
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count;) {
            int64_t from = (runs[i].start + t + skip) % PATTERN;
            int64_t count = ra_min_i64(PATTERN - from, runs[i].count - t);
            RA_TRY(ra_stream_copy(r->stream, rows + (runs[i].local + t) * row_bytes,
                                  r->pattern + from * row_bytes, count * row_bytes));
            t += count;
        }
    }
    return RA_OK;
}

/* As a model does: where the ring wants them. */
static ra_status_t place_keys(rank_t *r)
{
    int64_t plane_rows = r->rows;
    if (r->softmax != NULL) {
        r->k = ra_softmax_ring_own_kv(r->softmax, &plane_rows);
    }
    if (r->k == NULL) {
        RA_TRY(ra_device_alloc(ra_stream_device(r->stream), 4 * r->rows * r->kv_width,
                               (void **)&r->kv));
        r->k = r->kv;
    }
    r->v = r->k + plane_rows * r->kv_width * 2;
    return RA_OK;
}

static ra_status_t make_inputs(rank_t *r)
{
    ra_device_t *device = ra_stream_device(r->stream);
    int64_t row_bytes = r->width * 2, values = PATTERN * r->width;
    uint16_t *host = malloc((size_t)values * 2);
    uint64_t seed = 7;
    for (int64_t i = 0; host != NULL && i < values; i++) {
        host[i] = ra_bf16_from_f32((float)((double)(mix(&seed) >> 11) * 0x1p-52 - 1.0));
    }
    RA_TRY(ra_device_alloc(device, r->rows * row_bytes, (void **)&r->q));
    RA_TRY(ra_device_alloc(device, r->rows * row_bytes, (void **)&r->o));
    RA_TRY(place_keys(r));
    RA_TRY(ra_device_alloc(device, values * 2, (void **)&r->pattern));
    RA_TRY(ra_stream_copy(r->stream, r->pattern, host, values * 2));
    RA_TRY(fill_rows(r, r->q, r->width, 0));
    RA_TRY(fill_rows(r, r->k, r->kv_width, 1001));
    RA_TRY(fill_rows(r, r->v, r->kv_width, 2002));
    free(host);
    return ra_stream_sync(r->stream);
}

static ra_status_t make_plan(rank_t *r)
{
    const bench_case_t *c = r->b->c;
    float scale = 1.0f / sqrtf((float)DIM);
    int heads = r->b->heads;
    for (int h = 0; h < heads; h++) {
        r->decay[h] = -exp2f(-8.0f * (float)(h + 1) / (float)heads);
    }
    if (c->linear) {
        ra_state_scan_params_t scan = {.layout = r->b->layout,
                                       .heads = heads,
                                       .key_dim = DIM,
                                       .value_dim = DIM,
                                       .scale = scale,
                                       .dtype = RA_BF16};
        return ra_state_scan_create(r->comm, r->stream, &scan, &r->scan);
    }
    ra_softmax_ring_params_t softmax = {.layout = r->b->layout,
                                        .heads = heads,
                                        .kv_heads = heads / GROUP,
                                        .head_dim = DIM,
                                        .scale = scale,
                                        .window = c->window,
                                        .causal = true,
                                        .reproducible = c->reproducible,
                                        .dtype = RA_BF16,
                                        .walk = c->walk,
                                        .part_keys = r->b->part_keys};
    return ra_softmax_ring_create(r->comm, r->stream, &softmax, &r->softmax);
}

static ra_status_t run_layer(const rank_t *r)
{
    if (r->scan != NULL) {
        ra_state_scan_io_t io = {.q = r->q,
                                 .k = r->k,
                                 .v = r->v,
                                 .q_stride = r->width,
                                 .k_stride = r->width,
                                 .v_stride = r->width,
                                 .log_decay = r->decay,
                                 .o = r->o,
                                 .o_stride = r->width};
        return ra_state_scan_run(r->scan, &io);
    }
    ra_softmax_ring_io_t io = {
        .q = r->q, .q_stride = r->width, .kv = r->k, .o = r->o, .o_stride = r->width};
    return ra_softmax_ring_run(r->softmax, &io);
}

/* Seconds of @a layers, by the wall clock of all ranks. */
static ra_status_t time_layers(const rank_t *r, int layers, double *seconds)
{
    RA_TRY(ra_comm_barrier(r->comm));
    double begin = ra_clock_s();
    for (int i = 0; i < layers; i++) {
        RA_TRY(run_layer(r));
    }
    RA_TRY(ra_stream_sync(r->stream));
    RA_TRY(ra_comm_barrier(r->comm));
    *seconds = ra_clock_s() - begin;
    return RA_OK;
}

/* Until rank 0 has seen enough seconds. */
static ra_status_t warm(const rank_t *r, int layers)
{
    for (double spent = 0; spent < warm_up;) {
        double seconds = 0, all[RANKS_MOST];
        RA_TRY(time_layers(r, layers, &seconds));
        RA_TRY(ra_comm_allgather(r->comm, &seconds, sizeof(seconds), all));
        spent += all[0];
    }
    return RA_OK;
}

static ra_status_t keep_samples(const rank_t *r)
{
    bench_t *b = r->b;
    int rank = ra_comm_rank(r->comm);
    const ra_run_t *runs = ra_layout_runs(b->layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(b->layout, rank); i++) {
        int64_t begin = b->layout->document_row[runs[i].document] + runs[i].start;
        for (int64_t s = 0; s < SAMPLES; s++) {
            int64_t apart = b->alone_tokens / SAMPLES;
            int64_t token = s * apart + s % ra_min_i64(191, apart), at = token - begin;
            if (at >= 0 && at < runs[i].count) {
                RA_TRY(ra_stream_copy(r->stream, b->samples + s * b->width,
                                      r->o + (runs[i].local + at) * b->width * 2, b->width * 2));
            }
        }
    }
    return ra_stream_sync(r->stream);
}

/* Of one layer, about. */
static double guess_seconds(const bench_t *b, int ranks)
{
    return b->flops / ranks / (b->c->linear ? 100e12 : 600e12);
}

static ra_status_t measure_rank(rank_t *r)
{
    bench_t *b = r->b;
    int ranks = ra_comm_size(r->comm);
    double guess = guess_seconds(b, ranks), seconds = 0, still = 0;
    bool brief = guess < long_layer;
    int layers = (int)fmin(100.0, fmax(1.0, 0.3 / guess)), rounds = brief ? ROUNDS : 1;
    RA_TRY(make_plan(r));
    RA_TRY(make_inputs(r));
    if (brief) {
        RA_TRY(warm(r, layers));
    }
    RA_TRY(ra_comm_measure_waits(r->comm, true));
    for (int i = 0; i < rounds; i++) {
        RA_TRY(time_layers(r, layers, &seconds));
        if (ra_comm_rank(r->comm) == 0) {
            b->seconds[i] = seconds / layers;
            b->rounds = rounds;
        }
    }
    RA_TRY(ra_comm_waited(r->comm, &still));
    double all[RANKS_MOST] = {0};
    still /= (double)rounds * layers;
    RA_TRY(ra_comm_allgather(r->comm, &still, sizeof(still), all));
    if (ra_comm_rank(r->comm) == 0) {
        ra_ring_stats_t stats =
            r->scan != NULL ? ra_state_scan_stats(r->scan) : ra_softmax_ring_stats(r->softmax);
        b->received = (double)stats.received_bytes / (double)stats.calls;
        b->still = 0;
        for (int i = 0; i < ranks; i++) {
            b->still = fmax(b->still, all[i]);
        }
    }
    return keep_samples(r);
}

static ra_status_t rank_main(ra_comm_t *comm, void *arg)
{
    bench_t *b = arg;
    rank_t r = {.b = b, .comm = comm};
    ra_device_t *device = NULL;
    ra_status_t status;
    int index = (b->first_device + ra_comm_rank(comm)) % b->devices;
    r.rows = b->layout->rows[ra_comm_rank(comm)];
    r.width = b->width;
    r.kv_width = b->c->linear ? b->width : b->width / GROUP;
    RA_TRY(ra_device_open("cuda", index, NULL, &device));
    RA_TRY_GOTO(ra_stream_create(device, &r.stream), out);
    RA_TRY_GOTO(ra_comm_attach(comm, r.stream), out);
    status = measure_rank(&r);
    ra_softmax_ring_destroy(r.softmax);
    ra_state_scan_destroy(r.scan);
    char *memory[] = {r.q, r.kv, r.o, r.pattern};
    for (size_t i = 0; i < RA_ARRAY_LEN(memory); i++) {
        ra_device_free(device, memory[i]);
    }
out:
    ra_stream_destroy(r.stream);
    ra_device_close(device);
    return status;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* @return median seconds of a layer. */
static double run_world(bench_t *b, const char *transport, int ranks, int first_device)
{
    b->first_device = first_device;
    memset(b->samples, 0xff, (size_t)(SAMPLES * b->width) * 2);
    ra_status_t status =
        ra_layout_create(b->documents, b->document_count, TILE, ranks, b->c->kind, &b->layout);
    if (status == RA_OK) {
        status = ra_ranks_run(transport, ranks, rank_main, b);
    }
    if (status != RA_OK) {
        exit(ra_status_exit_code(status));
    }
    ra_layout_destroy(b->layout);
    qsort(b->seconds, (size_t)b->rounds, sizeof(double), ascending);
    return b->seconds[b->rounds / 2];
}

/* Flops a second of the slowest of the GPUs, each with all tokens (or 2^20) to itself. */
static double rate_alone(bench_t *b, int gpus)
{
    int64_t tokens = b->tokens;
    double slowest = 0;
    b->tokens = b->alone_tokens;
    cut_documents(b);
    for (int d = 0; d < gpus && (d == 0 || guess_seconds(b, 1) < long_layer); d++) {
        slowest = fmax(slowest, run_world(b, "peer", 1, d));
    }
    double flops = b->flops;
    b->tokens = tokens;
    cut_documents(b);
    return flops / slowest;
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

static bool measure(bench_t *b, const char *transport, int ranks)
{
    int gpus = ranks < b->devices ? ranks : b->devices;
    size_t bytes = (size_t)(SAMPLES * b->width) * 2;
    b->alone_tokens = ra_min_i64(b->tokens, ALONE_MOST);
    double alone = rate_alone(b, gpus);
    uint16_t *want = malloc(bytes);
    if (want == NULL) {
        exit(5);
    }
    memcpy(want, b->samples, bytes);
    double ring = run_world(b, transport, ranks, 0), rate = b->flops / ring / gpus;
    double wrong = difference(b->samples, want, SAMPLES * b->width);
    bool right = wrong < 4e-3;
    printf(
        "%-8s %-5s heads %d ranks %d gpus %d tokens %-8lld documents %-4lld %9.3f ms %6.1f TFLOP/s"
        " a GPU | one GPU %6.1f | ratio %.3f | still %4.1f %% | %7.1f MB in | difference %.1e%s\n",
        b->c->name, transport, b->heads, ranks, gpus, (long long)b->tokens,
        (long long)b->document_count, ring * 1e3, rate * 1e-12, alone * 1e-12, rate / alone,
        100.0 * b->still / ring, b->received * 1e-6, wrong, right ? "" : " WRONG");
    fflush(stdout);
    free(want);
    return right;
}

static bool measure_named(bench_t *b, const char *text, const char *transport, int ranks)
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
            return measure(b, transport, ranks);
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
    int ranks = atoi(argv[2]);
    if (ranks < 1 || ranks > RANKS_MOST) {
        fprintf(stderr, "ring_device_perf: 1 to %d ranks, not '%s'\n", RANKS_MOST, argv[2]);
        return 2;
    }
    ra_status_t status = ra_device_count("cuda", &b.devices);
    if (status != RA_OK) {
        return ra_status_exit_code(status);
    }
    b.samples = malloc((size_t)SAMPLES * HEADS_MOST * DIM * 2);
    if (b.samples == NULL) {
        return 5;
    }
    for (int i = 3; i < argc; i++) {
        right = measure_named(&b, argv[i], argv[1], ranks) && right;
    }
    free(b.samples);
    return right ? 0 : 1;
}
