#include "base/clock.h"

#include <time.h>

int64_t ra_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

double ra_clock_s(void)
{
    return (double)ra_clock_ns() * 1e-9;
}

int64_t ra_deadline_in(double seconds)
{
    return ra_clock_ns() + (int64_t)(seconds * 1e9);
}
