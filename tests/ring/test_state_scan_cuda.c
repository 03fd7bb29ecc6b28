/*
 * The state scan on GPUs against the recurrence in double over whole documents: 1 to 4 ranks, which
 * share a GPU where there are fewer, both kernels and layouts, continued documents, final states;
 * and the promises about bits. Skips without a GPU.
 */
#include "ring/state_scan.h"
#include "tests/comm/gpu_ranks.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { H = 3, DIM_MOST = 64, STATE_MOST = H * DIM_MOST * DIM_MOST, TILE = 64, PAD = 8 };
enum { STREAM_Q = 11, STREAM_K, STREAM_V, STREAM_STATE };

static const float decay[H] = {-0.6f, -0.02f, 0.0f};

typedef struct scan_case {
    pack_t pack;
    int ranks, dim;
    ra_layout_kind_t kind;
    ra_dtype_t dtype;
    bool reproducible, at_tile, over_v;
    const char *transport; /* NULL: "peer" */
    int layers;            /* runs of the plan, all the same; 0 means 1 */
} scan_case_t;

typedef struct scan_result {
    const scan_case_t *c;
    ra_layout_t *layout;
    float *o;                        /* [rows in document order, H, dim] */
    float *final_of[DOCUMENTS_MOST]; /* [H, dim, dim] */
} scan_result_t;

static int64_t state_size(const scan_case_t *c)
{
    return (int64_t)H * c->dim * c->dim;
}

static float scale_of(const scan_case_t *c)
{
    return 1.0f / sqrtf((float)c->dim);
}

static void narrow_row(ra_dtype_t dtype, float *row, int64_t count)
{
    for (int64_t i = 0; i < count && dtype == RA_BF16; i++) {
        row[i] = ra_bf16_to_f32(ra_bf16_from_f32(row[i]));
    }
}

/* q, k, v of a rank in one allocation, one after another. */
typedef struct rank_memory {
    char *rows, *o;
    float *states; /* [documents][2][state]: initial, final */
} rank_memory_t;

static ra_status_t put_rows(ra_stream_t *stream, const scan_result_t *result, int rank, int part,
                            char *device)
{
    const scan_case_t *c = result->c;
    int64_t rows = result->layout->rows[rank], width = (int64_t)H * c->dim, stride = width + PAD;
    int64_t count = rows * stride;
    float *values = float_array(count);
    uint16_t *narrow = malloc((size_t)count * 2 + 2);
    value_rows(&c->pack, result->layout, rank, STREAM_Q + part, width, stride, values);
    for (int64_t i = 0; i < count; i++) {
        narrow[i] = ra_bf16_from_f32(values[i]);
    }
    const void *from = c->dtype == RA_BF16 ? (const void *)narrow : values;
    int64_t bytes = count * ra_dtype_bytes(c->dtype);
    ra_status_t status = ra_stream_copy(stream, device + part * bytes, from, bytes);
    free(values);
    free(narrow);
    return status;
}

static ra_status_t get_rows(ra_stream_t *stream, scan_result_t *result, int rank, const char *from)
{
    const scan_case_t *c = result->c;
    int64_t rows = result->layout->rows[rank], width = (int64_t)H * c->dim, stride = width + PAD;
    int64_t bytes = rows * stride * ra_dtype_bytes(c->dtype);
    char *raw = malloc((size_t)bytes + 1);
    float *packed = float_array(rows * width);
    ra_status_t status = ra_stream_copy(stream, raw, from, bytes);
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    for (int64_t i = 0; i < rows * width && status == RA_OK; i++) {
        int64_t at = i / width * stride + i % width;
        if (c->dtype == RA_BF16) {
            uint16_t bits;
            memcpy(&bits, raw + 2 * at, 2);
            packed[i] = ra_bf16_to_f32(bits);
        } else {
            memcpy(&packed[i], raw + 4 * at, 4);
        }
    }
    if (status == RA_OK) {
        ra_layout_unpack(result->layout, rank, width * 4, packed, result->o);
    }
    free(raw);
    free(packed);
    return status;
}

static ra_status_t run_plan(ra_comm_t *comm, ra_stream_t *stream, const scan_result_t *result,
                            const ra_state_scan_io_t *io)
{
    const scan_case_t *c = result->c;
    ra_state_scan_params_t params = {.layout = result->layout,
                                     .heads = H,
                                     .key_dim = c->dim,
                                     .value_dim = c->dim,
                                     .scale = scale_of(c),
                                     .reproducible = c->reproducible,
                                     .final_at_tile = c->at_tile,
                                     .dtype = c->dtype};
    ra_state_scan_t *plan = NULL;
    ra_status_t status = ra_state_scan_create(comm, stream, &params, &plan);
    for (int layer = 0; layer < (c->layers > 0 ? c->layers : 1) && status == RA_OK; layer++) {
        status = ra_state_scan_run(plan, io);
    }
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    ra_state_scan_destroy(plan);
    return status;
}

