/**
 * @file  base/trace.h
 * @brief Spans of work as a Chrome trace (chrome://tracing, Perfetto): one process row a rank, one
 *        thread row a lane (compute, wait; on GPUs also transfer).
 *
 * Off by default; a span then costs one relaxed load. One trace for the process, like the log.
 * Builds with CUDA also push and pop every span as an NVTX range of its name, for Nsight Systems: a
 * GPU's work is queued within a span and done later.
 */
#ifndef RA_BASE_TRACE_H
#define RA_BASE_TRACE_H

#include "base/device.h"
#include "base/status.h"
#include <stdint.h>

typedef enum ra_trace_lane { RA_LANE_COMPUTE = 0, RA_LANE_WAIT, RA_LANE_TRANSFER } ra_trace_lane_t;

/** Start writing spans to @a path. @retval RA_ERR_OUTPUT cannot be created. */
ra_status_t ra_trace_open(const char *path);
/** Finish the file. No span may be open. @retval RA_ERR_OUTPUT a write failed. */
ra_status_t ra_trace_close(void);

typedef struct ra_moment ra_moment_t;

/** An open span; spans of a thread nest. */
typedef struct ra_span {
    int64_t start_ns; /**< 0: tracing is off */
    const char *name;
    ra_moment_t *mark; /**< its beginning on a device that is followed */
} ra_span_t;

/** @param name  A string literal; shown as is. */
ra_span_t ra_trace_begin(const char *name);
/** @param detail  Shown as an argument, such as a layer. */
void ra_trace_end(ra_span_t span, int rank, ra_trace_lane_t lane, int64_t detail);

/*
 * Where work is queued and done later the host's clock says little. While a thread follows a stream
 * its spans last from where the device comes to what was queued within them until it is done, and
 * transports add spans of the transfers beside it.
 */

/** Measure this thread's spans on @a stream until ra_trace_settle(); waits for what is queued. One
 * stream a rank and thread. Nothing when off, and on devices that work as they are called. */
void ra_trace_follow(ra_stream_t *stream, int rank);
/** Wait for the stream, write the spans, follow no more. */
void ra_trace_settle(void);
/** A span of the transfers to @a rank that are queued between the two calls on @a queue (a
 * cudaStream_t of the device that the rank follows, which is current). From any thread. */
ra_span_t ra_trace_transfer_begin(const char *name, int rank, void *queue);
void ra_trace_transfer_end(ra_span_t span, int rank, void *queue, int64_t bytes);

#endif
