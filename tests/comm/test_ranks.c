/* A world that is kept between calls, over every transport. */
#include "base/clock.h"
#include "tests/comm/device_ranks.h"
#include "tests/comm/transfers.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

static const char *row; /* transport under test */

enum { RANKS_MOST = 8 };

/* What the hooks of a world count, and make on GPUs. */
typedef struct world {
    ra_ranks_t *ranks;
    int size;
    bool on_gpus;
    device_world_t gpu;
    atomic_int opened, closed;
    atomic_int bad_rank;          /* fails to open; -1: none */
    double timeout_s;             /* 0: the transport's */
    pthread_t thread[RANKS_MOST]; /* that opened the rank */
} world_t;

static ra_status_t open_rank(ra_comm_t *comm, void *arg)
{
    world_t *world = arg;
    int rank = ra_comm_rank(comm);
    atomic_fetch_add(&world->opened, 1);
    world->thread[rank] = pthread_self();
    if (world->timeout_s > 0) {
        ra_comm_set_timeout(comm, world->timeout_s);
    }
    if (atomic_load(&world->bad_rank) == rank) {
        ra_log_set_quiet(1);
        return ra_fail(RA_ERR_UNSUPPORTED, "test", "rank %d cannot be opened", rank);
    }
    if (world->on_gpus) {
        RA_TRY(device_rank_open(comm, &world->gpu));
    }
    return ra_comm_size(comm) == world->size ? RA_OK : RA_ERR_INTERNAL;
}

static void close_rank(ra_comm_t *comm, void *arg)
{
    world_t *world = arg;
    if (world->on_gpus) {
        device_rank_close(comm, &world->gpu);
    }
    /* A rank closes on the thread that opened it; tests see one that does not in the count. */
    if (pthread_equal(world->thread[ra_comm_rank(comm)], pthread_self())) {
        atomic_fetch_add(&world->closed, 1);
    }
}

static world_t *world_open_on(const char *transport, int ranks)
{
    world_t *world = calloc(1, sizeof(*world));
    assert_non_null(world);
    world->size = ranks;
    world->bad_rank = -1;
    world->gpu = gpu_world();
    world->on_gpus = gpu_row_uses_gpus(transport);
    ra_rank_hooks_t hooks = {.open = open_rank, .close = close_rank, .arg = world};
    assert_int_equal(ra_ranks_open(transport, ranks, &hooks, &world->ranks), RA_OK);
    return world;
}

/* NULL where the machine has too few GPUs for the transport. */
static world_t *world_open(int ranks)
{
    return gpu_row_can_run(row, ranks) ? world_open_on(row, ranks) : NULL;
}

/* @param times  the world was connected */
static void world_close(world_t *world, int times)
{
    ra_ranks_close(world->ranks);
    assert_int_equal(world->opened, times * world->size);
    assert_int_equal(world->closed, times * world->size);
    free(world);
}

/* A number round the ring: another one in each call, so that one left over is seen. */
static ra_status_t shift(ra_comm_t *comm, void *arg)
{
    const int64_t *call = arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int left = (rank + size - 1) % size;
    int64_t mine = *call * 100 + rank, theirs = -1;
    ra_transfer_t group[] = {make(RA_SEND, (rank + 1) % size, &mine, sizeof(mine)),
                             make(RA_RECV, left, &theirs, sizeof(theirs))};
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, group, 2, &request));
    RA_TRY(wait_free(comm, request));
    RANK_CHECK(comm, theirs == *call * 100 + left);
    return RA_OK;
}

static ra_status_t meet(ra_comm_t *comm, void *arg)
{
    (void)arg;
    return ra_comm_barrier(comm);
}

static void shift_well(const world_t *world, int64_t call)
{
    assert_int_equal(checked_ranks_call(world->ranks, shift, &call), RA_OK);
}

static ra_status_t sum_up(ra_comm_t *comm, void *arg)
{
    const int64_t *call = arg;
    int64_t mine = *call + ra_comm_rank(comm), all[RANKS_MOST];
    RA_TRY(ra_comm_allgather(comm, &mine, sizeof(mine), all));
    for (int r = 0; r < ra_comm_size(comm); r++) {
        RANK_CHECK(comm, all[r] == *call + r);
    }
    return RA_OK;
}

