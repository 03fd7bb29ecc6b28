/**
 * @file  tests/comm/ranks_check.h
 * @brief Checks inside rank threads, where cmocka's own may not jump: they return an error that
 *        names the place, and ra_ranks_run() brings it to the test.
 */
#ifndef RA_TESTS_COMM_RANKS_CHECK_H
#define RA_TESTS_COMM_RANKS_CHECK_H

#include "base/log.h"
#include "comm/ranks.h"

#define RANK_CHECK(comm, condition)                                                                \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            return ra_fail(RA_ERR_INTERNAL, "test", "%s:%d rank %d of %d: %s", __FILE__, __LINE__, \
                           ra_comm_rank(comm), ra_comm_size(comm), #condition);                    \
        }                                                                                          \
    } while (0)

#endif
