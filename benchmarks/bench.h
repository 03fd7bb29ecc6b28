/**
 * @file  benchmarks/bench.h
 * @brief What every *_perf program shares: flags, the FMA peak, timing, a table and JSON.
 *
 * Shared flags   --threads N   threads of the pool (default: cores of the affinity mask)
 *                --iters N     timed iterations a case; the median is reported
 *                --warmup N    untimed iterations first
 *                --check on|off  compare results with an oracle (default on); a mismatch exits with
 * 1
 *                --json FILE   also write everything as JSON ("-": to stdout instead of the table)
 *                --help
 * A number is only worth its context, so each report states the CPU, the instruction set, the git
 * commit, the command line and the floating-point peak measured in the same run; percentages are of
 * the peak sampled around each timed iteration (bench_run()).
 */
#ifndef RA_BENCHMARKS_BENCH_H
#define RA_BENCHMARKS_BENCH_H

#include "base/cpu_isa.h"
#include "base/device.h"
#include <stdbool.h>
#include <stdint.h>

/** A flag of one program. @a value starts as the default and points into argv once given. */
typedef struct bench_flag {
    const char *name; /**< with its dashes */
    const char *value;
    const char *doc;
} bench_flag_t;

typedef struct bench {
    const char *program;
    int threads, iters, warmup;
    bool check;
    ra_pool_t *pool;
    ra_device_t *device;
    ra_stream_t *stream;         /**< over `threads` threads */
    ra_cpu_isa_t isa;            /**< widest of this machine */
    double peak_one, peak_all;   /**< FLOP/s of independent FMAs, one thread and all */
    double peak_core;            /**< FLOP/s of one thread per second of processor time */
    int64_t errors;              /**< failed checks */
    struct bench_report *report; /**< rows for JSON */
} bench_t;

/**
 * Parse flags, start the pool, measure the peak, print the heading. Ends the process on --help (0)
 * or a bad flag (2).
 * @param doc    One sentence: what is measured and which work is counted.
 * @param flags  The program's own flags, filled in; may be NULL.
 */
bench_t *bench_open(int argc, char **argv, const char *program, const char *doc,
                    bench_flag_t *flags, int flag_count);
/** Write the JSON, release everything. @return the exit code: 0, or 1 after a failed check. */
int bench_close(bench_t *bench);

/** Integer value of a flag, with k, m suffixes (1024s); ends the process with 2 on anything else.
 */
int64_t bench_int(const bench_flag_t *flag);

/**
 * Seconds of one call over the timed iterations. @a cpu is the median of processor seconds, summed
 * over threads: on a machine shared with others it says what the code needs, not what it waited.
 *
 * Paired peak  A burst of register-only FMAs (20 to 40 ms, all threads, the instruction set in use)
 * runs before and after each timed iteration; @a peak_flops is what the mean of the two rates would
 * have done in the iteration's seconds, median over iterations. So 100 flops / peak_flops is the
 * median percentage of the peak, and a host that slows down for a while slows both alike. @a
 * core_flops is the same by processor time.
 */
typedef struct bench_time {
    double median, best, worst, cpu;
    double peak_flops, peak_flops_least, peak_flops_most;
    double core_flops;
} bench_time_t;
bench_time_t bench_run(const bench_t *bench, void (*func)(void *arg), void *arg);

/** A column: numbers are printed with @a format ("%.1f"), text when @a format is "%s". */
typedef struct bench_column {
    const char *name, *format;
} bench_column_t;
/** A cell: text for "%s" columns, else number. */
typedef struct bench_cell {
    const char *text;
    double number;
} bench_cell_t;
#define BENCH_TEXT(value)   ((bench_cell_t){.text = (value)})
#define BENCH_NUMBER(value) ((bench_cell_t){.number = (double)(value)})

/** Start a table; rows follow. @a columns outlive the table. */
void bench_table(bench_t *bench, const char *title, const bench_column_t *columns, int count);
void bench_row(bench_t *bench, const bench_cell_t *cells);
/** Count and report a failed check. */
void bench_wrong(bench_t *bench, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** splitmix64 values in [low, high), the same everywhere for the same seed. */
void bench_fill(float *values, int64_t count, uint64_t seed, float low, float high);
/** 64-byte aligned memory; ends the process with 5 when there is none. Release with free(). */
void *bench_alloc(int64_t bytes);

#endif
