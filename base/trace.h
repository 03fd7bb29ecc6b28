/**
 * @file  base/trace.h
 * @brief Spans of work as a Chrome trace (chrome://tracing, Perfetto): one process row a rank, one
 *        thread row a lane (compute, wait).
 *
 * Off by default; a span then costs one relaxed load. One trace for the process, like the log.
 * Builds with CUDA also push and pop every span as an NVTX range of its name, for Nsight Systems: a
 * GPU's work is queued within a span and done later.
 */
#ifndef RA_BASE_TRACE_H
#define RA_BASE_TRACE_H

#include "base/status.h"
#include <stdint.h>

typedef enum ra_trace_lane { RA_LANE_COMPUTE = 0, RA_LANE_WAIT } ra_trace_lane_t;

/** Start writing spans to @a path. @retval RA_ERR_OUTPUT cannot be created. */
ra_status_t ra_trace_open(const char *path);
/** Finish the file. No span may be open. @retval RA_ERR_OUTPUT a write failed. */
ra_status_t ra_trace_close(void);

/** An open span; spans of a thread nest. */
typedef struct ra_span {
    int64_t start_ns; /**< 0: tracing is off */
    const char *name;
} ra_span_t;

/** @param name  A string literal; shown as is. */
ra_span_t ra_trace_begin(const char *name);
/** @param detail  Shown as an argument, such as a layer. */
void ra_trace_end(ra_span_t span, int rank, ra_trace_lane_t lane, int64_t detail);

#endif
