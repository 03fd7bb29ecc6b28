/* Mirrors model/layer_ops.h; the oracles are the header's formulas in double. */
#include "base/cpu_isa.h"
#include "model/layer_ops.h"
#include "tests/test_support.h"

#include <stdlib.h>
#include <string.h>

enum { ROWS = 37, STRIDE_PAD = 3 };

static const int64_t widths[] = {1, 4, 15, 16, 31, 32, 64, 100, 256};

static void ok(ra_status_t status)
{
    assert_int_equal(status, RA_OK);
}

static double *doubles(int64_t n)
{
    double *values = malloc((size_t)n * sizeof(*values));
    assert_non_null(values);
    return values;
}

static float *floats(int64_t n)
{
    float *values = malloc((size_t)n * sizeof(*values));
    assert_non_null(values);
    return values;
}

/* Run a check for every instruction set of this machine. */
static void on_every_isa(void (*check)(int64_t width), int64_t width)
{
    ra_cpu_isa_t best = ra_cpu_isa();
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        check(width);
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static double inverse_rms(const float *x, int64_t n, double eps)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)x[i] * x[i];
    }
    return 1.0 / sqrt(sum / (double)n + eps);
}

static void check_rms_norm(int64_t n)
{
    uint64_t seed = 1;
    int64_t stride = n + STRIDE_PAD;
    float *x = floats(ROWS * stride), *y = floats(ROWS * n), *weight = floats(n);
    double *want = doubles(ROWS * n);

    test_fill(x, ROWS * stride, &seed, -3, 3);
    test_fill(weight, n, &seed, 0.5f, 1.5f);
    for (int64_t r = 0; r < ROWS; r++) {
        double f = inverse_rms(x + r * stride, n, 1e-6);
        for (int64_t i = 0; i < n; i++) {
            want[r * n + i] = x[r * stride + i] * f * weight[i];
        }
    }
    test_poison(y, ROWS * n);
    ok(ra_op_rms_norm(x, stride, ROWS, n, weight, 1e-6, y, n, RA_F32, NULL));
    test_near(y, want, ROWS * n, 1e-6, 2e-6, "rms norm");
    free(x), free(y), free(weight), free(want);
}

static void rms_norm_matches_the_formula(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(widths) / sizeof(*widths); i++) {
        on_every_isa(check_rms_norm, widths[i]);
    }
}

static void check_head_rope(int64_t head_dim)
{
    enum { HEADS = 3 };
    uint64_t seed = 2;
    int64_t rotary = head_dim / 2 / 2 * 2, half = rotary / 2, n = HEADS * head_dim;
    float *x = floats(ROWS * n), *y = floats(ROWS * n), *weight = floats(head_dim);
    float *table = floats(ROWS * rotary + 1);
    double *want = doubles(ROWS * n), inv_freq[256];
    int64_t positions[ROWS];

    test_fill(x, ROWS * n, &seed, -2, 2);
    test_fill(weight, head_dim, &seed, 0.5f, 1.5f);
    for (int64_t i = 0; i < half; i++) {
        inv_freq[i] = pow(1e6, -2.0 * (double)i / (double)rotary);
    }
    for (int64_t r = 0; r < ROWS; r++) {
        positions[r] = r * r * 997;
        for (int64_t h = 0; h < HEADS; h++) {
            const float *xh = x + r * n + h * head_dim;
            double *wh = want + r * n + h * head_dim, f = inverse_rms(xh, head_dim, 1e-6);
            for (int64_t i = 0; i < head_dim; i++) {
                wh[i] = xh[i] * f * weight[i];
            }
            for (int64_t i = 0; i < half; i++) {
                double angle = (double)positions[r] * inv_freq[i];
                double c = 1.25 * cos(angle), s = 1.25 * sin(angle), a = wh[i], b = wh[half + i];
                wh[i] = a * c - b * s;
                wh[half + i] = b * c + a * s;
            }
        }
    }
    test_poison(table, ROWS * rotary);
    test_poison(y, ROWS * n);
    ok(ra_op_rope_table(positions, ROWS, inv_freq, rotary, 1.25, table, NULL));
    ra_op_heads_t part = {
        .x = x, .y = y, .x_stride = n, .y_stride = n, .heads = HEADS, .weight = weight};
    part.rotate = true;
    ok(ra_op_head_norm_rope(&part, 1, ROWS, head_dim, 1e-6, table, rotary, RA_F32, NULL));
    test_near(y, want, ROWS * n, 4e-6, 2e-6, "head norm and rope");
    part.y = x;
    ok(ra_op_head_norm_rope(&part, 1, ROWS, head_dim, 1e-6, table, rotary, RA_F32, NULL));
    assert_memory_equal(x, y, (size_t)(ROWS * n) * sizeof(*x)); /* in place gives the same bits */
    free(x), free(y), free(weight), free(table), free(want);
}

