/*
 * The softmax ring against attention in double over whole documents: packs, layouts, rank counts,
 * windows, prefixes, both kinds of transport; and the promises about bits.
 */
#include "ring/softmax_ring.h"
#include "tests/comm/ranks_check.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { H = 4, G = 2, D = 32, TILE = 16, PAD = 5, STREAM_Q = 1, STREAM_K, STREAM_V };

static const float scale = 0.17677669f; /* 1 / sqrt(D) */

typedef struct ring_case {
    pack_t pack;
    int ranks;
    ra_layout_kind_t kind;
    int64_t window;
    bool full, reproducible;
    const char *transport; /* NULL: "local" */
    int layers;            /* runs of the plan, all the same; 0 means 1 */
    ra_pool_t *pool;       /* threads shared by the ranks; NULL: none */
} ring_case_t;

typedef struct ring_result {
    const ring_case_t *c;
    ra_layout_t *layout, *prefix;
    float *o;   /* [rows in document order, H, D] */
    float *lse; /* [rows, H] */
    int64_t received_bytes;
} ring_result_t;

static ra_status_t run_rank(ra_comm_t *comm, ra_stream_t *stream, ring_result_t *result)
{
    const ring_case_t *c = result->c;
    const ra_layout_t *layout = result->layout, *prefix = result->prefix;
    int rank = ra_comm_rank(comm);
    int64_t rows = layout->rows[rank], cached = prefix->rows[rank], stride = H * D + PAD;
    float *q = float_array(rows * stride), *o = float_array(rows * stride);
    float *kv = float_array(2 * rows * G * D), *prefix_kv = float_array(2 * cached * G * D);
    float *lse = float_array(rows * H), *packed = float_array(rows * H * D);
    float *lse_rows = float_array(rows * H);
    value_rows(&c->pack, layout, rank, STREAM_Q, H * D, stride, q);
    value_rows(&c->pack, layout, rank, STREAM_K, G * D, G * D, kv);
    value_rows(&c->pack, layout, rank, STREAM_V, G * D, G * D, kv + rows * G * D);
    value_rows(&c->pack, prefix, rank, STREAM_K, G * D, G * D, prefix_kv);
    value_rows(&c->pack, prefix, rank, STREAM_V, G * D, G * D, prefix_kv + cached * G * D);

    ra_softmax_ring_params_t params = {.layout = layout,
                                       .prefix = prefix->total_rows > 0 ? prefix : NULL,
                                       .heads = H,
                                       .kv_heads = G,
                                       .head_dim = D,
                                       .scale = scale,
                                       .window = c->window,
                                       .causal = !c->full,
                                       .reproducible = c->reproducible};
    ra_softmax_ring_io_t io = {.q = q,
                               .q_stride = stride,
                               .kv = kv,
                               .prefix_kv = prefix_kv,
                               .o = o,
                               .o_stride = stride,
                               .lse = lse};
    ra_softmax_ring_t *plan = NULL;
    ra_status_t status = ra_softmax_ring_create(comm, stream, &params, &plan);
    for (int layer = 0; layer < (c->layers > 0 ? c->layers : 1) && status == RA_OK; layer++) {
        status = ra_softmax_ring_run(plan, &io);
    }
    for (int64_t r = 0; r < rows && status == RA_OK; r++) {
        memcpy(packed + r * H * D, o + r * stride, H * D * sizeof(float));
        for (int h = 0; h < H; h++) {
            lse_rows[r * H + h] = lse[h * rows + r];
        }
    }
    if (status == RA_OK) {
        ra_layout_unpack(layout, rank, H * D * 4, packed, result->o);
        ra_layout_unpack(layout, rank, H * 4, lse_rows, result->lse);
        if (rank == 0) {
            result->received_bytes = ra_softmax_ring_stats(plan).received_bytes;
        }
    }
    ra_softmax_ring_destroy(plan);
    free(q);
    free(o);
    free(kv);
    free(prefix_kv);
    free(lse);
    free(packed);
    free(lse_rows);
    return status;
}