/* Initial states of continued documents, and poison where final ones go. */
static ra_status_t put_states(ra_stream_t *stream, const scan_case_t *c, float *device)
{
    float state[STATE_MOST];
    int64_t size = state_size(c);
    for (int64_t d = 0; d < c->pack.count; d++) {
        value_row(c->pack.name[d], STREAM_STATE, 0, size, state);
        RA_TRY(ra_stream_copy(stream, device + 2 * d * size, state, size * 4));
        test_poison(state, size);
        RA_TRY(ra_stream_copy(stream, device + (2 * d + 1) * size, state, size * 4));
    }
    return RA_OK;
}

static ra_status_t run_on_device(ra_comm_t *comm, ra_stream_t *stream, scan_result_t *result,
                                 rank_memory_t *memory)
{
    const scan_case_t *c = result->c;
    int rank = ra_comm_rank(comm);
    int64_t stride = (int64_t)H * c->dim + PAD, size = state_size(c);
    int64_t bytes = result->layout->rows[rank] * stride * ra_dtype_bytes(c->dtype);
    ra_device_t *device = ra_stream_device(stream);
    const float *initial[DOCUMENTS_MOST] = {0};
    float *final[DOCUMENTS_MOST] = {0};
    RA_TRY(ra_device_alloc(device, 3 * bytes, (void **)&memory->rows));
    RA_TRY(ra_device_alloc(device, bytes, (void **)&memory->o));
    RA_TRY(ra_device_alloc(device, 2 * c->pack.count * size * 4, (void **)&memory->states));
    for (int part = 0; part < 3; part++) {
        RA_TRY(put_rows(stream, result, rank, part, memory->rows));
    }
    RA_TRY(put_states(stream, c, memory->states));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_run_t *last = ra_layout_last_run(result->layout, d);
        initial[d] = c->pack.documents[d].first > 0 ? memory->states + 2 * d * size : NULL;
        final[d] = last != NULL && last->rank == rank ? memory->states + (2 * d + 1) * size : NULL;
    }
    char *v = memory->rows + 2 * bytes, *o = c->over_v ? v : memory->o;
    ra_state_scan_io_t io = {.q = memory->rows,
                             .k = memory->rows + bytes,
                             .v = v,
                             .q_stride = stride,
                             .k_stride = stride,
                             .v_stride = stride,
                             .log_decay = decay,
                             .o = o,
                             .o_stride = stride,
                             .initial = initial,
                             .final_state = final};
    RA_TRY(run_plan(comm, stream, result, &io));
    for (int64_t d = 0; d < c->pack.count; d++) {
        if (final[d] != NULL) {
            RA_TRY(ra_stream_copy(stream, result->final_of[d], final[d], size * 4));
        }
    }
    return get_rows(stream, result, rank, o);
}

static ra_status_t run_rank(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    rank_memory_t memory = {0};
    ra_device_t *device = ra_stream_device(stream);
    ra_status_t status = run_on_device(comm, stream, arg, &memory);
    ra_device_free(device, memory.rows);
    ra_device_free(device, memory.o);
    ra_device_free(device, memory.states);
    return status;
}

static scan_result_t run_case(const scan_case_t *c)
{
    scan_result_t result = {.c = c};
    assert_int_equal(
        ra_layout_create(c->pack.documents, c->pack.count, TILE, c->ranks, c->kind, &result.layout),
        RA_OK);
    result.o = float_array(result.layout->total_rows * H * c->dim);
    for (int64_t d = 0; d < DOCUMENTS_MOST; d++) {
        result.final_of[d] = float_array(state_size(c));
    }
    const char *transport = c->transport != NULL ? c->transport : "peer";
    assert_int_equal(gpu_ranks_run(transport, c->ranks, run_rank, &result), RA_OK);
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
    float row[3][H * DIM_MOST];
    int64_t dim = c->dim;
    for (int part = 0; part < 3; part++) {
        value_row(name, STREAM_Q + part, position, H * dim, row[part]);
        narrow_row(c->dtype, row[part], H * dim);
    }
    for (int64_t h = 0; h < H; h++) {
        double keep = exp((double)decay[h]);
        for (int64_t j = 0; j < dim; j++) {
            o[h * dim + j] = 0;
        }
        for (int64_t i = 0; i < dim; i++) {
            double *s = state + (h * dim + i) * dim;
            for (int64_t j = 0; j < dim; j++) {
                s[j] = keep * s[j] + (double)row[1][h * dim + i] * (double)row[2][h * dim + j];
                o[h * dim + j] += (double)scale_of(c) * s[j] * (double)row[0][h * dim + i];
            }
        }
    }
}

/* [total rows, H * dim], then the final state of each document. */
static double *oracle(const scan_case_t *c)
{
    int64_t rows = 0, row = 0, width = (int64_t)H * c->dim, size = state_size(c);
    for (int64_t d = 0; d < c->pack.count; d++) {
        rows += c->pack.documents[d].count;
    }
    double *want = malloc((size_t)(rows * width + c->pack.count * size) * sizeof(double));
    double *state = malloc((size_t)size * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t end = document->first + document->count;
        int64_t save_at = c->at_tile ? end / TILE * TILE : end;
        double *saved = want + rows * width + d * size;
        float start[STATE_MOST] = {0};
        if (document->first > 0) {
            value_row(c->pack.name[d], STREAM_STATE, 0, size, start);
        }
        for (int64_t i = 0; i < size; i++) {
            state[i] = saved[i] = (double)start[i];
        }
        for (int64_t p = document->first; p < end; p++, row++) {
            oracle_token(c, c->pack.name[d], p, state, want + row * width);
            if (p + 1 == save_at) {
                memcpy(saved, state, (size_t)size * sizeof(double));
            }
        }
    }
    free(state);
    return want;
}

