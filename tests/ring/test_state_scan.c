/*
 * The state scan against the recurrence in double over whole documents: packs, layouts, rank
 * counts, continuation, final states; and the promises about bits.
 */
#include "ring/state_scan.h"
#include "tests/comm/ranks_check.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { H = 3, DK = 32, DV = 32, STATE = H * DK * DV, TILE = 16, PAD = 3 };
enum { STREAM_Q = 11, STREAM_K, STREAM_V, STREAM_DECAY, STREAM_STATE };

static const float scale = 0.17677669f; /* 1 / sqrt(DK) */
static const float decay[H] = {-0.6f, -0.05f, 0.0f};

typedef struct scan_case {
    pack_t pack;
    int ranks;
    ra_layout_kind_t kind;
    bool per_token, reproducible, at_tile, over_v;
    bool from_result; /* initial states are those of `before` */
    const struct scan_result *before;
    const char *transport; /* NULL: "local" */
    int layers;            /* runs of the plan, all the same; 0 means 1 */
    ra_pool_t *pool;       /* threads shared by the ranks; NULL: none */
} scan_case_t;

typedef struct scan_result {
    const scan_case_t *c;
    ra_layout_t *layout;
    float *o;                        /* [rows in document order, H, DV] */
    float *final_of[DOCUMENTS_MOST]; /* [STATE] */
    int64_t received_bytes;
} scan_result_t;

static float log_decay_of(const scan_case_t *c, int name, int64_t position, int h)
{
    float row[H];
    if (!c->per_token) {
        return decay[h];
    }
    value_row(name, STREAM_DECAY, position, H, row);
    return -0.3f * fabsf(row[h]);
}

/* The state a continued document starts with when it is not that of an earlier result. */
static void made_up_state(int name, float *state)
{
    value_row(name, STREAM_STATE, 0, STATE, state);
}

static ra_status_t run_plan(ra_comm_t *comm, ra_stream_t *stream, const scan_result_t *result,
                            const ra_state_scan_io_t *io, int64_t *received_bytes)
{
    const scan_case_t *c = result->c;
    ra_state_scan_params_t params = {.layout = result->layout,
                                     .heads = H,
                                     .key_dim = DK,
                                     .value_dim = DV,
                                     .scale = scale,
                                     .decay_per_token = c->per_token,
                                     .reproducible = c->reproducible,
                                     .final_at_tile = c->at_tile};
    ra_state_scan_t *plan = NULL;
    ra_status_t status = ra_state_scan_create(comm, stream, &params, &plan);
    for (int layer = 0; layer < (c->layers > 0 ? c->layers : 1) && status == RA_OK; layer++) {
        status = ra_state_scan_run(plan, io);
    }
    if (status == RA_OK) {
        *received_bytes = ra_state_scan_stats(plan).received_bytes;
    }
    ra_state_scan_destroy(plan);
    return status;
}

