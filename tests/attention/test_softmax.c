/*
 * attention/softmax_block.h: the "cpu" row on every instruction set against the "ref" row (double,
 * two passes), and the promises about bits.
 *
 * Tolerance  scores are sums of up to 256 fp32 products and stay below about 10, so a score is off
 * by less than 1e-5 and with it every weight; O is an average of values in [-1, 1] with those
 * weights, lse moves as a score does. 4e-5 holds both and is far below one lost or doubled key of
 * the few hundred here.
 */
#include "attention/softmax_block.h"
#include "base/cpu_isa.h"
#include "tests/cpu_engine.h"
#include <stdlib.h>
#include <string.h>

#define TOLERANCE 4e-5

typedef enum mask_kind { FULL, CAUSAL, WINDOW, PACKED, THRESHOLD, BIAS, MASK_KINDS } mask_kind_t;

typedef struct problem {
    ra_softmax_block_t block;
    ra_row_group_t groups[2];
    ra_key_span_t spans[5];
    float *q, *k, *v, *key_score, *row_threshold, *key_bias;
    int64_t *row_lo, *row_hi, *key_pos;
} problem_t;

/* The carried state and the finished log-sum-exp of one run. */
typedef struct result {
    ra_softmax_state_t state;
    float *lse;
    int64_t rows, heads, dim;
} result_t;

static void *must_alloc(int64_t bytes)
{
    void *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    assert_non_null(memory);
    return memory;
}

static float *random_floats(int64_t n, uint64_t *seed, float low, float high)
{
    float *values = must_alloc(n * 4);
    test_fill(values, n, seed, low, high);
    return values;
}

/* Rows are the last of the keys' positions. Packed documents are cut every 37 positions. */
static void make_mask(problem_t *p, mask_kind_t kind, int64_t rows, int64_t keys)
{
    for (int64_t j = 0; j < keys; j++) {
        p->key_pos[j] = j;
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t position = keys - rows + r;
        int64_t at = position < 0 ? 0 : position;
        p->row_hi[r] = kind == FULL ? keys : position + 1;
        p->row_lo[r] = kind == WINDOW ? position - keys / 4 : kind == PACKED ? at / 37 * 37 : 0;
    }
}

static problem_t problem_make(int64_t rows, int64_t keys, int32_t heads, int32_t kv_heads,
                              int32_t dim, mask_kind_t kind, uint64_t seed)
{
    problem_t p = {.block = {.rows = rows,
                             .keys = keys,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = dim,
                             .scale = 1.0f / sqrtf((float)dim),
                             .dtype = RA_F32,
                             .q_stride = heads * dim + 7,
                             .k_stride = kv_heads * dim + 3,
                             .v_stride = kv_heads * dim + 1}};
    p.q = random_floats(rows * p.block.q_stride, &seed, -2.0f, 2.0f);
    p.k = random_floats(keys * p.block.k_stride, &seed, -2.0f, 2.0f);
    p.v = random_floats(keys * p.block.v_stride, &seed, -1.0f, 1.0f);
    p.row_lo = must_alloc(rows * 8);
    p.row_hi = must_alloc(rows * 8);
    p.key_pos = must_alloc(keys * 8);
    make_mask(&p, kind, rows, keys);
    p.block.q = p.q;
    p.block.k = p.k;
    p.block.v = p.v;
    p.block.mask = (ra_attention_mask_t){p.row_lo, p.row_hi, p.key_pos, NULL, NULL, NULL};
    if (kind == THRESHOLD) {
        p.block.mask.key_score = p.key_score = random_floats(heads * keys, &seed, 0.0f, 1.0f);
        p.block.mask.row_threshold = p.row_threshold =
            random_floats(heads * rows, &seed, 0.2f, 1.05f);
    }
    if (kind == BIAS) {
        p.block.mask.key_bias = p.key_bias = random_floats(keys, &seed, -3.0f, 3.0f);
    }
    return p;
}

static void problem_free(problem_t *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->key_score);
    free(p->row_threshold);
    free(p->key_bias);
    free(p->row_lo);
    free(p->row_hi);
    free(p->key_pos);
}

/* Five spans, the last keys first as in a ring, one of them empty; two groups of rows. */
static void cut(problem_t *p)
{
    int64_t n = p->block.keys, a = n / 5, b = n / 2, c = n - n / 7, m = p->block.rows / 3;
    ra_key_span_t spans[5] = {{c, n - c}, {b, c - b}, {b, 0}, {a, b - a}, {0, a}};
    memcpy(p->spans, spans, sizeof(spans));
    p->groups[0] = (ra_row_group_t){0, m, 0, 5};
    p->groups[1] = (ra_row_group_t){m, p->block.rows - m, 0, 5};
    p->block.spans = p->spans;
    p->block.groups = p->groups;
    p->block.group_count = 2;
}

