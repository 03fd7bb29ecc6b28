/* Mirrors model/layer_ops.h on a GPU; the oracles are the header's formulas in double. bf16
 * activations are rounded before both sides see them, and an output may be off by one rounding. */
#include "model/layer_ops.h"
#include "tests/model/gpu_arrays.h"
#include <string.h>

enum { ROWS = 37 };
static const double eps = 1e-6;
/* Half a unit in the last place of 8 bits, and what fp32 adds to it. */
static const double bf16_relative = 0x1p-8 + 4e-6;

/* Rows of an output against the oracle [rows, channels]; what lies between rows is untouched. */
static void compare(const array_t *got, int64_t stride, const double *want, int64_t rows,
                    int64_t channels, const char *what)
{
    double relative = got->dtype == RA_BF16 ? bf16_relative : 4e-6;
    for (int64_t r = 0; r < rows; r++) {
        test_near(got->host + r * stride, want + r * channels, channels, 3e-6, relative, what);
        for (int64_t i = channels; i < stride && r * stride + i < got->n; i++) {
            assert_true(isnan(got->host[r * stride + i]));
        }
    }
}

static double inverse_rms(const float *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)x[i] * x[i];
    }
    return 1.0 / sqrt(sum / (double)n + eps);
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static double *doubles(int64_t n)
{
    double *values = calloc((size_t)n + 1, sizeof(*values));
    assert_non_null(values);
    return values;
}

/* Widths around each kernel's vector sizes, paddings that keep and break the alignment of rows. */
static const int64_t widths[] = {1,    7,    8,    64,   100,  128,  512,
                                 1000, 1024, 1032, 2048, 4096, 8192, 9000};
static const int64_t paddings[] = {0, 3, 8};
static const ra_dtype_t types[] = {RA_F32, RA_BF16};

static void on_every_shape(void (*check)(int64_t n, int64_t padding, ra_dtype_t act))
{
    skip_without_gpu();
    for (size_t w = 0; w < sizeof(widths) / sizeof(*widths); w++) {
        for (size_t p = 0; p < sizeof(paddings) / sizeof(*paddings); p++) {
            for (size_t t = 0; t < sizeof(types) / sizeof(*types); t++) {
                check(widths[w], paddings[p], types[t]);
            }
        }
    }
}

static void check_rms_norm(int64_t n, int64_t padding, ra_dtype_t act)
{
    uint64_t seed = 1;
    int64_t stride = n + padding;
    array_t x = make(ROWS * stride, RA_F32, &seed, -3, 3);
    array_t weight = make(n, RA_F32, &seed, 0.5f, 1.5f);
    array_t y = poisoned(ROWS * stride, act), one = poisoned(n, act);
    double *want = doubles(ROWS * n);

    for (int64_t r = 0; r < ROWS; r++) {
        double f = inverse_rms(x.host + r * stride, n);
        for (int64_t i = 0; i < n; i++) {
            want[r * n + i] = x.host[r * stride + i] * f * weight.host[i];
        }
    }
    ok(ra_op_rms_norm((float *)x.gpu, stride, ROWS, n, (float *)weight.gpu, eps, y.gpu, stride, act,
                      stream));
    download(&y);
    compare(&y, stride, want, ROWS, n, "rms norm");
    if (padding == 0) { /* a row alone has the bits it has among others */
        ok(ra_op_rms_norm((float *)x.gpu + 8 * n, n, 1, n, (float *)weight.gpu, eps, one.gpu, n,
                          act, stream));
        download(&one);
        assert_memory_equal(one.host, y.host + 8 * n, (size_t)n * sizeof(float));
    }
    drop(&x), drop(&weight), drop(&y), drop(&one), free(want);
}

static void rms_norm_matches_the_formula(void **state)
{
    (void)state;
    on_every_shape(check_rms_norm);
}

