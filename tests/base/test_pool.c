#include "base/pool.h"
#include "tests/test_support.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { CALLERS = 6, ROUNDS = 40, COUNT = 37 };

static atomic_int inside, most_inside;

static void note_entry(void)
{
    int now = atomic_fetch_add(&inside, 1) + 1;
    int most = atomic_load(&most_inside);
    while (now > most && !atomic_compare_exchange_weak(&most_inside, &most, now)) {
    }
}

static void count_index(void *arg, int64_t index)
{
    atomic_int *seen = arg;
    note_entry();
    atomic_fetch_add(&seen[index], 1);
    usleep(20); /* long enough for a permit too many to be seen */
    atomic_fetch_sub(&inside, 1);
}

static void *call_many_jobs(void *arg)
{
    ra_pool_t *pool = arg;
    for (int round = 0; round < ROUNDS; round++) {
        atomic_int seen[COUNT] = {0};
        ra_pool_for(pool, COUNT, count_index, seen);
        for (int i = 0; i < COUNT; i++) {
            if (atomic_load(&seen[i]) != 1) {
                return (void *)"an index ran not exactly once before the call returned";
            }
        }
    }
    return NULL;
}

static void jobs_of_several_threads_run_each_index_once_within_the_permits(void **state)
{
    (void)state;
    static const int permits[] = {1, 2, 3, 5};
    for (size_t p = 0; p < RA_ARRAY_LEN(permits); p++) {
        ra_pool_t *pool;
        pthread_t caller[CALLERS];
        assert_int_equal(ra_pool_create(permits[p], &pool), RA_OK);
        assert_int_equal(ra_pool_threads(pool), permits[p]);
        atomic_store(&most_inside, 0);
        for (int i = 0; i < CALLERS; i++) {
            assert_int_equal(pthread_create(&caller[i], NULL, call_many_jobs, pool), 0);
        }
        for (int i = 0; i < CALLERS; i++) {
            void *complaint;
            pthread_join(caller[i], &complaint);
            if (complaint != NULL) {
                fail_msg("%s", (const char *)complaint);
            }
        }
        assert_true(atomic_load(&most_inside) <= permits[p]);
        assert_int_equal(atomic_load(&inside), 0);
        ra_pool_destroy(pool);
    }
}

typedef struct nest {
    ra_pool_t *pool;
    atomic_int inner_runs;
    atomic_int other_thread;
} nest_t;

typedef struct inner {
    nest_t *nest;
    pthread_t owner;
} inner_t;

static void inner_index(void *arg, int64_t index)
{
    inner_t *inner = arg;
    (void)index;
    atomic_fetch_add(&inner->nest->inner_runs, 1);
    if (!pthread_equal(inner->owner, pthread_self())) {
        atomic_store(&inner->nest->other_thread, 1);
    }
}

static void outer_index(void *arg, int64_t index)
{
    inner_t inner = {.nest = arg, .owner = pthread_self()};
    ra_pool_for(inner.nest->pool, index + 1, inner_index, &inner);
}

static void a_nested_call_runs_inline(void **state)
{
    (void)state;
    nest_t nest = {0};
    assert_int_equal(ra_pool_create(3, &nest.pool), RA_OK);
    ra_pool_for(nest.pool, 10, outer_index, &nest);
    assert_int_equal(atomic_load(&nest.inner_runs), 55);
    assert_int_equal(atomic_load(&nest.other_thread), 0);
    ra_pool_destroy(nest.pool);
}

static void count_plain(void *arg, int64_t index)
{
    *(int64_t *)arg += index;
}

static void no_pool_and_no_work_are_fine(void **state)
{
    (void)state;
    int64_t sum = 0;
    ra_pool_for(NULL, 5, count_plain, &sum);
    assert_int_equal(sum, 10);
    ra_pool_t *pool;
    assert_int_equal(ra_pool_create(2, &pool), RA_OK);
    ra_pool_for(pool, 0, count_plain, &sum);
    ra_pool_for(pool, -3, count_plain, &sum);
    ra_pool_for(pool, 1, count_plain, &sum);
    assert_int_equal(sum, 10);
    ra_pool_destroy(pool);
    ra_pool_destroy(NULL);
    assert_int_equal(ra_pool_threads(NULL), 1);
    assert_true(ra_pool_default_threads() >= 1);
}

static void use_scratch(void *arg, int64_t index)
{
    atomic_int *bad = arg;
    unsigned char *slot[RA_SCRATCH_SLOTS];
    for (int s = 0; s < RA_SCRATCH_SLOTS; s++) {
        slot[s] = ra_scratch(s, 64 + index * 100);
        if (slot[s] == NULL || ((uintptr_t)slot[s] & 63) != 0) {
            atomic_store(bad, 1);
            return;
        }
        for (int64_t i = 0; i < 64 + index * 100; i++) {
            slot[s][i] = (unsigned char)(s + 1);
        }
    }
    for (int s = 0; s < RA_SCRATCH_SLOTS; s++) {
        for (int64_t i = 0; i < 64 + index * 100; i++) {
            if (slot[s][i] != (unsigned char)(s + 1)) {
                atomic_store(bad, 1);
            }
        }
    }
}

static void scratch_slots_are_aligned_and_apart(void **state)
{
    (void)state;
    ra_pool_t *pool;
    atomic_int bad = 0;
    assert_int_equal(ra_pool_create(4, &pool), RA_OK);
    ra_pool_for(pool, 50, use_scratch, &bad);
    assert_int_equal(atomic_load(&bad), 0);
    ra_pool_destroy(pool);
}

static void a_pool_of_no_threads_is_refused(void **state)
{
    (void)state;
    ra_pool_t *pool = NULL;
    assert_int_equal(ra_pool_create(0, &pool), RA_ERR_INVALID);
    assert_null(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_of_several_threads_run_each_index_once_within_the_permits),
        cmocka_unit_test(a_nested_call_runs_inline),
        cmocka_unit_test(no_pool_and_no_work_are_fine),
        cmocka_unit_test(scratch_slots_are_aligned_and_apart),
        cmocka_unit_test(a_pool_of_no_threads_is_refused),
    };
    return cmocka_run_group_tests_name("base.pool", tests, NULL, NULL);
}