static result_t result_make(const problem_t *p)
{
    const ra_softmax_block_t *b = &p->block;
    result_t r = {.rows = b->rows, .heads = b->heads, .dim = b->head_dim};
    r.state.o_stride = b->heads * b->head_dim + 2;
    r.state.m = must_alloc(r.heads * r.rows * 4);
    r.state.l = must_alloc(r.heads * r.rows * 4);
    r.lse = must_alloc(r.heads * r.rows * 4);
    r.state.o = must_alloc(r.rows * r.state.o_stride * 4);
    test_poison(r.state.m, r.heads * r.rows);
    test_poison(r.state.l, r.heads * r.rows);
    test_poison(r.lse, r.heads * r.rows);
    test_poison(r.state.o, r.rows * r.state.o_stride);
    assert_int_equal(ra_softmax_reset(r.rows, b->heads, b->head_dim, &r.state, NULL), RA_OK);
    return r;
}

static void result_free(result_t *r)
{
    free(r->state.m);
    free(r->state.l);
    free(r->state.o);
    free(r->lse);
}

static void fold(const problem_t *p, const char *name, result_t *r, ra_stream_t *stream)
{
    const ra_softmax_kernel_t *kernel;
    assert_int_equal(ra_softmax_select(name, RA_DEVICE_CPU, &p->block, &kernel), RA_OK);
    assert_string_equal(ra_softmax_kernel_name(kernel), name);
    assert_int_equal(ra_softmax_fold(kernel, &p->block, &r->state, stream), RA_OK);
}

static void finish(result_t *r, ra_stream_t *stream)
{
    assert_int_equal(
        ra_softmax_finish(r->rows, (int32_t)r->heads, (int32_t)r->dim, &r->state, r->lse, stream),
        RA_OK);
}

static void check_near(const result_t *got, const result_t *want, const char *what)
{
    int64_t width = got->heads * got->dim;
    double *wide = must_alloc((width + got->rows) * 8);
    for (int64_t r = 0; r < got->rows; r++) {
        for (int64_t i = 0; i < width; i++) {
            wide[i] = want->state.o[r * want->state.o_stride + i];
        }
        const float *o = got->state.o + r * got->state.o_stride;
        test_near(o, wide, width, TOLERANCE, 0.0, what);
        assert_true(isnan(o[width]) && isnan(o[width + 1]));
    }
    for (int64_t h = 0; h < got->heads; h++) {
        for (int64_t r = 0; r < got->rows; r++) {
            wide[r] = want->lse[h * got->rows + r];
        }
        test_near(got->lse + h * got->rows, wide, got->rows, TOLERANCE, 0.0, what);
    }
    free(wide);
}

/* Rows [begin, begin + count) of both carry the same bits. */
static void check_bits(const result_t *a, const result_t *b, int64_t begin, int64_t count)
{
    for (int64_t h = 0; h < a->heads; h++) {
        int64_t at = h * a->rows + begin;
        assert_memory_equal(a->state.m + at, b->state.m + at, (size_t)count * 4);
        assert_memory_equal(a->state.l + at, b->state.l + at, (size_t)count * 4);
    }
    for (int64_t r = begin; r < begin + count; r++) {
        assert_memory_equal(a->state.o + r * a->state.o_stride, b->state.o + r * b->state.o_stride,
                            (size_t)(a->heads * a->dim) * 4);
    }
}

static const struct {
    int64_t rows, keys;
    int32_t heads, kv_heads, dim;
} shapes[] = {{1, 1, 1, 1, 32},     {1, 300, 4, 1, 64},  {97, 97, 2, 2, 32},
              {130, 261, 4, 2, 64}, {33, 129, 3, 1, 80}, {50, 140, 2, 1, 128},
              {29, 257, 1, 1, 256}, {64, 128, 2, 2, 4},  {211, 211, 6, 2, 64},
              {40, 13, 2, 1, 36},   {7, 200, 40, 1, 32}};

