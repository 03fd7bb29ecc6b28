/*
 * The softmax ring on GPUs against attention in double over whole documents: 1 to 4 ranks, which
 * share a GPU where there are fewer, both kernels, both layouts, packs, windows, prefixes; and the
 * promises about bits. Skips without a GPU.
 */
#include "ring/softmax_ring.h"
#include "tests/comm/gpu_ranks.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { H = 4, G = 2, DIM_MOST = 128, TILE = 64, PAD = 8, STREAM_Q = 1, STREAM_K, STREAM_V };

typedef struct ring_case {
    pack_t pack;
    int ranks, dim;
    ra_layout_kind_t kind;
    ra_dtype_t dtype;
    int64_t window;
    bool full, reproducible, walk;
    const char *transport; /* NULL: "peer" */
    int layers;            /* runs of the plan, all the same; 0 means 1 */
} ring_case_t;

typedef struct ring_result {
    const ring_case_t *c;
    ra_layout_t *layout, *prefix;
    float *o;   /* [rows in document order, H, dim] */
    float *lse; /* [rows, H] */
} ring_result_t;

static float scale_of(const ring_case_t *c)
{
    return 1.0f / sqrtf((float)c->dim);
}

/* As the device sees them. */
static void round_values(ra_dtype_t dtype, float *values, int64_t count)
{
    for (int64_t i = 0; i < count && dtype == RA_BF16; i++) {
        values[i] = ra_bf16_to_f32(ra_bf16_from_f32(values[i]));
    }
}

static ra_status_t to_device(ra_stream_t *stream, ra_dtype_t dtype, const float *values,
                             int64_t count, void **device_p)
{
    uint16_t *narrow = malloc((size_t)count * 2 + 2);
    for (int64_t i = 0; i < count; i++) {
        narrow[i] = ra_bf16_from_f32(values[i]);
    }
    int64_t bytes = count * ra_dtype_bytes(dtype);
    ra_status_t status = ra_device_alloc(ra_stream_device(stream), bytes, device_p);
    if (status == RA_OK) {
        const void *from = dtype == RA_BF16 ? (const void *)narrow : values;
        status = ra_stream_copy(stream, *device_p, from, bytes);
    }
    free(narrow);
    return status;
}

static ra_status_t to_host(ra_stream_t *stream, ra_dtype_t dtype, const void *device, int64_t count,
                           float *values)
{
    uint16_t *narrow = malloc((size_t)count * 2 + 2);
    void *to = dtype == RA_BF16 ? (void *)narrow : values;
    ra_status_t status = ra_stream_copy(stream, to, device, count * ra_dtype_bytes(dtype));
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    for (int64_t i = 0; i < count && dtype == RA_BF16 && status == RA_OK; i++) {
        values[i] = ra_bf16_to_f32(narrow[i]);
    }
    free(narrow);
    return status;
}

static float *packed_values(const ring_case_t *c, const ra_layout_t *layout, int rank)
{
    int64_t rows = layout->rows[rank], width = (int64_t)G * c->dim;
    float *kv = float_array(2 * rows * width);
    value_rows(&c->pack, layout, rank, STREAM_K, width, width, kv);
    value_rows(&c->pack, layout, rank, STREAM_V, width, width, kv + rows * width);
    return kv;
}

static ra_status_t run_layers(ra_comm_t *comm, ra_stream_t *stream, const ring_result_t *result,
                              const ra_softmax_ring_io_t *io)
{
    const ring_case_t *c = result->c;
    ra_softmax_ring_params_t params = {.layout = result->layout,
                                       .prefix =
                                           result->prefix->total_rows > 0 ? result->prefix : NULL,
                                       .heads = H,
                                       .kv_heads = G,
                                       .head_dim = c->dim,
                                       .scale = scale_of(c),
                                       .window = c->window,
                                       .causal = !c->full,
                                       .reproducible = c->reproducible,
                                       .dtype = c->dtype,
                                       .walk = c->walk};
    ra_softmax_ring_t *plan = NULL;
    ra_status_t status = ra_softmax_ring_create(comm, stream, &params, &plan);
    for (int layer = 0; layer < (c->layers > 0 ? c->layers : 1) && status == RA_OK; layer++) {
        status = ra_softmax_ring_run(plan, io);
    }
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    ra_softmax_ring_destroy(plan);
    return status;
}

