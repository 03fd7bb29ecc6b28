#include "tests/ring/state_scan_case.h"

#include "tests/ring/rank_tensors.h"
#include <string.h>

enum { H = SCAN_HEADS, STATE_MOST = H * SCAN_DIM_MOST * SCAN_DIM_MOST };
enum { STREAM_Q = 11, STREAM_K, STREAM_V, STREAM_DECAY, STREAM_STATE };

static const float decay[H] = {-0.6f, -0.02f, 0.0f};

static int64_t dim_of(const scan_case_t *c)
{
    return c->dim > 0 ? c->dim : 32;
}

static float scale_of(const scan_case_t *c)
{
    return 1.0f / sqrtf((float)dim_of(c));
}

int64_t scan_case_tile(const scan_case_t *c)
{
    return c->gpu ? 64 : 16;
}

int64_t scan_state_size(const scan_case_t *c)
{
    return H * dim_of(c) * dim_of(c);
}

/* Between rows; GPUs want 16 bytes, on the CPU anything goes. */
static int64_t stride_of(const scan_case_t *c)
{
    return H * dim_of(c) + (c->gpu ? 8 : 3);
}

static float log_decay_of(const scan_case_t *c, int name, int64_t position, int64_t h)
{
    float row[H];
    if (!c->per_token) {
        return decay[h];
    }
    value_row(name, STREAM_DECAY, position, H, row);
    return -0.3f * fabsf(row[h]);
}

/* The state a continued document starts with when it is not that of an earlier result. */
static void made_up_state(const scan_case_t *c, int64_t document, float *state)
{
    value_row(c->pack.name[document], STREAM_STATE, 0, scan_state_size(c), state);
}

/* ---- running ------------------------------------------------------------------------------- */

