#include "base/trace.h"

#include "base/clock.h"
#include "base/device_ops.h"
#include "base/log.h"
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
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

static const char *const lane_names[] = {"compute", "wait", "transfer"};

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

/* Where a queue of a device was. */
struct ra_moment {
    const ra_device_ops_t *ops;
    void *event;
};

/* A span whose moments a device has yet to reach. */
typedef struct later {
    ra_span_t span;
    ra_moment_t *end;
    ra_trace_lane_t lane;
    int64_t detail;
} later_t;

/* A stream that a thread follows. Times of its device count from `origin`, when the host's clock
 * showed origin_ns. */
typedef struct follower {
    ra_stream_t *stream; /* borrowed */
    int rank;
    ra_moment_t *origin;
    int64_t origin_ns;
    later_t *spans; /* [room], count of them; guarded by trace_mutex */
    int64_t count, room;
    struct follower *next;
} follower_t;

static follower_t *followers; /* guarded by trace_mutex */
static _Thread_local follower_t *followed;

/* NULL: not marked, the span is left out. */
static ra_moment_t *mark(const follower_t *follower, void *queue)
{
    ra_moment_t *moment = calloc(1, sizeof(*moment));
    if (moment == NULL) {
        return NULL;
    }
    moment->ops = follower->stream->device->ops;
    if (moment->ops->mark(queue, &moment->event) != RA_OK) {
        free(moment);
        return NULL;
    }
    return moment;
}

static void moment_free(ra_moment_t *moment)
{
    if (moment != NULL) {
        moment->ops->mark_free(moment->event);
        free(moment);
    }
}

/* In seconds. */
static bool gap(const ra_moment_t *from, const ra_moment_t *to, double *seconds_p)
{
    return to->ops->mark_gap(from->event, to->event, seconds_p) == RA_OK;
}

/* With the mutex held. */
static void write_span(const char *name, int rank, ra_trace_lane_t lane, int64_t detail,
                       double start_ns, double duration_ns)
{
    if (trace_file != NULL) {
        fprintf(trace_file,
                ",\n{\"name\":\"%s\",\"cat\":\"%s\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,"
                "\"pid\":%d,\"tid\":%d,\"args\":{\"detail\":%" PRId64 "}}",
                name, lane_names[lane], (start_ns - (double)trace_start_ns) * 1e-3,
                duration_ns * 1e-3, rank, (int)lane, detail);
    }
}

/* With the mutex held; owns both marks. */
static void keep(follower_t *follower, later_t later)
{
    bool whole = later.span.mark != NULL && later.end != NULL;
    if (whole && follower->count == follower->room) {
        int64_t room = 2 * follower->room + 256;
        later_t *grown = realloc(follower->spans, (size_t)room * sizeof(*grown));
        whole = grown != NULL;
        follower->spans = whole ? grown : follower->spans;
        follower->room = whole ? room : follower->room;
    }
    if (!whole) {
        moment_free(later.span.mark);
        moment_free(later.end);
        return;
    }
    follower->spans[follower->count++] = later;
}

ra_span_t ra_trace_begin(const char *name)
{
    PUSH_RANGE(name);
    ra_span_t span = {.name = name};
    if (atomic_load_explicit(&trace_on, memory_order_relaxed)) {
        span.start_ns = ra_clock_ns();
        span.mark = followed == NULL ? NULL : mark(followed, followed->stream->queue);
    }
    return span;
}

void ra_trace_end(ra_span_t span, int rank, ra_trace_lane_t lane, int64_t detail)
{
    POP_RANGE();
    if (span.start_ns == 0) {
        return;
    }
    int64_t now = ra_clock_ns();
    bool later = span.mark != NULL && followed != NULL;
    ra_moment_t *end = later ? mark(followed, followed->stream->queue) : NULL;
    pthread_mutex_lock(&trace_mutex);
    if (later) {
        keep(followed, (later_t){span, end, lane, detail});
    } else {
        moment_free(span.mark);
        write_span(span.name, rank, lane, detail, (double)span.start_ns,
                   (double)(now - span.start_ns));
    }
    pthread_mutex_unlock(&trace_mutex);
}

void ra_trace_follow(ra_stream_t *stream, int rank)
{
    const ra_device_ops_t *ops = stream->device->ops;
    if (!atomic_load(&trace_on) || ops->mark == NULL || followed != NULL) {
        return;
    }
    follower_t *follower = calloc(1, sizeof(*follower));
    if (follower == NULL) {
        return;
    }
    follower->stream = stream;
    follower->rank = rank;
    follower->origin = mark(follower, stream->queue);
    if (follower->origin == NULL || ra_stream_sync(stream) != RA_OK) {
        moment_free(follower->origin);
        free(follower);
        return;
    }
    follower->origin_ns = ra_clock_ns();
    pthread_mutex_lock(&trace_mutex);
    follower->next = followers;
    followers = follower;
    pthread_mutex_unlock(&trace_mutex);
    followed = follower;
}

/* With the mutex held. What the device never came to is left out. */
static void write_later(const follower_t *follower, const later_t *later)
{
    double start = 0.0, end = 0.0;
    if (gap(follower->origin, later->span.mark, &start) &&
        gap(follower->origin, later->end, &end)) {
        write_span(later->span.name, follower->rank, later->lane, later->detail,
                   (double)follower->origin_ns + start * 1e9, (end - start) * 1e9);
    }
    moment_free(later->span.mark);
    moment_free(later->end);
}

void ra_trace_settle(void)
{
    follower_t *follower = followed;
    if (follower == NULL) {
        return;
    }
    followed = NULL;
    ra_stream_sync(follower->stream);
    pthread_mutex_lock(&trace_mutex);
    follower_t **place = &followers;
    while (*place != follower) {
        place = &(*place)->next;
    }
    *place = follower->next;
    for (int64_t i = 0; i < follower->count; i++) {
        write_later(follower, &follower->spans[i]);
    }
    pthread_mutex_unlock(&trace_mutex);
    moment_free(follower->origin);
    free(follower->spans);
    free(follower);
}

/* With the mutex held. */
static follower_t *follower_of(int rank)
{
    follower_t *follower = followers;
    while (follower != NULL && follower->rank != rank) {
        follower = follower->next;
    }
    return follower;
}

ra_span_t ra_trace_transfer_begin(const char *name, int rank, void *queue)
{
    ra_span_t span = {.name = name};
    if (!atomic_load_explicit(&trace_on, memory_order_relaxed)) {
        return span;
    }
    pthread_mutex_lock(&trace_mutex);
    const follower_t *follower = follower_of(rank);
    if (follower != NULL) {
        span.start_ns = ra_clock_ns();
        span.mark = mark(follower, queue);
    }
    pthread_mutex_unlock(&trace_mutex);
    return span;
}

void ra_trace_transfer_end(ra_span_t span, int rank, void *queue, int64_t bytes)
{
    if (span.start_ns == 0) {
        return;
    }
    pthread_mutex_lock(&trace_mutex);
    follower_t *follower = follower_of(rank);
    if (follower != NULL) {
        keep(follower, (later_t){span, mark(follower, queue), RA_LANE_TRANSFER, bytes});
    } else {
        moment_free(span.mark);
    }
    pthread_mutex_unlock(&trace_mutex);
}