static ra_status_t rank_body(ra_comm_t *comm, void *arg)
{
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    const ring_result_t *result = arg;
    RA_TRY(ra_device_open("cpu", 0, result->c->pool, &device));
    RA_TRY(ra_stream_create(device, &stream));
    ra_status_t status = run_rank(comm, stream, arg);
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

static ring_result_t run_case(const ring_case_t *c)
{
    ring_result_t result = {.c = c};
    assert_int_equal(
        ra_layout_create(c->pack.documents, c->pack.count, TILE, c->ranks, c->kind, &result.layout),
        RA_OK);
    assert_int_equal(ra_layout_create_prefix(result.layout, &result.prefix), RA_OK);
    result.o = float_array(result.layout->total_rows * H * D);
    result.lse = float_array(result.layout->total_rows * H);
    const char *transport = c->transport != NULL ? c->transport : "local";
    assert_int_equal(ra_ranks_run(transport, c->ranks, rank_body, &result), RA_OK);
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
static void oracle_row(const float *q, const float *k, const float *v, int64_t lo, int64_t hi,
                       double *o, double *lse)
{
    double *score = malloc((size_t)(hi - lo) * sizeof(double));
    for (int h = 0; h < H; h++) {
        int64_t g = h / (H / G);
        double m = -INFINITY, l = 0;
        for (int64_t j = lo; j < hi; j++) {
            double s = 0;
            for (int d = 0; d < D; d++) {
                s += (double)q[h * D + d] * (double)k[(j * G + g) * D + d];
            }
            score[j - lo] = s * (double)scale;
            m = fmax(m, score[j - lo]);
        }
        memset(o + h * D, 0, D * sizeof(double));
        for (int64_t j = lo; j < hi; j++) {
            double p = exp(score[j - lo] - m);
            l += p;
            for (int d = 0; d < D; d++) {
                o[h * D + d] += p * (double)v[(j * G + g) * D + d];
            }
        }
        for (int d = 0; d < D; d++) {
            o[h * D + d] /= l;
        }
        lse[h] = m + log(l);
    }
    free(score);
}

/* [total rows, H * D + H]: output, then log-sum-exp. */
static double *oracle(const ring_case_t *c)
{
    int64_t rows = 0, row = 0, width = H * D + H;
    for (int64_t d = 0; d < c->pack.count; d++) {
        rows += c->pack.documents[d].count;
    }
    double *want = malloc((size_t)(rows * width + 1) * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t length = document->first + document->count;
        float *k = float_array(length * G * D), *v = float_array(length * G * D);
        float q[H * D];
        for (int64_t p = 0; p < length; p++) {
            value_row(c->pack.name[d], STREAM_K, p, G * D, k + p * G * D);
            value_row(c->pack.name[d], STREAM_V, p, G * D, v + p * G * D);
        }
        for (int64_t p = document->first; p < length; p++, row++) {
            int64_t lo = c->window > 0 && p >= c->window ? p - c->window + 1 : 0;
            value_row(c->pack.name[d], STREAM_Q, p, H * D, q);
            oracle_row(q, k, v, lo, c->full ? length : p + 1, want + row * width,
                       want + row * width + H * D);
        }
        free(k);
        free(v);
    }
    return want;
}

/* fp32 sums of at most a few hundred terms of size 1: 1e-5 leaves a factor of ten. */
static void check_near(const ring_result_t *result, const double *want)
{
    int64_t width = H * D + H;
    for (int64_t r = 0; r < result->layout->total_rows; r++) {
        test_near(result->o + r * H * D, want + r * width, H * D, 1e-5, 0, "o");
        test_near(result->lse + r * H, want + r * width + H * D, H, 1e-5, 1e-6, "lse");
    }
}

static const int rank_counts[] = {1, 2, 3, 4, 7};
static const ra_layout_kind_t kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

static const pack_t packs[] = {
    {1, {1}, {{0, 237}}},
    {1, {2}, {{0, 1}}},
    {2, {3, 4}, {{0, 129}, {0, 77}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {0, 16}, {0, 131}, {0, 3}}},
};

static const pack_t prefixed[] = {
    {1, {1}, {{128, 109}}},
    {1, {1}, {{16, 221}}},
    {3, {5, 6, 8}, {{224, 2}, {0, 130}, {48, 83}}},
};

static void compare_everywhere(ring_case_t c, const pack_t *some, size_t count)
{
    for (size_t p = 0; p < count; p++) {
        c.pack = some[p];
        double *want = oracle(&c);
        for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
                c.ranks = rank_counts[n];
                c.kind = kinds[k];
                ring_result_t result = run_case(&c);
                check_near(&result, want);
                free_result(&result);
            }
        }
        free(want);
    }
}

static void causal_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((ring_case_t){0}, packs, RA_ARRAY_LEN(packs));
}

static void a_plan_serves_many_layers_and_copying_transports(void **state)
{
    (void)state;
    const char *transports[] = {"local-copy", "local-order"};
    for (int i = 0; i < 2; i++) {
        ring_case_t c = {.transport = transports[i], .layers = 2};
        compare_everywhere(c, packs + 2, 2);
        compare_everywhere(c, prefixed, RA_ARRAY_LEN(prefixed));
    }
}

static void full_attention_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((ring_case_t){.full = true}, packs, RA_ARRAY_LEN(packs));
    compare_everywhere((ring_case_t){.full = true}, prefixed, 1);
}