static ra_status_t run_rank(ra_comm_t *comm, ra_stream_t *stream, scan_result_t *result)
{
    const scan_case_t *c = result->c;
    const ra_layout_t *layout = result->layout;
    int rank = ra_comm_rank(comm);
    int64_t rows = layout->rows[rank], stride = H * DK + PAD, received = 0;
    float *q = float_array(rows * stride), *k = float_array(rows * stride);
    float *v = float_array(rows * stride), *other = float_array(rows * stride);
    float *o = c->over_v ? v : other;
    float *g = float_array(rows * H), *packed = float_array(rows * H * DV);
    float *states = float_array(DOCUMENTS_MOST * STATE);
    const float *initial[DOCUMENTS_MOST] = {0};
    float *final[DOCUMENTS_MOST];
    value_rows(&c->pack, layout, rank, STREAM_Q, H * DK, stride, q);
    value_rows(&c->pack, layout, rank, STREAM_K, H * DK, stride, k);
    value_rows(&c->pack, layout, rank, STREAM_V, H * DV, stride, v);
    const ra_run_t *runs = ra_layout_runs(layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count * H; t++) {
            g[runs[i].local * H + t] = log_decay_of(c, c->pack.name[runs[i].document],
                                                    runs[i].start + t / H, (int)(t % H));
        }
    }
    for (int64_t d = 0; d < c->pack.count; d++) {
        if (c->from_result) {
            initial[d] = c->before->final_of[d];
        } else if (c->pack.documents[d].first > 0) {
            made_up_state(c->pack.name[d], states + d * STATE);
            initial[d] = states + d * STATE;
        }
        const ra_run_t *last = ra_layout_last_run(layout, d);
        final[d] = last != NULL && last->rank == rank ? result->final_of[d] : NULL;
    }
    ra_state_scan_io_t io = {.q = q,
                             .k = k,
                             .v = v,
                             .q_stride = stride,
                             .k_stride = stride,
                             .v_stride = stride,
                             .log_decay = c->per_token ? g : decay,
                             .log_decay_stride = H,
                             .o = o,
                             .o_stride = stride,
                             .initial = initial,
                             .final_state = final};
    ra_status_t status = run_plan(comm, stream, result, &io, &received);
    for (int64_t r = 0; r < rows && status == RA_OK; r++) {
        memcpy(packed + r * H * DV, o + r * stride, H * DV * sizeof(float));
    }
    if (status == RA_OK) {
        ra_layout_unpack(layout, rank, H * DV * 4, packed, result->o);
    }
    if (rank == 0) {
        result->received_bytes = received;
    }
    float *arrays[] = {q, k, v, other, g, packed, states};
    for (size_t i = 0; i < RA_ARRAY_LEN(arrays); i++) {
        free(arrays[i]);
    }
    return status;
}

static ra_status_t rank_body(ra_comm_t *comm, void *arg)
{
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    const scan_result_t *result = arg;
    RA_TRY(ra_device_open("cpu", 0, result->c->pool, &device));
    RA_TRY(ra_stream_create(device, &stream));
    ra_status_t status = run_rank(comm, stream, arg);
    ra_stream_destroy(stream);
    ra_device_close(device);
    return status;
}

static scan_result_t make_result(const scan_case_t *c)
{
    scan_result_t result = {.c = c};
    assert_int_equal(
        ra_layout_create(c->pack.documents, c->pack.count, TILE, c->ranks, c->kind, &result.layout),
        RA_OK);
    result.o = float_array(result.layout->total_rows * H * DV);
    for (int64_t d = 0; d < DOCUMENTS_MOST; d++) {
        result.final_of[d] = float_array(STATE);
    }
    return result;
}

static scan_result_t run_case(const scan_case_t *c)
{
    scan_result_t result = make_result(c);
    const char *transport = c->transport != NULL ? c->transport : "local";
    assert_int_equal(ra_ranks_run(transport, c->ranks, rank_body, &result), RA_OK);
    return result;
}

static void free_result(scan_result_t *result)
{
    ra_layout_destroy(result->layout);
    free(result->o);
    for (int64_t d = 0; d < DOCUMENTS_MOST; d++) {
        free(result->final_of[d]);
    }
}

/* One token: S <- e^g S + k v^T, o = scale S^T q. */
static void oracle_token(const scan_case_t *c, int name, int64_t position, double *state, double *o)
{
    float q[H * DK], k[H * DK], v[H * DV];
    value_row(name, STREAM_Q, position, H * DK, q);
    value_row(name, STREAM_K, position, H * DK, k);
    value_row(name, STREAM_V, position, H * DV, v);
    for (int h = 0; h < H; h++) {
        double keep = exp((double)log_decay_of(c, name, position, h));
        for (int j = 0; j < DV; j++) {
            o[h * DV + j] = 0;
        }
        for (int i = 0; i < DK; i++) {
            double *row = state + (h * DK + i) * DV;
            for (int j = 0; j < DV; j++) {
                row[j] = keep * row[j] + (double)k[h * DK + i] * (double)v[h * DV + j];
                o[h * DV + j] += (double)scale * row[j] * (double)q[h * DK + i];
            }
        }
    }
}