/* One head: norm where there is a weight, rotation of the first 2 * half channels. */
static void want_head(const float *x, int64_t n, const float *weight, int64_t position,
                      const double *inv_freq, int64_t half, double *want)
{
    double f = weight != NULL ? inverse_rms(x, n) : 1;
    for (int64_t i = 0; i < n; i++) {
        want[i] = x[i] * f * (weight != NULL ? weight[i] : 1);
    }
    for (int64_t i = 0; i < half; i++) {
        double angle = (double)position * inv_freq[i];
        double c = 1.25 * cos(angle), s = 1.25 * sin(angle), a = want[i], b = want[half + i];
        want[i] = a * c - b * s;
        want[half + i] = b * c + a * s;
    }
}

/* q and k normed and rotated and v copied, each to its own place; then all in place. */
static void check_heads(int64_t n, int64_t rotary, int64_t padding, ra_dtype_t act)
{
    enum { PARTS = 3 };
    static const int64_t heads[PARTS] = {5, 2, 2};
    static const int64_t first[PARTS] = {0, 5, 7};
    uint64_t seed = 2;
    int64_t half = rotary / 2, stride = 9 * n + padding;
    array_t x = make(ROWS * stride, act, &seed, -2, 2);
    array_t weight = make(2 * n, RA_F32, &seed, 0.5f, 1.5f);
    array_t table = poisoned(ROWS * rotary, RA_F32), y[PARTS];
    double *want = doubles(ROWS * 9 * n), inv_freq[512];
    int64_t positions[ROWS];
    ra_op_heads_t part[PARTS];

    for (int64_t i = 0; i < half; i++) {
        inv_freq[i] = pow(1e6, -2.0 * (double)i / (double)rotary);
    }
    for (int p = 0; p < PARTS; p++) {
        y[p] = poisoned(ROWS * (heads[p] * n + padding), act);
        part[p] = (ra_op_heads_t){.x = at(&x, first[p] * n),
                                  .y = y[p].gpu,
                                  .x_stride = stride,
                                  .y_stride = heads[p] * n + padding,
                                  .heads = heads[p],
                                  .weight = p < 2 ? (float *)weight.gpu + p * n : NULL,
                                  .rotate = p < 2};
    }
    for (int64_t r = 0; r < ROWS; r++) {
        positions[r] = r * r * 997;
        for (int p = 0; p < PARTS; p++) {
            for (int64_t h = 0; h < heads[p]; h++) {
                want_head(x.host + r * stride + (first[p] + h) * n, n,
                          p < 2 ? weight.host + p * n : NULL, positions[r], inv_freq,
                          p < 2 ? half : 0, want + ROWS * first[p] * n + (r * heads[p] + h) * n);
            }
        }
    }
    void *gpu_positions = on_gpu(positions, (int64_t)sizeof(positions));
    ok(ra_op_rope_table(gpu_positions, ROWS, inv_freq, rotary, 1.25, (float *)table.gpu, stream));
    ok(ra_op_head_norm_rope(part, PARTS, ROWS, n, eps, (float *)table.gpu, rotary, act, stream));
    for (int p = 0; p < PARTS; p++) {
        download(&y[p]);
        compare(&y[p], part[p].y_stride, want + ROWS * first[p] * n, ROWS, heads[p] * n, "heads");
        part[p].y = at(&x, first[p] * n);
        part[p].y_stride = stride;
    }
    ok(ra_op_head_norm_rope(part, PARTS, ROWS, n, eps, (float *)table.gpu, rotary, act, stream));
    download(&x);
    for (int64_t r = 0; r < ROWS; r++) { /* in place gives the same bits */
        for (int p = 0; p < PARTS; p++) {
            assert_memory_equal(x.host + r * stride + first[p] * n,
                                y[p].host + r * (heads[p] * n + padding),
                                (size_t)(heads[p] * n) * sizeof(float));
        }
    }
    ra_device_free(device, gpu_positions);
    for (int p = 0; p < PARTS; p++) {
        drop(&y[p]);
    }
    drop(&x), drop(&weight), drop(&table), free(want);
}

