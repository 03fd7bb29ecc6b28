#include "base/pool.h"

#include "base/log.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* One ra_pool_for() call; lives on the caller's stack while linked in the pool's list. */
typedef struct job {
    ra_pool_func_t func;
    void *arg;
    int64_t count;
    atomic_llong next; /* next index to hand out; written by every participant */
    int64_t helpers;   /* workers inside the job; guarded by the pool's mutex */
    struct job *newer; /* guarded by the pool's mutex */
} job_t;

struct ra_pool {
    pthread_mutex_t mutex;
    pthread_cond_t work; /* a job was linked, a permit was freed, or the pool stops */
    pthread_cond_t done; /* a helper left a job, or a permit was freed */
    job_t *jobs;         /* oldest first; guarded by mutex */
    int permits;         /* free permits; guarded by mutex */
    int threads;
    int workers;
    bool stopping; /* guarded by mutex */
    pthread_t *worker;
};

static _Thread_local bool inside_job;

int ra_pool_default_threads(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) {
        return 1;
    }
    int n = CPU_COUNT(&set);
    return n > 0 ? n : 1;
}

static void work_on(job_t *job)
{
    inside_job = true;
    for (;;) {
        int64_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (index >= job->count) {
            break;
        }
        job->func(job->arg, index);
    }
    inside_job = false;
}

/* Oldest job with indices left, or NULL. Called with the mutex held. */
static job_t *find_open_job(ra_pool_t *pool)
{
    for (job_t *job = pool->jobs; job != NULL; job = job->newer) {
        if (atomic_load_explicit(&job->next, memory_order_relaxed) < job->count) {
            return job;
        }
    }
    return NULL;
}

static void *worker_main(void *arg)
{
    ra_pool_t *pool = arg;

    pthread_mutex_lock(&pool->mutex);
    while (!pool->stopping) {
        job_t *job = pool->permits > 0 ? find_open_job(pool) : NULL;
        if (job == NULL) {
            pthread_cond_wait(&pool->work, &pool->mutex);
            continue;
        }
        pool->permits--;
        job->helpers++;
        pthread_mutex_unlock(&pool->mutex);
        work_on(job);
        pthread_mutex_lock(&pool->mutex);
        job->helpers--;
        pool->permits++;
        pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

ra_status_t ra_pool_create(int threads, ra_pool_t **pool_p)
{
    if (threads < 1) {
        return ra_fail(RA_ERR_INVALID, "pool", "%d threads asked for; need at least 1", threads);
    }
    ra_pool_t *pool = calloc(1, sizeof(*pool));
    pthread_t *worker = calloc((size_t)threads, sizeof(*worker));
    if (pool == NULL || worker == NULL) {
        free(pool);
        free(worker);
        return ra_fail(RA_ERR_NOMEM, "pool", "cannot allocate a pool of %d threads", threads);
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->permits = pool->threads = threads;
    pool->worker = worker;
    for (; pool->workers < threads - 1; pool->workers++) {
        int error = pthread_create(&worker[pool->workers], NULL, worker_main, pool);
        if (error != 0) {
            ra_fail(RA_ERR_NOMEM, "pool", "cannot start worker %d of %d: %s", pool->workers + 1,
                    threads - 1, strerror(error));
            ra_pool_destroy(pool);
            return RA_ERR_NOMEM;
        }
    }
    *pool_p = pool;
    return RA_OK;
}

void ra_pool_destroy(ra_pool_t *pool)
{
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->workers; i++) {
        pthread_join(pool->worker[i], NULL);
    }
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->worker);
    free(pool);
}

int ra_pool_threads(const ra_pool_t *pool)
{
    return pool == NULL ? 1 : pool->threads;
}

static void link_job(ra_pool_t *pool, job_t *job)
{
    job_t **tail = &pool->jobs;
    while (*tail != NULL) {
        tail = &(*tail)->newer;
    }
    *tail = job;
}

static void unlink_job(ra_pool_t *pool, job_t *job)
{
    job_t **place = &pool->jobs;
    while (*place != job) {
        place = &(*place)->newer;
    }
    *place = job->newer;
}

void ra_pool_for(ra_pool_t *pool, int64_t count, ra_pool_func_t func, void *arg)
{
    if (pool == NULL || inside_job) {
        for (int64_t i = 0; i < count; i++) {
            func(arg, i);
        }
        return;
    }
    if (count <= 0) {
        return;
    }

    job_t job = {.func = func, .arg = arg, .count = count};
    atomic_init(&job.next, 0);
    pthread_mutex_lock(&pool->mutex);
    /* Linked before the permit is taken: workers may finish it while the caller waits its turn. */
    if (count > 1) {
        link_job(pool, &job);
        pthread_cond_broadcast(&pool->work);
    }
    while (pool->permits == 0 &&
           atomic_load_explicit(&job.next, memory_order_relaxed) < job.count) {
        pthread_cond_wait(&pool->done, &pool->mutex);
    }
    if (atomic_load_explicit(&job.next, memory_order_relaxed) < job.count) {
        pool->permits--;
        pthread_mutex_unlock(&pool->mutex);
        work_on(&job);
        pthread_mutex_lock(&pool->mutex);
        pool->permits++;
        pthread_cond_broadcast(&pool->done);
        if (pool->jobs != NULL) {
            pthread_cond_signal(&pool->work);
        }
    }
    while (job.helpers > 0) {
        pthread_cond_wait(&pool->done, &pool->mutex);
    }
    if (count > 1) {
        unlink_job(pool, &job);
    }
    pthread_mutex_unlock(&pool->mutex);
}

/* Freed by the thread-exit destructor of scratch_key. */
typedef struct scratch {
    void *data[RA_SCRATCH_SLOTS];
    int64_t bytes[RA_SCRATCH_SLOTS];
} scratch_t;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_free(void *arg)
{
    scratch_t *scratch = arg;
    for (int i = 0; i < RA_SCRATCH_SLOTS; i++) {
        free(scratch->data[i]);
    }
    free(scratch);
}

/* The main thread does not run key destructors at exit(). */
static void scratch_free_main(void)
{
    scratch_t *scratch = pthread_getspecific(scratch_key);
    if (scratch != NULL) {
        pthread_setspecific(scratch_key, NULL);
        scratch_free(scratch);
    }
}

static void scratch_make_key(void)
{
    pthread_key_create(&scratch_key, scratch_free);
    atexit(scratch_free_main);
}

void *ra_scratch(int slot, int64_t bytes)
{
    pthread_once(&scratch_once, scratch_make_key);
    scratch_t *scratch = pthread_getspecific(scratch_key);
    if (scratch == NULL) {
        scratch = calloc(1, sizeof(*scratch));
        if (scratch == NULL || pthread_setspecific(scratch_key, scratch) != 0) {
            free(scratch);
            ra_fail(RA_ERR_NOMEM, "pool", "cannot allocate scratch bookkeeping");
            return NULL;
        }
    }
    if (scratch->bytes[slot] < bytes) {
        free(scratch->data[slot]);
        int64_t rounded = (bytes + 63) / 64 * 64;
        scratch->data[slot] = aligned_alloc(64, (size_t)rounded);
        scratch->bytes[slot] = scratch->data[slot] != NULL ? rounded : 0;
        if (scratch->data[slot] == NULL) {
            ra_fail(RA_ERR_NOMEM, "pool", "cannot allocate %lld bytes of scratch",
                    (long long)rounded);
        }
    }
    return scratch->data[slot];
}