/* Outputs and states grow to about 30 here (the head without decay): 1e-5 of that. */
static const double tolerance = 3e-4;

/* [total rows, H * DV], then the final state of each document. */
static double *oracle(const scan_case_t *c)
{
    int64_t rows = 0, row = 0;
    for (int64_t d = 0; d < c->pack.count; d++) {
        rows += c->pack.documents[d].count;
    }
    double *want = malloc((size_t)(rows * H * DV + c->pack.count * STATE) * sizeof(double));
    double *state = malloc(STATE * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t end = document->first + document->count;
        int64_t save_at = c->at_tile ? end / TILE * TILE : end;
        double *saved = want + rows * H * DV + d * STATE;
        float start[STATE] = {0};
        if (document->first > 0) {
            made_up_state(c->pack.name[d], start);
        }
        for (int64_t i = 0; i < STATE; i++) {
            state[i] = saved[i] = (double)start[i];
        }
        for (int64_t p = document->first; p < end; p++, row++) {
            oracle_token(c, c->pack.name[d], p, state, want + row * H * DV);
            if (p + 1 == save_at) {
                memcpy(saved, state, STATE * sizeof(double));
            }
        }
    }
    free(state);
    return want;
}

static void check_against_oracle(const scan_result_t *result, const double *want)
{
    int64_t values = result->layout->total_rows * H * DV;
    test_near(result->o, want, values, tolerance, 0, "o");
    for (int64_t d = 0; d < result->c->pack.count; d++) {
        test_near(result->final_of[d], want + values + d * STATE, STATE, tolerance, 0,
                  "final state");
    }
}

static const int rank_counts[] = {1, 2, 3, 4, 7};
static const ra_layout_kind_t kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

static const pack_t packs[] = {
    {1, {1}, {{0, 237}}},
    {1, {2}, {{0, 1}}},
    {2, {3, 4}, {{48, 129}, {0, 77}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 226}, {16, 16}, {32, 131}, {0, 3}}},
};

static void compare_everywhere(scan_case_t c)
{
    for (size_t p = 0; p < RA_ARRAY_LEN(packs); p++) {
        c.pack = packs[p];
        double *want = oracle(&c);
        for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
                c.ranks = rank_counts[n];
                c.kind = kinds[k];
                if (c.reproducible && c.kind == RA_LAYOUT_ZIGZAG) {
                    continue;
                }
                scan_result_t result = run_case(&c);
                check_against_oracle(&result, want);
                free_result(&result);
            }
        }
        free(want);
    }
}

static void constant_decay_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){0});
    compare_everywhere((scan_case_t){.at_tile = true, .transport = "local-copy"});
    compare_everywhere((scan_case_t){.at_tile = true, .transport = "local-order"});
}

static void decay_per_token_is_exact_on_any_ring(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.per_token = true});
}

static void output_may_replace_values(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.over_v = true, .at_tile = true});
    compare_everywhere((scan_case_t){.over_v = true, .reproducible = true});
}

static void a_plan_serves_many_layers(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.layers = 3});
    compare_everywhere((scan_case_t){.layers = 3, .reproducible = true});
}

static void reproducible_scans_are_exact_too(void **state)
{
    (void)state;
    compare_everywhere((scan_case_t){.reproducible = true, .per_token = true});
    compare_everywhere((scan_case_t){.reproducible = true, .at_tile = true});
}