static void thousands_of_calls_of_different_functions_share_a_world(void **state)
{
    (void)state;
    static const ra_rank_func_t funcs[] = {shift, sum_up, meet};
    for (int ranks = 1; ranks <= 4; ranks++) {
        world_t *world = world_open(ranks);
        for (int64_t call = 0; world != NULL && call < 1000; call++) {
            assert_int_equal(checked_ranks_call(world->ranks, funcs[call % 3], &call), RA_OK);
        }
        if (world != NULL) {
            world_close(world, 1);
        }
    }
}

/* Threads of a world; what one call leaves on a thread is not seen by the next. */
static ra_status_t look_at_thread(ra_comm_t *comm, void *arg)
{
    const world_t *world = arg;
    int rank = ra_comm_rank(comm);
    RANK_CHECK(comm, pthread_equal(world->thread[rank], pthread_self()));
    for (int r = 0; r < rank; r++) {
        RANK_CHECK(comm, !pthread_equal(world->thread[r], pthread_self()));
    }
    RANK_CHECK(comm, world->size == 1 || ra_last_error()[0] == '\0');
    ra_last_error_set("left over");
    return RA_OK;
}

static void a_rank_keeps_its_thread_and_one_alone_has_the_callers(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= RANKS_MOST; ranks++) {
        world_t *world = world_open(ranks);
        for (int call = 0; world != NULL && call < 20; call++) {
            assert_int_equal(checked_ranks_call(world->ranks, look_at_thread, world), RA_OK);
            assert_int_equal(pthread_equal(world->thread[0], pthread_self()) != 0, ranks == 1);
        }
        if (world != NULL) {
            world_close(world, 1);
        }
    }
}

static ra_status_t fail_on_rank(ra_comm_t *comm, void *arg)
{
    const int *bad = arg;
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == *bad) {
        return ra_fail(RA_ERR_INPUT, "test", "rank %d gives up", *bad);
    }
    ra_status_t status = ra_comm_barrier(comm);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_failed_call_keeps_its_cause_and_the_next_one_works(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 4; ranks++) {
        world_t *world = world_open(ranks);
        if (world == NULL) {
            continue;
        }
        for (int bad = 0; bad < ranks; bad++) {
            char text[64];
            snprintf(text, sizeof(text), "rank %d gives up", bad);
            shift_well(world, 1);
            assert_int_equal(checked_ranks_call(world->ranks, fail_on_rank, &bad), RA_ERR_INPUT);
            assert_string_equal(ra_last_error(), text);
            assert_int_equal(world->closed, (bad + 1) * ranks); /* left before the call returns */
            shift_well(world, 2);
        }
        world_close(world, ranks + 1);
    }
}

static void a_world_may_fail_in_every_call(void **state)
{
    (void)state;
    world_t *world = world_open(1);
    int bad = 0;
    ra_log_set_quiet(1);
    for (int call = 0; call < 10; call++) {
        assert_int_equal(checked_ranks_call(world->ranks, fail_on_rank, &bad), RA_ERR_INPUT);
    }
    ra_log_set_quiet(0);
    world_close(world, 10);
}

/* Rank 0 sends what rank 1 never asks for. */
static ra_status_t send_in_vain(ra_comm_t *comm, void *arg)
{
    const bool *fails = arg;
    int64_t stale = 111;
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 0) {
        ra_transfer_t send = make(RA_SEND, 1, &stale, sizeof(stale));
        ra_request_t *request = NULL;
        RA_TRY(ra_comm_post(comm, &send, 1, &request));
        ra_status_t status = *fails ? ra_comm_wait(request, ra_deadline_in(60)) : RA_OK;
        ra_request_free(request);
        /* NCCL may have taken so few bytes without the other side. */
        RANK_CHECK(comm, status == RA_ERR_PEER || !*fails || strcmp(row, "nccl") == 0);
        return status;
    }
    return *fails ? ra_fail(RA_ERR_INPUT, "test", "rank 1 does not receive") : RA_OK;
}

static ra_status_t send_for_good(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int64_t value = ra_comm_rank(comm) == 0 ? 222 : -1;
    ra_transfer_t one = ra_comm_rank(comm) == 0 ? make(RA_SEND, 1, &value, sizeof(value))
                                                : make(RA_RECV, 0, &value, sizeof(value));
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &one, 1, &request));
    RA_TRY(wait_free(comm, request));
    RANK_CHECK(comm, value == 222);
    return RA_OK;
}