static void cpu_agrees_with_the_oracle_for_every_shape_and_mask(void **state)
{
    (void)state;
    ra_cpu_isa_t best = ra_cpu_isa();
    engine_t e = engine_make(3);
    for (size_t s = 0; s < RA_ARRAY_LEN(shapes); s++) {
        for (int kind = 0; kind < MASK_KINDS; kind++) {
            problem_t p = problem_make(shapes[s].rows, shapes[s].keys, shapes[s].heads,
                                       shapes[s].kv_heads, shapes[s].dim, (mask_kind_t)kind, s + 1);
            cut(&p);
            result_t want = result_make(&p);
            fold(&p, "ref", &want, NULL);
            finish(&want, NULL);
            for (int isa = 0; isa <= (int)best; isa++) {
                assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
                result_t got = result_make(&p);
                fold(&p, "cpu", &got, (s + (size_t)kind) % 2 == 0 ? NULL : e.stream);
                finish(&got, e.stream);
                check_near(&got, &want, ra_cpu_isa_name((ra_cpu_isa_t)isa));
                result_free(&got);
            }
            result_free(&want);
            problem_free(&p);
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
    engine_free(&e);
}

static void spans_over_several_calls_give_the_bits_of_one_call(void **state)
{
    (void)state;
    ra_cpu_isa_t best = ra_cpu_isa();
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        for (int kind = 0; kind < MASK_KINDS; kind++) {
            problem_t p = problem_make(120, 333, 4, 2, 64, (mask_kind_t)kind, 5);
            cut(&p);
            result_t whole = result_make(&p), parts = result_make(&p);
            fold(&p, "cpu", &whole, NULL);
            for (int64_t s = 0; s < 5; s++) {
                p.groups[0].span_begin = p.groups[1].span_begin = s;
                p.groups[0].span_count = p.groups[1].span_count = 1;
                fold(&p, "cpu", &parts, NULL);
            }
            check_bits(&whole, &parts, 0, 120);
            result_free(&whole);
            result_free(&parts);
            problem_free(&p);
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static void a_row_keeps_its_bits_in_any_company_and_on_any_threads(void **state)
{
    (void)state;
    static const int64_t begins[] = {0, 1, 5, 24, 77, 118}, counts[] = {1, 3, 24, 41};
    ra_cpu_isa_t best = ra_cpu_isa();
    engine_t e = engine_make(3);
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        for (int kind = 0; kind < MASK_KINDS; kind++) {
            problem_t p = problem_make(120, 700, 6, 2, 36, (mask_kind_t)kind, 6);
            cut(&p);
            result_t all = result_make(&p);
            fold(&p, "cpu", &all, NULL);
            p.block.group_count = 1;
            for (size_t b = 0; b < RA_ARRAY_LEN(begins); b++) {
                for (size_t c = 0; c < RA_ARRAY_LEN(counts); c++) {
                    int64_t left = 120 - begins[b], n = counts[c] < left ? counts[c] : left;
                    result_t some = result_make(&p);
                    result_t untouched = result_make(&p);
                    p.groups[0] = (ra_row_group_t){begins[b], n, 0, 5};
                    fold(&p, "cpu", &some, c % 2 == 0 ? e.stream : NULL);
                    check_bits(&some, &all, begins[b], n);
                    check_bits(&some, &untouched, 0, begins[b]);
                    check_bits(&some, &untouched, begins[b] + n, left - n);
                    result_free(&some);
                    result_free(&untouched);
                }
            }
            result_free(&all);
            problem_free(&p);
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
    engine_free(&e);
}

/* Both rows of the table share it, so it is not among what they are compared for. */
static void finishing_divides_by_the_sum_and_adds_its_logarithm(void **state)
{
    (void)state;
    enum { ROWS = 5, HEADS = 2, DIM = 33, STRIDE = HEADS * DIM + 3 };
    uint64_t seed = 5;
    float *m = random_floats(HEADS * ROWS, &seed, -9, 9);
    float *l = random_floats(HEADS * ROWS, &seed, 0.5F, 700);
    float *o = random_floats(ROWS * STRIDE, &seed, -50, 50), lse[HEADS * ROWS];
    double want[ROWS * STRIDE], want_lse[HEADS * ROWS];
    for (int i = 0; i < ROWS * STRIDE; i++) {
        int column = i % STRIDE, head = column / DIM;
        want[i] = head < HEADS ? (double)o[i] / (double)l[head * ROWS + i / STRIDE] : (double)o[i];
    }
    for (int i = 0; i < HEADS * ROWS; i++) {
        want_lse[i] = (double)m[i] + log((double)l[i]);
    }
    ra_softmax_state_t carried = {.m = m, .l = l, .o = o, .o_stride = STRIDE};
    test_poison(lse, HEADS * ROWS);
    assert_int_equal(ra_softmax_finish(ROWS, HEADS, DIM, &carried, lse, NULL), RA_OK);
    test_near(o, want, ROWS * STRIDE, 0, 3e-7, "o"); /* a few fp32 roundings */
    test_near(lse, want_lse, HEADS * ROWS, 2e-6, 0, "lse");
    free(m);
    free(l);
    free(o);
}

static void rows_without_a_key_are_zero_with_infinite_lse(void **state)
{
    (void)state;
    problem_t p = problem_make(50, 150, 2, 1, 64, CAUSAL, 7);
    for (int64_t r = 10; r < 20; r++) {
        p.row_hi[r] = 0;
    }
    p.row_lo[30] = p.row_hi[30] + 5;
    cut(&p);
    result_t got = result_make(&p), want = result_make(&p);
    fold(&p, "cpu", &got, NULL);
    fold(&p, "ref", &want, NULL);
    finish(&got, NULL);
    finish(&want, NULL);
    check_near(&got, &want, "cpu");
    for (int64_t i = 0; i < 128; i++) {
        assert_true(got.state.o[15 * got.state.o_stride + i] == 0.0f);
        assert_true(got.state.o[30 * got.state.o_stride + i] == 0.0f);
    }
    assert_true(got.lse[15] == -INFINITY && got.lse[50 + 30] == -INFINITY);
    result_free(&got);
    result_free(&want);
    problem_free(&p);
}

static void hidden_keys_that_are_not_finite_change_nothing(void **state)
{
    (void)state;
    ra_cpu_isa_t best = ra_cpu_isa();
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        problem_t p = problem_make(150, 150, 2, 1, 64, PACKED, 8);
        cut(&p);
        result_t clean = result_make(&p), dirty = result_make(&p);
        fold(&p, "cpu", &clean, NULL);
        /* One document (positions 37 to 73) goes bad; the others share micro tiles with it. */
        for (int64_t j = 40; j < 70; j++) {
            p.k[j * p.block.k_stride + 3] = NAN;
            p.v[j * p.block.v_stride + j % 64] = j % 2 == 0 ? NAN : INFINITY;
        }
        fold(&p, "cpu", &dirty, NULL);
        check_bits(&clean, &dirty, 0, 40);
        check_bits(&clean, &dirty, 74, 76);
        assert_true(isnan(dirty.state.o[60 * dirty.state.o_stride]));
        result_free(&clean);
        result_free(&dirty);
        problem_free(&p);
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static void scores_far_apart_neither_overflow_nor_vanish(void **state)
{
    (void)state;
    problem_t p = problem_make(60, 260, 2, 2, 32, CAUSAL, 9);
    cut(&p);
    p.block.scale = 60.0f; /* scores of thousands: one key takes all the weight */
    result_t got = result_make(&p), want = result_make(&p);
    fold(&p, "cpu", &got, NULL);
    fold(&p, "ref", &want, NULL);
    finish(&got, NULL);
    finish(&want, NULL);
    for (int64_t r = 0; r < 60; r++) {
        for (int64_t h = 0; h < 2; h++) {
            double a = got.lse[h * 60 + r], b = want.lse[h * 60 + r];
            assert_true(fabs(a - b) <= 1e-6 * fabs(b) + 1e-2);
        }
        for (int64_t i = 0; i < 64; i++) {
            float o = got.state.o[r * got.state.o_stride + i];
            assert_true(fabsf(o) <= 1.001f);
        }
    }
    result_free(&got);
    result_free(&want);
    problem_free(&p);
}

static void unfit_shapes_are_refused_by_name(void **state)
{
    (void)state;
    const ra_softmax_kernel_t *kernel;
    ra_softmax_block_t shape = {.heads = 4, .kv_heads = 2, .head_dim = 512, .dtype = RA_F32};
    assert_int_equal(ra_softmax_select("cpu", RA_DEVICE_CPU, &shape, &kernel), RA_ERR_UNSUPPORTED);
    assert_non_null(strstr(ra_last_error(), "512"));
    assert_int_equal(ra_softmax_select("auto", RA_DEVICE_CPU, &shape, &kernel), RA_OK);
    assert_string_equal(ra_softmax_kernel_name(kernel), "ref");
    shape.head_dim = 64;
    assert_int_equal(ra_softmax_select("auto", RA_DEVICE_CPU, &shape, &kernel), RA_OK);
    assert_string_equal(ra_softmax_kernel_name(kernel), "cpu");
    shape.dtype = RA_BF16;
    assert_int_equal(ra_softmax_select("auto", RA_DEVICE_CPU, &shape, &kernel), RA_ERR_UNSUPPORTED);
    shape.dtype = RA_F32;
    shape.kv_heads = 3;
    assert_int_equal(ra_softmax_select("auto", RA_DEVICE_CPU, &shape, &kernel), RA_ERR_UNSUPPORTED);
    shape.kv_heads = 4;
    assert_int_equal(ra_softmax_select("fast", RA_DEVICE_CPU, &shape, &kernel), RA_ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cpu_agrees_with_the_oracle_for_every_shape_and_mask),
        cmocka_unit_test(spans_over_several_calls_give_the_bits_of_one_call),
        cmocka_unit_test(a_row_keeps_its_bits_in_any_company_and_on_any_threads),
        cmocka_unit_test(finishing_divides_by_the_sum_and_adds_its_logarithm),
        cmocka_unit_test(rows_without_a_key_are_zero_with_infinite_lse),
        cmocka_unit_test(hidden_keys_that_are_not_finite_change_nothing),
        cmocka_unit_test(scores_far_apart_neither_overflow_nor_vanish),
        cmocka_unit_test(unfit_shapes_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