static void heads_are_normed_and_rotated_by_the_formula(void **state)
{
    static const int64_t shapes[][2] = {{8, 0},    {16, 16},  {32, 16},  {64, 64},   {80, 32},
                                        {80, 40},  {96, 96},  {100, 50}, {128, 64},  {128, 128},
                                        {256, 64}, {256, 80}, {33, 10},  {520, 400}, {264, 64}};
    (void)state;
    skip_without_gpu();
    for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
        for (size_t p = 0; p < sizeof(paddings) / sizeof(*paddings); p++) {
            for (size_t t = 0; t < sizeof(types) / sizeof(*types); t++) {
                check_heads(shapes[i][0], shapes[i][1], paddings[p], types[t]);
            }
        }
    }
}

static void check_group_gate(int64_t group, int64_t padding, ra_dtype_t act)
{
    enum { GROUPS = 3 };
    uint64_t seed = 3;
    int64_t n = GROUPS * group, stride = n + padding;
    array_t o = make(ROWS * stride, act, &seed, -2, 2);
    array_t gate = make(ROWS * stride, act, &seed, -30, 30);
    array_t weight = make(n, RA_F32, &seed, 0.5f, 1.5f);
    double *want = doubles(ROWS * n), last = 0;

    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t i = 0; i < n; i++) {
            const float *x = o.host + r * stride + i / group * group;
            double f = i % group == 0 ? inverse_rms(x, group) : last;
            want[r * n + i] =
                x[i % group] * f * weight.host[i] * sigmoid(gate.host[r * stride + i]);
            last = f;
        }
        test_poison(o.host + r * stride + n, padding);
    }
    upload(&o);
    ok(ra_op_group_norm_gate(o.gpu, stride, ROWS, n, GROUPS, (float *)weight.gpu, eps, gate.gpu,
                             stride, act, stream));
    download(&o);
    compare(&o, stride, want, ROWS, n, "group norm and gate");
    drop(&o), drop(&gate), drop(&weight), free(want);
}

static void group_norm_and_gate_match_the_formula(void **state)
{
    (void)state;
    on_every_shape(check_group_gate);
}

static void check_silu(int64_t n, int64_t padding, ra_dtype_t act)
{
    uint64_t seed = 4;
    int64_t stride = n + padding;
    array_t gate = make(ROWS * stride, act, &seed, -40, 40);
    array_t up = make(ROWS * stride, act, &seed, -2, 2);
    double *want = doubles(ROWS * n);

    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t i = 0; i < n; i++) {
            double g = gate.host[r * stride + i];
            want[r * n + i] = g * sigmoid(g) * up.host[r * stride + i];
        }
        test_poison(gate.host + r * stride + n, padding);
    }
    upload(&gate);
    ok(ra_op_silu_mul(gate.gpu, stride, up.gpu, stride, ROWS, n, act, stream));
    download(&gate);
    compare(&gate, stride, want, ROWS, n, "silu");
    drop(&gate), drop(&up), free(want);
}

static void silu_matches_the_formula(void **state)
{
    (void)state;
    on_every_shape(check_silu);
}

static void check_copy(int64_t n, int64_t padding, ra_dtype_t act)
{
    uint64_t seed = 5;
    int64_t stride = n + padding;
    double *want = doubles(ROWS * n);
    for (size_t t = 0; t < sizeof(types) / sizeof(*types); t++) {
        array_t x = make(ROWS * stride, act, &seed, -3, 3);
        array_t y = poisoned(ROWS * stride, types[t]);
        for (int64_t i = 0; i < ROWS * n; i++) {
            want[i] = x.host[i / n * stride + i % n];
        }
        ok(ra_op_copy_rows(x.gpu, stride, act, ROWS, n, y.gpu, stride, types[t], stream));
        download(&y);
        compare(&y, stride, want, ROWS, n, "row copy");
        drop(&x), drop(&y);
    }
    free(want);
}

static void rows_are_copied_between_strides_and_types(void **state)
{
    (void)state;
    on_every_shape(check_copy);
}