/* Rows of document d of @a got against the same positions of @a want, by document name. */
static void check_same_bits(const scan_result_t *got, int64_t d, const scan_result_t *want)
{
    const pack_t *ours = &got->c->pack, *theirs = &want->c->pack;
    int64_t other = 0;
    while (theirs->name[other] != ours->name[d]) {
        other++;
    }
    int64_t first = ours->documents[d].first, other_first = theirs->documents[other].first;
    for (int64_t i = 0; i < ours->documents[d].count; i++) {
        int64_t row = got->layout->document_row[d] + i;
        int64_t other_row = want->layout->document_row[other] + i + first - other_first;
        if (memcmp(got->o + row * H * DV, want->o + other_row * H * DV, H * DV * 4) != 0) {
            fail_msg("document %lld, position %lld differs (%d ranks)", (long long)d,
                     (long long)(first + i), got->c->ranks);
        }
    }
    if (memcmp(got->final_of[d], want->final_of[other], STATE * 4) != 0) {
        fail_msg("final state of document %lld differs (%d ranks)", (long long)d, got->c->ranks);
    }
}

static void reproducible_bits_do_not_depend_on_ranks_or_neighbours(void **state)
{
    (void)state;
    for (int per_token = 0; per_token < 2; per_token++) {
        scan_case_t whole = {.ranks = 1, .reproducible = true, .per_token = per_token};
        whole.pack = (pack_t){3, {1, 6, 8}, {{0, 237}, {0, 226}, {32, 131}}};
        scan_result_t want = run_case(&whole);
        const pack_t others[] = {
            whole.pack, {1, {6}, {{0, 226}}}, {3, {8, 2, 1}, {{32, 131}, {0, 5}, {0, 237}}}};
        for (size_t p = 0; p < RA_ARRAY_LEN(others); p++) {
            for (int ranks = 1; ranks <= 8; ranks++) {
                scan_case_t c = whole;
                c.pack = others[p];
                c.ranks = ranks;
                const char *transports[] = {"local-copy", "local", "local-order"};
                c.transport = transports[ranks % 3];
                scan_result_t got = run_case(&c);
                for (int64_t d = 0; d < c.pack.count; d++) {
                    if (c.pack.name[d] != 2) {
                        check_same_bits(&got, d, &want);
                    }
                }
                free_result(&got);
            }
        }
        free_result(&want);
    }
}

static void a_continued_document_has_the_bits_of_one_go(void **state)
{
    (void)state;
    scan_case_t whole = {.ranks = 1, .reproducible = true};
    whole.pack = (pack_t){2, {1, 6}, {{0, 237}, {0, 226}}};
    scan_result_t want = run_case(&whole);
    const int64_t cuts[][2] = {{1, 15}, {16, 17}, {112, 208}, {236, 225}};
    for (size_t i = 0; i < RA_ARRAY_LEN(cuts); i++) {
        for (int ranks = 1; ranks <= 7; ranks += 2) {
            scan_case_t head = {.ranks = ranks, .reproducible = true, .at_tile = true};
            head.pack = (pack_t){2, {1, 6}, {{0, cuts[i][0]}, {0, cuts[i][1]}}};
            scan_result_t before = run_case(&head);
            scan_case_t tail = {
                .ranks = 8 - ranks, .reproducible = true, .from_result = true, .before = &before};
            tail.pack = whole.pack;
            for (int64_t d = 0; d < 2; d++) {
                int64_t cached = cuts[i][d] / TILE * TILE;
                tail.pack.documents[d].first = cached;
                tail.pack.documents[d].count -= cached;
            }
            scan_result_t got = run_case(&tail);
            for (int64_t d = 0; d < 2; d++) {
                check_same_bits(&got, d, &want);
            }
            free_result(&got);
            free_result(&before);
        }
    }
    free_result(&want);
}

