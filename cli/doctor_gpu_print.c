#include "cli/doctor_gpu.h"
#include "cli/json_write.h"

#include <stdio.h>

static const double GIB = 1073741824;

static void print_links(const ra_gpu_report_t *report)
{
    for (int i = 0; i < report->count; i++) {
        for (int j = 0; j < report->count; j++) {
            const ra_gpu_link_t *link = &report->link[i][j];
            if (i != j) {
                printf("link   gpu %d to %d: %s%s, %.1f GB/s\n", i, j,
                       link->access ? "peer access" : "through host memory",
                       link->native_atomics ? ", native atomics (NVLink)" : "", link->rate * 1e-9);
            }
        }
    }
}

void ra_gpus_print(const ra_gpu_report_t *report)
{
    if (!report->built) {
        printf("cuda   %s\n", report->why);
        return;
    }
    printf("cuda   driver %s, runtime %s, cuBLASLt %s, NCCL %s\n", report->driver, report->runtime,
           report->cublaslt, report->nccl);
    if (report->why[0] != '\0') {
        printf("gpu    none: %s\n", report->why);
    }
    for (int i = 0; i < report->count; i++) {
        const ra_gpu_t *gpu = &report->gpu[i];
        printf("gpu    %d: %s   compute capability %d.%d   %d multiprocessors   %.1f GiB, free "
               "%.1f GiB\n",
               i, gpu->name, gpu->major, gpu->minor, gpu->multiprocessors,
               (double)gpu->memory_bytes / GIB, (double)gpu->memory_free / GIB);
        if (gpu->measure_why[0] != '\0') {
            printf("test   gpu %d: not measured: %s\n", i, gpu->measure_why);
            continue;
        }
        printf("test   gpu %d copy %.0f GB/s read and written; host to device %.1f GB/s, back "
               "%.1f GB/s\n",
               i, gpu->device_copy * 1e-9, gpu->host_to_device * 1e-9, gpu->device_to_host * 1e-9);
        printf("test   gpu %d GEMM bf16: %s, %.0f TFLOP/s\n", i,
               gpu->gemm_right ? "right" : "WRONG", gpu->gemm * 1e-12);
    }
    print_links(report);
}

static void json_text(const char *before, const char *text)
{
    fputs(before, stdout);
    ra_json_write_string(stdout, text[0] == '\0' ? NULL : text);
}

static void json_rate(const char *before, double rate)
{
    fputs(before, stdout);
    ra_json_write_number(stdout, rate);
}

static void json_gpu(const ra_gpu_t *gpu)
{
    json_text("{\"name\":", gpu->name);
    printf(",\"compute_capability\":\"%d.%d\",\"multiprocessors\":%d,\"memory_bytes\":%lld,"
           "\"memory_free\":%lld",
           gpu->major, gpu->minor, gpu->multiprocessors, (long long)gpu->memory_bytes,
           (long long)gpu->memory_free);
    json_rate(",\"copy_bytes_per_second\":", gpu->device_copy);
    json_rate(",\"host_to_device_bytes_per_second\":", gpu->host_to_device);
    json_rate(",\"device_to_host_bytes_per_second\":", gpu->device_to_host);
    json_rate(",\"gemm_flops\":", gpu->gemm);
    printf(",\"gemm_right\":%s", gpu->gemm_right ? "true" : "false");
    json_text(",\"not_measured\":", gpu->measure_why);
    fputc('}', stdout);
}

void ra_gpus_print_json(const ra_gpu_report_t *report)
{
    const char *comma = "";
    printf(",\"cuda\":{\"built\":%s", report->built ? "true" : "false");
    json_text(",\"why_none\":", report->why);
    json_text(",\"driver\":", report->driver);
    json_text(",\"runtime\":", report->runtime);
    json_text(",\"cublaslt\":", report->cublaslt);
    json_text(",\"nccl\":", report->nccl);
    fputs(",\"gpus\":[", stdout);
    for (int i = 0; i < report->count; i++) {
        fputs(i > 0 ? "," : "", stdout);
        json_gpu(&report->gpu[i]);
    }
    fputs("],\"links\":[", stdout);
    for (int i = 0; i < report->count; i++) {
        for (int j = 0; j < report->count; j++) {
            const ra_gpu_link_t *link = &report->link[i][j];
            if (i != j) {
                printf("%s{\"from\":%d,\"to\":%d,\"peer_access\":%s,\"native_atomics\":%s", comma,
                       i, j, link->access ? "true" : "false",
                       link->native_atomics ? "true" : "false");
                json_rate(",\"bytes_per_second\":", link->rate);
                fputc('}', stdout);
                comma = ",";
            }
        }
    }
    fputs("]}", stdout);
}
