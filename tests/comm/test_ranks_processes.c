/*
 * Worlds where this process is one rank of several. Two threads play the processes, each with a
 * ra_ranks_t of its own; this file's transport joins them to a world in memory, anew whenever both
 * connect. It stands in for the transport table.
 */
#include "comm/transport.h"
#include "tests/comm/ranks_check.h"
#include "tests/test_support.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { PROCESSES = 2, WORLDS_MOST = 64 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static ra_transport_t *ends[WORLDS_MOST][PROCESSES]; /* guarded by mutex, as what follows */
static int worlds, joined[PROCESSES], left[PROCESSES];
static ra_transport_ops_t row;

static ra_status_t join_world(const ra_launch_t *launch, ra_transport_t **end_p)
{
    pthread_mutex_lock(&mutex);
    int number = joined[launch->rank]++;
    ra_status_t status = number < WORLDS_MOST ? RA_OK : RA_ERR_INTERNAL;
    if (status == RA_OK && number == worlds) {
        status = ra_transport_local.open(PROCESSES, ends[worlds++]);
    }
    if (status == RA_OK) {
        *end_p = ends[number][launch->rank];
        (*end_p)->ops = &row;
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* A world in memory ends for all at once: the last one to leave ends it. */
static void leave_world(ra_transport_t *end)
{
    pthread_mutex_lock(&mutex);
    int number = left[end->rank]++;
    if (left[1 - end->rank] > number) {
        ra_transport_local.close(ends[number][0]);
        ra_transport_local.close(ends[number][1]);
    }
    pthread_mutex_unlock(&mutex);
}

ra_status_t ra_transport_find(const char *name, const ra_transport_ops_t **ops_p)
{
    (void)name;
    row = ra_transport_local;
    row.join = join_world;
    row.close = leave_world;
    *ops_p = &row;
    return RA_OK;
}

/* What a process does in its calls, and what came of them. */
typedef struct process {
    int rank;
    ra_ranks_t *ranks;
    int opened, closed;
    ra_status_t status[16];
    char text[16][64];
    pthread_t thread;
} process_t;

static ra_status_t open_rank(ra_comm_t *comm, void *arg)
{
    process_t *process = arg;
    process->opened++;
    return ra_comm_rank(comm) == process->rank ? RA_OK : RA_ERR_INTERNAL;
}

static void close_rank(ra_comm_t *comm, void *arg)
{
    (void)comm;
    ((process_t *)arg)->closed++;
}

static void start_by_launcher(const char *rank)
{
    setenv("RANK", rank, 1);
    setenv("WORLD_SIZE", "2", 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
}

static void forget_launcher(void)
{
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
    unsetenv("MASTER_ADDR");
}

static void open_processes(process_t *processes)
{
    for (int r = 0; r < PROCESSES; r++) {
        start_by_launcher(r == 0 ? "0" : "1");
        processes[r] = (process_t){.rank = r};
        ra_rank_hooks_t hooks = {.open = open_rank, .close = close_rank, .arg = &processes[r]};
        assert_int_equal(ra_ranks_open("any", PROCESSES, &hooks, &processes[r].ranks), RA_OK);
    }
    forget_launcher();
}

static void run_processes(process_t *processes, void *(*func)(void *arg))
{
    for (int r = 0; r < PROCESSES; r++) {
        assert_int_equal(pthread_create(&processes[r].thread, NULL, func, &processes[r]), 0);
    }
    for (int r = 0; r < PROCESSES; r++) {
        pthread_join(processes[r].thread, NULL);
    }
}

static ra_status_t exchange(ra_comm_t *comm, void *arg)
{
    const int *call = arg;
    int rank = ra_comm_rank(comm), mine = *call * 10 + rank, all[PROCESSES];
    RA_TRY(ra_comm_allgather(comm, &mine, sizeof(mine), all));
    RANK_CHECK(comm, all[0] == *call * 10 && all[1] == *call * 10 + 1);
    return RA_OK;
}

/* Rank 1 fails when it has nothing more to say to rank 0, which has all it needs. */
static ra_status_t fail_at_the_end(ra_comm_t *comm, void *arg)
{
    RA_TRY(exchange(comm, arg));
    if (ra_comm_rank(comm) == 0) {
        return RA_OK;
    }
    ra_log_set_quiet(1);
    return ra_fail(RA_ERR_OUTPUT, "test", "rank 1 cannot write");
}

static void *call_often(void *arg)
{
    process_t *process = arg;
    for (int call = 0; call < 16; call++) {
        ra_rank_func_t func = call % 4 == 2 ? fail_at_the_end : exchange;
        process->status[call] = ra_ranks_call(process->ranks, func, &call);
        snprintf(process->text[call], sizeof(process->text[call]), "%s", ra_last_error());
    }
    ra_ranks_close(process->ranks);
    return NULL;
}

static void a_failure_anywhere_fails_the_call_everywhere_and_all_go_on_together(void **state)
{
    (void)state;
    process_t processes[PROCESSES];
    atomic_store(&rank_checks_failed, 0);
    open_processes(processes);
    run_processes(processes, call_often);
    assert_int_equal(rank_checks_failed, 0);
    for (int call = 0; call < 16; call++) {
        bool fails = call % 4 == 2;
        assert_int_equal(processes[0].status[call], fails ? RA_ERR_PEER : RA_OK);
        assert_int_equal(processes[1].status[call], fails ? RA_ERR_OUTPUT : RA_OK);
        if (fails) {
            assert_string_equal(processes[0].text[call],
                                "another rank failed: output cannot be written");
            assert_string_equal(processes[1].text[call], "rank 1 cannot write");
        }
    }
    assert_int_equal(worlds, 5);
    for (int r = 0; r < PROCESSES; r++) {
        assert_int_equal(processes[r].opened, 5);
        assert_int_equal(processes[r].closed, 5);
    }
}

static void as_many_ranks_as_processes_are_asked_for(void **state)
{
    (void)state;
    ra_ranks_t *ranks = NULL;
    start_by_launcher("1");
    ra_log_set_quiet(1);
    assert_int_equal(ra_ranks_open("any", 3, NULL, &ranks), RA_ERR_USAGE);
    assert_string_equal(ra_last_error(), "3 ranks asked for, but torchrun started 2 processes");
    ra_log_set_quiet(0);
    forget_launcher();
    assert_null(ranks);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_failure_anywhere_fails_the_call_everywhere_and_all_go_on_together),
        cmocka_unit_test(as_many_ranks_as_processes_are_asked_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
