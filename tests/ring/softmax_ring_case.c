#include "tests/ring/softmax_ring_case.h"

#include "tests/ring/rank_tensors.h"
#include <string.h>

enum { H = RING_HEADS, G = RING_KV_HEADS, STREAM_Q = 1, STREAM_K, STREAM_V };

static int64_t dim_of(const ring_case_t *c)
{
    return c->dim > 0 ? c->dim : 32;
}

static float scale_of(const ring_case_t *c)
{
    return 1.0f / sqrtf((float)dim_of(c));
}

int64_t ring_case_tile(const ring_case_t *c)
{
    return c->gpu ? 64 : 16;
}

/* Between rows of q and o; GPUs want 16 bytes, on the CPU anything goes. */
static int64_t stride_of(const ring_case_t *c)
{
    return H * dim_of(c) + (c->gpu ? 8 : 5);
}

/* ---- running ------------------------------------------------------------------------------- */

static ra_status_t run_layers(ra_comm_t *comm, ra_stream_t *stream, ring_result_t *result,
                              const ra_softmax_ring_io_t *io)
{
    const ring_case_t *c = result->c;
    const ra_layout_t *prefix = result->prefix->total_rows > 0 ? result->prefix : NULL;
    ra_softmax_ring_params_t params = {.layout = result->layout,
                                       .prefix = prefix,
                                       .heads = H,
                                       .kv_heads = G,
                                       .head_dim = (int32_t)dim_of(c),
                                       .scale = scale_of(c),
                                       .window = c->window,
                                       .causal = !c->full,
                                       .reproducible = c->reproducible,
                                       .dtype = c->dtype,
                                       .walk = c->walk,
                                       .part_keys = c->part_keys};
    ra_softmax_ring_t *plan = NULL;
    ra_status_t status = ra_softmax_ring_create(comm, stream, &params, &plan);
    for (int layer = 0; layer < (c->layers > 0 ? c->layers : 1) && status == RA_OK; layer++) {
        status = ra_softmax_ring_run(plan, io);
    }
    if (status == RA_OK) {
        status = ra_stream_sync(stream);
    }
    if (status == RA_OK && ra_comm_rank(comm) == 0) {
        result->received_bytes = ra_softmax_ring_stats(plan).received_bytes;
    }
    ra_softmax_ring_destroy(plan);
    return status;
}

/* Tensors of a rank. */
enum { Q, KV, PREFIX_KV, O, LSE, TENSORS };

static rank_tensor_t key_values(const ring_case_t *c, const ra_layout_t *layout, int rank)
{
    int64_t rows = layout->rows[rank], width = G * dim_of(c);
    float *kv = float_array(2 * rows * width);
    value_rows(&c->pack, layout, rank, STREAM_K, width, width, kv);
    value_rows(&c->pack, layout, rank, STREAM_V, width, width, kv + rows * width);
    return (rank_tensor_t){.host = kv, .count = 2 * rows * width, .dtype = c->dtype};
}

static rank_tensor_t poison(int64_t count, ra_dtype_t dtype)
{
    return (rank_tensor_t){.host = float_array(count), .count = count, .dtype = dtype};
}

static void make_tensors(const ring_result_t *result, int rank, rank_tensor_t t[TENSORS])
{
    const ring_case_t *c = result->c;
    int64_t rows = result->layout->rows[rank], stride = stride_of(c);
    t[Q] = poison(rows * stride, c->dtype);
    value_rows(&c->pack, result->layout, rank, STREAM_Q, H * dim_of(c), stride, t[Q].host);
    t[KV] = key_values(c, result->layout, rank);
    t[PREFIX_KV] = key_values(c, result->prefix, rank);
    t[O] = poison(rows * stride, c->dtype);
    t[LSE] = poison(rows * H, RA_F32);
}

static void keep_rows(ring_result_t *result, int rank, const float *o, const float *lse)
{
    int64_t rows = result->layout->rows[rank], width = H * dim_of(result->c);
    int64_t stride = stride_of(result->c);
    float *o_rows = float_array(rows * width), *lse_rows = float_array(rows * H);
    for (int64_t r = 0; r < rows; r++) {
        memcpy(o_rows + r * width, o + r * stride, (size_t)width * sizeof(float));
        for (int h = 0; h < H; h++) {
            lse_rows[r * H + h] = lse[h * rows + r];
        }
    }
    ra_layout_unpack(result->layout, rank, width * 4, o_rows, result->o);
    ra_layout_unpack(result->layout, rank, H * 4, lse_rows, result->lse);
    free(o_rows);
    free(lse_rows);
}

ra_status_t ring_rank_run(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    ring_result_t *result = arg;
    rank_tensor_t t[TENSORS];
    make_tensors(result, ra_comm_rank(comm), t);
    ra_status_t status = rank_tensors_to_device(stream, t, TENSORS);
    ra_softmax_ring_io_t io = {.q = t[Q].device,
                               .q_stride = stride_of(result->c),
                               .kv = t[KV].device,
                               .prefix_kv = t[PREFIX_KV].device,
                               .o = t[O].device,
                               .o_stride = stride_of(result->c),
                               .lse = t[LSE].device};
    if (status == RA_OK) {
        status = run_layers(comm, stream, result, &io);
    }
    for (int i = O; i <= LSE && status == RA_OK; i++) {
        status = rank_tensor_to_host(stream, &t[i]);
    }
    if (status == RA_OK) {
        keep_rows(result, ra_comm_rank(comm), t[O].host, t[LSE].host);
    }
    rank_tensors_free(stream, t, TENSORS);
    return status;
}

