#include "cli/doctor_gpu.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/device.h"
#include "base/gemm.h"
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COPY_BYTES = 256 << 20, TRIES = 3, COPIES = 4, GEMM_ROWS = 8192, GEMM_SIDE = 4096 };

/* What the measurements of one GPU work with. */
typedef struct bench {
    ra_device_t *device;
    ra_stream_t *stream;
    void *a, *b;  /* COPY_BYTES on the device */
    void *pinned; /* COPY_BYTES on the host */
} bench_t;

static void close_bench(bench_t *bench)
{
    if (bench->device != NULL) {
        ra_device_free(bench->device, bench->a);
        ra_device_free(bench->device, bench->b);
        ra_device_free_host(bench->device, bench->pinned);
        ra_stream_destroy(bench->stream);
        ra_device_close(bench->device);
    }
    *bench = (bench_t){.device = NULL};
}

static ra_status_t open_bench(int index, bench_t *bench)
{
    RA_TRY(ra_device_open("cuda", index, NULL, &bench->device));
    RA_TRY(ra_stream_create(bench->device, &bench->stream));
    RA_TRY(ra_device_alloc(bench->device, COPY_BYTES, &bench->a));
    RA_TRY(ra_device_alloc(bench->device, COPY_BYTES, &bench->b));
    RA_TRY(ra_device_alloc_host(bench->device, COPY_BYTES, &bench->pinned));
    memset(bench->pinned, 0x5a, COPY_BYTES);
    return ra_stream_copy(bench->stream, bench->a, bench->pinned, COPY_BYTES);
}

/* Bytes copied a second, best of several tries. */
static ra_status_t time_copy(ra_stream_t *stream, void *to, const void *from, double *rate_p)
{
    RA_TRY(ra_stream_copy(stream, to, from, COPY_BYTES));
    RA_TRY(ra_stream_sync(stream));
    for (int i = 0; i < TRIES; i++) {
        double start = ra_clock_s();
        for (int c = 0; c < COPIES; c++) {
            RA_TRY(ra_stream_copy(stream, to, from, COPY_BYTES));
        }
        RA_TRY(ra_stream_sync(stream));
        *rate_p = fmax(*rate_p, (double)COPY_BYTES * COPIES / (ra_clock_s() - start));
    }
    return RA_OK;
}

/* Element i of x and W: bf16 of a number in [-1, 1) that repeats after SAMPLES elements, an odd
 * number, so that rows differ. */
enum { SAMPLES = 999983 };

static void fill_samples(uint16_t *samples, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint64_t z = (uint64_t)(i % SAMPLES + 1) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9u;
        samples[i] = ra_bf16_from_f32((float)((double)(z >> 11) * 0x1p-52 - 1.0));
    }
}

/* A few elements of the last row against sums in double. */
static bool last_row_is_right(const uint16_t *samples, const float *row)
{
    const uint16_t *x = samples + (int64_t)(GEMM_ROWS - 1) * GEMM_SIDE;
    for (int64_t n = 0; n < GEMM_SIDE; n += 97) {
        double sum = 0;
        for (int64_t k = 0; k < GEMM_SIDE; k++) {
            sum += (double)ra_bf16_to_f32(x[k]) * ra_bf16_to_f32(samples[n * GEMM_SIDE + k]);
        }
        if (!(fabs(sum - (double)row[n]) <= 1e-2)) {
            return false;
        }
    }
    return true;
}

static ra_status_t run_gemm(const bench_t *bench, const ra_gemm_weight_t *weight,
                            const uint16_t *samples, ra_gpu_t *gpu)
{
    static float row[GEMM_SIDE];
    const double flops = 2.0 * GEMM_ROWS * GEMM_SIDE * GEMM_SIDE;
    ra_gemm_job_t job = {.weight = weight,
                         .x = bench->a,
                         .x_stride = GEMM_SIDE,
                         .rows = GEMM_ROWS,
                         .y = bench->b,
                         .y_stride = GEMM_SIDE,
                         .x_dtype = RA_BF16,
                         .y_dtype = RA_F32};
    RA_TRY(ra_gemm(&job, 1, false, bench->stream));
    RA_TRY(ra_stream_copy(bench->stream, row,
                          (float *)bench->b + (int64_t)(GEMM_ROWS - 1) * GEMM_SIDE, sizeof(row)));
    RA_TRY(ra_stream_sync(bench->stream));
    gpu->gemm_right = last_row_is_right(samples, row);
    for (int i = 0; i < TRIES; i++) {
        double start = ra_clock_s();
        for (int c = 0; c < 4 * COPIES; c++) {
            RA_TRY(ra_gemm(&job, 1, false, bench->stream));
        }
        RA_TRY(ra_stream_sync(bench->stream));
        gpu->gemm = fmax(gpu->gemm, flops * 4 * COPIES / (ra_clock_s() - start));
    }
    return RA_OK;
}

