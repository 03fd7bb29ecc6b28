#include "benchmarks/bench.h"

#include "base/clock.h"
#include "base/fma_peak.h"
#include <cjson/cJSON.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef RA_GIT_COMMIT
#define RA_GIT_COMMIT "unknown"
#endif

typedef struct bench_report {
    cJSON *root, *tables, *rows;
    const char *json_path; /* NULL: none */
    bool quiet;            /* JSON goes to stdout */
    const bench_column_t *columns;
    int column_count;
} bench_report_t;

enum { SHARED_FLAGS = 5 };

static void usage(const char *program, const char *doc, const bench_flag_t *shared,
                  const bench_flag_t *own, int own_count)
{
    printf("%s: %s\n", program, doc);
    for (int i = 0; i < SHARED_FLAGS + own_count; i++) {
        const bench_flag_t *flag = i < SHARED_FLAGS ? &shared[i] : &own[i - SHARED_FLAGS];
        printf("  %-12s %s%s%s%s\n", flag->name, flag->doc, flag->value ? " [" : "",
               flag->value ? flag->value : "", flag->value ? "]" : "");
    }
}

static void bad_usage(const char *program, const char *what, const char *which)
{
    fprintf(stderr, "%s: %s '%s'; see --help\n", program, what, which);
    exit(2);
}

int64_t bench_int(const bench_flag_t *flag)
{
    char *end;
    long long value = strtoll(flag->value, &end, 10);
    if (end != flag->value && (*end == 'k' || *end == 'm')) {
        value *= *end == 'k' ? 1024 : 1024 * 1024;
        end++;
    }
    if (end == flag->value || *end != '\0' || value < 0) {
        bad_usage(flag->name, "not a count:", flag->value);
    }
    return value;
}

static void parse(int argc, char **argv, const char *program, const char *doc, bench_flag_t *shared,
                  bench_flag_t *own, int own_count)
{
    for (int i = 1; i < argc; i++) {
        bench_flag_t *flag = NULL;
        if (strcmp(argv[i], "--help") == 0) {
            usage(program, doc, shared, own, own_count);
            exit(0);
        }
        for (int f = 0; f < SHARED_FLAGS + own_count && flag == NULL; f++) {
            bench_flag_t *candidate = f < SHARED_FLAGS ? &shared[f] : &own[f - SHARED_FLAGS];
            flag = strcmp(argv[i], candidate->name) == 0 ? candidate : NULL;
        }
        if (flag == NULL) {
            bad_usage(program, "unknown flag", argv[i]);
        } else if (i + 1 == argc) {
            bad_usage(program, "a value must follow", argv[i]);
        } else {
            flag->value = argv[++i];
        }
    }
}

enum { MAX_THREADS = 1024, PIECES_A_THREAD = 8 };

typedef struct peak_job {
    ra_cpu_isa_t isa;
    int64_t steps;
    double flops[MAX_THREADS * PIECES_A_THREAD];
    float sink[MAX_THREADS * PIECES_A_THREAD];
} peak_job_t;

static void peak_piece(void *arg, int64_t index)
{
    peak_job_t *job = arg;
    job->flops[index] = ra_fma_loop(job->isa, job->steps, &job->sink[index]);
}

static double cpu_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* FLOP/s of one burst of FMAs, per second and per second of processor time. */
typedef struct peak_rate {
    double wall, core;
} peak_rate_t;

/* Several pieces a thread: like the kernels, a thread that is held up leaves its work to others. */
static peak_rate_t peak_burst(const bench_t *bench, ra_cpu_isa_t isa, int threads, int64_t steps)
{
    static peak_job_t job;
    int64_t pieces = threads > 1 ? (int64_t)threads * PIECES_A_THREAD : 1;
    job.isa = isa;
    job.steps = steps * threads / pieces;
    double start = ra_clock_s(), start_busy = cpu_s(), flops = 0.0;
    ra_pool_for(bench->pool, pieces, peak_piece, &job);
    double seconds = ra_clock_s() - start, busy = cpu_s() - start_busy;
    for (int64_t i = 0; i < pieces; i++) {
        flops += job.flops[i];
    }
    return (peak_rate_t){flops / seconds, flops / busy};
}

static peak_rate_t peak_best(const bench_t *bench, ra_cpu_isa_t isa, int threads)
{
    peak_rate_t best = {0.0, 0.0};
    for (int repeat = 0; repeat < 30; repeat++) {
        peak_rate_t rate = peak_burst(bench, isa, threads, 2000000);
        best.wall = rate.wall > best.wall ? rate.wall : best.wall;
        best.core = rate.core > best.core ? rate.core : best.core;
    }
    return best;
}