static void head_norm_and_rotation_match_the_formula(void **state)
{
    (void)state;
    on_every_isa(check_head_rope, 8);
    on_every_isa(check_head_rope, 32);
    on_every_isa(check_head_rope, 64);
    on_every_isa(check_head_rope, 128);
    on_every_isa(check_head_rope, 80);
}

static void check_group_gate(int64_t group)
{
    enum { GROUPS = 3 };
    uint64_t seed = 3;
    int64_t n = GROUPS * group;
    float *o = floats(ROWS * n), *gate = floats(ROWS * n), *weight = floats(n);
    double *want = doubles(ROWS * n);

    test_fill(o, ROWS * n, &seed, -2, 2);
    test_fill(gate, ROWS * n, &seed, -30, 30);
    test_fill(weight, n, &seed, 0.5f, 1.5f);
    for (int64_t i = 0; i < ROWS * n; i++) {
        double f = inverse_rms(o + i / group * group, group, 1e-6);
        want[i] = o[i] * f * weight[i % n] / (1.0 + exp(-(double)gate[i]));
    }
    ok(ra_op_group_norm_gate(o, n, ROWS, n, GROUPS, weight, 1e-6, gate, n, RA_F32, NULL));
    test_near(o, want, ROWS * n, 1e-6, 3e-6, "group norm and gate");
    free(o), free(gate), free(weight), free(want);
}

static void group_norm_and_gate_match_the_formula(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(widths) / sizeof(*widths); i++) {
        on_every_isa(check_group_gate, widths[i]);
    }
}

static void check_silu(int64_t n)
{
    uint64_t seed = 4;
    float *gate = floats(ROWS * n), *up = floats(ROWS * n);
    double *want = doubles(ROWS * n);

    test_fill(gate, ROWS * n, &seed, -40, 40);
    test_fill(up, ROWS * n, &seed, -2, 2);
    for (int64_t i = 0; i < ROWS * n; i++) {
        want[i] = gate[i] / (1.0 + exp(-(double)gate[i])) * up[i];
    }
    ok(ra_op_silu_mul(gate, n, up, n, ROWS, n, RA_F32, NULL));
    test_near(gate, want, ROWS * n, 1e-6, 2e-6, "silu");
    free(gate), free(up), free(want);
}

static void silu_matches_the_formula(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(widths) / sizeof(*widths); i++) {
        on_every_isa(check_silu, widths[i]);
    }
}

/* Vocabulary in two blocks; the second holds larger logits, so the running maximum moves. */
static void check_lse(int64_t n)
{
    uint64_t seed = 5;
    float *z = floats(2 * ROWS * n), m[ROWS], l[ROWS], picked[ROWS], got[ROWS];
    double want[ROWS];
    int32_t target[ROWS];

    test_fill(z, ROWS * n, &seed, -20, 5);
    test_fill(z + ROWS * n, ROWS * n, &seed, -20, 30);
    for (int64_t r = 0; r < ROWS; r++) {
        double sum = 0;
        target[r] = (int32_t)(test_random_u64(&seed) % (uint64_t)(2 * n));
        for (int64_t j = 0; j < 2 * n; j++) {
            sum += exp((double)z[(j / n) * ROWS * n + r * n + j % n]);
        }
        want[r] = (double)z[(target[r] / n) * ROWS * n + r * n + target[r] % n] - log(sum);
    }
    target[3] = -1; /* not scored */
    want[3] = 0;
    test_poison(m, ROWS);
    test_poison(l, ROWS);
    test_poison(picked, ROWS);
    test_poison(got, ROWS);
    ok(ra_op_lse_reset(m, l, picked, ROWS, NULL));
    ok(ra_op_lse_fold(z, n, ROWS, n, 0, target, m, l, picked, NULL));
    ok(ra_op_lse_fold(z + ROWS * n, n, ROWS, n, n, target, m, l, picked, NULL));
    ok(ra_op_log_prob(picked, target, m, l, 1, ROWS, got, NULL));
    test_near(got, want, ROWS, 2e-6, 1e-6, "log-probability");
    free(z);
}

static void log_sum_exp_over_vocabulary_blocks_matches_one_sum(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(widths) / sizeof(*widths); i++) {
        on_every_isa(check_lse, widths[i]);
    }
}

/* A hostile or broken model gives NaN; it must come out as NaN, not as a number. */
static void log_sum_exp_of_a_nan_logit_is_nan(void **state)
{
    (void)state;
    float z[64] = {0}, m = -INFINITY, l = 0, picked = 0;
    int32_t target = 3;
    z[40] = NAN;
    ok(ra_op_lse_fold(z, 64, 1, 64, 0, &target, &m, &l, &picked, NULL));
    assert_true(isnan(picked - m - logf(l)));
}

