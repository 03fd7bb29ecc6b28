/* The CUDA kernels of moe/ but the router one by one, against loops in double. */
#include "moe/experts_cuda.h"
#include "tests/cuda_support.h"
#include <stdbool.h>
#include <string.h>

/* ---- sort ---------------------------------------------------------------------------------- */

/* Every token picks k ascending experts; `hot` per cent of tokens pick the same ones. */
static void draw_choices(int64_t rows, int32_t k, int32_t experts, int hot, uint64_t *seed,
                         int32_t *expert)
{
    for (int64_t t = 0; t < rows; t++) {
        bool same = (int)(test_random_u64(seed) % 100) < hot;
        for (int32_t j = 0, e = 0; j < k; j++, e++) {
            int32_t room = experts - (k - j) - e;
            e +=
                same || room <= 0 ? 0 : (int32_t)(test_random_u64(seed) % (uint64_t)(room + 1)) / 2;
            expert[t * k + j] = e;
        }
    }
}

static void sort_once(int64_t rows, int32_t k, int32_t experts, int32_t first, int32_t last,
                      int hot)
{
    uint64_t seed = (uint64_t)rows + 1;
    int64_t slots = rows * k, capacity = ra_moe_cuda_sorted_rows(slots, last - first);
    int64_t max_tiles = ra_moe_cuda_tiles(slots, last - first);
    int32_t *expert = malloc((size_t)slots * 4 + 4);
    draw_choices(rows, k, experts, hot, &seed, expert);
    int32_t *d_expert = device_array((size_t)slots * 4, expert);
    ra_moe_cuda_sort_t sort = {
        .expert = d_expert,
        .rows = rows,
        .top_k = k,
        .first = first,
        .last = last,
        .position = device_array((size_t)slots * 4, NULL),
        .source = device_array((size_t)capacity * 4, NULL),
        .tiles = device_array((size_t)max_tiles * sizeof(ra_moe_tile_t), NULL),
        .tile_count = device_array(4, NULL),
        .scratch = device_array((size_t)ra_moe_cuda_sort_scratch(rows, last - first) * 4, NULL)};
    assert_int_equal(ra_moe_cuda_sort(&sort, NULL), RA_OK);
    int32_t *position = host_array(sort.position, (size_t)slots * 4);
    int32_t *source = host_array(sort.source, (size_t)capacity * 4);
    ra_moe_tile_t *tiles = host_array(sort.tiles, (size_t)max_tiles * sizeof(ra_moe_tile_t));
    int32_t *tile_count = host_array(sort.tile_count, 4);
    int32_t row = 0, tile = 0;
    for (int32_t e = first; e < last; e++) {
        int32_t begin = row;
        for (int64_t s = 0; s < slots; s++) {
            if (expert[s] == e) {
                assert_int_equal(position[s], row);
                assert_int_equal(source[row++], s / k);
            }
        }
        for (int32_t at = begin; at < row; at += RA_MOE_TILE_ROWS) {
            assert_int_equal(tiles[tile].row, at);
            assert_int_equal(tiles[tile].rows,
                             row - at < RA_MOE_TILE_ROWS ? row - at : RA_MOE_TILE_ROWS);
            assert_int_equal(tiles[tile++].group, e - first);
        }
        for (; row % RA_MOE_ROW_PAD != 0; row++) {
            assert_int_equal(source[row], -1);
        }
    }
    for (int64_t s = 0; s < slots; s++) {
        assert_true((position[s] == -1) == (expert[s] < first || expert[s] >= last));
    }
    assert_int_equal(tile_count[0], tile);
    assert_true(row <= capacity && tile <= max_tiles);
    cudaFree(d_expert);
    cudaFree(sort.scratch);
    free(expert);
    free(position);
    free(source);
    free(tiles);
    free(tile_count);
}

static void slots_are_sorted_by_expert_and_then_by_token(void **unused)
{
    (void)unused;
    skip_without_gpu();
    static const int64_t rows[] = {0, 1, 31, 128, 129, 1000};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        sort_once(rows[i], 8, 256, 0, 256, 0);
        sort_once(rows[i], 8, 256, 64, 128, 30);
        sort_once(rows[i], 1, 5, 0, 5, 0);
        sort_once(rows[i], 6, 6, 0, 3, 0);
        sort_once(rows[i], 8, 256, 7, 7, 0);
        sort_once(rows[i], 3, 1500, 0, 1500, 50);
    }
    sort_once(40000, 2, 20, 0, 20, 100);
}

/* ---- grouped products ---------------------------------------------------------------------- */

/* Rows of each group of the grouped cases. */
static const int32_t group_rows[] = {0, 1, 63, 64, 65, 127, 128, 129, 0, 300, 192, 17};
enum { GROUPS = sizeof(group_rows) / sizeof(group_rows[0]), PAD = 8 };

