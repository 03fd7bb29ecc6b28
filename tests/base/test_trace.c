/* What a trace file shows: spans by the host's clock, and by that of a device that works later. The
 * device is a made-up one, whose clock the test sets. */
#include "base/trace.h"

#include "base/device_ops.h"
#include "tests/test_support.h"
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EVENTS_MOST = 16, TEXT_MOST = 4096 };

static double device_seconds; /* where every queue of the device is */
static double events[EVENTS_MOST];
static int made, freed;

static ra_status_t fake_mark(void *queue, void **event_p)
{
    (void)queue;
    assert_true(made < EVENTS_MOST);
    events[made] = device_seconds;
    *event_p = &events[made++];
    return RA_OK;
}

/* A negative time is never reached. */
static ra_status_t fake_gap(void *from, void *to, double *seconds_p)
{
    *seconds_p = *(double *)to - *(double *)from;
    return *(double *)to < 0.0 ? RA_INPROGRESS : RA_OK;
}

static void fake_free(void *event)
{
    (void)event;
    freed++;
}

static ra_status_t fake_sync(ra_stream_t *stream)
{
    (void)stream;
    return RA_OK;
}

static const ra_device_ops_t fake_ops = {.name = "fake",
                                         .sync = fake_sync,
                                         .mark = fake_mark,
                                         .mark_gap = fake_gap,
                                         .mark_free = fake_free};
static ra_device_t fake_device = {.ops = &fake_ops};
static ra_stream_t fake_stream = {.device = &fake_device};

static char path[] = "/tmp/ringattn_trace_XXXXXX";
static char text[TEXT_MOST];

static void open_trace(void)
{
    made = freed = 0;
    device_seconds = 100.0;
    assert_int_equal(ra_trace_open(path), RA_OK);
}

static void read_trace(void)
{
    assert_int_equal(ra_trace_close(), RA_OK);
    FILE *file = fopen(path, "re");
    assert_non_null(file);
    size_t length = fread(text, 1, sizeof(text) - 1, file);
    text[length] = '\0';
    fclose(file);
}

typedef struct shown {
    double start, duration; /* microseconds */
    int rank, lane;
    long long detail;
} shown_t;

static bool find_span(const char *name, shown_t *shown)
{
    char key[64];
    snprintf(key, sizeof(key), "{\"name\":\"%s\"", name);
    const char *at = strstr(text, key);
    if (at == NULL) {
        return false;
    }
    int found = sscanf(strstr(at, "\"ts\""),
                       "\"ts\":%lf,\"dur\":%lf,\"pid\":%d,\"tid\":%d,\"args\":{\"detail\":%lld}",
                       &shown->start, &shown->duration, &shown->rank, &shown->lane, &shown->detail);
    assert_int_equal(found, 5);
    return true;
}

static void spans_are_shown_with_rank_lane_and_detail(void **state)
{
    (void)state;
    shown_t shown;
    open_trace();
    ra_span_t span = ra_trace_begin("on the host");
    ra_trace_end(span, 3, RA_LANE_WAIT, 17);
    ra_trace_settle(); /* nobody is followed */
    read_trace();
    assert_true(find_span("on the host", &shown));
    assert_true(shown.duration >= 0.0 && shown.start >= 0.0);
    assert_int_equal(shown.rank, 3);
    assert_int_equal(shown.lane, RA_LANE_WAIT);
    assert_int_equal(shown.detail, 17);
    assert_int_equal(made, 0);
}

static void *transfer(void *arg)
{
    ra_span_t span = ra_trace_transfer_begin("a transfer", 5, arg);
    device_seconds = 103.0;
    ra_trace_transfer_end(span, 5, arg, 4096);
    span = ra_trace_transfer_begin("a transfer of another rank", 6, arg);
    ra_trace_transfer_end(span, 6, arg, 1);
    return NULL;
}

static void spans_of_a_followed_stream_are_when_its_device_works(void **state)
{
    (void)state;
    shown_t outer, inner, beside;
    pthread_t thread;
    open_trace();
    ra_trace_follow(&fake_stream, 5);
    device_seconds = 101.0;
    ra_span_t first = ra_trace_begin("layer");
    ra_span_t second = ra_trace_begin("product");
    device_seconds = 101.5;
    ra_trace_end(second, 5, RA_LANE_COMPUTE, 1);
    assert_int_equal(pthread_create(&thread, NULL, transfer, NULL), 0);
    pthread_join(thread, NULL);
    device_seconds = 104.0;
    ra_trace_end(first, 5, RA_LANE_COMPUTE, 2);
    ra_trace_settle();
    read_trace();
    assert_true(find_span("layer", &outer) && find_span("product", &inner));
    assert_true(find_span("a transfer", &beside));
    assert_false(find_span("a transfer of another rank", &(shown_t){0}));
    assert_true(fabs(outer.duration - 3e6) < 1.0);
    assert_true(fabs(inner.duration - 5e5) < 1.0);
    assert_true(fabs(inner.start - outer.start) < 1.0);
    assert_true(fabs(beside.start - outer.start - 5e5) < 1.0 &&
                fabs(beside.duration - 1.5e6) < 1.0);
    assert_int_equal(beside.lane, RA_LANE_TRANSFER);
    assert_int_equal(beside.detail, 4096);
    assert_int_equal(freed, made);
}

static void what_the_device_never_reached_is_left_out(void **state)
{
    (void)state;
    open_trace();
    ra_trace_follow(&fake_stream, 0);
    ra_span_t span = ra_trace_begin("reached");
    ra_trace_end(span, 0, RA_LANE_COMPUTE, 0);
    span = ra_trace_begin("never reached");
    device_seconds = -1.0;
    ra_trace_end(span, 0, RA_LANE_COMPUTE, 0);
    ra_span_t late = ra_trace_begin("after the last of them");
    ra_span_t beside = ra_trace_transfer_begin("beside", 0, NULL);
    ra_trace_settle();
    ra_trace_end(late, 0, RA_LANE_COMPUTE, 0); /* by the host's clock, then */
    ra_trace_transfer_end(beside, 0, NULL, 0);
    read_trace();
    assert_true(find_span("reached", &(shown_t){0}));
    assert_false(find_span("never reached", &(shown_t){0}));
    assert_true(find_span("after the last of them", &(shown_t){0}));
    assert_false(find_span("beside", &(shown_t){0}));
    assert_int_equal(freed, made);
}

static void nothing_is_marked_without_a_trace(void **state)
{
    (void)state;
    made = freed = 0;
    ra_trace_follow(&fake_stream, 0);
    ra_trace_end(ra_trace_begin("span"), 0, RA_LANE_COMPUTE, 0);
    ra_trace_transfer_end(ra_trace_transfer_begin("beside", 0, NULL), 0, NULL, 0);
    ra_trace_settle();
    assert_int_equal(made, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(spans_are_shown_with_rank_lane_and_detail),
        cmocka_unit_test(spans_of_a_followed_stream_are_when_its_device_works),
        cmocka_unit_test(what_the_device_never_reached_is_left_out),
        cmocka_unit_test(nothing_is_marked_without_a_trace),
    };
    int file = mkstemp(path);
    if (file < 0 || close(file) != 0) {
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