typedef struct rank_memory {
    void *q, *kv, *prefix_kv, *o, *lse;
} rank_memory_t;

static ra_status_t run_on_device(ra_comm_t *comm, ra_stream_t *stream, const ring_result_t *result,
                                 rank_memory_t *memory, float *o, float *lse)
{
    const ring_case_t *c = result->c;
    int rank = ra_comm_rank(comm);
    int64_t rows = result->layout->rows[rank], cached = result->prefix->rows[rank];
    int64_t stride = (int64_t)H * c->dim + PAD, kv_width = (int64_t)G * c->dim;
    float *q = float_array(rows * stride), *kv = packed_values(c, result->layout, rank);
    float *prefix_kv = packed_values(c, result->prefix, rank);
    value_rows(&c->pack, result->layout, rank, STREAM_Q, (int64_t)H * c->dim, stride, q);
    ra_status_t status = to_device(stream, c->dtype, q, rows * stride, &memory->q);
    if (status == RA_OK) {
        status = to_device(stream, c->dtype, kv, 2 * rows * kv_width, &memory->kv);
    }
    if (status == RA_OK) {
        status = to_device(stream, c->dtype, prefix_kv, 2 * cached * kv_width, &memory->prefix_kv);
    }
    free(q);
    free(kv);
    free(prefix_kv);
    RA_TRY(status);
    RA_TRY(to_device(stream, c->dtype, o, rows * stride, &memory->o)); /* poison */
    RA_TRY(to_device(stream, RA_F32, lse, rows * H, &memory->lse));
    ra_softmax_ring_io_t io = {.q = memory->q,
                               .q_stride = stride,
                               .kv = memory->kv,
                               .prefix_kv = memory->prefix_kv,
                               .o = memory->o,
                               .o_stride = stride,
                               .lse = memory->lse};
    RA_TRY(run_layers(comm, stream, result, &io));
    RA_TRY(to_host(stream, c->dtype, memory->o, rows * stride, o));
    return to_host(stream, RA_F32, memory->lse, rows * H, lse);
}

static ra_status_t run_rank(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    ring_result_t *result = arg;
    const ring_case_t *c = result->c;
    int rank = ra_comm_rank(comm);
    int64_t rows = result->layout->rows[rank], width = (int64_t)H * c->dim, stride = width + PAD;
    float *o = float_array(rows * stride), *packed = float_array(rows * width);
    float *lse = float_array(rows * H), *lse_rows = float_array(rows * H);
    rank_memory_t memory = {0};
    ra_status_t status = run_on_device(comm, stream, result, &memory, o, lse);
    for (int64_t r = 0; r < rows && status == RA_OK; r++) {
        memcpy(packed + r * width, o + r * stride, (size_t)width * sizeof(float));
        for (int h = 0; h < H; h++) {
            lse_rows[r * H + h] = lse[h * rows + r];
        }
    }
    if (status == RA_OK) {
        ra_layout_unpack(result->layout, rank, width * 4, packed, result->o);
        ra_layout_unpack(result->layout, rank, H * 4, lse_rows, result->lse);
    }
    void *device_memory[] = {memory.q, memory.kv, memory.prefix_kv, memory.o, memory.lse};
    for (size_t i = 0; i < RA_ARRAY_LEN(device_memory); i++) {
        ra_device_free(ra_stream_device(stream), device_memory[i]);
    }
    free(o);
    free(packed);
    free(lse);
    free(lse_rows);
    return status;
}