typedef struct product {
    int64_t n, k, x_rows;
    ra_dtype_t dtype, y_dtype;
    bool swiglu, grouped, gather, simt;
    int32_t repeat;
    double *x, *w;   /* [x_rows, k], [groups, parts n, repeat k] */
    int32_t *source; /* [y_rows] */
    ra_moe_tile_t tiles[64];
    int32_t tile_count;
    int64_t y_rows;
} product_t;

static size_t element_of(ra_dtype_t dtype)
{
    return dtype == RA_F32 ? 4 : 2;
}

/* Random values of the type, rows `stride` apart; the same in double. */
static void *draw(ra_dtype_t dtype, int64_t rows, int64_t cols, int64_t stride, float size,
                  uint64_t *seed, double **wide_p)
{
    char *values = malloc((size_t)(rows * stride) * element_of(dtype));
    double *wide = malloc((size_t)(rows * cols) * sizeof(double));
    memset(values, 0xFF, (size_t)(rows * stride) * element_of(dtype)); /* NaN between rows */
    for (int64_t i = 0; i < rows * cols; i++) {
        float value = test_random(seed, -size, size);
        int64_t at = i / cols * stride + i % cols;
        if (dtype == RA_F32) {
            ((float *)values)[at] = value;
        } else {
            uint16_t bits = ra_bf16_from_f32(value);
            ((uint16_t *)values)[at] = bits;
            value = ra_bf16_to_f32(bits);
        }
        wide[i] = (double)value;
    }
    void *device = device_array((size_t)(rows * stride) * element_of(dtype), values);
    free(values);
    *wide_p = wide;
    return device;
}

static void list_tiles(product_t *p, uint64_t *seed)
{
    p->source = malloc(4096 * sizeof(int32_t));
    p->y_rows = 0;
    for (int32_t g = 0; g < GROUPS; g++) {
        int32_t begin = (int32_t)p->y_rows, end = begin + group_rows[g];
        for (int32_t at = begin; at < end; at += RA_MOE_TILE_ROWS) {
            int32_t left = end - at;
            p->tiles[p->tile_count++] =
                (ra_moe_tile_t){at, left < RA_MOE_TILE_ROWS ? left : RA_MOE_TILE_ROWS, g, 0};
        }
        for (; p->y_rows < end || p->y_rows % RA_MOE_ROW_PAD != 0; p->y_rows++) {
            int32_t from = (int32_t)(test_random_u64(seed) % (uint64_t)p->x_rows);
            p->source[p->y_rows] = p->y_rows < end ? from : -1;
        }
    }
}

static double dot(const double *x, const double *w, int64_t k, int32_t repeat)
{
    double sum = 0;
    for (int32_t r = 0; r < repeat; r++, w += k) {
        for (int64_t i = 0; i < k; i++) {
            sum += x[i] * w[i];
        }
    }
    return sum;
}

static double want_at(const product_t *p, int32_t group, int64_t row, int64_t n)
{
    const int64_t wk = p->k * p->repeat, parts = p->swiglu ? 2 : 1;
    const double *x = p->x + (p->gather ? p->source[row] : row) * p->k;
    const double *w = p->w + (group * parts * p->n + n) * wk;
    double a = dot(x, w, p->k, p->repeat);
    return p->swiglu ? a / (1 + exp(-a)) * dot(x, w + p->n * wk, p->k, 1) : a;
}

/* Sums of k products of numbers in [-1, 1] and [-1, 1] / sqrt(k): fp32 sums err by some 1e-6, a
 * bf16 result by its rounding, 2^-8. */
static void check_product(const product_t *p, const char *y, int64_t y_stride)
{
    const bool f32 = p->y_dtype == RA_F32;
    for (int32_t t = 0; t < p->tile_count; t++) {
        for (int64_t i = 0; i < p->tiles[t].rows * p->n; i++) {
            int64_t row = p->tiles[t].row + i / p->n, n = i % p->n, at = row * y_stride + n;
            double want = want_at(p, p->tiles[t].group, row, n);
            double got =
                (double)(f32 ? ((const float *)y)[at] : ra_bf16_to_f32(((const uint16_t *)y)[at]));
            double bound = 1e-5 + fabs(want) * (f32 ? 1e-6 : 0x1.01p-8);
            if (!(fabs(got - want) <= bound)) {
                fail_msg("n %d k %d swiglu %d gather %d simt %d: row %d of group %d, column %d: "
                         "got %.9g, want %.9g",
                         (int)p->n, (int)p->k, p->swiglu, p->gather, p->simt, (int)row,
                         p->tiles[t].group, (int)n, got, want);
            }
        }
    }
    for (int64_t row = 0; row < p->y_rows; row++) {
        for (int64_t n = p->n; n < y_stride; n++) { /* nothing beyond a row is written */
            size_t at = (size_t)(row * y_stride + n) * element_of(p->y_dtype);
            assert_true((unsigned char)y[at] == 0xFF && (unsigned char)y[at + 1] == 0xFF);
        }
    }
}

