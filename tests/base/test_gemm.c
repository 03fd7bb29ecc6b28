/*
 * base/gemm.h against the oracle in double, and the packed kernel's promise: the bits of an output
 * row depend on its input row and the weights alone.
 *
 * Tolerance  each of K additions rounds a partial sum of a few units (|x|, |w| <= 1, random signs)
 * by 2^-24 of it: (4 + K) 2^-23 is generous and yet far below one wrong or missing product.
 */
#include "base/cpu_isa.h"
#include "base/gemm.h"
#include "base/gemm_ref.h"
#include "tests/cpu_engine.h"
#include <stdlib.h>
#include <string.h>

typedef struct problem {
    int64_t rows, out, in, x_stride, y_stride;
    ra_tensor_t w;
    float *x, *y, *start;
    double *want;
} problem_t;

static void *must_alloc(int64_t bytes)
{
    void *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    assert_non_null(memory);
    return memory;
}

static problem_t problem_make(int64_t rows, int64_t out, int64_t in, ra_dtype_t dtype,
                              uint64_t seed)
{
    problem_t p = {.rows = rows, .out = out, .in = in, .x_stride = in + 3, .y_stride = out + 5};
    void *weights = must_alloc(out * in * ra_dtype_bytes(dtype));
    for (int64_t i = 0; i < out * in; i++) {
        float value = test_random(&seed, -1.0f, 1.0f);
        if (dtype == RA_BF16) {
            ((uint16_t *)weights)[i] = ra_bf16_from_f32(value);
        } else {
            ((float *)weights)[i] = value;
        }
    }
    p.w = ra_tensor_view(weights, dtype, 2, (int64_t[]){out, in});
    p.x = must_alloc(rows * p.x_stride * 4);
    p.y = must_alloc(rows * p.y_stride * 4);
    p.start = must_alloc(rows * p.y_stride * 4);
    p.want = must_alloc(rows * out * 8);
    test_fill(p.x, rows * p.x_stride, &seed, -1.0f, 1.0f);
    test_fill(p.start, rows * p.y_stride, &seed, -1.0f, 1.0f);
    test_poison(p.y, rows * p.y_stride);
    ra_gemm_ref(&p.w, p.x, p.x_stride, rows, p.want);
    return p;
}

static void problem_free(problem_t *p)
{
    free(p->w.data);
    free(p->x);
    free(p->y);
    free(p->start);
    free(p->want);
}

static ra_gemm_job_t problem_job(const problem_t *p, const ra_gemm_weight_t *weight)
{
    return (ra_gemm_job_t){.weight = weight,
                           .x = p->x,
                           .x_stride = p->x_stride,
                           .rows = p->rows,
                           .y = p->y,
                           .y_stride = p->y_stride};
}

static void check_result(const problem_t *p, bool accumulated, const char *what)
{
    double bound = (4.0 + (double)p->in) * 0x1p-23;
    for (int64_t r = 0; r < p->rows; r++) {
        const float *got = p->y + r * p->y_stride;
        for (int64_t n = 0; n < p->out && accumulated; n++) {
            p->want[r * p->out + n] += p->start[r * p->y_stride + n];
        }
        test_near(got, p->want + r * p->out, p->out, bound, 0.0, what);
        for (int64_t n = p->out; n < p->y_stride; n++) {
            assert_true(accumulated ? got[n] == p->start[r * p->y_stride + n] : isnan(got[n]));
        }
    }
}

static const struct {
    int64_t out, in;
} shapes[] = {{1, 1},   {7, 5},    {16, 64},   {64, 32},  {65, 33},  {100, 257},
              {96, 96}, {130, 70}, {257, 300}, {300, 19}, {48, 513}, {3, 1000}};
static const int64_t row_counts[] = {0, 1, 2, 3, 5, 7, 12, 13, 17, 300};