static ra_status_t time_gemm(const bench_t *bench, ra_gpu_t *gpu)
{
    const int64_t count = (int64_t)GEMM_ROWS * GEMM_SIDE, extent[2] = {GEMM_SIDE, GEMM_SIDE};
    const ra_gemm_kernel_t *kernel;
    ra_gemm_weight_t *weight = NULL;
    ra_status_t status;
    uint16_t *samples = malloc((size_t)count * sizeof(*samples));

    if (samples == NULL) {
        return ra_fail(RA_ERR_NOMEM, "doctor", "cannot test GEMM on a GPU");
    }
    fill_samples(samples, count);
    ra_tensor_t view = ra_tensor_view(samples, RA_BF16, 2, extent);
    RA_TRY_GOTO(ra_stream_copy(bench->stream, bench->a, samples, count * 2), out);
    RA_TRY_GOTO(ra_gemm_select("auto", RA_DEVICE_CUDA, false, &kernel), out);
    RA_TRY_GOTO(ra_gemm_weight_create(kernel, &view, RA_BF16, bench->stream, &weight), out);
    RA_TRY_GOTO(run_gemm(bench, weight, samples, gpu), out);
out:
    ra_gemm_weight_destroy(weight);
    free(samples);
    return status;
}

static ra_status_t measure_alone(const bench_t *bench, ra_gpu_t *gpu)
{
    RA_TRY(time_copy(bench->stream, bench->b, bench->a, &gpu->device_copy));
    gpu->device_copy *= 2;
    RA_TRY(time_copy(bench->stream, bench->a, bench->pinned, &gpu->host_to_device));
    RA_TRY(time_copy(bench->stream, bench->pinned, bench->a, &gpu->device_to_host));
    return time_gemm(bench, gpu);
}

/* A GPU that another process fills cannot be measured; the rest of the report stands. */
static void measure(ra_gpu_report_t *report, bench_t *bench)
{
    for (int i = 0; i < report->count; i++) {
        ra_gpu_t *gpu = &report->gpu[i];
        ra_status_t status = open_bench(i, &bench[i]);
        if (status == RA_OK) {
            status = measure_alone(&bench[i], gpu);
        }
        if (status != RA_OK) {
            snprintf(gpu->measure_why, sizeof(gpu->measure_why), "%.255s", ra_last_error());
            close_bench(&bench[i]);
        }
    }
}

static void measure_link(const bench_t *from, const bench_t *to, ra_gpu_link_t *link)
{
    int access = 0, atomics = 0, a = ra_device_index(from->device), b = ra_device_index(to->device);
    cudaDeviceGetP2PAttribute(&access, cudaDevP2PAttrAccessSupported, a, b);
    cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, a, b);
    link->access = access != 0;
    link->native_atomics = atomics != 0;
    if (access && cudaSetDevice(a) == cudaSuccess) {
        cudaDeviceEnablePeerAccess(b, 0);
    }
    if (time_copy(from->stream, to->b, from->a, &link->rate) != RA_OK) {
        link->rate = 0;
    }
    cudaGetLastError(); /* enabling twice is no error here */
}

static void measure_links(ra_gpu_report_t *report, const bench_t *bench)
{
    for (int i = 0; i < report->count; i++) {
        for (int j = 0; j < report->count; j++) {
            if (i != j && bench[i].device != NULL && bench[j].device != NULL) {
                measure_link(&bench[i], &bench[j], &report->link[i][j]);
            }
        }
    }
}

static void name_versions(ra_gpu_report_t *report)
{
    int driver = 0, runtime = 0, nccl = 0, lt = (int)cublasLtGetVersion();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    ncclGetVersion(&nccl);
    snprintf(report->driver, sizeof(report->driver), "%d.%d", driver / 1000, driver % 1000 / 10);
    snprintf(report->runtime, sizeof(report->runtime), "%d.%d", runtime / 1000,
             runtime % 1000 / 10);
    snprintf(report->cublaslt, sizeof(report->cublaslt), "%d.%d.%d", lt / 10000, lt / 100 % 100,
             lt % 100);
    snprintf(report->nccl, sizeof(report->nccl), "%d.%d.%d", nccl / 10000, nccl / 100 % 100,
             nccl % 100);
}

static bool look(int index, ra_gpu_t *gpu)
{
    struct cudaDeviceProp properties;
    size_t free_bytes = 0, total = 0;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
        return false;
    }
    snprintf(gpu->name, sizeof(gpu->name), "%.255s", properties.name);
    gpu->major = properties.major;
    gpu->minor = properties.minor;
    gpu->multiprocessors = properties.multiProcessorCount;
    gpu->memory_bytes = (int64_t)properties.totalGlobalMem;
    if (cudaSetDevice(index) == cudaSuccess && cudaMemGetInfo(&free_bytes, &total) == cudaSuccess) {
        gpu->memory_free = (int64_t)free_bytes;
    }
    return true;
}

ra_status_t ra_probe_gpus(ra_gpu_report_t *report)
{
    bench_t bench[RA_GPUS_MOST] = {{.device = NULL}};
    int count = 0;

    *report = (ra_gpu_report_t){.built = true};
    name_versions(report);
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        snprintf(report->why, sizeof(report->why), "%s",
                 error == cudaSuccess || error == cudaErrorNoDevice ? "no GPU on this machine"
                                                                    : cudaGetErrorString(error));
        return RA_OK;
    }
    count = count < RA_GPUS_MOST ? count : RA_GPUS_MOST;
    while (report->count < count && look(report->count, &report->gpu[report->count])) {
        report->count++;
    }
    measure(report, bench);
    measure_links(report, bench);
    for (int i = 0; i < report->count; i++) {
        close_bench(&bench[i]);
    }
    return RA_OK;
}