static void a_message_nobody_received_is_not_received_in_the_next_call(void **state)
{
    (void)state;
    world_t *world = world_open(2);
    if (world == NULL) {
        skip();
    }
    for (int i = 0; i < 20; i++) {
        bool fails = i % 2 == 0;
        if (!fails && strcmp(row, "nccl") == 0) {
            continue; /* cannot withdraw a group */
        }
        assert_int_equal(checked_ranks_call(world->ranks, send_in_vain, &fails),
                         fails ? RA_ERR_INPUT : RA_OK);
        assert_int_equal(checked_ranks_call(world->ranks, send_for_good, NULL), RA_OK);
    }
    world_close(world, 11);
}

static ra_status_t abort_and_go_on(ra_comm_t *comm, void *arg)
{
    const int *returned = arg;
    if (ra_comm_rank(comm) == 0) {
        ra_comm_abort(comm, RA_ERR_CANCELED);
        return RA_OK;
    }
    ra_status_t status;
    while ((status = ra_comm_barrier(comm)) == RA_OK) {
    }
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return *returned == RA_OK ? RA_OK : status;
}

static void an_aborted_world_is_left_even_if_all_went_well(void **state)
{
    (void)state;
    static int returned[] = {RA_ERR_PEER, RA_OK};
    for (int i = 0; i < 2; i++) {
        world_t *world = world_open(2);
        if (world == NULL) {
            skip();
        }
        shift_well(world, 1);
        assert_int_equal(checked_ranks_call(world->ranks, abort_and_go_on, &returned[i]),
                         returned[i]);
        if (returned[i] != RA_OK) {
            assert_string_equal(ra_last_error(), "another rank failed: canceled");
        }
        shift_well(world, 2);
        world_close(world, 2);
    }
}

/* Ranks that wait for each other for good, and who may stop them. */
typedef struct watched {
    _Atomic(ra_comm_t *) comm;
    atomic_int waiting, ranks;
} watched_t;

static ra_status_t wait_for_good(ra_comm_t *comm, void *arg)
{
    watched_t *watched = arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    char byte;
    ra_transfer_t receive = make(RA_RECV, (rank + 1) % size, &byte, 1);
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &receive, 1, &request));
    atomic_store(&watched->comm, comm);
    atomic_fetch_add(&watched->waiting, 1);
    return wait_free(comm, request);
}

static void *stop_them(void *arg)
{
    watched_t *watched = arg;
    while (atomic_load(&watched->waiting) < atomic_load(&watched->ranks)) {
        sched_yield();
    }
    ra_comm_abort(atomic_load(&watched->comm), RA_ERR_INTERRUPTED);
    return NULL;
}

static void an_abort_from_outside_wakes_all_ranks(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= RANKS_MOST; ranks += 3) {
        world_t *world = world_open(ranks);
        if (world == NULL) {
            continue;
        }
        for (int i = 0; i < 10; i++) {
            watched_t watched = {.ranks = ranks};
            pthread_t thread;
            assert_int_equal(pthread_create(&thread, NULL, stop_them, &watched), 0);
            assert_int_equal(checked_ranks_call(world->ranks, wait_for_good, &watched),
                             RA_ERR_PEER);
            assert_string_equal(ra_last_error(), "another rank failed: interrupted");
            pthread_join(thread, NULL);
            shift_well(world, i);
        }
        world_close(world, 11);
    }
}

static ra_status_t wait_in_vain(ra_comm_t *comm, void *arg)
{
    (void)arg;
    char byte;
    if (ra_comm_rank(comm) != 0) {
        return RA_OK;
    }
    ra_log_set_quiet(1);
    ra_transfer_t receive = make(RA_RECV, 1, &byte, 1);
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &receive, 1, &request));
    return wait_free(comm, request);
}

static void a_deadline_set_once_holds_in_every_call(void **state)
{
    (void)state;
    if (!gpu_row_can_run(row, 2)) {
        skip();
    }
    world_t *world = world_open_on(row, 2);
    world->timeout_s = 0.1;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(checked_ranks_call(world->ranks, look_at_thread, world), RA_OK);
        assert_int_equal(checked_ranks_call(world->ranks, wait_in_vain, NULL), RA_ERR_TIMEOUT);
        assert_non_null(strstr(ra_last_error(), "deadline passed on rank 0"));
    }
    world_close(world, 2);
}

