/* Processes that find each other over TCP and notice each other's end. */
#include "base/log.h"
#include "comm/bootstrap.h"
#include "tests/test_support.h"
#include <arpa/inet.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS_MOST = 6, PATIENCE_S = 20 };

static bool with_frozen; /* the tests that wait for silence */

static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    close(fd);
    return ntohs(address.sin_port);
}

static void pause_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

typedef int (*rank_func_t)(ra_bootstrap_t *bootstrap, int rank, int size);

/* 0 when all cards are there and @a func says so. */
static int be_rank(int rank, int size, int port, rank_func_t func)
{
    ra_launch_t launch = {.rank = rank, .size = size, .port = port, .address = "127.0.0.1"};
    int64_t mine[2] = {rank * 11, -rank}, all[RANKS_MOST][2];
    ra_bootstrap_t *bootstrap = NULL;
    ra_log_set_quiet(1);
    if (ra_bootstrap_open(&launch, PATIENCE_S, mine, sizeof(mine), all, &bootstrap) != RA_OK) {
        return 1;
    }
    for (int r = 0; r < size; r++) {
        if (all[r][0] != r * 11 || all[r][1] != -r) {
            return 2;
        }
    }
    int code = func(bootstrap, rank, size);
    ra_bootstrap_close(bootstrap);
    return code;
}

