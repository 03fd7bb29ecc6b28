#define PCRE2_CODE_UNIT_WIDTH 8
#include "base/log.h"
#include "base/pool.h"
#include "cli/command.h"
#include "cli/doctor.h"
#include "cli/doctor_gpu.h"
#include "cli/json_write.h"
#include "cli/version_info.h"
#include "comm/ranks.h"
#include <cblas.h>
#include <cjson/cJSON.h>
#include <pcre2.h>
#include <stdarg.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

enum { RING_RANKS = 4 };

typedef struct report {
    ra_host_t host;
    int threads;
    double fma_one, fma_all, copy;
    ra_gemm_probe_t gemm[2];
    ra_ring_probe_t ring;
    ra_disk_probe_t disk;
    ra_gpu_report_t gpus;
    char blas[256], pcre2[64], xxhash[32];
    int warnings;
    char warning[8][160];
} report_t;

__attribute__((format(printf, 2, 3))) static void warn(report_t *report, const char *format, ...)
{
    if (report->warnings < (int)RA_ARRAY_LEN(report->warning)) {
        va_list args;
        va_start(args, format);
        vsnprintf(report->warning[report->warnings++], sizeof(report->warning[0]), format, args);
        va_end(args);
    }
}

static void name_libraries(report_t *report)
{
    unsigned xxhash = XXH_versionNumber();
    snprintf(report->blas, sizeof(report->blas), "%.240s", openblas_get_config());
    if (pcre2_config(PCRE2_CONFIG_VERSION, NULL) < (int)sizeof(report->pcre2)) {
        pcre2_config(PCRE2_CONFIG_VERSION, report->pcre2);
    }
    snprintf(report->xxhash, sizeof(report->xxhash), "%u.%u.%u", xxhash / 10000, xxhash / 100 % 100,
             xxhash % 100);
}

static void judge_gpus(report_t *report)
{
    for (int i = 0; i < report->gpus.count; i++) {
        const ra_gpu_t *gpu = &report->gpus.gpu[i];
        if (gpu->major < 8) {
            warn(report, "GPU %d is older than compute capability 8.0: no kernel runs on it", i);
        }
        if (gpu->measure_why[0] != '\0') {
            warn(report, "GPU %d could not be measured: %.100s", i, gpu->measure_why);
        }
    }
}

static void judge(report_t *report)
{
    const ra_host_t *host = &report->host;
    uint32_t jit = 0;
    if (ra_cpu_isa() == RA_CPU_GENERIC) {
        warn(report, "this CPU has no AVX2: kernels run in portable C, several times slower");
    }
    if (host->cores_allowed < host->cores_online) {
        warn(report, "the affinity mask allows %d of %d cores", host->cores_allowed,
             host->cores_online);
    }
    if (host->cgroup_cpus > 0 && host->cgroup_cpus < host->cores_allowed) {
        warn(report, "the control group allows %.1f CPUs, fewer than the %d cores of --threads",
             host->cgroup_cpus, host->cores_allowed);
    }
    if (host->open_files >= 0 && host->open_files < 256) {
        warn(report, "only %lld open files are allowed", (long long)host->open_files);
    }
    if (pcre2_config(PCRE2_CONFIG_JIT, &jit) < 0 || jit == 0) {
        warn(report, "PCRE2 was built without its compiler: tokenizing is slow");
    }
    for (int i = 0; i < 2; i++) {
        if (!report->gemm[i].repeats_equal) {
            warn(report, "GEMM %s: repeats differ in their bits", report->gemm[i].kernel);
        }
    }
    if (!report->disk.writable) {
        warn(report, "the current directory is not writable: %.100s", report->disk.message);
    } else if (!report->disk.rename_atomic) {
        warn(report, "rename is not atomic in the current directory: results are not safe there");
    } else if (report->disk.fsync_seconds > 0.1) {
        warn(report, "fsync takes %.0f ms here: small documents are bound by it",
             report->disk.fsync_seconds * 1e3);
    }
}