static void check_embed(int64_t n, int64_t padding, ra_dtype_t dtype)
{
    enum { VOCABULARY = 11 };
    uint64_t seed = 6;
    int64_t stride = n + padding, extent[2] = {VOCABULARY, n};
    array_t table = make(VOCABULARY * n, dtype, &seed, -3, 3);
    array_t x = poisoned(ROWS * stride, RA_F32);
    double *want = doubles(ROWS * n);
    int32_t tokens[ROWS];

    for (int64_t r = 0; r < ROWS; r++) {
        tokens[r] = (int32_t)(test_random_u64(&seed) % VOCABULARY);
        for (int64_t i = 0; i < n; i++) {
            want[r * n + i] = table.host[tokens[r] * n + i];
        }
    }
    void *gpu_tokens = on_gpu(tokens, (int64_t)sizeof(tokens));
    ra_tensor_t view = ra_tensor_view(table.gpu, dtype, 2, extent);
    ok(ra_op_embed(&view, gpu_tokens, ROWS, (float *)x.gpu, stride, stream));
    download(&x);
    compare(&x, stride, want, ROWS, n, "embedding");
    ra_device_free(device, gpu_tokens);
    drop(&table), drop(&x), free(want);
}

static void embedding_widens_rows_of_the_table(void **state)
{
    (void)state;
    on_every_shape(check_embed);
}

/* Vocabulary in two blocks; the second holds larger logits, so the running maximum moves. */
static void check_lse(int64_t n, int64_t padding)
{
    uint64_t seed = 7;
    int64_t stride = n + padding;
    array_t z[2] = {make(ROWS * stride, RA_F32, &seed, -20, 5),
                    make(ROWS * stride, RA_F32, &seed, -20, 30)};
    array_t m = poisoned(ROWS, RA_F32), l = poisoned(ROWS, RA_F32);
    array_t picked = poisoned(ROWS, RA_F32), got = poisoned(ROWS, RA_F32);
    double want[ROWS];
    int32_t target[ROWS];

    for (int64_t r = 0; r < ROWS; r++) {
        double sum = 0;
        target[r] = (int32_t)(test_random_u64(&seed) % (uint64_t)(2 * n));
        for (int64_t j = 0; j < 2 * n; j++) {
            sum += exp((double)z[j / n].host[r * stride + j % n]);
        }
        want[r] = (double)z[target[r] / n].host[r * stride + target[r] % n] - log(sum);
    }
    target[3] = -1; /* not scored */
    want[3] = 0;
    void *gpu_target = on_gpu(target, (int64_t)sizeof(target));
    ok(ra_op_lse_reset((float *)m.gpu, (float *)l.gpu, (float *)picked.gpu, ROWS, stream));
    for (int b = 0; b < 2; b++) {
        ok(ra_op_lse_fold((float *)z[b].gpu, stride, ROWS, n, b * n, gpu_target, (float *)m.gpu,
                          (float *)l.gpu, (float *)picked.gpu, stream));
    }
    ok(ra_op_log_prob((float *)picked.gpu, gpu_target, (float *)m.gpu, (float *)l.gpu, 1, ROWS,
                      (float *)got.gpu, stream));
    download(&got);
    test_near(got.host, want, ROWS, 2e-6, 1e-6, "log-probability");
    ra_device_free(device, gpu_target);
    drop(&z[0]), drop(&z[1]), drop(&m), drop(&l), drop(&picked), drop(&got);
}

static void log_sum_exp_over_vocabulary_blocks_matches_one_sum(void **state)
{
    (void)state;
    skip_without_gpu();
    for (size_t w = 0; w < sizeof(widths) / sizeof(*widths); w++) {
        check_lse(widths[w], 0);
        check_lse(widths[w], 3);
        check_lse(widths[w], 4);
    }
    check_lse(40001, 7);
}

/* One vocabulary row in uneven blocks. @return the log-probabilities on the host. */
static array_t vocabulary_row(const float *logits, int64_t n, int64_t block)
{
    array_t z = poisoned(n, RA_F32), parts = poisoned(3, RA_F32);
    float *m = (float *)parts.gpu, *l = m + 1, *picked = m + 2;
    memcpy(z.host, logits, (size_t)n * sizeof(*logits));
    upload(&z);
    ok(ra_op_lse_reset(m, l, picked, 1, stream));
    for (int64_t first = 0; first < n; first += block) {
        int64_t columns = n - first < block ? n - first : block;
        ok(ra_op_lse_fold((float *)z.gpu + first, columns, 1, columns, first, NULL, m, l, picked,
                          stream));
    }
    ok(ra_op_log_prob((float *)z.gpu, NULL, m, l, 0, n, (float *)z.gpu, stream));
    download(&z);
    drop(&parts);
    return z;
}

