/* Mirrors model/head_cuda.h: products and log-sum-exp in double, of bf16 operands. */
#include "base/device_cuda.h"
#include "base/dtype.h"
#include "model/head_cuda.h"
#include "model/layer_ops.h"
#include "tests/test_support.h"

#include <stdlib.h>
#include <string.h>

static ra_device_t *device;
static ra_stream_t *stream;

static void ok(ra_status_t status)
{
    assert_int_equal(status, RA_OK);
}

static int open_gpu(void **state)
{
    (void)state;
    ra_status_t status = ra_device_open("cuda", 0, NULL, &device);
    if (status == RA_ERR_UNSUPPORTED) {
        device = NULL; /* every test skips */
        return 0;
    }
    return status == RA_OK && ra_stream_create(device, &stream) == RA_OK ? 0 : -1;
}

static int close_gpu(void **state)
{
    (void)state;
    ra_stream_destroy(stream);
    ra_device_close(device);
    return 0;
}

static void *on_gpu(const void *host, int64_t bytes)
{
    void *memory;
    ok(ra_device_alloc(device, bytes, &memory));
    ok(ra_stream_copy(stream, memory, host, bytes));
    ok(ra_stream_sync(stream));
    return memory;
}

/* n bf16 numbers in [low, high). */
static uint16_t *numbers(int64_t n, uint64_t *seed, float low, float high)
{
    uint16_t *values = malloc((size_t)n * sizeof(*values));
    assert_non_null(values);
    for (int64_t i = 0; i < n; i++) {
        values[i] = ra_bf16_from_f32(test_random(seed, low, high));
    }
    return values;
}

typedef struct head_case {
    int64_t rows, columns, channels, padding, block; /* block: columns of a call */
} head_case_t;

/* x and W on both sides, the calls' parts, and what they should give. */
typedef struct head_data {
    uint16_t *x, *w;
    int32_t *target;
    double *want; /* [rows] log-probabilities of the targets */
    void *gpu_x, *gpu_w, *gpu_target, *gpu_m, *gpu_l, *gpu_picked, *gpu_out, *parts;
} head_data_t;

static void expect(const head_case_t *c, head_data_t *d)
{
    int64_t stride = c->channels + c->padding;
    for (int64_t r = 0; r < c->rows; r++) {
        double sum = 0, picked = 0;
        for (int64_t n = 0; n < c->columns; n++) {
            double z = 0;
            for (int64_t k = 0; k < c->channels; k++) {
                z += (double)ra_bf16_to_f32(d->x[r * stride + k]) *
                     ra_bf16_to_f32(d->w[n * c->channels + k]);
            }
            sum += exp(z);
            picked = n == d->target[r] ? z : picked;
        }
        d->want[r] = d->target[r] < 0 ? 0 : picked - log(sum);
    }
}

static head_data_t make(const head_case_t *c)
{
    uint64_t seed = 11;
    int64_t stride = c->channels + c->padding, bytes = c->rows * 4;
    float spread = 24.0f / (float)sqrt((double)c->channels); /* logits of some units */
    head_data_t d = {.x = numbers(c->rows * stride, &seed, -1, 1),
                     .w = numbers(c->columns * c->channels, &seed, -spread, spread),
                     .target = malloc((size_t)bytes),
                     .want = malloc((size_t)c->rows * sizeof(double))};
    assert_true(d.target != NULL && d.want != NULL);
    for (int64_t r = 0; r < c->rows; r++) {
        d.target[r] = (int32_t)(test_random_u64(&seed) % (uint64_t)c->columns);
    }
    d.target[c->rows / 2] = -1;
    d.target[0] = (int32_t)c->columns - 1;
    expect(c, &d);
    d.gpu_x = on_gpu(d.x, c->rows * stride * 2);
    d.gpu_w = on_gpu(d.w, c->columns * c->channels * 2);
    d.gpu_target = on_gpu(d.target, bytes);
    ok(ra_device_alloc(device, bytes, &d.gpu_m));
    ok(ra_device_alloc(device, bytes, &d.gpu_l));
    ok(ra_device_alloc(device, bytes, &d.gpu_picked));
    ok(ra_device_alloc(device, bytes, &d.gpu_out));
    ok(ra_device_alloc(device, ra_head_sm90_parts(c->rows, c->columns), &d.parts));
    return d;
}