static void check_kernel(const char *name, ra_stream_t *stream)
{
    const ra_gemm_kernel_t *kernel;
    assert_int_equal(ra_gemm_select(name, RA_DEVICE_CPU, false, &kernel), RA_OK);
    for (size_t s = 0; s < RA_ARRAY_LEN(shapes); s++) {
        for (size_t i = 0; i < RA_ARRAY_LEN(row_counts); i++) {
            ra_dtype_t dtype = (s + i) % 2 == 0 ? RA_BF16 : RA_F32;
            problem_t p = problem_make(row_counts[i], shapes[s].out, shapes[s].in, dtype, s + i);
            ra_gemm_weight_t *weight;
            assert_int_equal(ra_gemm_weight_create(kernel, &p.w, RA_F32, NULL, &weight), RA_OK);
            assert_int_equal(ra_gemm_weight_out(weight), p.out);
            assert_int_equal(ra_gemm_weight_in(weight), p.in);
            ra_gemm_job_t job = problem_job(&p, weight);
            assert_int_equal(ra_gemm(&job, 1, false, stream), RA_OK);
            check_result(&p, false, name);
            memcpy(p.y, p.start, (size_t)(p.rows * p.y_stride) * 4);
            assert_int_equal(ra_gemm(&job, 1, true, stream), RA_OK);
            check_result(&p, true, name);
            ra_gemm_weight_destroy(weight);
            problem_free(&p);
        }
    }
}

static void openblas_agrees_with_the_oracle(void **state)
{
    (void)state;
    engine_t e = engine_make(2);
    check_kernel("openblas", e.stream);
    engine_free(&e);
}

static void packed_agrees_with_the_oracle_on_every_instruction_set(void **state)
{
    (void)state;
    ra_cpu_isa_t best = ra_cpu_isa();
    engine_t e = engine_make(3);
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        check_kernel("packed", isa == 0 ? NULL : e.stream);
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
    engine_free(&e);
}

/* Rows of `p` in the order `row`, `count` at a time, must give the bits of `want`. */
static void check_rows(const problem_t *p, const ra_gemm_weight_t *weight, const float *want,
                       const int64_t *row, int64_t rows, int64_t count, ra_stream_t *stream)
{
    float *x = must_alloc(count * p->in * 4), *y = must_alloc(count * p->out * 4);
    for (int64_t at = 0; at < rows; at += count) {
        int64_t n = rows - at < count ? rows - at : count;
        for (int64_t i = 0; i < n; i++) {
            memcpy(x + i * p->in, p->x + row[at + i] * p->x_stride, (size_t)p->in * 4);
        }
        ra_gemm_job_t job = {
            .weight = weight, .x = x, .x_stride = p->in, .rows = n, .y = y, .y_stride = p->out};
        assert_int_equal(ra_gemm(&job, 1, false, stream), RA_OK);
        for (int64_t i = 0; i < n; i++) {
            assert_memory_equal(y + i * p->out, want + row[at + i] * p->y_stride,
                                (size_t)p->out * 4);
        }
    }
    free(x);
    free(y);
}

