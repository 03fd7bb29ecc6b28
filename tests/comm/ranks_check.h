/**
 * @file  tests/comm/ranks_check.h
 * @brief Checks inside rank threads, where cmocka's own may not jump: they return an error that
 *        names the place, and checked_ranks_run() brings it to the test.
 */
#ifndef RA_TESTS_COMM_RANKS_CHECK_H
#define RA_TESTS_COMM_RANKS_CHECK_H

#include "base/log.h"
#include "comm/ranks.h"
#include <stdatomic.h>
#include <stdio.h>

/* Counted, since a rank that fails on purpose would hide the status of a check that fails after it;
 * weak, so that all files of a test program count as one. */
__attribute__((weak)) atomic_int rank_checks_failed;

#define RANK_CHECK(comm, condition)                                                                \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            atomic_fetch_add(&rank_checks_failed, 1);                                              \
            fprintf(stderr, "%s:%d: rank %d of %d: %s\n", __FILE__, __LINE__, ra_comm_rank(comm),  \
                    ra_comm_size(comm), #condition);                                               \
            return ra_fail(RA_ERR_INTERNAL, "test", "a check failed");                             \
        }                                                                                          \
    } while (0)

/** ra_ranks_call(), RA_ERR_INTERNAL when any RANK_CHECK failed. */
static inline ra_status_t checked_ranks_call(ra_ranks_t *ranks, ra_rank_func_t func, void *arg)
{
    atomic_store(&rank_checks_failed, 0);
    ra_status_t status = ra_ranks_call(ranks, func, arg);
    return atomic_load(&rank_checks_failed) > 0 ? RA_ERR_INTERNAL : status;
}

/** ra_ranks_run(), RA_ERR_INTERNAL when any RANK_CHECK failed. */
static inline ra_status_t checked_ranks_run(const char *transport, int ranks, ra_rank_func_t func,
                                            void *arg)
{
    atomic_store(&rank_checks_failed, 0);
    ra_status_t status = ra_ranks_run(transport, ranks, func, arg);
    return atomic_load(&rank_checks_failed) > 0 ? RA_ERR_INTERNAL : status;
}

#endif