static void run_product(product_t p)
{
    uint64_t seed = (uint64_t)(p.n * 1000 + p.k);
    p.repeat = p.repeat > 0 ? p.repeat : 1;
    const int64_t parts = p.swiglu ? 2 : 1, groups = p.grouped ? GROUPS : 1;
    if (p.grouped) {
        p.x_rows = p.gather ? 97 : 4096;
        list_tiles(&p, &seed);
        p.x_rows = p.gather ? p.x_rows : p.y_rows;
    } else {
        p.y_rows = p.x_rows;
        for (int32_t at = 0; at < p.x_rows; at += RA_MOE_TILE_ROWS) {
            int32_t left = (int32_t)p.x_rows - at;
            p.tiles[p.tile_count++] =
                (ra_moe_tile_t){at, left < RA_MOE_TILE_ROWS ? left : RA_MOE_TILE_ROWS, 0, 0};
        }
    }
    const int64_t x_stride = p.k + PAD, y_stride = p.n + PAD, wk = p.k * p.repeat;
    void *x = draw(p.dtype, p.x_rows, p.k, x_stride, 1, &seed, &p.x);
    void *w = draw(p.dtype, groups * parts * p.n, wk, wk, 1 / sqrtf((float)wk), &seed, &p.w);
    int32_t *source = p.gather ? device_array((size_t)p.y_rows * 4, p.source) : NULL;
    ra_moe_tile_t *tiles = device_array(sizeof(p.tiles), p.tiles);
    int32_t *tile_count = device_array(4, &p.tile_count);
    size_t y_bytes = (size_t)(p.y_rows * y_stride) * element_of(p.y_dtype);
    char *results[2];
    for (int i = 0; i < 2; i++) {
        ra_moe_cuda_gemm_t call = {.dtype = p.dtype,
                                   .y_dtype = p.y_dtype,
                                   .x = x,
                                   .x_rows = p.x_rows,
                                   .x_stride = x_stride,
                                   .source = source,
                                   .weight = w,
                                   .groups = (int32_t)groups,
                                   .repeat = p.repeat,
                                   .swiglu = p.swiglu,
                                   .n = p.n,
                                   .k = p.k,
                                   .tiles = p.grouped ? tiles : NULL,
                                   .tile_count = tile_count,
                                   .max_tiles = p.tile_count + 5,
                                   .y = device_array(y_bytes, NULL),
                                   .y_rows = p.y_rows,
                                   .y_stride = y_stride};
        assert_int_equal(p.simt ? ra_moe_simt_gemm(&call, NULL) : ra_moe_sm90_gemm(&call, NULL),
                         RA_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        results[i] = host_array(call.y, y_bytes);
    }
    check_product(&p, results[0], y_stride);
    assert_memory_equal(results[0], results[1], y_bytes);
    cudaFree(x);
    cudaFree(w);
    cudaFree(source);
    cudaFree(tiles);
    cudaFree(tile_count);
    free(p.x);
    free(p.w);
    free(p.source);
    free(results[0]);
    free(results[1]);
}

static void hopper_products_equal_the_loop(void **unused)
{
    (void)unused;
    skip_without_hopper();
    static const int64_t sizes[][2] = {{128, 64},  {8, 8},     {136, 72}, {64, 264},
                                       {256, 320}, {264, 512}, {520, 128}};
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        for (int variant = 0; variant < 6; variant++) {
            product_t p = {.n = sizes[s][0],
                           .k = sizes[s][1],
                           .dtype = RA_BF16,
                           .y_dtype = variant == 2 || variant == 5 ? RA_F32 : RA_BF16,
                           .swiglu = variant % 3 == 0,
                           .grouped = true,
                           .gather = variant >= 3};
            run_product(p);
            p.grouped = p.gather = false;
            p.x_rows = variant >= 3 ? 1 : 333;
            run_product(p);
        }
    }
    run_product((product_t){
        .n = 256, .k = 192, .x_rows = 150, .dtype = RA_BF16, .y_dtype = RA_F32, .repeat = 3});
}

static void portable_products_equal_the_loop(void **unused)
{
    (void)unused;
    skip_without_gpu();
    static const int64_t sizes[][2] = {{1, 1}, {17, 50}, {64, 33}, {136, 128}};
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        for (int variant = 0; variant < 12; variant++) {
            product_t p = {.n = sizes[s][0],
                           .k = sizes[s][1],
                           .dtype = variant % 3 == 0 ? RA_F32 : RA_BF16,
                           .y_dtype = variant % 3 == 2 ? RA_BF16 : RA_F32,
                           .swiglu = variant / 3 % 2 == 0,
                           .grouped = true,
                           .gather = variant / 6 == 0,
                           .simt = true};
            run_product(p);
        }
    }
    run_product((product_t){.n = 20, .k = 19, .x_rows = 70, .repeat = 3, .simt = true});
}