static void packed_rows_keep_their_bits_in_any_company(void **state)
{
    (void)state;
    const ra_gemm_kernel_t *kernel;
    ra_cpu_isa_t best = ra_cpu_isa();
    assert_int_equal(ra_gemm_select("auto", RA_DEVICE_CPU, true, &kernel), RA_OK);
    assert_string_equal(ra_gemm_kernel_name(kernel), "packed");
    assert_int_equal(ra_gemm_select("auto", RA_DEVICE_CPU, false, &kernel), RA_OK);
    assert_string_equal(ra_gemm_kernel_name(kernel), "packed");
    engine_t one = engine_make(1), three = engine_make(3);
    for (int isa = 0; isa <= (int)best; isa++) {
        assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
        for (int d = 0; d < 2; d++) {
            problem_t p = problem_make(211, 147, 530, d == 0 ? RA_BF16 : RA_F32, 99);
            ra_gemm_weight_t *weight;
            assert_int_equal(ra_gemm_weight_create(kernel, &p.w, RA_F32, NULL, &weight), RA_OK);
            ra_gemm_job_t job = problem_job(&p, weight);
            assert_int_equal(ra_gemm(&job, 1, false, one.stream), RA_OK);
            int64_t row[211];
            for (int64_t i = 0; i < 211; i++) {
                row[i] = i * 100 % 211; /* a permutation: 211 is prime */
            }
            static const int64_t counts[] = {1, 2, 3, 5, 11, 12, 13, 64, 193, 211};
            for (size_t i = 0; i < RA_ARRAY_LEN(counts); i++) {
                check_rows(&p, weight, p.y, row, 211, counts[i],
                           i % 2 == 0 ? three.stream : one.stream);
            }
            ra_gemm_weight_destroy(weight);
            problem_free(&p);
        }
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
    engine_free(&one);
    engine_free(&three);
}

static void many_jobs_run_in_one_call(void **state)
{
    (void)state;
    enum { JOBS = 9 };
    static const char *const names[] = {"openblas", "packed"};
    engine_t e = engine_make(3);
    for (size_t k = 0; k < RA_ARRAY_LEN(names); k++) {
        const ra_gemm_kernel_t *kernel;
        assert_int_equal(ra_gemm_select(names[k], RA_DEVICE_CPU, false, &kernel), RA_OK);
        problem_t p[JOBS];
        ra_gemm_weight_t *weight[JOBS];
        ra_gemm_job_t jobs[JOBS];
        for (int i = 0; i < JOBS; i++) {
            p[i] = problem_make(i * i * 7 % 50 * 10 % 400, 20 + 61 * i, 40 + i,
                                i % 2 == 0 ? RA_F32 : RA_BF16, (uint64_t)i);
            assert_int_equal(ra_gemm_weight_create(kernel, &p[i].w, RA_F32, NULL, &weight[i]),
                             RA_OK);
            jobs[i] = problem_job(&p[i], weight[i]);
        }
        assert_int_equal(ra_gemm(jobs, JOBS, false, e.stream), RA_OK);
        for (int i = 0; i < JOBS; i++) {
            check_result(&p[i], false, names[k]);
            ra_gemm_weight_destroy(weight[i]);
            problem_free(&p[i]);
        }
    }
    assert_int_equal(ra_gemm(NULL, 0, false, e.stream), RA_OK);
    engine_free(&e);
}

static void a_product_over_nothing_is_zero(void **state)
{
    (void)state;
    static const char *const names[] = {"openblas", "packed"};
    for (size_t k = 0; k < RA_ARRAY_LEN(names); k++) {
        const ra_gemm_kernel_t *kernel;
        assert_int_equal(ra_gemm_select(names[k], RA_DEVICE_CPU, false, &kernel), RA_OK);
        problem_t p = problem_make(4, 9, 0, RA_F32, 1);
        ra_gemm_weight_t *weight;
        assert_int_equal(ra_gemm_weight_create(kernel, &p.w, RA_F32, NULL, &weight), RA_OK);
        ra_gemm_job_t job = problem_job(&p, weight);
        assert_int_equal(ra_gemm(&job, 1, false, NULL), RA_OK);
        check_result(&p, false, names[k]);
        ra_gemm_weight_destroy(weight);
        problem_free(&p);
    }
}

static void wrong_names_and_weights_are_refused(void **state)
{
    (void)state;
    const ra_gemm_kernel_t *kernel;
    assert_int_equal(ra_gemm_select("mkl", RA_DEVICE_CPU, false, &kernel), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "mkl"));
    assert_int_equal(ra_gemm_select("openblas", RA_DEVICE_CPU, true, &kernel), RA_ERR_USAGE);
    assert_int_equal(ra_gemm_select("packed", RA_DEVICE_CPU, true, &kernel), RA_OK);
    float data[4] = {0};
    ra_gemm_weight_t *weight = NULL;
    ra_tensor_t flat = ra_tensor_view(data, RA_F32, 1, (int64_t[]){4});
    ra_tensor_t half = ra_tensor_view(data, RA_F16, 2, (int64_t[]){2, 2});
    assert_int_equal(ra_gemm_weight_create(kernel, &flat, RA_F32, NULL, &weight), RA_ERR_SHAPE);
    assert_int_equal(ra_gemm_weight_create(kernel, &half, RA_F32, NULL, &weight), RA_ERR_SHAPE);
    assert_null(weight);
    ra_gemm_weight_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(openblas_agrees_with_the_oracle),
        cmocka_unit_test(packed_agrees_with_the_oracle_on_every_instruction_set),
        cmocka_unit_test(packed_rows_keep_their_bits_in_any_company),
        cmocka_unit_test(many_jobs_run_in_one_call),
        cmocka_unit_test(a_product_over_nothing_is_zero),
        cmocka_unit_test(wrong_names_and_weights_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