static void a_rank_that_cannot_be_opened_fails_the_call_only(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++) {
        world_t *world = world_open(ranks);
        if (world == NULL) {
            continue;
        }
        atomic_store(&world->bad_rank, ranks - 1);
        for (int i = 0; i < 3; i++) {
            assert_int_equal(checked_ranks_call(world->ranks, meet, NULL), RA_ERR_UNSUPPORTED);
            assert_non_null(strstr(ra_last_error(), "cannot be opened"));
        }
        ra_log_set_quiet(0); /* of the one rank that ran here */
        atomic_store(&world->bad_rank, -1);
        shift_well(world, 1);
        world_close(world, 4);
    }
}

static void worlds_close_unused_idle_and_failed(void **state)
{
    (void)state;
    ra_ranks_close(NULL);
    for (int ranks = 1; ranks <= 4; ranks++) {
        int bad = 0;
        for (int used = 0; used < 3 && gpu_row_can_run(row, ranks); used++) {
            world_t *world = world_open(ranks);
            if (used > 0) {
                shift_well(world, 1);
            }
            if (used == 2) {
                assert_int_equal(checked_ranks_call(world->ranks, fail_on_rank, &bad),
                                 RA_ERR_INPUT);
            }
            ra_log_set_quiet(0);
            world_close(world, used > 0);
        }
    }
}

static void *shift_often(void *arg)
{
    const world_t *world = arg;
    int64_t wrong = 0;
    for (int64_t call = 0; call < 200; call++) {
        wrong += ra_ranks_call(world->ranks, shift, &call) != RA_OK;
    }
    return (void *)(intptr_t)wrong;
}

static void worlds_live_side_by_side(void **state)
{
    (void)state;
    if (!gpu_row_can_run(row, 3)) {
        skip();
    }
    world_t *pair[] = {world_open(3), world_open_on("local", 4)};
    for (int64_t call = 0; call < 200; call++) {
        shift_well(pair[call % 2], call);
    }
    pthread_t thread;
    void *wrong = NULL;
    assert_int_equal(pthread_create(&thread, NULL, shift_often, pair[0]), 0);
    assert_null(shift_often(pair[1]));
    pthread_join(thread, &wrong);
    assert_null(wrong);
    world_close(pair[1], 1);
    shift_well(pair[0], 1);
    world_close(pair[0], 1);
}

static ra_status_t run_another(ra_comm_t *comm, void *arg)
{
    RA_TRY(ra_ranks_run("local", 2, shift, arg));
    return shift(comm, arg);
}

static void a_rank_may_have_a_world_of_its_own(void **state)
{
    (void)state;
    if (!gpu_row_can_run(row, 2)) {
        skip();
    }
    world_t *world = world_open(2);
    for (int64_t call = 0; call < 10; call++) {
        assert_int_equal(checked_ranks_call(world->ranks, run_another, &call), RA_OK);
    }
    world_close(world, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(thousands_of_calls_of_different_functions_share_a_world),
        cmocka_unit_test(a_rank_keeps_its_thread_and_one_alone_has_the_callers),
        cmocka_unit_test(a_failed_call_keeps_its_cause_and_the_next_one_works),
        cmocka_unit_test(a_world_may_fail_in_every_call),
        cmocka_unit_test(a_message_nobody_received_is_not_received_in_the_next_call),
        cmocka_unit_test(an_aborted_world_is_left_even_if_all_went_well),
        cmocka_unit_test(an_abort_from_outside_wakes_all_ranks),
        cmocka_unit_test(a_deadline_set_once_holds_in_every_call),
        cmocka_unit_test(a_rank_that_cannot_be_opened_fails_the_call_only),
        cmocka_unit_test(worlds_close_unused_idle_and_failed),
        cmocka_unit_test(worlds_live_side_by_side),
        cmocka_unit_test(a_rank_may_have_a_world_of_its_own),
    };
    int failed = 0;
    for (int i = 0; next_transport(&i, &row);) {
        failed += cmocka_run_group_tests_name(row, tests, NULL, NULL);
    }
    return failed;
}