static ra_status_t examine(const ra_settings_t *settings, report_t *report)
{
    int64_t threads = ra_settings_int(settings, RA_SET_THREADS);
    report->threads = threads > 0 ? (int)threads : ra_pool_default_threads();
    ra_host_look(&report->host);
    name_libraries(report);
    RA_TRY(ra_probe_fma(report->threads, &report->fma_one, &report->fma_all));
    RA_TRY(ra_probe_gemm("openblas", report->threads, &report->gemm[0]));
    RA_TRY(ra_probe_gemm("packed", report->threads, &report->gemm[1]));
    RA_TRY(ra_probe_copy(&report->copy));
    RA_TRY(ra_probe_ring(ra_settings_text(settings, RA_SET_TRANSPORT), RING_RANKS,
                         ra_settings_real(settings, RA_SET_TIMEOUT), &report->ring));
    ra_probe_disk(".", &report->disk);
    RA_TRY(ra_probe_gpus(&report->gpus));
    judge(report);
    judge_gpus(report);
    return RA_OK;
}

static bool is_usable(const report_t *report)
{
    bool right = report->gemm[0].right && report->gemm[1].right && report->ring.wrong == 0;
    for (int i = 0; i < report->gpus.count; i++) {
        const ra_gpu_t *gpu = &report->gpus.gpu[i];
        right &= gpu->gemm_right || gpu->measure_why[0] != '\0';
    }
    return right;
}

static void print_bytes(const char *before, int64_t bytes, const char *unknown)
{
    if (bytes < 0) {
        printf("%s%s", before, unknown);
    } else {
        printf("%s%.1f GiB", before, (double)bytes / 1073741824);
    }
}

static void print_host(const report_t *report)
{
    const ra_host_t *host = &report->host;
    printf("ringattn %s (git %s, %s)\n", ra_version(), ra_version_commit(), ra_version_build());
    printf("host   %s   kernel %s   %s\n", host->name, host->kernel, host->libc);
    printf("cpu    %s   %d cores, %d allowed   kernels: %s\n", host->cpu, host->cores_online,
           host->cores_allowed, ra_cpu_isa_name(ra_cpu_isa()));
    print_bytes("memory ", host->memory_bytes, "unknown");
    print_bytes(", available ", host->memory_available, "unknown");
    print_bytes(", cgroup limit ", host->cgroup_limit, "none");
    print_bytes(", lockable ", host->lockable_bytes, "unlimited");
    printf("\nlibs   %s; PCRE2 %s; cJSON %s; utf8proc %s; xxhash %s\n", report->blas, report->pcre2,
           cJSON_Version(), utf8proc_version(), report->xxhash);
}

static void print_text(const report_t *report)
{
    const char *name, *doc;
    print_host(report);
    printf("device cpu%s\n", report->gpus.count > 0 ? ", cuda" : "");
    for (int i = 0; ra_transport_list(i, &name, &doc); i++) {
        printf("transport %s: %s\n", name, doc);
    }
    printf("test   FMA peak %.1f GFLOP/s on one thread, %.1f on %d\n", report->fma_one * 1e-9,
           report->fma_all * 1e-9, report->threads);
    for (int i = 0; i < 2; i++) {
        const ra_gemm_probe_t *gemm = &report->gemm[i];
        printf("test   GEMM %s: %s, 3 repeats %s, %.1f GFLOP/s\n", gemm->kernel,
               gemm->right ? "right" : "WRONG", gemm->repeats_equal ? "bit-equal" : "DIFFER",
               gemm->flops * 1e-9);
    }
    printf("test   memory copy %.1f GB/s read and written\n", report->copy * 1e-9);
    printf("test   ring of %d ranks, %lld rounds of %lld KiB: %lld wrong, %.1f GB/s in all\n",
           report->ring.ranks, (long long)report->ring.rounds, (long long)report->ring.bytes / 1024,
           (long long)report->ring.wrong, report->ring.bytes_per_second * 1e-9);
    ra_gpus_print(&report->gpus);
    if (report->disk.writable) {
        printf("fs     . writable, rename %s, fsync %.2f ms\n",
               report->disk.rename_atomic ? "atomic" : "NOT ATOMIC",
               report->disk.fsync_seconds * 1e3);
    }
    for (int i = 0; i < report->warnings; i++) {
        printf("WARN   %s\n", report->warning[i]);
    }
    printf("result: %s, %d warning%s\n", is_usable(report) ? "usable" : "NOT USABLE",
           report->warnings, report->warnings == 1 ? "" : "s");
}

