/*
 * What a tour owes, when it is given up, to those whose memory it passes on without a copy. That
 * its blocks are the right ones is what the tests of the softmax ring show.
 */
#include "ring/block_tour.h"

#include "tests/comm/ranks_check.h"
#include "tests/test_support.h"
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RANKS = 4, BYTES = 4096, TAG = 9 };

typedef struct shared {
    atomic_bool holds; /* rank 0 has the block of rank 2, which came through rank 3 */
    atomic_bool let_go;
} shared_t;

static bool is_block_of(const void *block, int rank)
{
    const unsigned char *bytes = block;
    for (int i = 0; i < BYTES; i++) {
        if (bytes[i] != rank + 1) {
            return false;
        }
    }
    return true;
}

/* Rank 0 reads block 2 until after the others have given up. */
static ra_status_t read_for_long(ra_comm_t *comm, shared_t *shared, const void *block)
{
    const struct timespec pause = {.tv_nsec = 30000000};
    RANK_CHECK(comm, is_block_of(block, 2));
    atomic_store(&shared->holds, true);
    nanosleep(&pause, NULL);
    RANK_CHECK(comm, is_block_of(block, 2));
    atomic_store(&shared->let_go, true);
    return RA_OK;
}

static ra_status_t walk(ra_comm_t *comm, ra_block_tour_t *tour, const void *own, shared_t *shared)
{
    int owner = 0;
    const void *block;
    RA_TRY(ra_block_tour_begin(tour, own));
    for (;;) {
        RA_TRY(ra_block_tour_next(tour, &owner, &block));
        if (owner < 0) {
            return ra_block_tour_end(tour);
        }
        if (ra_comm_rank(comm) == 0 && owner == 2) {
            RA_TRY(read_for_long(comm, shared, block));
        }
    }
}

/* Rank 1 never sets out, so that rank 2 waits for its block in vain and gives up, as do ranks 3
 * and 0; rank 2's own memory may not be its own again while rank 0 reads it. */
static ra_status_t tour_without_rank_1(ra_comm_t *comm, void *arg)
{
    shared_t *shared = arg;
    int rank = ra_comm_rank(comm);
    const int64_t bytes[RANKS] = {BYTES, BYTES, BYTES, BYTES};
    ra_device_t *device = NULL;
    ra_block_tour_t *tour = NULL;
    unsigned char own[BYTES];
    if (rank == 1) {
        while (!atomic_load(&shared->holds)) {
            sched_yield();
        }
        ra_log_set_quiet(1);
        return ra_fail(RA_ERR_INPUT, "test", "rank 1 stays at home");
    }
    memset(own, rank + 1, sizeof(own));
    RA_TRY(ra_device_open("cpu", 0, NULL, &device));
    ra_status_t status = ra_block_tour_create_ring(comm, device, TAG, bytes, RANKS, &tour);
    if (status == RA_OK) {
        status = walk(comm, tour, own, shared);
    }
    ra_block_tour_cancel(tour, status);
    if (rank == 2) {
        RANK_CHECK(comm, atomic_load(&shared->let_go));
    }
    memset(own, 0, sizeof(own));
    ra_block_tour_destroy(tour);
    ra_device_close(device);
    return status;
}

static void a_block_that_was_passed_on_stays_while_it_is_read(void **state)
{
    (void)state;
    for (int i = 0; i < 10; i++) {
        shared_t shared = {false, false};
        assert_int_equal(checked_ranks_run("local", RANKS, tour_without_rank_1, &shared),
                         RA_ERR_INPUT);
        assert_string_equal(ra_last_error(), "rank 1 stays at home");
        assert_true(atomic_load(&shared.let_go));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_block_that_was_passed_on_stays_while_it_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