static void windows_of_any_size_are_exact_on_any_ring(void **state)
{
    (void)state;
    int64_t windows[] = {1, 17, 100};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        compare_everywhere((ring_case_t){.window = windows[w]}, packs + 2, 2);
        compare_everywhere((ring_case_t){.window = windows[w]}, prefixed, RA_ARRAY_LEN(prefixed));
    }
}

static void cached_prefixes_are_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((ring_case_t){0}, prefixed, RA_ARRAY_LEN(prefixed));
}

/* Rows of document d of @a got against rows of the document with the same name of @a want, from
 * the position where both have rows. */
static void check_same_bits(const ring_result_t *got, int64_t d, const ring_result_t *want)
{
    const pack_t *ours = &got->c->pack, *theirs = &want->c->pack;
    int64_t other = 0;
    while (theirs->name[other] != ours->name[d]) {
        other++;
    }
    int64_t first = ours->documents[d].first, other_first = theirs->documents[other].first;
    int64_t from = first > other_first ? first : other_first;
    int64_t count = ours->documents[d].first + ours->documents[d].count - from;
    int64_t row = got->layout->document_row[d] + from - first;
    int64_t other_row = want->layout->document_row[other] + from - other_first;
    for (int64_t i = 0; i < count; i++) {
        if (memcmp(got->o + (row + i) * H * D, want->o + (other_row + i) * H * D, H * D * 4) != 0 ||
            memcmp(got->lse + (row + i) * H, want->lse + (other_row + i) * H, H * 4) != 0) {
            fail_msg("document %lld, position %lld differs (%d ranks, window %lld)", (long long)d,
                     (long long)(from + i), got->c->ranks, (long long)got->c->window);
        }
    }
}

static void reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 17, 40};
    const char *transports[] = {"local-copy", "local", "local-order"};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        ring_case_t whole = {.ranks = 1, .window = windows[w], .reproducible = true};
        whole.pack = (pack_t){3, {1, 6, 8}, {{0, 237}, {0, 226}, {0, 131}}};
        ring_result_t want = run_case(&whole);
        const pack_t others[] = {
            {3, {1, 6, 8}, {{0, 237}, {0, 226}, {0, 131}}},
            {1, {6}, {{0, 226}}},
            {3, {8, 1, 6}, {{112, 19}, {16, 221}, {208, 18}}},
            {2, {6, 1}, {{64, 162}, {224, 13}}},
        };
        for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
            for (int ranks = 1; ranks <= 8; ranks += ranks < 4 ? 1 : 2) {
                ring_case_t c = {.pack = others[p],
                                 .ranks = ranks,
                                 .window = windows[w],
                                 .reproducible = true,
                                 .transport = transports[ranks % 3]};
                ring_result_t got = run_case(&c);
                for (int64_t d = 0; d < c.pack.count; d++) {
                    check_same_bits(&got, d, &want);
                }
                free_result(&got);
            }
        }
        free_result(&want);
    }
}

static void bits_never_depend_on_neighbours(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 40};
    for (size_t w = 0; w < RA_ARRAY_LEN(windows); w++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
            for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
                ring_case_t many = {.ranks = rank_counts[n], .kind = kinds[k]};
                many.window = windows[w];
                many.pack =
                    (pack_t){5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {0, 16}, {32, 99}, {0, 3}}};
                ring_result_t want = run_case(&many);
                for (int64_t d = 0; d < many.pack.count; d++) {
                    ring_case_t alone = many;
                    alone.pack = (pack_t){.count = 1,
                                          .name = {many.pack.name[d]},
                                          .documents = {many.pack.documents[d]}};
                    ring_result_t got = run_case(&alone);
                    check_same_bits(&got, 0, &want);
                    free_result(&got);
                }
                free_result(&want);
            }
        }
    }
}

static void ranks_that_share_a_pool_get_the_same_bits(void **state)
{
    (void)state;
    ra_pool_t *pool = NULL;
    assert_int_equal(ra_pool_create(3, &pool), RA_OK);
    for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
        ring_case_t c = {.pack = packs[3], .ranks = 4, .kind = kinds[k], .layers = 2};
        ring_result_t want = run_case(&c);
        ring_case_t shared = c;
        shared.pool = pool;
        ring_result_t got = run_case(&shared);
        for (int64_t d = 0; d < c.pack.count; d++) {
            check_same_bits(&got, d, &want);
        }
        free_result(&want);
        free_result(&got);
    }
    ra_pool_destroy(pool);
}

