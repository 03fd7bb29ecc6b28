/**
 * @file  base/trace.h
 * @brief Spans of work as a Chrome trace (chrome://tracing, Perfetto): one process row a rank, one
 *        thread row a lane (compute, transfer, wait).
 *
 * Off by default; a span then costs one relaxed load. One trace for the process, like the log.
 */
#ifndef RA_BASE_TRACE_H
#define RA_BASE_TRACE_H

#include "base/status.h"
#include <stdint.h>

typedef enum ra_trace_lane { RA_LANE_COMPUTE = 0, RA_LANE_TRANSFER, RA_LANE_WAIT } ra_trace_lane_t;

/** Start writing spans to @a path. @retval RA_ERR_OUTPUT cannot be created. */
ra_status_t ra_trace_open(const char *path);
/** Finish the file. No span may be open. @retval RA_ERR_OUTPUT a write failed. */
ra_status_t ra_trace_close(void);

/** Start of a span: a time to hand to ra_trace_end(), 0 when tracing is off. */
int64_t ra_trace_begin(void);
/** @param name  A string literal; shown as is. @param detail  Shown as an argument, such as a
 * layer. */
void ra_trace_end(int64_t begin, int rank, ra_trace_lane_t lane, const char *name, int64_t detail);

#endif
