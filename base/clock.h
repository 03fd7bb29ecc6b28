/** @file base/clock.h  @brief Monotonic time. */
#ifndef RA_BASE_CLOCK_H
#define RA_BASE_CLOCK_H

#include <stdint.h>

/** Monotonic time in nanoseconds since an arbitrary start. */
int64_t ra_clock_ns(void);
/** The same in seconds. */
double ra_clock_s(void);

/** A deadline that never passes. */
#define RA_NO_DEADLINE INT64_MAX
/** Deadline @a seconds from now, in ra_clock_ns() time. */
int64_t ra_deadline_in(double seconds);

#endif