static void whole_documents_exchange_nothing(void **state)
{
    (void)state;
    ring_case_t c = {.pack = {4, {1, 2, 3, 4}, {{0, 60}, {0, 50}, {0, 40}, {0, 64}}}, .ranks = 4};
    ring_result_t result = run_case(&c);
    assert_int_equal(result.received_bytes, 0);
    free_result(&result);
    c.pack = (pack_t){1, {1}, {{0, 256}}};
    result = run_case(&c);
    assert_int_equal(result.received_bytes, 3 * 2 * 64 * G * D * 4);
    free_result(&result);
}

static ra_status_t fail_half_way(ra_comm_t *comm, void *arg)
{
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 2) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 2 does not take part");
    }
    ra_status_t status = rank_body(comm, arg);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_missing_rank_ends_the_ring_on_all_others(void **state)
{
    (void)state;
    const char *transports[] = {"local", "local-copy", "local-order"};
    const pack_t tries[] = {{1, {1}, {{0, 256}}}, {1, {1}, {{256, 256}}}};
    for (int i = 0; i < 12; i++) {
        ring_case_t c = {.pack = tries[i % 2], .ranks = 4, .window = i / 2 % 2 ? 100 : 0};
        ring_result_t result = {.c = &c};
        assert_int_equal(
            ra_layout_create(c.pack.documents, 1, TILE, c.ranks, kinds[0], &result.layout), RA_OK);
        assert_int_equal(ra_layout_create_prefix(result.layout, &result.prefix), RA_OK);
        result.o = float_array(result.layout->total_rows * H * D);
        result.lse = float_array(result.layout->total_rows * H);
        assert_int_equal(ra_ranks_run(transports[i / 4], 4, fail_half_way, &result), RA_ERR_INPUT);
        free_result(&result);
    }
}

static ra_status_t make_bad_plans(ra_comm_t *comm, void *arg)
{
    ra_stream_t *stream = arg;
    ra_document_t documents[] = {{0, 100}, {32, 10}};
    ra_layout_t *zigzag = NULL, *cut = NULL, *prefix = NULL;
    RA_TRY(ra_layout_create(documents, 1, TILE, 2, RA_LAYOUT_ZIGZAG, &zigzag));
    RA_TRY(ra_layout_create(documents, 2, TILE, 2, RA_LAYOUT_CONTIGUOUS, &cut));
    RA_TRY(ra_layout_create_prefix(cut, &prefix));
    ra_softmax_ring_params_t good = {
        .layout = cut, .prefix = prefix, .heads = 4, .kv_heads = 2, .head_dim = 32, .causal = true};
    ra_softmax_ring_params_t bad[6] = {good, good, good, good, good, good};
    ra_status_t want[6] = {RA_ERR_UNSUPPORTED, RA_ERR_INVALID,     RA_ERR_INVALID,
                           RA_ERR_INVALID,     RA_ERR_UNSUPPORTED, RA_ERR_UNSUPPORTED};
    bad[0].layout = zigzag;
    bad[0].reproducible = true;
    bad[1].prefix = NULL;
    bad[2].layout = zigzag; /* one document, but two prefixes */
    bad[3].causal = false;
    bad[3].window = 5;
    bad[4].kernel = "abacus";
    bad[5].causal = false;
    bad[5].reproducible = true;
    ra_log_set_quiet(1);
    for (int i = 0; i < 6; i++) {
        ra_softmax_ring_t *plan = NULL;
        RANK_CHECK(comm, ra_softmax_ring_create(comm, stream, &bad[i], &plan) == want[i]);
        RANK_CHECK(comm, plan == NULL);
    }
    ra_layout_destroy(zigzag);
    ra_layout_destroy(cut);
    ra_layout_destroy(prefix);
    return RA_OK;
}

static void plans_that_cannot_work_are_refused(void **state)
{
    (void)state;
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    assert_int_equal(ra_stream_create(device, &stream), RA_OK);
    assert_int_equal(ra_ranks_run("local", 2, make_bad_plans, stream), RA_OK);
    ra_stream_destroy(stream);
    ra_device_close(device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(causal_attention_is_exact_on_any_ring),
        cmocka_unit_test(a_plan_serves_many_layers_and_copying_transports),
        cmocka_unit_test(full_attention_is_exact_on_any_ring),
        cmocka_unit_test(windows_of_any_size_are_exact_on_any_ring),
        cmocka_unit_test(cached_prefixes_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_neighbours_or_prefix),
        cmocka_unit_test(bits_never_depend_on_neighbours),
        cmocka_unit_test(ranks_that_share_a_pool_get_the_same_bits),
        cmocka_unit_test(whole_documents_exchange_nothing),
        cmocka_unit_test(a_missing_rank_ends_the_ring_on_all_others),
        cmocka_unit_test(plans_that_cannot_work_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