static ring_result_t make_result(const ring_case_t *c)
{
    ring_result_t result = {.c = c};
    assert_int_equal(
        ra_layout_create(c->pack.documents, c->pack.count, TILE, c->ranks, c->kind, &result.layout),
        RA_OK);
    assert_int_equal(ra_layout_create_prefix(result.layout, &result.prefix), RA_OK);
    result.o = float_array(result.layout->total_rows * H * c->dim);
    result.lse = float_array(result.layout->total_rows * H);
    return result;
}

static ring_result_t run_case(const ring_case_t *c)
{
    ring_result_t result = make_result(c);
    const char *transport = c->transport != NULL ? c->transport : "peer";
    assert_int_equal(gpu_ranks_run(transport, c->ranks, run_rank, &result), RA_OK);
    return result;
}

static void free_result(ring_result_t *result)
{
    ra_layout_destroy(result->layout);
    ra_layout_destroy(result->prefix);
    free(result->o);
    free(result->lse);
}

/* Attention of one row over keys [lo, hi) of its document, head by head, in double. */
static void oracle_row(const ring_case_t *c, const float *q, const float *k, const float *v,
                       int64_t lo, int64_t hi, double *o, double *lse)
{
    int64_t dim = c->dim;
    double *score = malloc((size_t)(hi - lo) * sizeof(double));
    for (int64_t h = 0; h < H; h++) {
        int64_t g = h / (H / G);
        double m = -INFINITY, l = 0;
        for (int64_t j = lo; j < hi; j++) {
            double s = 0;
            for (int64_t d = 0; d < dim; d++) {
                s += (double)q[h * dim + d] * (double)k[(j * G + g) * dim + d];
            }
            score[j - lo] = s * (double)scale_of(c);
            m = fmax(m, score[j - lo]);
        }
        memset(o + h * dim, 0, (size_t)dim * sizeof(double));
        for (int64_t j = lo; j < hi; j++) {
            double p = exp(score[j - lo] - m);
            l += p;
            for (int64_t d = 0; d < dim; d++) {
                o[h * dim + d] += p * (double)v[(j * G + g) * dim + d];
            }
        }
        for (int64_t d = 0; d < dim; d++) {
            o[h * dim + d] /= l;
        }
        lse[h] = m + log(l);
    }
    free(score);
}

/* [total rows, H * dim + H]: output, then log-sum-exp. */
static double *oracle(const ring_case_t *c)
{
    int64_t rows = 0, row = 0, q_width = (int64_t)H * c->dim, width = q_width + H;
    int64_t kv_width = (int64_t)G * c->dim;
    for (int64_t d = 0; d < c->pack.count; d++) {
        rows += c->pack.documents[d].count;
    }
    double *want = malloc((size_t)(rows * width + 1) * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t length = document->first + document->count;
        float *k = float_array(length * kv_width), *v = float_array(length * kv_width);
        float q[H * DIM_MOST];
        for (int64_t p = 0; p < length; p++) {
            value_row(c->pack.name[d], STREAM_K, p, kv_width, k + p * kv_width);
            value_row(c->pack.name[d], STREAM_V, p, kv_width, v + p * kv_width);
        }
        round_values(c->dtype, k, length * kv_width);
        round_values(c->dtype, v, length * kv_width);
        for (int64_t p = document->first; p < length; p++, row++) {
            int64_t lo = c->window > 0 && p >= c->window ? p - c->window + 1 : 0;
            value_row(c->pack.name[d], STREAM_Q, p, q_width, q);
            round_values(c->dtype, q, q_width);
            oracle_row(c, q, k, v, lo, c->full ? length : p + 1, want + row * width,
                       want + row * width + q_width);
        }
        free(k);
        free(v);
    }
    return want;
}

/* F32: sums of about a thousand terms of size 1, 2e-6 of which 1e-5 leaves a factor of five. BF16:
 * weights and outputs rounded to 2^-9 of at most 1. Log-sum-exps see exact products. */
static void check_near(const ring_result_t *result, const double *want)
{
    const ring_case_t *c = result->c;
    int64_t q_width = (int64_t)H * c->dim, width = q_width + H;
    double bound = c->dtype == RA_BF16 ? 8e-3 : 1e-5;
    for (int64_t r = 0; r < result->layout->total_rows; r++) {
        test_near(result->o + r * q_width, want + r * width, q_width, bound, 0, "o");
        test_near(result->lse + r * H, want + r * width + q_width, H, 3e-5, 1e-5, "lse");
    }
}