static void json_text(const char *key, const char *text)
{
    char escaped[1024];
    ra_log_escape(text, escaped, sizeof(escaped));
    printf(",\"%s\":", key);
    ra_json_write_string(stdout, escaped);
}

static void json_number(const char *key, double number)
{
    printf(",\"%s\":", key);
    ra_json_write_number(stdout, number);
}

static void json_host(const report_t *report)
{
    const ra_host_t *host = &report->host;
    printf("{\"version\":\"%s\",\"commit\":\"%s\",\"build\":\"%s\"", ra_version(),
           ra_version_commit(), ra_version_build());
    json_text("host", host->name);
    json_text("kernel", host->kernel);
    json_text("libc", host->libc);
    json_text("cpu", host->cpu);
    json_text("cpu_isa", ra_cpu_isa_name(ra_cpu_isa()));
    printf(",\"cores\":%d,\"cores_allowed\":%d,\"memory_bytes\":", host->cores_online,
           host->cores_allowed);
    ra_json_write_count(stdout, host->memory_bytes);
    printf(",\"cgroup_memory_bytes\":");
    ra_json_write_count(stdout, host->cgroup_limit);
    json_text("openblas", report->blas);
    json_text("pcre2", report->pcre2);
    json_text("cjson", cJSON_Version());
    json_text("utf8proc", utf8proc_version());
    json_text("xxhash", report->xxhash);
}

static void json_transports(bool gpus)
{
    const char *name, *doc;
    printf(",\"devices\":[\"cpu\"%s],\"transports\":[", gpus ? ",\"cuda\"" : "");
    for (int i = 0; ra_transport_list(i, &name, &doc); i++) {
        printf("%s\"%s\"", i > 0 ? "," : "", name);
    }
    fputc(']', stdout);
}

static void print_json(const report_t *report)
{
    json_host(report);
    json_transports(report->gpus.count > 0);
    printf(",\"threads\":%d", report->threads);
    json_number("fma_flops_one_thread", report->fma_one);
    json_number("fma_flops", report->fma_all);
    fputs(",\"gemm\":[", stdout);
    for (int i = 0; i < 2; i++) {
        const ra_gemm_probe_t *gemm = &report->gemm[i];
        printf("%s{\"kernel\":\"%s\",\"right\":%s,\"repeats_equal\":%s", i > 0 ? "," : "",
               gemm->kernel, gemm->right ? "true" : "false",
               gemm->repeats_equal ? "true" : "false");
        json_number("flops", gemm->flops);
        fputc('}', stdout);
    }
    fputc(']', stdout);
    json_number("copy_bytes_per_second", report->copy);
    printf(",\"ring_ranks\":%d,\"ring_wrong\":%lld", report->ring.ranks,
           (long long)report->ring.wrong);
    json_number("ring_bytes_per_second", report->ring.bytes_per_second);
    printf(",\"writable\":%s,\"rename_atomic\":%s", report->disk.writable ? "true" : "false",
           report->disk.rename_atomic ? "true" : "false");
    json_number("fsync_seconds", report->disk.fsync_seconds);
    ra_gpus_print_json(&report->gpus);
    fputs(",\"warnings\":[", stdout);
    for (int i = 0; i < report->warnings; i++) {
        fputs(i > 0 ? "," : "", stdout);
        ra_json_write_string(stdout, report->warning[i]);
    }
    printf("],\"usable\":%s}\n", is_usable(report) ? "true" : "false");
}

ra_status_t ra_cmd_doctor(const ra_settings_t *settings)
{
    report_t report = {.warnings = 0};
    RA_TRY(examine(settings, &report));
    if (ra_settings_bool(settings, RA_SET_JSON)) {
        print_json(&report);
    } else {
        print_text(&report);
    }
    RA_TRY(ra_flush_stdout());
    if (!is_usable(&report)) {
        return ra_fail(RA_ERR_INTEGRITY, "doctor", "a test gave wrong results on this machine");
    }
    return RA_OK;
}