static void hopper_products_refuse_what_they_cannot_read(void **unused)
{
    (void)unused;
    skip_without_hopper();
    ra_moe_cuda_gemm_t call = {.dtype = RA_BF16,
                               .y_dtype = RA_BF16,
                               .x_rows = 1,
                               .x_stride = 16,
                               .groups = 1,
                               .n = 16,
                               .k = 16,
                               .y_rows = 1,
                               .y_stride = 16};
    ra_moe_cuda_gemm_t odd = call;
    odd.n = 12;
    assert_int_equal(ra_moe_sm90_gemm(&odd, NULL), RA_ERR_UNSUPPORTED);
    odd = call;
    odd.x_stride = 20;
    assert_int_equal(ra_moe_sm90_gemm(&odd, NULL), RA_ERR_UNSUPPORTED);
    odd = call;
    odd.dtype = odd.y_dtype = RA_F32;
    assert_int_equal(ra_moe_sm90_gemm(&odd, NULL), RA_ERR_UNSUPPORTED);
    odd = call;
    odd.x = (const char *)8;
    assert_int_equal(ra_moe_sm90_gemm(&odd, NULL), RA_ERR_UNSUPPORTED);
}

/* ---- combine ------------------------------------------------------------------------------- */

static void combine_once(ra_dtype_t dtype, int64_t rows, int64_t hidden, int32_t k, bool shared,
                         bool accumulate)
{
    uint64_t seed = 17;
    const int64_t slots = rows * k, stride = hidden + 4;
    double *out, *home;
    float *weight = malloc((size_t)slots * 4), *y = malloc((size_t)(rows * stride) * 4);
    int32_t *position = malloc((size_t)slots * 4);
    test_fill(weight, slots, &seed, 0, 1);
    test_fill(y, rows * stride, &seed, -1, 1);
    for (int64_t s = 0; s < slots; s++) {
        position[s] = (int32_t)((s * 7 + 3) % slots);
    }
    ra_moe_cuda_combine_t call = {.dtype = dtype,
                                  .rows = rows,
                                  .hidden = hidden,
                                  .top_k = k,
                                  .position = device_array((size_t)slots * 4, position),
                                  .weight = device_array((size_t)slots * 4, weight),
                                  .out = draw(dtype, slots, hidden, hidden, 1, &seed, &out),
                                  .accumulate = accumulate,
                                  .y_stride = stride};
    call.shared = draw(dtype, rows, hidden, hidden, 1, &seed, &home);
    void *home_device = (void *)(uintptr_t)call.shared;
    call.shared = shared ? home_device : NULL;
    call.y = device_array((size_t)(rows * stride) * 4, accumulate ? y : NULL);
    assert_int_equal(ra_moe_cuda_combine(&call, NULL), RA_OK);
    float *got = host_array(call.y, (size_t)(rows * stride) * 4);
    for (int64_t i = 0; i < rows * hidden; i++) {
        int64_t t = i / hidden, d = i % hidden;
        double want = accumulate ? (double)y[t * stride + d] : 0;
        for (int32_t j = 0; j < k; j++) {
            want += (double)weight[t * k + j] * out[position[t * k + j] * hidden + d];
        }
        want += shared ? home[i] : 0;
        if (!(fabs((double)got[t * stride + d] - want) <= 2e-6)) { /* a dozen fp32 roundings */
            fail_msg("row %d column %d: got %.9g, want %.9g", (int)t, (int)d,
                     (double)got[t * stride + d], want);
        }
    }
    cudaFree((void *)(uintptr_t)call.position);
    cudaFree((void *)(uintptr_t)call.weight);
    cudaFree((void *)(uintptr_t)call.out);
    cudaFree(home_device);
    free(out);
    free(home);
    free(weight);
    free(position);
    free(y);
    free(got);
}

static void results_are_summed_in_the_order_of_the_slots(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (int variant = 0; variant < 8; variant++) {
        ra_dtype_t dtype = variant & 1 ? RA_BF16 : RA_F32;
        combine_once(dtype, 37, 264, 8, variant & 2, variant & 4);
        combine_once(dtype, 5, 51, 3, variant & 2, variant & 4);
        combine_once(dtype, 1, 2056, 1, variant & 2, variant & 4);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(slots_are_sorted_by_expert_and_then_by_token),
        cmocka_unit_test(hopper_products_equal_the_loop),
        cmocka_unit_test(portable_products_equal_the_loop),
        cmocka_unit_test(hopper_products_refuse_what_they_cannot_read),
        cmocka_unit_test(results_are_summed_in_the_order_of_the_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