static const pack_t packs[] = {
    {1, {1}, {{0, 1213}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 803}, {0, 64}, {0, 521}, {0, 3}}},
};

static const pack_t prefixed[] = {
    {1, {1}, {{512, 409}}},
    {3, {5, 6, 8}, {{640, 2}, {0, 530}, {192, 383}}},
};

static const ra_layout_kind_t kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

static void compare_everywhere(ring_case_t c, const pack_t *some, size_t count)
{
    for (size_t p = 0; p < count; p++) {
        c.pack = some[p];
        double *want = oracle(&c);
        for (c.ranks = 1; c.ranks <= 4; c.ranks++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
                c.kind = kinds[k];
                if (c.reproducible && c.ranks > 1 && c.kind != RA_LAYOUT_CONTIGUOUS) {
                    continue;
                }
                ring_result_t result = run_case(&c);
                check_near(&result, want);
                free_result(&result);
            }
        }
        free(want);
    }
}

static void skip_without_gpu(void)
{
    if (gpu_count() == 0) {
        skip();
    }
}

static void bf16_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 128, .dtype = RA_BF16, .layers = 3}, packs, 2);
    compare_everywhere((ring_case_t){.dim = 64, .dtype = RA_BF16, .layers = 3}, packs, 2);
}

static void fp32_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 32, .layers = 2}, packs, 2);
    compare_everywhere((ring_case_t){.dim = 48, .full = true}, packs + 1, 1);
}

static void full_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 64, .dtype = RA_BF16, .full = true}, packs, 2);
}

static void blocks_that_go_round_are_exact(void **state)
{
    (void)state;
    skip_without_gpu();
    ring_case_t c = {.dim = 128, .dtype = RA_BF16, .walk = true, .layers = 3};
    compare_everywhere(c, packs, 2);
    compare_everywhere((ring_case_t){.dim = 32, .walk = true, .full = true}, packs + 1, 1);
}

static void windows_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    int64_t windows[] = {1, 100, 700};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        ring_case_t c = {.dim = 64, .dtype = RA_BF16, .window = windows[w], .layers = 2};
        compare_everywhere(c, packs + 1, 1);
        compare_everywhere(c, prefixed + 1, 1);
    }
    compare_everywhere((ring_case_t){.dim = 32, .window = 100}, prefixed, 2);
}

static void cached_prefixes_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((ring_case_t){.dim = 128, .dtype = RA_BF16, .layers = 2}, prefixed, 2);
    compare_everywhere((ring_case_t){.dim = 32}, prefixed, 2);
}

static void reproducible_attention_is_exact_too(void **state)
{
    (void)state;
    skip_without_gpu();
    ring_case_t c = {.dim = 64, .dtype = RA_BF16, .reproducible = true};
    compare_everywhere(c, packs + 1, 1);
    c.window = 100;
    compare_everywhere(c, prefixed, 2);
}

/* Rows of document d of @a got against rows of the document with the same name of @a want, from
 * the position where both have rows. */
static void check_same_bits(const ring_result_t *got, int64_t d, const ring_result_t *want)
{
    const pack_t *ours = &got->c->pack, *theirs = &want->c->pack;
    int64_t other = 0, width = (int64_t)H * got->c->dim;
    while (theirs->name[other] != ours->name[d]) {
        other++;
    }
    int64_t first = ours->documents[d].first, other_first = theirs->documents[other].first;
    int64_t from = first > other_first ? first : other_first;
    int64_t count = ours->documents[d].first + ours->documents[d].count - from;
    int64_t row = got->layout->document_row[d] + from - first;
    int64_t other_row = want->layout->document_row[other] + from - other_first;
    for (int64_t i = 0; i < count; i++) {
        if (memcmp(got->o + (row + i) * width, want->o + (other_row + i) * width,
                   (size_t)width * 4) != 0 ||
            memcmp(got->lse + (row + i) * H, want->lse + (other_row + i) * H, H * 4) != 0) {
            fail_msg("document %lld, position %lld differs (%d ranks, window %lld, dim %d)",
                     (long long)d, (long long)(from + i), got->c->ranks, (long long)got->c->window,
                     got->c->dim);
        }
    }
}