/* "model name" of the first core. */
static void cpu_name(char *name, size_t size)
{
    snprintf(name, size, "unknown CPU");
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[512];
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(name, size, "%s", colon + 2);
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

static void print_heading(bench_t *bench, const char *doc, int argc, char **argv)
{
    char cpu[256], command[1024] = "";
    cpu_name(cpu, sizeof(cpu));
    for (int i = 0; i < argc; i++) {
        size_t used = strlen(command);
        snprintf(command + used, sizeof(command) - used, "%s%s", i > 0 ? " " : "", argv[i]);
    }
    if (!bench->report->quiet) {
        printf("# %s: %s\n# cpu %s, %d cores; %s; commit %s\n# command %s\n"
               "# fma peak %.1f GFLOP/s on 1 thread, %.1f on %d; %.1f a core-second\n",
               bench->program, doc, cpu, ra_pool_default_threads(), ra_cpu_isa_name(bench->isa),
               RA_GIT_COMMIT, command, bench->peak_one * 1e-9, bench->peak_all * 1e-9,
               bench->threads, bench->peak_core * 1e-9);
    }
    cJSON *root = bench->report->root;
    cJSON_AddStringToObject(root, "benchmark", bench->program);
    cJSON_AddStringToObject(root, "measures", doc);
    cJSON_AddStringToObject(root, "cpu", cpu);
    cJSON_AddNumberToObject(root, "cores", ra_pool_default_threads());
    cJSON_AddStringToObject(root, "isa", ra_cpu_isa_name(bench->isa));
    cJSON_AddStringToObject(root, "commit", RA_GIT_COMMIT);
    cJSON_AddStringToObject(root, "command", command);
    cJSON_AddNumberToObject(root, "threads", bench->threads);
    cJSON_AddNumberToObject(root, "iters", bench->iters);
    cJSON_AddNumberToObject(root, "peak_one_gflops", bench->peak_one * 1e-9);
    cJSON_AddNumberToObject(root, "peak_all_gflops", bench->peak_all * 1e-9);
    cJSON_AddNumberToObject(root, "peak_core_gflops", bench->peak_core * 1e-9);
    bench->report->tables = cJSON_AddArrayToObject(root, "tables");
}

bench_t *bench_open(int argc, char **argv, const char *program, const char *doc,
                    bench_flag_t *flags, int flag_count)
{
    char cores[16];
    snprintf(cores, sizeof(cores), "%d", ra_pool_default_threads());
    bench_flag_t shared[SHARED_FLAGS] = {
        {"--threads", cores, "threads of the pool"},
        {"--iters", "5", "timed iterations a case; the median is reported"},
        {"--warmup", "1", "untimed iterations first"},
        {"--check", "on", "on|off: compare with an oracle"},
        {"--json", NULL, "also write JSON to this file; - for stdout, without the table"},
    };
    parse(argc, argv, program, doc, shared, flags, flag_count);

    bench_t *bench = calloc(1, sizeof(*bench));
    bench_report_t *report = calloc(1, sizeof(*report));
    if (bench == NULL || report == NULL) {
        fprintf(stderr, "%s: out of memory\n", program);
        exit(5);
    }
    bench->program = program;
    bench->report = report;
    bench->threads = (int)bench_int(&shared[0]);
    bench->iters = (int)bench_int(&shared[1]);
    bench->warmup = (int)bench_int(&shared[2]);
    bench->check = strcmp(shared[3].value, "on") == 0;
    if (bench->threads < 1 || bench->threads > MAX_THREADS || bench->iters < 1 ||
        (!bench->check && strcmp(shared[3].value, "off") != 0)) {
        bad_usage(program, "out of range:", "--threads, --iters or --check");
    }
    report->json_path = shared[4].value;
    report->quiet = report->json_path != NULL && strcmp(report->json_path, "-") == 0;
    report->root = cJSON_CreateObject();
    bench->isa = ra_cpu_isa();
    if (ra_pool_create(bench->threads, &bench->pool) != RA_OK ||
        ra_device_open("cpu", 0, bench->pool, &bench->device) != RA_OK ||
        ra_stream_create(bench->device, &bench->stream) != RA_OK) {
        exit(5);
    }
    peak_rate_t one = peak_best(bench, bench->isa, 1);
    bench->peak_one = one.wall;
    bench->peak_core = one.core;
    bench->peak_all = peak_best(bench, bench->isa, bench->threads).wall;
    print_heading(bench, doc, argc, argv);
    return bench;
}

int bench_close(bench_t *bench)
{
    bench_report_t *report = bench->report;
    int code = bench->errors > 0 ? 1 : 0;

    cJSON_AddNumberToObject(report->root, "errors", (double)bench->errors);
    if (report->json_path != NULL) {
        char *text = cJSON_Print(report->root);
        FILE *file = report->quiet ? stdout : fopen(report->json_path, "w");
        if (text == NULL || file == NULL || fprintf(file, "%s\n", text) < 0 || fflush(file) != 0) {
            fprintf(stderr, "%s: cannot write %s\n", bench->program, report->json_path);
            code = 8;
        }
        if (file != NULL && file != stdout) {
            fclose(file);
        }
        cJSON_free(text);
    }
    cJSON_Delete(report->root);
    ra_stream_destroy(bench->stream);
    ra_device_close(bench->device);
    ra_pool_destroy(bench->pool);
    free(report);
    free(bench);
    return code;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The middle of @a count numbers, which are sorted on the way. */
static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof(*values), compare_doubles);
    return values[count / 2];
}