static void a_vocabulary_row_sums_to_one(void **state)
{
    (void)state;
    enum { VOCABULARY = 5003 };
    static float logits[VOCABULARY];
    uint64_t seed = 8;
    double mass = 0;
    skip_without_gpu();
    test_fill(logits, VOCABULARY, &seed, -20, 5);
    array_t row = vocabulary_row(logits, VOCABULARY, 1024);
    for (int j = 0; j < VOCABULARY; j++) {
        mass += exp((double)row.host[j]);
    }
    assert_true(fabs(mass - 1) < 1e-5);
    drop(&row);
}

static void a_nan_logit_gives_nan_and_minus_infinity_no_mass(void **state)
{
    (void)state;
    float logits[70] = {0};
    skip_without_gpu();
    logits[40] = NAN;
    array_t row = vocabulary_row(logits, 70, 35);
    assert_true(isnan(row.host[0]) && isnan(row.host[69]));
    drop(&row);
    for (int j = 0; j < 69; j++) {
        logits[j] = -INFINITY; /* whole blocks of them, before and with the finite one */
    }
    row = vocabulary_row(logits, 70, 35);
    assert_true(row.host[69] == 0 && row.host[0] == -INFINITY);
    drop(&row);
}

static void routing_gaps_fold_to_the_least(void **state)
{
    (void)state;
    enum { N = 5000 };
    uint64_t seed = 9;
    skip_without_gpu();
    array_t a = make(N, RA_F32, &seed, 0, 1), b = make(N, RA_F32, &seed, 0, 1);
    array_t least = poisoned(N, RA_F32);
    ok(ra_op_fill((float *)least.gpu, N, INFINITY, stream));
    ok(ra_op_min_rows((float *)a.gpu, N, (float *)least.gpu, stream));
    ok(ra_op_min_rows((float *)b.gpu, N, (float *)least.gpu, stream));
    download(&least);
    for (int i = 0; i < N; i++) {
        assert_true(least.host[i] == fminf(a.host[i], b.host[i]));
    }
    drop(&a), drop(&b), drop(&least);
}

static void no_rows_are_no_work(void **state)
{
    (void)state;
    ra_op_heads_t part = {.heads = 2};
    skip_without_gpu();
    ok(ra_op_rms_norm(NULL, 8, 0, 8, NULL, eps, NULL, 8, RA_BF16, stream));
    ok(ra_op_head_norm_rope(&part, 1, 0, 8, eps, NULL, 8, RA_BF16, stream));
    ok(ra_op_lse_fold(NULL, 8, 0, 8, 0, NULL, NULL, NULL, NULL, stream));
    ok(ra_stream_sync(stream));
}

static void other_types_are_refused(void **state)
{
    (void)state;
    skip_without_gpu();
    assert_int_equal(ra_op_silu_mul(NULL, 8, NULL, 8, 1, 8, RA_F16, stream), RA_ERR_UNSUPPORTED);
    assert_int_equal(ra_op_rms_norm(NULL, 8, 1, 8, NULL, eps, NULL, 8, RA_F64, stream),
                     RA_ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rms_norm_matches_the_formula),
        cmocka_unit_test(heads_are_normed_and_rotated_by_the_formula),
        cmocka_unit_test(group_norm_and_gate_match_the_formula),
        cmocka_unit_test(silu_matches_the_formula),
        cmocka_unit_test(rows_are_copied_between_strides_and_types),
        cmocka_unit_test(embedding_widens_rows_of_the_table),
        cmocka_unit_test(log_sum_exp_over_vocabulary_blocks_matches_one_sum),
        cmocka_unit_test(a_vocabulary_row_sums_to_one),
        cmocka_unit_test(a_nan_logit_gives_nan_and_minus_infinity_no_mass),
        cmocka_unit_test(routing_gaps_fold_to_the_least),
        cmocka_unit_test(no_rows_are_no_work),
        cmocka_unit_test(other_types_are_refused),
    };
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