ra_status_t ring_rank_run_but_2(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    const ring_result_t *result = arg;
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 2) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 2 does not take part");
    }
    ra_status_t status = ring_rank_run(comm, stream, arg);
    /* With a window, who needs nothing of rank 2 may be done before it fails. */
    bool apart = result->c->window > 0 && status == RA_OK;
    RANK_CHECK(comm, status == RA_ERR_PEER || apart);
    return status;
}

ring_result_t ring_result_make(const ring_case_t *c)
{
    ring_result_t result = {.c = c};
    assert_int_equal(ra_layout_create(c->pack.documents, c->pack.count, ring_case_tile(c), c->ranks,
                                      c->kind, &result.layout),
                     RA_OK);
    assert_int_equal(ra_layout_create_prefix(result.layout, &result.prefix), RA_OK);
    result.o = float_array(result.layout->total_rows * H * dim_of(c));
    result.lse = float_array(result.layout->total_rows * H);
    return result;
}

void ring_result_free(ring_result_t *result)
{
    ra_layout_destroy(result->layout);
    ra_layout_destroy(result->prefix);
    free(result->o);
    free(result->lse);
}

ra_status_t ring_ranks_run(ring_result_t *result, device_rank_func_t body)
{
    const ring_case_t *c = result->c;
    const char *transport = c->transport != NULL ? c->transport : c->gpu ? "peer" : "local";
    return c->gpu ? gpu_ranks_run(transport, c->ranks, body, result)
                  : cpu_ranks_run(transport, c->ranks, c->pool, body, result);
}

ring_result_t ring_case_run(const ring_case_t *c)
{
    ring_result_t result = ring_result_make(c);
    assert_int_equal(ring_ranks_run(&result, ring_rank_run), RA_OK);
    return result;
}

/* ---- checking ------------------------------------------------------------------------------ */

/* Attention of one row over keys [lo, hi) of its document, head by head, in double. */
static void oracle_row(const ring_case_t *c, const float *q, const float *k, const float *v,
                       int64_t lo, int64_t hi, double *o, double *lse)
{
    int64_t dim = dim_of(c);
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

double *ring_oracle(const ring_case_t *c)
{
    int64_t row = 0, q_width = H * dim_of(c), kv_width = G * dim_of(c), width = q_width + H;
    double *want = malloc((size_t)(pack_rows(&c->pack) * width + 1) * sizeof(double));
    for (int64_t d = 0; d < c->pack.count; d++) {
        const ra_document_t *document = &c->pack.documents[d];
        int64_t length = document->first + document->count;
        float *k = float_array(length * kv_width), *v = float_array(length * kv_width);
        float q[H * RING_DIM_MOST];
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

/* F32: sums of at most a thousand terms of size 1, 2e-6 of which 1e-5 leaves a factor of five.
 * BF16: weights and outputs rounded to 2^-9 of at most 1. Log-sum-exps see exact products; a GPU's
 * are longer, and of its approximate exponential. */
void ring_check_near(const ring_result_t *result, const double *want)
{
    const ring_case_t *c = result->c;
    int64_t q_width = H * dim_of(c), width = q_width + H;
    double bound = c->dtype == RA_BF16 ? 8e-3 : 1e-5;
    double lse_absolute = c->gpu ? 3e-5 : 1e-5, lse_relative = c->gpu ? 1e-5 : 1e-6;
    for (int64_t r = 0; r < result->layout->total_rows; r++) {
        test_near(result->o + r * q_width, want + r * width, q_width, bound, 0, "o");
        test_near(result->lse + r * H, want + r * width + q_width, H, lse_absolute, lse_relative,
                  "lse");
    }
}

void ring_check_everywhere(ring_case_t c, const pack_t *packs, size_t count)
{
    for (size_t p = 0; p < count; p++) {
        c.pack = packs[p];
        double *want = ring_oracle(&c);
        for (int n = 0; n < (c.gpu ? GPU_RANK_COUNTS : RANK_COUNTS); n++) {
            for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
                c.ranks = rank_counts[n];
                c.kind = layout_kinds[k];
                if (c.reproducible && c.ranks > 1 && c.kind != RA_LAYOUT_CONTIGUOUS) {
                    continue;
                }
                ring_result_t result = ring_case_run(&c);
                ring_check_near(&result, want);
                ring_result_free(&result);
            }
        }
        free(want);
    }
}

void ring_check_same_bits(const ring_result_t *got, int64_t d, const ring_result_t *want)
{
    const pack_t *ours = &got->c->pack, *theirs = &want->c->pack;
    int64_t other = pack_find(theirs, ours->name[d]), width = H * dim_of(got->c);
    int64_t first = ours->documents[d].first, other_first = theirs->documents[other].first;
    int64_t from = first > other_first ? first : other_first;
    int64_t count = first + ours->documents[d].count - from;
    int64_t row = got->layout->document_row[d] + from - first;
    int64_t other_row = want->layout->document_row[other] + from - other_first;
    for (int64_t i = 0; i < count; i++) {
        if (memcmp(got->o + (row + i) * width, want->o + (other_row + i) * width,
                   (size_t)width * 4) != 0 ||
            memcmp(got->lse + (row + i) * H, want->lse + (other_row + i) * H, H * 4) != 0) {
            fail_msg("document %lld, position %lld differs (%d ranks, window %lld, dim %lld)",
                     (long long)d, (long long)(from + i), got->c->ranks, (long long)got->c->window,
                     (long long)dim_of(got->c));
        }
    }
}