/* Rank 0 here, the others in processes; @a lost is a rank that ends by a signal, or -1. */
static void run_processes(int size, rank_func_t func, int lost)
{
    int port = free_port();
    pid_t child[RANKS_MOST] = {0};
    for (int r = 1; r < size; r++) {
        child[r] = fork();
        assert_true(child[r] >= 0);
        if (child[r] == 0) {
            _exit(be_rank(r, size, port, func));
        }
    }
    int code = be_rank(0, size, port, func);
    for (int r = 1; r < size; r++) {
        int status = 0;
        if (r == lost) {
            kill(child[r], SIGKILL);
        }
        assert_int_equal(waitpid(child[r], &status, 0), child[r]);
        assert_true(r == lost ? WIFSIGNALED(status)
                              : WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    assert_int_equal(code, 0);
}

static int just_leave(ra_bootstrap_t *bootstrap, int rank, int size)
{
    (void)bootstrap;
    (void)rank;
    (void)size;
    return 0;
}

static void everybody_gets_what_everybody_gave(void **state)
{
    (void)state;
    for (int size = 1; size <= RANKS_MOST; size++) {
        run_processes(size, just_leave, -1);
    }
}

typedef struct news {
    atomic_int count, cause;
} news_t;

static void hear(void *arg, ra_status_t cause)
{
    news_t *news = arg;
    atomic_store(&news->cause, (int)cause);
    atomic_fetch_add(&news->count, 1);
}

/* The bootstrap is closed by be_rank(), so what it tells outlives this frame. */
static news_t news;

static int wait_for_news(int seconds)
{
    for (int i = 0; i < seconds * 100 && atomic_load(&news.count) == 0; i++) {
        pause_ms(10);
    }
    return atomic_load(&news.count);
}

static int leave_at_different_times(ra_bootstrap_t *bootstrap, int rank, int size)
{
    news = (news_t){0};
    if (ra_bootstrap_watch(bootstrap, hear, &news) != RA_OK) {
        return 3;
    }
    pause_ms(30 * (rank == 0 ? 0 : size - rank));
    return atomic_load(&news.count) == 0 ? 0 : 4;
}

static void leaving_is_not_a_loss(void **state)
{
    (void)state;
    run_processes(4, leave_at_different_times, -1);
}

static int vanish_or_hear(ra_bootstrap_t *bootstrap, int rank, int size)
{
    news = (news_t){0};
    if (ra_bootstrap_watch(bootstrap, hear, &news) != RA_OK) {
        return 3;
    }
    if (rank == size - 1) {
        pause_ms(50);
        raise(SIGKILL);
    }
    return wait_for_news(10) == 1 && atomic_load(&news.cause) == RA_ERR_PEER ? 0 : 5;
}

static void a_process_that_dies_is_known_to_all(void **state)
{
    (void)state;
    for (int size = 2; size <= 5; size++) {
        run_processes(size, vanish_or_hear, size - 1);
    }
}

static int abort_or_hear(ra_bootstrap_t *bootstrap, int rank, int size)
{
    news = (news_t){0};
    if (ra_bootstrap_watch(bootstrap, hear, &news) != RA_OK) {
        return 3;
    }
    if (rank == size / 2) {
        ra_bootstrap_abort(bootstrap, RA_ERR_NOMEM);
        return 0;
    }
    return wait_for_news(10) == 1 && atomic_load(&news.cause) == RA_ERR_NOMEM ? 0 : 5;
}

static void an_abort_reaches_all_with_its_cause(void **state)
{
    (void)state;
    for (int size = 2; size <= 5; size++) {
        run_processes(size, abort_or_hear, -1);
    }
}

static int freeze_or_hear(ra_bootstrap_t *bootstrap, int rank, int size)
{
    news = (news_t){0};
    if (ra_bootstrap_watch(bootstrap, hear, &news) != RA_OK) {
        return 3;
    }
    if (rank == size - 1) {
        raise(SIGSTOP);
        return 6;
    }
    return wait_for_news(2 * RA_BOOTSTRAP_SILENCE_S) == 1 ? 0 : 5;
}

static void a_frozen_process_is_known_to_all(void **state)
{
    (void)state;
    if (!with_frozen) {
        print_message("needs the argument frozen: takes %d s\n", RA_BOOTSTRAP_SILENCE_S);
        skip();
    }
    run_processes(3, freeze_or_hear, 2);
}

static void rank_0_waits_in_vain_for_the_rest(void **state)
{
    (void)state;
    ra_launch_t launch = {.size = 2, .port = free_port(), .address = "127.0.0.1"};
    ra_bootstrap_t *bootstrap = NULL;
    char mine = 1, all[2];
    ra_log_set_quiet(1);
    assert_int_equal(ra_bootstrap_open(&launch, 0.05, &mine, 1, all, &bootstrap), RA_ERR_TIMEOUT);
    assert_non_null(strstr(ra_last_error(), "1 of 2 processes did not come"));
    launch.rank = 1;
    assert_int_equal(ra_bootstrap_open(&launch, 0.05, &mine, 1, all, &bootstrap), RA_ERR_TIMEOUT);
    assert_non_null(strstr(ra_last_error(), "cannot reach rank 0"));
    ra_log_set_quiet(0);
}

static void set(const char *name, const char *value)
{
    if (value == NULL) {
        unsetenv(name);
    } else {
        setenv(name, value, 1);
    }
}

static void launchers_are_read_from_their_variables(void **state)
{
    (void)state;
    ra_launch_t launch;
    const char *all[] = {"RANK",        "WORLD_SIZE",           "LOCAL_RANK",
                         "PMI_RANK",    "OMPI_COMM_WORLD_RANK", "SLURM_PROCID",
                         "PMI_SIZE",    "OMPI_COMM_WORLD_SIZE", "LOCAL_WORLD_SIZE",
                         "MASTER_ADDR", "MASTER_PORT"};
    for (size_t i = 0; i < RA_ARRAY_LEN(all); i++) {
        set(all[i], NULL);
    }
    assert_int_equal(ra_launch_find(&launch), RA_OK);
    assert_int_equal(launch.size, 1);
    set("RANK", "3");
    set("WORLD_SIZE", "8");
    set("LOCAL_RANK", "1");
    set("LOCAL_WORLD_SIZE", "2");
    ra_log_set_quiet(1);
    assert_int_equal(ra_launch_find(&launch), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "set MASTER_ADDR"));
    set("MASTER_ADDR", "node0");
    set("MASTER_PORT", "1234");
    assert_int_equal(ra_launch_find(&launch), RA_OK);
    assert_int_equal(launch.rank, 3);
    assert_int_equal(launch.size, 8);
    assert_int_equal(launch.local_rank, 1);
    assert_int_equal(launch.port, 1234);
    assert_string_equal(launch.address, "node0");
    set("RANK", "8");
    assert_int_equal(ra_launch_find(&launch), RA_ERR_USAGE);
    ra_log_set_quiet(0);
    for (size_t i = 0; i < RA_ARRAY_LEN(all); i++) {
        set(all[i], NULL);
    }
    set("OMPI_COMM_WORLD_RANK", "1");
    set("OMPI_COMM_WORLD_SIZE", "2");
    set("OMPI_COMM_WORLD_LOCAL_SIZE", "2");
    assert_int_equal(ra_launch_find(&launch), RA_OK);
    assert_string_equal(launch.address, "127.0.0.1");
    assert_int_equal(launch.local_rank, 1);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everybody_gets_what_everybody_gave),
        cmocka_unit_test(leaving_is_not_a_loss),
        cmocka_unit_test(a_process_that_dies_is_known_to_all),
        cmocka_unit_test(an_abort_reaches_all_with_its_cause),
        cmocka_unit_test(rank_0_waits_in_vain_for_the_rest),
        cmocka_unit_test(a_frozen_process_is_known_to_all),
        cmocka_unit_test(launchers_are_read_from_their_variables),
    };
    with_frozen = argc > 1 && strcmp(argv[1], "frozen") == 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