static ra_status_t run_layers(ra_comm_t *comm, ra_stream_t *stream, scan_result_t *result,
                              const ra_state_scan_io_t *io)
{
    const scan_case_t *c = result->c;
    ra_state_scan_params_t params = {.layout = result->layout,
                                     .heads = H,
                                     .key_dim = (int32_t)dim_of(c),
                                     .value_dim = (int32_t)dim_of(c),
                                     .scale = scale_of(c),
                                     .decay_per_token = c->per_token,
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
    if (status == RA_OK && ra_comm_rank(comm) == 0) {
        result->received_bytes = ra_state_scan_stats(plan).received_bytes;
    }
    ra_state_scan_destroy(plan);
    return status;
}

/* Tensors of a rank; states are [documents]. */
enum { Q, K, V, O, DECAY, INITIAL, FINAL, TENSORS };

static void fill_decays(const scan_result_t *result, int rank, float *g)
{
    const scan_case_t *c = result->c;
    const ra_run_t *runs = ra_layout_runs(result->layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(result->layout, rank); i++) {
        for (int64_t t = 0; t < runs[i].count * H; t++) {
            g[runs[i].local * H + t] =
                log_decay_of(c, c->pack.name[runs[i].document], runs[i].start + t / H, t % H);
        }
    }
}

static void make_tensors(const scan_result_t *result, int rank, rank_tensor_t t[TENSORS])
{
    const scan_case_t *c = result->c;
    int64_t rows = result->layout->rows[rank], stride = stride_of(c), width = H * dim_of(c);
    int64_t size = scan_state_size(c), states = c->pack.count * size;
    for (int i = 0; i < TENSORS; i++) {
        t[i].count = i <= O ? rows * stride : i == DECAY ? rows * H : states;
        t[i].dtype = i <= O ? c->dtype : RA_F32;
        t[i].host = float_array(t[i].count);
    }
    for (int i = Q; i <= V; i++) {
        value_rows(&c->pack, result->layout, rank, STREAM_Q + i, width, stride, t[i].host);
    }
    fill_decays(result, rank, t[DECAY].host);
    for (int64_t d = 0; d < c->pack.count; d++) {
        if (c->before != NULL) {
            memcpy(t[INITIAL].host + d * size, c->before->final_of[d], (size_t)size * 4);
        } else {
            made_up_state(c, d, t[INITIAL].host + d * size);
        }
    }
}

static void keep_rows(scan_result_t *result, int rank, const float *o)
{
    int64_t rows = result->layout->rows[rank], width = H * dim_of(result->c);
    float *packed = float_array(rows * width);
    for (int64_t r = 0; r < rows; r++) {
        memcpy(packed + r * width, o + r * stride_of(result->c), (size_t)width * sizeof(float));
    }
    ra_layout_unpack(result->layout, rank, width * 4, packed, result->o);
    free(packed);
}

static ra_status_t run_tensors(ra_comm_t *comm, ra_stream_t *stream, scan_result_t *result,
                               const rank_tensor_t t[TENSORS])
{
    const scan_case_t *c = result->c;
    int64_t stride = stride_of(c), size = scan_state_size(c);
    int rank = ra_comm_rank(comm), o = c->over_v ? V : O;
    const float *initial[DOCUMENTS_MOST] = {0};
    float *final[DOCUMENTS_MOST] = {0};
    for (int64_t d = 0; d < c->pack.count; d++) {
        bool continued = c->before != NULL || c->pack.documents[d].first > 0;
        const ra_run_t *last = ra_layout_last_run(result->layout, d);
        initial[d] = continued ? (float *)t[INITIAL].device + d * size : NULL;
        if (last != NULL && last->rank == rank) {
            final[d] = (float *)t[FINAL].device + d * size;
        }
    }
    ra_state_scan_io_t io = {.q = t[Q].device,
                             .k = t[K].device,
                             .v = t[V].device,
                             .q_stride = stride,
                             .k_stride = stride,
                             .v_stride = stride,
                             .log_decay = c->per_token ? t[DECAY].device : decay,
                             .log_decay_stride = H,
                             .o = t[o].device,
                             .o_stride = stride,
                             .initial = initial,
                             .final_state = final};
    RA_TRY(run_layers(comm, stream, result, &io));
    for (int64_t d = 0; d < c->pack.count; d++) {
        if (final[d] != NULL) {
            RA_TRY(values_from_device(stream, RA_F32, final[d], size, result->final_of[d]));
        }
    }
    RA_TRY(rank_tensor_to_host(stream, &t[o]));
    keep_rows(result, rank, t[o].host);
    return RA_OK;
}

ra_status_t scan_rank_run(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    rank_tensor_t t[TENSORS] = {{0}};
    make_tensors(arg, ra_comm_rank(comm), t);
    ra_status_t status = rank_tensors_to_device(stream, t, TENSORS);
    if (status == RA_OK) {
        status = run_tensors(comm, stream, arg, t);
    }
    rank_tensors_free(stream, t, TENSORS);
    return status;
}

scan_result_t scan_result_make(const scan_case_t *c)
{
    scan_result_t result = {.c = c};
    assert_int_equal(ra_layout_create(c->pack.documents, c->pack.count, scan_case_tile(c), c->ranks,
                                      c->kind, &result.layout),
                     RA_OK);
    result.o = float_array(result.layout->total_rows * H * dim_of(c));
    for (int64_t d = 0; d < DOCUMENTS_MOST; d++) {
        result.final_of[d] = float_array(scan_state_size(c));
    }
    return result;
}

void scan_result_free(scan_result_t *result)
{
    ra_layout_destroy(result->layout);
    free(result->o);
    for (int64_t d = 0; d < DOCUMENTS_MOST; d++) {
        free(result->final_of[d]);
    }
}

ra_status_t scan_ranks_run(scan_result_t *result, device_rank_func_t body)
{
    const scan_case_t *c = result->c;
    const char *transport = c->transport != NULL ? c->transport : c->gpu ? "peer" : "local";
    return c->gpu ? gpu_ranks_run(transport, c->ranks, body, result)
                  : cpu_ranks_run(transport, c->ranks, c->pool, body, result);
}

scan_result_t scan_case_run(const scan_case_t *c)
{
    scan_result_t result = scan_result_make(c);
    assert_int_equal(scan_ranks_run(&result, scan_rank_run), RA_OK);
    return result;
}

/* ---- checking ------------------------------------------------------------------------------ */

/* One token: S <- e^g S + k v^T, o = scale S^T q. */
static void oracle_token(const scan_case_t *c, int name, int64_t position, double *state, double *o)
{
    float row[3][H * SCAN_DIM_MOST];
    int64_t dim = dim_of(c);
    for (int part = 0; part < 3; part++) {
        value_row(name, STREAM_Q + part, position, H * dim, row[part]);
        round_values(c->dtype, row[part], H * dim);
    }
    for (int64_t h = 0; h < H; h++) {
        double keep = exp((double)log_decay_of(c, name, position, h));
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

double *scan_oracle(const scan_case_t *c)
{
    int64_t rows = pack_rows(&c->pack), row = 0, width = H * dim_of(c), size = scan_state_size(c);
    double *want = malloc((size_t)(rows * width + c->pack.count * size) * sizeof(double));
    double *state = malloc((size_t)size * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t end = document->first + document->count, tile = scan_case_tile(c);
        int64_t save_at = c->at_tile ? end / tile * tile : end;
        double *saved = want + rows * width + d * size;
        float start[STATE_MOST] = {0};
        if (document->first > 0) {
            made_up_state(c, d, start);
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

/* CPU: outputs and states grow to about 30 (the head without decay), of which 3e-4 is 1e-5. GPU:
 * relative L2 distance of fp32 sums, or of bf16 operands with rounded decays, scores and outputs
 * (3e-3 by linear_cuda.h). */
static void check_values(const scan_case_t *c, const float *got, const double *want, int64_t count,
                         const char *what)
{
    double error = 0, norm = 0, bound = c->dtype == RA_BF16 ? 5e-3 : 5e-6;
    if (!c->gpu) {
        test_near(got, want, count, 3e-4, 0, what);
        return;
    }
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

void scan_check_near(const scan_result_t *result, const double *want)
{
    const scan_case_t *c = result->c;
    int64_t width = H * dim_of(c), size = scan_state_size(c);
    const double *states = want + result->layout->total_rows * width;
    for (int64_t d = 0; d < c->pack.count; d++) {
        int64_t begin = result->layout->document_row[d] * width;
        int64_t count = c->pack.documents[d].count * width;
        check_values(c, result->o + begin, want + begin, count, "o");
        check_values(c, result->final_of[d], states + d * size, size, "final state");
    }
}

void scan_check_everywhere(scan_case_t c, const pack_t *packs, size_t count)
{
    for (size_t p = 0; p < count; p++) {
        c.pack = packs[p];
        double *want = scan_oracle(&c);
        for (int n = 0; n < (c.gpu ? GPU_RANK_COUNTS : RANK_COUNTS); n++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
                c.ranks = rank_counts[n];
                c.kind = layout_kinds[k];
                if (c.reproducible && c.kind == RA_LAYOUT_ZIGZAG) {
                    continue;
                }
                scan_result_t result = scan_case_run(&c);
                scan_check_near(&result, want);
                scan_result_free(&result);
            }
        }
        free(want);
    }
}

void scan_check_same_bits(const scan_result_t *got, int64_t d, const scan_result_t *want)
{
    const pack_t *ours = &got->c->pack, *theirs = &want->c->pack;
    int64_t other = pack_find(theirs, ours->name[d]), width = H * dim_of(got->c);
    int64_t first = ours->documents[d].first, other_first = theirs->documents[other].first;
    for (int64_t i = 0; i < ours->documents[d].count; i++) {
        int64_t row = got->layout->document_row[d] + i;
        int64_t other_row = want->layout->document_row[other] + i + first - other_first;
        if (memcmp(got->o + row * width, want->o + other_row * width, (size_t)width * 4) != 0) {
            fail_msg("document %lld, position %lld differs (%d ranks)", (long long)d,
                     (long long)(first + i), got->c->ranks);
        }
    }
    if (memcmp(got->final_of[d], want->final_of[other], (size_t)scan_state_size(got->c) * 4) != 0) {
        fail_msg("final state of document %lld differs (%d ranks)", (long long)d, got->c->ranks);
    }
}
