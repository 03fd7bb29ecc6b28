#include "comm/ranks.h"

#include "base/log.h"
#include "comm/transport.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS_MAX = 4096, FAILURE_BYTES = 1024 };

typedef struct world {
    ra_rank_func_t func;
    void *arg;
    pthread_mutex_t mutex;
    ra_status_t status; /* first failure so far, own ones before RA_ERR_PEER; guarded by mutex */
    char failure[FAILURE_BYTES]; /* its text; guarded by mutex */
} world_t;

typedef struct rank_thread {
    world_t *world;
    ra_comm_t *comm;
    pthread_t thread;
} rank_thread_t;

static void keep_failure(world_t *world, ra_status_t status)
{
    pthread_mutex_lock(&world->mutex);
    bool better = world->status == RA_OK || (world->status == RA_ERR_PEER && status != RA_ERR_PEER);
    if (better) {
        const char *text = ra_last_error();
        size_t length = strnlen(text, sizeof(world->failure) - 1);
        world->status = status;
        memcpy(world->failure, text, length);
        world->failure[length] = '\0';
    }
    pthread_mutex_unlock(&world->mutex);
}

static void run_rank(rank_thread_t *rank)
{
    world_t *world = rank->world;
    ra_status_t status = world->func(rank->comm, world->arg);
    if (status != RA_OK) {
        keep_failure(world, status);
        ra_comm_abort(rank->comm, status);
    }
}

static void *rank_main(void *arg)
{
    rank_thread_t *rank = arg;
    ra_log_set_rank(ra_comm_rank(rank->comm));
    ra_last_error_set("");
    run_rank(rank);
    return NULL;
}

static void run_threads(rank_thread_t *threads, int ranks)
{
    int started = 0;
    for (; started < ranks; started++) {
        int error = pthread_create(&threads[started].thread, NULL, rank_main, &threads[started]);
        if (error != 0) {
            ra_fail(RA_ERR_NOMEM, "comm", "cannot start the thread of rank %d: %s", started,
                    strerror(error));
            keep_failure(threads->world, RA_ERR_NOMEM);
            ra_comm_abort(threads->comm, RA_ERR_NOMEM);
            break;
        }
    }
    for (int r = 0; r < started; r++) {
        pthread_join(threads[r].thread, NULL);
    }
}

static ra_status_t open_comms(const ra_transport_ops_t *ops, int ranks, rank_thread_t *threads)
{
    ra_transport_t **ends = calloc((size_t)ranks, sizeof(ra_transport_t *));
    if (ends == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", ranks);
    }
    ra_status_t status = ops->open(ranks, ends);
    for (int r = 0; r < ranks && ends[r] != NULL; r++) {
        if (status == RA_OK) {
            status = ra_comm_create(ends[r], &threads[r].comm);
        }
        if (status != RA_OK) {
            ops->close(ends[r]);
        }
    }
    free(ends);
    return status;
}

static ra_status_t run_process(const ra_transport_ops_t *ops, const ra_launch_t *launch, int ranks,
                               ra_rank_func_t func, void *arg)
{
    if (ranks != launch->size) {
        return ra_fail(RA_ERR_USAGE, "comm", "%d ranks asked for, but %s started %d processes",
                       ranks, launch->started, launch->size);
    }
    ra_transport_t *end = NULL;
    ra_comm_t *comm = NULL;
    RA_TRY(ops->join(launch, &end));
    ra_status_t status = ra_comm_create(end, &comm);
    if (status != RA_OK) {
        ops->close(end);
        return status;
    }
    ra_log_set_rank(launch->rank);
    status = func(comm, arg);
    if (status != RA_OK) {
        ra_comm_abort(comm, status);
    }
    ra_comm_destroy(comm);
    return status;
}

ra_status_t ra_ranks_run(const char *transport, int ranks, ra_rank_func_t func, void *arg)
{
    const ra_transport_ops_t *ops = NULL;
    RA_TRY(ra_transport_find(transport, &ops));
    if (ranks < 1 || ranks > RANKS_MAX) {
        return ra_fail(RA_ERR_USAGE, "comm", "%d ranks asked for; 1 to %d are possible", ranks,
                       RANKS_MAX);
    }
    if (ops->join != NULL) {
        ra_launch_t launch;
        RA_TRY(ra_launch_find(&launch));
        if (launch.size > 1) {
            return run_process(ops, &launch, ranks, func, arg);
        }
    }
    rank_thread_t *threads = calloc((size_t)ranks, sizeof(*threads));
    if (threads == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate %d ranks", ranks);
    }

    world_t world = {.func = func, .arg = arg};
    pthread_mutex_init(&world.mutex, NULL);
    ra_status_t status = open_comms(ops, ranks, threads);
    if (status == RA_OK) {
        for (int r = 0; r < ranks; r++) {
            threads[r].world = &world;
        }
        if (ranks == 1) {
            run_rank(&threads[0]);
        } else {
            run_threads(threads, ranks);
        }
        status = world.status;
        if (status != RA_OK) {
            ra_last_error_set(world.failure);
        }
    }
    for (int r = 0; r < ranks; r++) {
        ra_comm_destroy(threads[r].comm);
    }
    pthread_mutex_destroy(&world.mutex);
    free(threads);
    return status;
}
