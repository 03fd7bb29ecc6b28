/* Collectives over every transport row and 1 to 8 ranks. */
#include "tests/comm/device_ranks.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS_MOST = 8 };

static void run_everywhere(ra_rank_func_t func, void *arg)
{
    const char *row, *doc;
    for (int i = 0; ra_transport_list(i, &row, &doc); i++) {
        for (int ranks = 1; ranks <= RANKS_MOST; ranks++) {
            if (gpu_row_can_run(row, ranks)) {
                assert_int_equal(host_ranks_run(row, ranks, func, arg), RA_OK);
            } else if (ranks == gpu_count() + 1) {
                print_message("%s: not run with %d ranks or more\n", row, ranks);
            }
        }
    }
}

static ra_status_t meet(ra_comm_t *comm, void *arg)
{
    atomic_int *arrived = arg;
    int size = ra_comm_size(comm);
    for (int round = 1; round <= 30; round++) {
        int before = atomic_fetch_add(arrived, 1);
        RANK_CHECK(comm, before < round * size);
        RA_TRY(ra_comm_barrier(comm));
        RANK_CHECK(comm, atomic_load(arrived) >= round * size);
    }
    RA_TRY(ra_comm_barrier(comm));
    if (ra_comm_rank(comm) == 0) {
        atomic_store(arrived, 0);
    }
    return ra_comm_barrier(comm);
}

static void nobody_leaves_a_barrier_before_everybody_came(void **state)
{
    (void)state;
    atomic_int arrived = 0;
    run_everywhere(meet, &arrived);
}

static ra_status_t gather(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int32_t mine[3] = {rank, rank * rank, -rank}, all[3 * RANKS_MOST];
    RA_TRY(ra_comm_allgather(comm, mine, sizeof(mine), all));
    for (int r = 0; r < size; r++) {
        RANK_CHECK(comm, all[3 * r] == r && all[3 * r + 1] == r * r && all[3 * r + 2] == -r);
    }
    return ra_comm_allgather(comm, NULL, 0, NULL);
}

static void allgather_orders_blocks_by_rank(void **state)
{
    (void)state;
    run_everywhere(gather, NULL);
}

/* Rank r gives r bytes (rank 0 none), landing in reverse order with a gap of one byte. */
static ra_status_t gather_ragged(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int64_t bytes[RANKS_MOST], offset[RANKS_MOST], at = 1;
    for (int r = size - 1; r >= 0; r--) {
        bytes[r] = r;
        offset[r] = at;
        at += r + 1;
    }
    uint8_t mine[RANKS_MOST], all[RANKS_MOST * RANKS_MOST];
    memset(mine, 10 + rank, sizeof(mine));
    memset(all, 0xee, sizeof(all));
    RA_TRY(ra_comm_allgatherv(comm, mine, all, bytes, offset));
    for (int r = 0; r < size; r++) {
        RANK_CHECK(comm, all[offset[r] - 1] == 0xee && all[offset[r] + bytes[r]] == 0xee);
        for (int i = 0; i < r; i++) {
            RANK_CHECK(comm, all[offset[r] + i] == 10 + r);
        }
    }
    return RA_OK;
}

static void allgatherv_takes_blocks_of_any_size(void **state)
{
    (void)state;
    run_everywhere(gather_ragged, NULL);
}

static ra_status_t broadcast_from_each(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    for (int root = 0; root < size; root++) {
        int64_t data[5];
        for (int i = 0; i < 5; i++) {
            data[i] = rank == root ? root * 50 + i : -1;
        }
        RA_TRY(ra_comm_broadcast(comm, root, data, sizeof(data)));
        for (int i = 0; i < 5; i++) {
            RANK_CHECK(comm, data[i] == root * 50 + i);
        }
    }
    ra_log_set_quiet(1);
    RANK_CHECK(comm, ra_comm_broadcast(comm, size, NULL, 0) == RA_ERR_INVALID);
    ra_log_set_quiet(0);
    return RA_OK;
}

static void broadcast_reaches_all_from_any_root(void **state)
{
    (void)state;
    run_everywhere(broadcast_from_each, NULL);
}

/* Rank r sends (r + 2 p) mod 5 values to rank p. */
static ra_status_t all_to_all(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int64_t send_bytes[RANKS_MOST], recv_bytes[RANKS_MOST];
    int64_t send_offset[RANKS_MOST], recv_offset[RANKS_MOST];
    int32_t send[RANKS_MOST * 5], recv[RANKS_MOST * 5];
    for (int p = 0; p < size; p++) {
        send_bytes[p] = (rank + 2 * p) % 5 * 4;
        recv_bytes[p] = (p + 2 * rank) % 5 * 4;
        send_offset[p] = recv_offset[p] = p * 5 * 4;
        for (int i = 0; i < 5; i++) {
            send[p * 5 + i] = rank * 1000 + p * 10 + i;
            recv[p * 5 + i] = -1;
        }
    }
    for (int round = 0; round < 5; round++) {
        RA_TRY(
            ra_comm_alltoallv(comm, send, send_bytes, send_offset, recv, recv_bytes, recv_offset));
    }
    for (int p = 0; p < size; p++) {
        for (int i = 0; i < 5; i++) {
            int want = i < (p + 2 * rank) % 5 ? p * 1000 + rank * 10 + i : -1;
            RANK_CHECK(comm, recv[p * 5 + i] == want);
        }
    }
    return RA_OK;
}

static void alltoallv_delivers_each_pair_its_block(void **state)
{
    (void)state;
    run_everywhere(all_to_all, NULL);
}

static ra_status_t disagree(ra_comm_t *comm, void *arg)
{
    (void)arg;
    ra_log_set_quiet(1);
    int rank = ra_comm_rank(comm);
    int64_t bytes[] = {4, rank == 0 ? 4 : 8}, offset[] = {0, 8};
    char mine[8] = {0}, all[16];
    return ra_comm_allgatherv(comm, mine, all, bytes, offset);
}

static void ranks_that_disagree_on_a_size_fail(void **state)
{
    (void)state;
    assert_int_equal(checked_ranks_run("auto", 2, disagree, NULL), RA_ERR_INVALID);
}

static ra_status_t leave_alone(ra_comm_t *comm, void *arg)
{
    (void)arg;
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 1) {
        return ra_fail(RA_ERR_NOMEM, "test", "no memory for rank 1");
    }
    ra_status_t status = ra_comm_barrier(comm);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_collective_ends_when_a_rank_fails(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= RANKS_MOST; ranks++) {
        assert_int_equal(checked_ranks_run("auto", ranks, leave_alone, NULL), RA_ERR_NOMEM);
        assert_string_equal(ra_last_error(), "no memory for rank 1");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nobody_leaves_a_barrier_before_everybody_came),
        cmocka_unit_test(allgather_orders_blocks_by_rank),
        cmocka_unit_test(allgatherv_takes_blocks_of_any_size),
        cmocka_unit_test(broadcast_reaches_all_from_any_root),
        cmocka_unit_test(alltoallv_delivers_each_pair_its_block),
        cmocka_unit_test(ranks_that_disagree_on_a_size_fail),
        cmocka_unit_test(a_collective_ends_when_a_rank_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