static void bits_never_depend_on_neighbours(void **state)
{
    (void)state;
    for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
        for (size_t n = 0; n < RA_ARRAY_LEN(rank_counts); n++) {
            scan_case_t many = {.ranks = rank_counts[n], .kind = kinds[k], .pack = packs[3]};
            scan_result_t want = run_case(&many);
            for (int64_t d = 0; d < many.pack.count; d++) {
                scan_case_t alone = many;
                alone.pack = (pack_t){
                    .count = 1, .name = {many.pack.name[d]}, .documents = {many.pack.documents[d]}};
                scan_result_t got = run_case(&alone);
                check_same_bits(&got, 0, &want);
                free_result(&got);
            }
            free_result(&want);
        }
    }
}

static void ranks_that_share_a_pool_get_the_same_bits(void **state)
{
    (void)state;
    ra_pool_t *pool = NULL;
    assert_int_equal(ra_pool_create(3, &pool), RA_OK);
    for (int reproducible = 0; reproducible < 2; reproducible++) {
        scan_case_t c = {.pack = packs[3], .ranks = 4, .reproducible = reproducible, .layers = 2};
        scan_result_t want = run_case(&c);
        scan_case_t shared = c;
        shared.pool = pool;
        scan_result_t got = run_case(&shared);
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
    scan_case_t c = {.pack = {4, {1, 2, 3, 4}, {{0, 60}, {0, 50}, {0, 40}, {0, 64}}}, .ranks = 4};
    scan_result_t result = run_case(&c);
    assert_int_equal(result.received_bytes, 0);
    free_result(&result);
}

static ra_status_t fail_half_way(ra_comm_t *comm, void *arg)
{
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 1) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 1 does not take part");
    }
    return rank_body(comm, arg);
}

static void a_missing_rank_ends_the_scan_on_all_others(void **state)
{
    (void)state;
    for (int reproducible = 0; reproducible < 2; reproducible++) {
        scan_case_t c = {
            .pack = {1, {1}, {{0, 256}}}, .ranks = 4, .reproducible = reproducible == 1};
        scan_result_t result = make_result(&c);
        assert_int_equal(ra_ranks_run("local", 4, fail_half_way, &result), RA_ERR_INPUT);
        free_result(&result);
    }
}

static ra_status_t make_bad_plans(ra_comm_t *comm, void *arg)
{
    ra_stream_t *stream = arg;
    ra_document_t document = {0, 100};
    ra_layout_t *zigzag = NULL;
    RA_TRY(ra_layout_create(&document, 1, TILE, 2, RA_LAYOUT_ZIGZAG, &zigzag));
    ra_state_scan_params_t good = {.layout = zigzag, .heads = 2, .key_dim = 32, .value_dim = 32};
    ra_state_scan_params_t bad[] = {good, good, good};
    ra_status_t want[] = {RA_ERR_UNSUPPORTED, RA_ERR_INVALID, RA_ERR_UNSUPPORTED};
    bad[0].reproducible = true;
    bad[1].key_dim = 0;
    bad[2].kernel = "abacus";
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        ra_state_scan_t *plan = NULL;
        RANK_CHECK(comm, ra_state_scan_create(comm, stream, &bad[i], &plan) == want[i]);
        RANK_CHECK(comm, plan == NULL);
    }
    ra_layout_destroy(zigzag);
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
        cmocka_unit_test(constant_decay_is_exact_on_any_ring),
        cmocka_unit_test(decay_per_token_is_exact_on_any_ring),
        cmocka_unit_test(output_may_replace_values),
        cmocka_unit_test(a_plan_serves_many_layers),
        cmocka_unit_test(reproducible_scans_are_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks_or_neighbours),
        cmocka_unit_test(a_continued_document_has_the_bits_of_one_go),
        cmocka_unit_test(bits_never_depend_on_neighbours),
        cmocka_unit_test(ranks_that_share_a_pool_get_the_same_bits),
        cmocka_unit_test(whole_documents_exchange_nothing),
        cmocka_unit_test(a_missing_rank_ends_the_scan_on_all_others),
        cmocka_unit_test(plans_that_cannot_work_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
