/*
 * A world is connected by connect_world() and left by leave_world(); in between its threads sleep
 * until there is a job. Jobs are the hooks and the functions of calls; a thread runs each once, so
 * it counts them.
 */
#include "comm/ranks.h"

#include "base/log.h"
#include "comm/transport.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS_MAX = 4096, FAILURE_BYTES = 1024 };

typedef struct rank {
    ra_ranks_t *ranks;
    ra_comm_t *comm;
    pthread_t thread;
} rank_t;

struct ra_ranks {
    const ra_transport_ops_t *ops;
    ra_launch_t launch; /* of several processes: size > 1 */
    int size;
    ra_rank_hooks_t hooks;
    rank_t *local; /* the ranks of this process, NULL while not connected */
    int locals;
    int threads; /* started: as many as locals, or 0 where the caller runs the one rank */

    pthread_mutex_t mutex; /* of all that follows */
    pthread_cond_t posted, finished;
    int64_t jobs; /* posted since the world was connected */
    ra_rank_func_t func;
    void *arg;
    int running; /* ranks that have not finished the last job */
    bool leaving;
    ra_status_t status; /* of the call: first failure so far, own ones before RA_ERR_PEER */
    char failure[FAILURE_BYTES]; /* its text */
};

static void keep_failure(ra_ranks_t *ranks, ra_status_t status)
{
    pthread_mutex_lock(&ranks->mutex);
    bool better = ranks->status == RA_OK || (ranks->status == RA_ERR_PEER && status != RA_ERR_PEER);
    if (better) {
        const char *text = ra_last_error();
        size_t length = strnlen(text, sizeof(ranks->failure) - 1);
        ranks->status = status;
        memcpy(ranks->failure, text, length);
        ranks->failure[length] = '\0';
    }
    pthread_mutex_unlock(&ranks->mutex);
}

static void run_rank(rank_t *rank, ra_rank_func_t func, void *arg)
{
    ra_status_t status = func(rank->comm, arg);
    if (status != RA_OK) {
        keep_failure(rank->ranks, status);
        ra_comm_abort(rank->comm, status);
    }
}

static bool await_job(ra_ranks_t *ranks, int64_t number, ra_rank_func_t *func_p, void **arg_p)
{
    pthread_mutex_lock(&ranks->mutex);
    while (ranks->jobs < number && !ranks->leaving) {
        pthread_cond_wait(&ranks->posted, &ranks->mutex);
    }
    bool any = ranks->jobs >= number;
    *func_p = ranks->func;
    *arg_p = ranks->arg;
    pthread_mutex_unlock(&ranks->mutex);
    return any;
}

static void finish_job(ra_ranks_t *ranks)
{
    pthread_mutex_lock(&ranks->mutex);
    if (--ranks->running == 0) {
        pthread_cond_signal(&ranks->finished);
    }
    pthread_mutex_unlock(&ranks->mutex);
}

static void *rank_main(void *arg)
{
    rank_t *rank = arg;
    ra_rank_func_t func;
    void *func_arg;
    ra_log_set_rank(ra_comm_rank(rank->comm));
    for (int64_t number = 1; await_job(rank->ranks, number, &func, &func_arg); number++) {
        ra_last_error_set("");
        ra_log_set_quiet(0);
        run_rank(rank, func, func_arg);
        finish_job(rank->ranks);
    }
    return NULL;
}

/* Failures are kept in ranks->status. */
static void run_job(ra_ranks_t *ranks, ra_rank_func_t func, void *arg)
{
    if (ranks->threads == 0) {
        run_rank(&ranks->local[0], func, arg);
        return;
    }
    pthread_mutex_lock(&ranks->mutex);
    ranks->func = func;
    ranks->arg = arg;
    ranks->running = ranks->threads;
    ranks->jobs++;
    pthread_cond_broadcast(&ranks->posted);
    while (ranks->running > 0) {
        pthread_cond_wait(&ranks->finished, &ranks->mutex);
    }
    pthread_mutex_unlock(&ranks->mutex);
}

static ra_status_t close_rank(ra_comm_t *comm, void *arg)
{
    const ra_rank_hooks_t *hooks = arg;
    hooks->close(comm, hooks->arg);
    return RA_OK;
}

/* When no job is running. */
static void stop_threads(ra_ranks_t *ranks)
{
    pthread_mutex_lock(&ranks->mutex);
    ranks->leaving = true;
    pthread_cond_broadcast(&ranks->posted);
    pthread_mutex_unlock(&ranks->mutex);
    for (int r = 0; r < ranks->threads; r++) {
        pthread_join(ranks->local[r].thread, NULL);
    }
    ranks->leaving = false;
    ranks->threads = 0;
    ranks->jobs = 0;
}

static void disconnect(ra_ranks_t *ranks)
{
    for (int r = 0; r < ranks->locals; r++) {
        ra_comm_destroy(ranks->local[r].comm);
    }
    free(ranks->local);
    ranks->local = NULL;
}

static void leave_world(ra_ranks_t *ranks)
{
    if (ranks->local == NULL) {
        return;
    }
    if (ranks->hooks.close != NULL) {
        run_job(ranks, close_rank, &ranks->hooks);
    }
    stop_threads(ranks);
    disconnect(ranks);
}