bench_time_t bench_run(const bench_t *bench, void (*func)(void *arg), void *arg)
{
    enum { STEPS = 10000000 }; /* of a peak sample: 20 to 40 ms */
    int n = bench->iters;
    double *seconds = bench_alloc(4 * n * (int64_t)sizeof(*seconds));
    double *busy = seconds + n, *wall_flops = busy + n, *core_flops = wall_flops + n;
    for (int i = 0; i < bench->warmup; i++) {
        func(arg);
    }
    peak_rate_t before = peak_burst(bench, ra_cpu_isa(), bench->threads, STEPS);
    for (int i = 0; i < n; i++) {
        double start = ra_clock_s(), start_busy = cpu_s();
        func(arg);
        seconds[i] = ra_clock_s() - start;
        busy[i] = cpu_s() - start_busy;
        peak_rate_t after = peak_burst(bench, ra_cpu_isa(), bench->threads, STEPS);
        wall_flops[i] = seconds[i] * 0.5 * (before.wall + after.wall);
        core_flops[i] = busy[i] * 0.5 * (before.core + after.core);
        before = after;
    }
    bench_time_t result = {.median = median(seconds, n),
                           .cpu = median(busy, n),
                           .peak_flops = median(wall_flops, n),
                           .core_flops = median(core_flops, n)};
    result.best = seconds[0];
    result.worst = seconds[n - 1];
    result.peak_flops_least = wall_flops[0];
    result.peak_flops_most = wall_flops[n - 1];
    free(seconds);
    return result;
}

void bench_table(bench_t *bench, const char *title, const bench_column_t *columns, int count)
{
    bench_report_t *report = bench->report;
    report->columns = columns;
    report->column_count = count;
    cJSON *table = cJSON_CreateObject();
    cJSON_AddStringToObject(table, "title", title);
    report->rows = cJSON_AddArrayToObject(table, "rows");
    cJSON_AddItemToArray(report->tables, table);
    if (!report->quiet) {
        printf("\n%s\n", title);
        for (int i = 0; i < count; i++) {
            printf("%*s", i == 0 ? 10 : 14, columns[i].name);
        }
        printf("\n");
    }
}

void bench_row(bench_t *bench, const bench_cell_t *cells)
{
    bench_report_t *report = bench->report;
    cJSON *row = cJSON_CreateObject();
    for (int i = 0; i < report->column_count; i++) {
        const bench_column_t *column = &report->columns[i];
        char text[64];
        if (cells[i].text != NULL) {
            snprintf(text, sizeof(text), "%s", cells[i].text);
            cJSON_AddStringToObject(row, column->name, text);
        } else {
            char *end = text;
            snprintf(text, sizeof(text), column->format, cells[i].number);
            /* The printed digits are what was measured; the rest is noise. */
            cJSON_AddNumberToObject(row, column->name, strtod(text, &end));
        }
        if (!report->quiet) {
            printf("%*s", i == 0 ? 10 : 14, text);
        }
    }
    cJSON_AddItemToArray(report->rows, row);
    if (!report->quiet) {
        printf("\n");
        fflush(stdout);
    }
}

void bench_wrong(bench_t *bench, const char *format, ...)
{
    va_list args;
    bench->errors++;
    fprintf(stderr, "%s: check failed: ", bench->program);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
}

void bench_fill(float *values, int64_t count, uint64_t seed, float low, float high)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        values[i] = low + (high - low) * (float)((double)(z >> 11) * 0x1p-53);
    }
}

void *bench_alloc(int64_t bytes)
{
    void *memory = aligned_alloc(64, (size_t)(bytes + 64) / 64 * 64);
    if (memory == NULL) {
        fprintf(stderr, "cannot allocate %lld bytes\n", (long long)bytes);
        exit(5);
    }
    return memory;
}