static void embedding_widens_bf16_rows(void **state)
{
    (void)state;
    uint16_t bits[3 * 5];
    float x[2 * 5];
    int32_t tokens[2] = {2, 0};
    int64_t extent[2] = {3, 5};
    for (int i = 0; i < 15; i++) {
        bits[i] = ra_bf16_from_f32((float)i * 0.5f);
    }
    ra_tensor_t table = ra_tensor_view(bits, RA_BF16, 2, extent);
    test_poison(x, 10);
    ok(ra_op_embed(&table, tokens, 2, x, 5, NULL));
    for (int i = 0; i < 5; i++) {
        assert_true(x[i] == (float)(10 + i) * 0.5f);
        assert_true(x[5 + i] == (float)i * 0.5f);
    }
}

/* A row of the vocabulary: one m and l for every entry, no targets, in place. */
static void a_vocabulary_row_sums_to_one(void **state)
{
    (void)state;
    enum { VOCABULARY = 100 };
    uint64_t seed = 6;
    float z[VOCABULARY], m, l, picked;
    double want[VOCABULARY], sum = 0, mass = 0;

    test_fill(z, VOCABULARY, &seed, -20, 5);
    for (int j = 0; j < VOCABULARY; j++) {
        sum += exp((double)z[j]);
    }
    for (int j = 0; j < VOCABULARY; j++) {
        want[j] = (double)z[j] - log(sum);
    }
    ok(ra_op_lse_reset(&m, &l, &picked, 1, NULL));
    ok(ra_op_lse_fold(z, 64, 1, 64, 0, NULL, &m, &l, &picked, NULL));
    ok(ra_op_lse_fold(z + 64, 36, 1, 36, 64, NULL, &m, &l, &picked, NULL));
    ok(ra_op_log_prob(z, NULL, &m, &l, 0, VOCABULARY, z, NULL));
    test_near(z, want, VOCABULARY, 2e-6, 1e-6, "vocabulary row");
    for (int j = 0; j < VOCABULARY; j++) {
        mass += exp((double)z[j]);
    }
    assert_true(fabs(mass - 1) < 1e-5);
}

static void routing_gaps_fold_to_the_least(void **state)
{
    (void)state;
    enum { N = 5000 }; /* more than a thread takes at once */
    uint64_t seed = 7;
    static float a[N], b[N], least[N];

    test_fill(a, N, &seed, 0, 1);
    test_fill(b, N, &seed, 0, 1);
    test_poison(least, N);
    ok(ra_op_fill(least, N, INFINITY, NULL));
    ok(ra_op_min_rows(a, N, least, NULL));
    ok(ra_op_min_rows(b, N, least, NULL));
    for (int i = 0; i < N; i++) {
        assert_true(least[i] == fminf(a[i], b[i]));
    }
}

static void heads_without_norm_and_rotation_are_copied(void **state)
{
    (void)state;
    enum { HEADS = 2, DIM = 20, PITCH = 47 };
    uint64_t seed = 8;
    float x[ROWS * PITCH], y[ROWS * HEADS * DIM];

    test_fill(x, ROWS * PITCH, &seed, -2, 2);
    test_poison(y, ROWS * HEADS * DIM);
    ra_op_heads_t part = {
        .x = x, .y = y, .x_stride = PITCH, .y_stride = HEADS * DIM, .heads = HEADS};
    ok(ra_op_head_norm_rope(&part, 1, ROWS, DIM, 1e-6, x, 0, RA_F32, NULL));
    for (int r = 0; r < ROWS; r++) {
        assert_memory_equal(y + r * HEADS * DIM, x + r * PITCH, HEADS * DIM * sizeof(*x));
    }
}

static void the_cpu_refuses_bf16_activations(void **state)
{
    (void)state;
    uint16_t gate[4] = {0}, up[4] = {0};
    assert_int_equal(ra_op_silu_mul(gate, 4, up, 4, 1, 4, RA_BF16, NULL), RA_ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rms_norm_matches_the_formula),
        cmocka_unit_test(head_norm_and_rotation_match_the_formula),
        cmocka_unit_test(group_norm_and_gate_match_the_formula),
        cmocka_unit_test(silu_matches_the_formula),
        cmocka_unit_test(log_sum_exp_over_vocabulary_blocks_matches_one_sum),
        cmocka_unit_test(log_sum_exp_of_a_nan_logit_is_nan),
        cmocka_unit_test(embedding_widens_bf16_rows),
        cmocka_unit_test(a_vocabulary_row_sums_to_one),
        cmocka_unit_test(routing_gaps_fold_to_the_least),
        cmocka_unit_test(heads_without_norm_and_rotation_are_copied),
        cmocka_unit_test(the_cpu_refuses_bf16_activations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