static ra_status_t open_comms(ra_ranks_t *ranks)
{
    ra_transport_t **ends = calloc((size_t)ranks->locals, sizeof(ra_transport_t *));
    if (ends == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", ranks->size);
    }
    ra_status_t status = ranks->launch.size > 1 ? ranks->ops->join(&ranks->launch, ends)
                                                : ranks->ops->open(ranks->size, ends);
    for (int r = 0; r < ranks->locals && ends[r] != NULL; r++) {
        if (status == RA_OK) {
            status = ra_comm_create(ends[r], &ranks->local[r].comm);
        }
        if (status != RA_OK) {
            ranks->ops->close(ends[r]);
        }
    }
    free(ends);
    return status;
}

static ra_status_t start_threads(ra_ranks_t *ranks)
{
    for (; ranks->threads < ranks->size; ranks->threads++) {
        rank_t *rank = &ranks->local[ranks->threads];
        int error = pthread_create(&rank->thread, NULL, rank_main, rank);
        if (error != 0) {
            ra_fail(RA_ERR_NOMEM, "comm", "cannot start the thread of rank %d: %s", ranks->threads,
                    strerror(error));
            stop_threads(ranks);
            return RA_ERR_NOMEM;
        }
    }
    return RA_OK;
}

static ra_status_t connect_ranks(ra_ranks_t *ranks)
{
    ranks->local = calloc((size_t)ranks->locals, sizeof(*ranks->local));
    if (ranks->local == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate %d ranks", ranks->locals);
    }
    for (int r = 0; r < ranks->locals; r++) {
        ranks->local[r].ranks = ranks;
    }
    RA_TRY(open_comms(ranks));
    if (ranks->launch.size > 1) {
        ra_log_set_rank(ranks->launch.rank);
    }
    return ranks->locals == 1 ? RA_OK : start_threads(ranks);
}

static void connect_world(ra_ranks_t *ranks)
{
    ra_status_t status = connect_ranks(ranks);
    if (status != RA_OK) {
        keep_failure(ranks, status);
        if (ranks->local != NULL) {
            disconnect(ranks);
        }
    } else if (ranks->hooks.open != NULL) {
        run_job(ranks, ranks->hooks.open, ranks->hooks.arg);
    }
}

/* Processes see each other's failures in a communicator only. */
static ra_status_t barrier(ra_comm_t *comm, void *arg)
{
    (void)arg;
    return ra_comm_barrier(comm);
}

ra_status_t ra_ranks_call(ra_ranks_t *ranks, ra_rank_func_t func, void *arg)
{
    bool processes = ranks->launch.size > 1;
    ranks->status = RA_OK;
    if (ranks->local == NULL) {
        connect_world(ranks);
    }
    if (ranks->status == RA_OK) {
        run_job(ranks, func, arg);
    }
    if (ranks->status == RA_OK && processes && ranks->hooks.open != NULL) {
        run_job(ranks, barrier, NULL);
    }
    ra_status_t status = ranks->status;
    if (status != RA_OK || (!processes && ra_comm_aborted(ranks->local[0].comm))) {
        leave_world(ranks);
    }
    if (status != RA_OK) {
        ra_last_error_set(ranks->failure);
    }
    return status;
}

ra_status_t ra_ranks_open(const char *transport, int ranks, const ra_rank_hooks_t *hooks,
                          ra_ranks_t **ranks_p)
{
    const ra_transport_ops_t *ops = NULL;
    ra_launch_t launch = {.size = 1};
    RA_TRY(ra_transport_find(transport, &ops));
    if (ranks < 1 || ranks > RANKS_MAX) {
        return ra_fail(RA_ERR_USAGE, "comm", "%d ranks asked for; 1 to %d are possible", ranks,
                       RANKS_MAX);
    }
    if (ops->join != NULL) {
        RA_TRY(ra_launch_find(&launch));
    }
    if (launch.size > 1 && ranks != launch.size) {
        return ra_fail(RA_ERR_USAGE, "comm", "%d ranks asked for, but %s started %d processes",
                       ranks, launch.started, launch.size);
    }
    ra_ranks_t *world = calloc(1, sizeof(*world));
    if (world == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a world of %d ranks", ranks);
    }
    world->ops = ops;
    world->launch = launch;
    world->size = ranks;
    world->locals = launch.size > 1 ? 1 : ranks;
    world->hooks = hooks != NULL ? *hooks : (ra_rank_hooks_t){0};
    pthread_mutex_init(&world->mutex, NULL);
    pthread_cond_init(&world->posted, NULL);
    pthread_cond_init(&world->finished, NULL);
    *ranks_p = world;
    return RA_OK;
}

void ra_ranks_close(ra_ranks_t *ranks)
{
    if (ranks == NULL) {
        return;
    }
    leave_world(ranks);
    pthread_cond_destroy(&ranks->finished);
    pthread_cond_destroy(&ranks->posted);
    pthread_mutex_destroy(&ranks->mutex);
    free(ranks);
}

ra_status_t ra_ranks_run(const char *transport, int ranks, ra_rank_func_t func, void *arg)
{
    ra_ranks_t *world = NULL;
    RA_TRY(ra_ranks_open(transport, ranks, NULL, &world));
    ra_status_t status = ra_ranks_call(world, func, arg);
    ra_ranks_close(world);
    return status;
}
