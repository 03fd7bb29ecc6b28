/** @file tests/moe/random_replay.h  @brief Routing replay with random choices. */
#ifndef RA_TESTS_MOE_RANDOM_REPLAY_H
#define RA_TESTS_MOE_RANDOM_REPLAY_H

#include "moe/router.h"
#include "tests/test_support.h"
#include <stdlib.h>
#include <string.h>

/** k of @a experts, ascending, every set alike. */
static inline void random_choice(int32_t experts, int32_t k, uint64_t *seed, int32_t *choice)
{
    for (int32_t e = 0, at = 0; at < k; e++) {
        if (test_random_u64(seed) % (uint64_t)(experts - e) < (uint64_t)(k - at)) {
            choice[at++] = e;
        }
    }
}

/**
 * Two of three rows are forced, regardless of groups; chosen is poisoned, and so is what lies
 * between the rows, which are 3 further apart than they are long.
 */
static inline ra_router_replay_t random_replay_create(const ra_router_t *router, int64_t rows)
{
    uint64_t seed = 31;
    int64_t stride = router->top_k + 3;
    size_t bytes = (size_t)(rows * stride) * sizeof(int32_t);
    int32_t *forced = malloc(bytes + 1), *chosen = malloc(bytes + 1);
    assert_non_null(forced);
    assert_non_null(chosen);
    memset(forced, 0x7f, bytes);
    memset(chosen, 0x7f, bytes);
    for (int64_t row = 0; row < rows; row++) {
        random_choice(router->experts, router->top_k, &seed, forced + row * stride);
        if (row % 3 == 2) {
            forced[row * stride] = -1;
        }
    }
    return (ra_router_replay_t){.forced = forced, .chosen = chosen, .stride = stride};
}

static inline void random_replay_destroy(const ra_router_replay_t *replay)
{
    free((void *)(uintptr_t)replay->forced);
    free(replay->chosen);
}

static inline size_t random_replay_bytes(const ra_router_replay_t *replay, int64_t rows)
{
    return (size_t)(rows * replay->stride) * sizeof(int32_t);
}

#endif