static void drop(head_data_t *d)
{
    void *const memory[] = {d->gpu_x, d->gpu_w,      d->gpu_target, d->gpu_m,
                            d->gpu_l, d->gpu_picked, d->gpu_out,    d->parts};
    for (size_t i = 0; i < sizeof(memory) / sizeof(*memory); i++) {
        ra_device_free(device, memory[i]);
    }
    free(d->x), free(d->w), free(d->target), free(d->want);
}

/* Rows [begin, begin + rows) of a case through the kernel, block by block. */
static ra_status_t score(const head_case_t *c, const head_data_t *d, int64_t begin, int64_t rows,
                         float *got)
{
    float *m = (float *)d->gpu_m, *l = (float *)d->gpu_l, *picked = (float *)d->gpu_picked;
    const int32_t *target = (const int32_t *)d->gpu_target + begin;
    ok(ra_op_lse_reset(m, l, picked, rows, stream));
    for (int64_t first = 0; first < c->columns; first += c->block) {
        int64_t columns = c->columns - first < c->block ? c->columns - first : c->block;
        ra_head_fold_t call = {.x = (const uint16_t *)d->gpu_x + begin * (c->channels + c->padding),
                               .x_stride = c->channels + c->padding,
                               .rows = rows,
                               .channels = c->channels,
                               .weight = (const uint16_t *)d->gpu_w + first * c->channels,
                               .columns = columns,
                               .first = first,
                               .target = target,
                               .m = m,
                               .l = l,
                               .picked = picked,
                               .parts = d->parts};
        ra_status_t status = ra_head_sm90_fold(&call, ra_stream_cuda(stream));
        if (status != RA_OK) {
            return status;
        }
    }
    ok(ra_op_log_prob(picked, target, m, l, 1, rows, (float *)d->gpu_out, stream));
    ok(ra_stream_copy(stream, got, d->gpu_out, rows * 4));
    return ra_stream_sync(stream);
}

static void check(const head_case_t *c)
{
    head_data_t d = make(c);
    float *got = malloc((size_t)c->rows * sizeof(*got)), alone, again;
    assert_non_null(got);
    test_poison(got, c->rows);
    ra_status_t status = score(c, &d, 0, c->rows, got);
    if (status == RA_ERR_UNSUPPORTED) {
        free(got), drop(&d);
        skip(); /* another GPU */
    }
    ok(status);
    /* Logits to 30, each an fp32 sum of up to 2,048 products of that size. */
    test_near(got, d.want, c->rows, 1e-4, 4e-6, "log-probability");
    int64_t row = c->rows - 1;
    ok(score(c, &d, row, 1, &alone)); /* a row alone has the bits it has among others */
    assert_memory_equal(&alone, &got[row], sizeof(alone));
    ok(score(c, &d, row, 1, &again));
    assert_memory_equal(&alone, &again, sizeof(alone));
    free(got);
    drop(&d);
}

static void log_probabilities_match_products_in_double(void **state)
{
    static const head_case_t cases[] = {
        {1, 64, 64, 0, 64},         {5, 256, 128, 0, 256},   {64, 300, 72, 8, 300},
        {129, 1000, 64, 0, 512},    {300, 777, 256, 8, 400}, {257, 2048, 2048, 0, 1024},
        {1100, 1300, 192, 0, 650},  {2500, 600, 64, 0, 600}, {40, 20000, 64, 0, 16896},
        {4500, 2000, 64, 64, 1000},
    };
    (void)state;
    if (device == NULL) {
        skip();
    }
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        check(&cases[i]);
    }
}

static void other_shapes_are_left_to_the_caller(void **state)
{
    (void)state;
    if (device == NULL) {
        skip();
    }
    ra_head_fold_t call = {.rows = 4, .columns = 16, .channels = 64, .x_stride = 64};
    assert_int_equal(ra_head_sm90_fold(&call, ra_stream_cuda(stream)), RA_ERR_UNSUPPORTED);
    call.columns = 256;
    call.channels = 60;
    assert_int_equal(ra_head_sm90_fold(&call, ra_stream_cuda(stream)), RA_ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_probabilities_match_products_in_double),
        cmocka_unit_test(other_shapes_are_left_to_the_caller),
    };
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