/* Relative L2 distance: fp32 sums, or bf16 operands with rounded decays, scores and outputs (3e-3
 * by linear_cuda.h). */
static void check_close(const scan_case_t *c, const float *got, const double *want, int64_t count,
                        const char *what)
{
    double error = 0, norm = 0, bound = c->dtype == RA_BF16 ? 5e-3 : 5e-6;
    for (int64_t i = 0; i < count; i++) {
        double e = (double)got[i] - want[i];
        error += e * e;
        norm += want[i] * want[i];
    }
    if (!(sqrt(error) <= bound * sqrt(norm))) {
        fail_msg("%s: relative error %.3g (%d ranks, %s)", what, sqrt(error / norm), c->ranks,
                 ra_layout_kind_name(c->kind));
    }
}

static void check_against_oracle(const scan_result_t *result, const double *want)
{
    const scan_case_t *c = result->c;
    int64_t width = (int64_t)H * c->dim, size = state_size(c);
    int64_t values = result->layout->total_rows * width;
    for (int64_t d = 0; d < c->pack.count; d++) {
        int64_t begin = result->layout->document_row[d] * width;
        int64_t count = c->pack.documents[d].count * width;
        check_close(c, result->o + begin, want + begin, count, "o");
        check_close(c, result->final_of[d], want + values + d * size, size, "final state");
    }
}

static const pack_t packs[] = {
    {1, {1}, {{0, 1013}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 526}, {64, 64}, {128, 331}, {0, 3}}},
};

static const ra_layout_kind_t kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

static void compare_everywhere(scan_case_t c)
{
    for (size_t p = 0; p < RA_ARRAY_LEN(packs); p++) {
        c.pack = packs[p];
        double *want = oracle(&c);
        for (c.ranks = 1; c.ranks <= 4; c.ranks++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
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

static void skip_without_gpu(void)
{
    if (gpu_count() == 0) {
        skip();
    }
}

static void bf16_scans_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .layers = 3});
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .at_tile = true});
}

static void fp32_scans_are_exact_on_any_ring(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 32, .layers = 2});
    compare_everywhere((scan_case_t){.dim = 32, .at_tile = true, .over_v = true});
}

static void reproducible_scans_are_exact_too(void **state)
{
    (void)state;
    skip_without_gpu();
    compare_everywhere((scan_case_t){.dim = 64, .dtype = RA_BF16, .reproducible = true});
    compare_everywhere((scan_case_t){
        .dim = 64, .dtype = RA_BF16, .reproducible = true, .at_tile = true, .over_v = true});
    compare_everywhere((scan_case_t){.dim = 32, .reproducible = true, .layers = 2});
}

static void reproducible_bits_do_not_depend_on_ranks(void **state)
{
    (void)state;
    skip_without_gpu();
    for (int i = 0; i < 2; i++) {
        scan_case_t c = {.dim = i == 0 ? 64 : 32,
                         .dtype = i == 0 ? RA_BF16 : RA_F32,
                         .pack = packs[1],
                         .reproducible = true,
                         .ranks = 1};
        scan_case_t one = c;
        scan_result_t want = run_case(&one);
        for (c.ranks = 2; c.ranks <= 4; c.ranks++) {
            scan_result_t got = run_case(&c);
            size_t bytes = (size_t)(want.layout->total_rows * H * c.dim) * sizeof(float);
            assert_memory_equal(got.o, want.o, bytes);
            for (int64_t d = 0; d < c.pack.count; d++) {
                assert_memory_equal(got.final_of[d], want.final_of[d],
                                    (size_t)state_size(&c) * sizeof(float));
            }
            free_result(&got);
        }
        free_result(&want);
    }
}

static void scans_over_nccl_are_exact(void **state)
{
    (void)state;
    if (gpu_count() < 2) {
        skip();
    }
    for (int i = 0; i < 3; i++) {
        scan_case_t c = {.pack = packs[1],
                         .ranks = 2,
                         .dim = 64,
                         .dtype = RA_BF16,
                         .kind = kinds[i % 2],
                         .reproducible = i == 2,
                         .transport = "nccl",
                         .layers = 2};
        double *want = oracle(&c);
        scan_result_t result = run_case(&c);
        check_against_oracle(&result, want);
        free_result(&result);
        free(want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_scans_are_exact_on_any_ring),
        cmocka_unit_test(fp32_scans_are_exact_on_any_ring),
        cmocka_unit_test(reproducible_scans_are_exact_too),
        cmocka_unit_test(reproducible_bits_do_not_depend_on_ranks),
        cmocka_unit_test(scans_over_nccl_are_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
