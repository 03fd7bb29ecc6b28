/* Mirrors model/head_cuda.h: products and log-sum-exp in double, of bf16 operands. */
#include "base/device_cuda.h"
#include "model/head_cuda.h"
#include "model/layer_ops.h"
#include "tests/model/gpu_arrays.h"
#include <string.h>

typedef struct head_case {
    int64_t rows, columns, channels, padding, block; /* block: columns of a call */
} head_case_t;

/* x and W, the calls' parts, and what they should give. */
typedef struct head_data {
    array_t x, w, m, l, picked, out;
    int32_t *target;
    void *gpu_target, *parts;
    double *want; /* [rows] log-probabilities of the targets */
} head_data_t;

static void expect(const head_case_t *c, head_data_t *d)
{
    int64_t stride = c->channels + c->padding;
    for (int64_t r = 0; r < c->rows; r++) {
        double sum = 0, picked = 0;
        for (int64_t n = 0; n < c->columns; n++) {
            double z = 0;
            for (int64_t k = 0; k < c->channels; k++) {
                z += (double)d->x.host[r * stride + k] * d->w.host[n * c->channels + k];
            }
            sum += exp(z);
            picked = n == d->target[r] ? z : picked;
        }
        d->want[r] = d->target[r] < 0 ? 0 : picked - log(sum);
    }
}

static head_data_t make_data(const head_case_t *c)
{
    uint64_t seed = 11;
    int64_t stride = c->channels + c->padding, bytes = c->rows * 4;
    float spread = 24.0f / (float)sqrt((double)c->channels); /* logits of some units */
    head_data_t d = {.x = make(c->rows * stride, RA_BF16, &seed, -1, 1),
                     .w = make(c->columns * c->channels, RA_BF16, &seed, -spread, spread),
                     .m = poisoned(c->rows, RA_F32),
                     .l = poisoned(c->rows, RA_F32),
                     .picked = poisoned(c->rows, RA_F32),
                     .out = poisoned(c->rows, RA_F32),
                     .target = malloc((size_t)bytes),
                     .want = malloc((size_t)c->rows * sizeof(double))};
    assert_true(d.target != NULL && d.want != NULL);
    for (int64_t r = 0; r < c->rows; r++) {
        d.target[r] = (int32_t)(test_random_u64(&seed) % (uint64_t)c->columns);
    }
    d.target[c->rows / 2] = -1;
    d.target[0] = (int32_t)c->columns - 1;
    expect(c, &d);
    d.gpu_target = on_gpu(d.target, bytes);
    ok(ra_device_alloc(device, ra_head_sm90_parts(c->rows, c->columns), &d.parts));
    return d;
}

static void drop_data(head_data_t *d)
{
    drop(&d->x), drop(&d->w), drop(&d->m), drop(&d->l), drop(&d->picked), drop(&d->out);
    ra_device_free(device, d->gpu_target);
    ra_device_free(device, d->parts);
    free(d->target), free(d->want);
}

/* Rows [begin, begin + rows) of a case through the kernel, block by block. */
static ra_status_t score(const head_case_t *c, const head_data_t *d, int64_t begin, int64_t rows,
                         float *got)
{
    float *m = (float *)d->m.gpu, *l = (float *)d->l.gpu, *picked = (float *)d->picked.gpu;
    const int32_t *target = (const int32_t *)d->gpu_target + begin;
    ok(ra_op_lse_reset(m, l, picked, rows, stream));
    for (int64_t first = 0; first < c->columns; first += c->block) {
        int64_t columns = c->columns - first < c->block ? c->columns - first : c->block;
        ra_head_fold_t call = {.x = at(&d->x, begin * (c->channels + c->padding)),
                               .x_stride = c->channels + c->padding,
                               .rows = rows,
                               .channels = c->channels,
                               .weight = at(&d->w, first * c->channels),
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
    ok(ra_op_log_prob(picked, target, m, l, 1, rows, (float *)d->out.gpu, stream));
    ok(ra_stream_copy(stream, got, d->out.gpu, rows * 4));
    return ra_stream_sync(stream);
}

static void check(const head_case_t *c)
{
    head_data_t d = make_data(c);
    float *got = malloc((size_t)c->rows * sizeof(*got)), alone, again;
    assert_non_null(got);
    test_poison(got, c->rows);
    ra_status_t status = score(c, &d, 0, c->rows, got);
    if (status == RA_ERR_UNSUPPORTED) {
        free(got), drop_data(&d);
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
    drop_data(&d);
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
    skip_without_gpu();
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        check(&cases[i]);
    }
}

static void other_shapes_are_left_to_the_caller(void **state)
{
    (void)state;
    skip_without_gpu();
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
