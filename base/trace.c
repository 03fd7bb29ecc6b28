#include "base/trace.h"

#include "base/clock.h"
#include "base/log.h"
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#if RA_HAVE_CUDA
#include <nvtx3/nvToolsExt.h>
#define PUSH_RANGE(name) nvtxRangePushA(name)
#define POP_RANGE()      nvtxRangePop()
#else
#define PUSH_RANGE(name) ((void)(name))
#define POP_RANGE()      ((void)0)
#endif

static pthread_mutex_t trace_mutex = PTHREAD_MUTEX_INITIALIZER;
static FILE *trace_file;       /* guarded by trace_mutex */
static int64_t trace_start_ns; /* written before trace_on is set */
static atomic_int trace_on;

static const char *const lane_names[] = {"compute", "wait"};

ra_status_t ra_trace_open(const char *path)
{
    FILE *file = fopen(path, "we");
    if (file == NULL) {
        return ra_fail(RA_ERR_OUTPUT, "trace", "%s: cannot create: %s", path, strerror(errno));
    }
    fputs("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}", file);
    pthread_mutex_lock(&trace_mutex);
    trace_file = file;
    trace_start_ns = ra_clock_ns();
    pthread_mutex_unlock(&trace_mutex);
    atomic_store(&trace_on, 1);
    return RA_OK;
}

ra_status_t ra_trace_close(void)
{
    if (!atomic_exchange(&trace_on, 0)) {
        return RA_OK;
    }
    pthread_mutex_lock(&trace_mutex);
    fputs("\n]}\n", trace_file);
    int failed = ferror(trace_file);
    failed |= fclose(trace_file) != 0;
    trace_file = NULL;
    pthread_mutex_unlock(&trace_mutex);
    if (failed) {
        return ra_fail(RA_ERR_OUTPUT, "trace", "the trace file could not be written whole");
    }
    return RA_OK;
}

ra_span_t ra_trace_begin(const char *name)
{
    PUSH_RANGE(name);
    bool on = atomic_load_explicit(&trace_on, memory_order_relaxed);
    return (ra_span_t){.start_ns = on ? ra_clock_ns() : 0, .name = name};
}

void ra_trace_end(ra_span_t span, int rank, ra_trace_lane_t lane, int64_t detail)
{
    POP_RANGE();
    if (span.start_ns == 0) {
        return;
    }
    int64_t now = ra_clock_ns();
    pthread_mutex_lock(&trace_mutex);
    if (trace_file != NULL) {
        fprintf(trace_file,
                ",\n{\"name\":\"%s\",\"cat\":\"%s\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,"
                "\"pid\":%d,\"tid\":%d,\"args\":{\"detail\":%" PRId64 "}}",
                span.name, lane_names[lane], (double)(span.start_ns - trace_start_ns) * 1e-3,
                (double)(now - span.start_ns) * 1e-3, rank, (int)lane, detail);
    }
    pthread_mutex_unlock(&trace_mutex);
}