static void check_reproducible(ring_case_t whole)
{
    whole.ranks = 1;
    whole.reproducible = true;
    whole.pack = (pack_t){3, {1, 6, 8}, {{0, 813}, {0, 526}, {0, 131}}};
    const pack_t others[] = {
        whole.pack,
        {1, {6}, {{0, 526}}},
        {3, {8, 1, 6}, {{64, 67}, {320, 493}, {512, 14}}},
    };
    ring_result_t want = run_case(&whole);
    for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
        for (int ranks = 1; ranks <= 4; ranks++) {
            ring_case_t c = whole;
            c.pack = others[p];
            c.ranks = ranks;
            ring_result_t got = run_case(&c);
            for (int64_t d = 0; d < c.pack.count; d++) {
                check_same_bits(&got, d, &want);
            }
            free_result(&got);
        }
    }
    free_result(&want);
}

static void reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix(void **state)
{
    (void)state;
    skip_without_gpu();
    const int64_t windows[] = {0, 100};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        check_reproducible((ring_case_t){.dim = 128, .dtype = RA_BF16, .window = windows[w]});
        check_reproducible((ring_case_t){.dim = 64, .dtype = RA_BF16, .window = windows[w]});
        check_reproducible((ring_case_t){.dim = 32, .window = windows[w]});
    }
}

static void rings_over_nccl_are_exact(void **state)
{
    (void)state;
    if (gpu_count() < 2) {
        skip();
    }
    const pack_t some[] = {packs[0], packs[1], prefixed[1]};
    for (size_t p = 0; p < RA_ARRAY_LEN(some); p++) {
        for (int i = 0; i < 6; i++) {
            ring_case_t c = {.pack = some[p],
                             .ranks = 2,
                             .dim = 64,
                             .kind = kinds[i % 2],
                             .dtype = RA_BF16,
                             .window = i / 2 == 1 ? 100 : 0,
                             .walk = i / 2 == 2,
                             .transport = "nccl",
                             .layers = 3};
            double *want = oracle(&c);
            ring_result_t result = run_case(&c);
            check_near(&result, want);
            free_result(&result);
            free(want);
        }
    }
}

static ra_status_t fail_half_way(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 2) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 2 does not take part");
    }
    ra_status_t status = run_rank(comm, stream, arg);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_missing_rank_ends_the_ring_on_all_others(void **state)
{
    (void)state;
    skip_without_gpu();
    const pack_t tries[] = {{1, {1}, {{0, 1024}}}, {1, {1}, {{1024, 1024}}}};
    for (int i = 0; i < 4; i++) {
        ring_case_t c = {.pack = tries[i % 2],
                         .ranks = 3,
                         .dim = 64,
                         .dtype = RA_BF16,
                         .kind = RA_LAYOUT_ZIGZAG,
                         .window = i / 2 == 1 ? 900 : 0};
        ring_result_t result = make_result(&c);
        assert_int_equal(gpu_ranks_run("peer", 3, fail_half_way, &result), RA_ERR_INPUT);
        free_result(&result);
    }
    ra_log_set_quiet(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_attention_is_exact_on_any_ring),
        cmocka_unit_test(fp32_attention_is_exact_on_any_ring),
        cmocka_unit_test(full_attention_is_exact_on_any_ring),
        cmocka_unit_test(blocks_that_go_round_are_exact),
        cmocka_unit_test(windows_are_exact_on_any_ring),
        cmocka_unit_test(cached_prefixes_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_attention_is_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix),
        cmocka_unit_test(rings_over_nccl_are_exact),
        cmocka_unit_test(a_missing_rank_ends_the_ring_on_all_others),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
