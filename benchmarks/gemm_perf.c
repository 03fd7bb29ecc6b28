/* The kernels of base/gemm.h at the shapes of the shipped configurations and of Ring-mini. */
#include "base/gemm.h"
#include "base/gemm_ref.h"
#include "benchmarks/bench.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    int64_t in, out;
} shapes[] = {{256, 768},   {256, 1280},  {256, 4096},  {256, 128}, {256, 64},
              {2048, 6144}, {2048, 2048}, {2048, 1024}, {2048, 512}};
static const int64_t row_counts[] = {1, 8, 64, 512, 4096};
static const char *const kernel_names[] = {"openblas", "packed"};

typedef struct timed {
    ra_gemm_job_t job;
    int64_t calls; /* short products are repeated, so that one timing is well above the clock */
    ra_stream_t *stream;
} timed_t;

static void multiply(void *arg)
{
    timed_t *timed = arg;
    for (int64_t i = 0; i < timed->calls; i++) {
        if (ra_gemm(&timed->job, 1, false, timed->stream) != RA_OK) {
            exit(5);
        }
    }
}

/* A few rows against the oracle; random signs let roundings cancel. */
static void check(bench_t *bench, const ra_tensor_t *w, const ra_gemm_job_t *job)
{
    int64_t out = w->extent[0], in = w->extent[1];
    double *want = bench_alloc(out * (int64_t)sizeof(*want));
    for (int64_t r = 0; r < job->rows; r += job->rows / 3 + 1) {
        ra_gemm_ref(w, (const float *)job->x + r * job->x_stride, job->x_stride, 1, want);
        for (int64_t n = 0; n < out; n++) {
            double error = fabs((double)((const float *)job->y)[r * job->y_stride + n] - want[n]);
            if (!(error <= (double)(in + 4) * 0x1p-23)) {
                bench_wrong(bench, "row %lld column %lld of K %lld N %lld: error %g", (long long)r,
                            (long long)n, (long long)in, (long long)out, error);
                free(want);
                return;
            }
        }
    }
    free(want);
}

static void measure(bench_t *bench, const char *name, const ra_tensor_t *w, const float *x,
                    float *y, int64_t rows)
{
    int64_t out = w->extent[0], in = w->extent[1];
    const ra_gemm_kernel_t *kernel;
    ra_gemm_weight_t *weight;
    if (ra_gemm_select(name, RA_DEVICE_CPU, false, &kernel) != RA_OK ||
        ra_gemm_weight_create(kernel, w, RA_F32, NULL, &weight) != RA_OK) {
        exit(5);
    }
    double flops = 2.0 * (double)rows * (double)in * (double)out;
    timed_t timed = {.job = {weight, x, in, rows, y, out},
                     .calls = flops < 2e8 ? (int64_t)(2e8 / flops) : 1,
                     .stream = bench->stream};
    for (int64_t i = 0; i < rows * out; i++) {
        y[i] = NAN;
    }
    bench_time_t time = bench_run(bench, multiply, &timed);
    if (bench->check) {
        check(bench, w, &timed.job);
    }
    double work = flops * (double)timed.calls;
    bench_row(bench, (bench_cell_t[]){BENCH_TEXT(name), BENCH_TEXT(ra_cpu_isa_name(ra_cpu_isa())),
                                      BENCH_TEXT(ra_dtype_name(w->dtype)), BENCH_NUMBER(in),
                                      BENCH_NUMBER(out), BENCH_NUMBER(rows),
                                      BENCH_NUMBER(time.median * 1e6 / (double)timed.calls),
                                      BENCH_NUMBER(work / time.median * 1e-9),
                                      BENCH_NUMBER(100.0 * work / time.peak_flops)});
    ra_gemm_weight_destroy(weight);
}

static const bench_column_t columns[] = {
    {"kernel", "%s"}, {"isa", "%s"},  {"dtype", "%s"},         {"K", "%.0f"},       {"N", "%.0f"},
    {"rows", "%.0f"}, {"us", "%.1f"}, {"gflop_per_s", "%.1f"}, {"pct_peak", "%.1f"}};

static void measure_shapes(bench_t *bench, ra_dtype_t dtype, int64_t only_k)
{
    enum { MAX_OUT = 6144, MAX_IN = 2048, MAX_ROWS = 4096 };
    float *w32 = bench_alloc((int64_t)MAX_OUT * MAX_IN * 4);
    uint16_t *w16 = bench_alloc((int64_t)MAX_OUT * MAX_IN * 2);
    float *x = bench_alloc((int64_t)MAX_ROWS * MAX_IN * 4);
    float *y = bench_alloc((int64_t)MAX_ROWS * MAX_OUT * 4);
    bench_fill(w32, (int64_t)MAX_OUT * MAX_IN, 1, -1.0f, 1.0f);
    bench_fill(x, (int64_t)MAX_ROWS * MAX_IN, 2, -1.0f, 1.0f);
    for (int64_t i = 0; i < (int64_t)MAX_OUT * MAX_IN; i++) {
        w16[i] = ra_bf16_from_f32(w32[i]);
    }
    for (size_t s = 0; s < RA_ARRAY_LEN(shapes); s++) {
        void *data = dtype == RA_BF16 ? (void *)w16 : (void *)w32;
        ra_tensor_t w = ra_tensor_view(data, dtype, 2, (int64_t[]){shapes[s].out, shapes[s].in});
        for (size_t r = 0; r < RA_ARRAY_LEN(row_counts); r++) {
            bool wanted = only_k == 0 || only_k == shapes[s].in;
            for (size_t k = 0; wanted && k < RA_ARRAY_LEN(kernel_names); k++) {
                measure(bench, kernel_names[k], &w, x, y, row_counts[r]);
            }
        }
    }
    free(w32);
    free(w16);
    free(x);
    free(y);
}

int main(int argc, char **argv)
{
    bench_flag_t flags[] = {
        {"--dtype", "bf16", "bf16|f32: type of the weights"},
        {"--k", "0", "only shapes with this inner size; 0 for all"},
        {"--isa", "widest", "widest|all: also the lower instruction sets, against their own peak"}};
    bench_t *bench =
        bench_open(argc, argv, "gemm_perf", "y = x W^T, 2 K N flops a row; kernels of base/gemm.h",
                   flags, (int)RA_ARRAY_LEN(flags));
    ra_dtype_t dtype = strcmp(flags[0].value, "f32") == 0 ? RA_F32 : RA_BF16;
    bool all = strcmp(flags[2].value, "all") == 0;
    bench_table(bench, "GEMM", columns, (int)RA_ARRAY_LEN(columns));
    for (int isa = all ? 0 : (int)bench->isa; isa <= (int)bench->isa; isa++) {
        ra_cpu_isa_force((ra_cpu_isa_t)isa);
        measure_shapes(bench, dtype, bench_int(&flags[1]));
    }
    return bench_close(bench);
}
