/*
 * comm_cuda_perf RANKS [TRANSPORT...]
 *
 * Device memory between GPUs: bytes a second into each rank (1e9 bytes) over a sweep of sizes, both
 * ways round the ring and one way, and microseconds of the small exchanges that layers make. Posts
 * follow one another in stream order and the host waits once at the end; "alone" also waits for the
 * GPU after each. Wall clock over all ranks, best of three rounds; every receive is checked. Ranks
 * are threads, or with nccl the processes of a launcher.
 */
#include "base/clock.h"
#include "base/log.h"
#include "comm/launch.h"
#include "comm/ranks.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 3, CHECK_BYTES = 4096 };

static const int64_t MOST_BYTES = (int64_t)1 << 30;

typedef struct perf {
    ra_comm_t *comm;
    ra_device_t *device;
    ra_stream_t *stream;
    int rank, size;
    char *mine, *theirs; /* [MOST_BYTES] device */
    char *host;          /* [CHECK_BYTES] */
} perf_t;

typedef ra_status_t (*step_func_t)(perf_t *p, int64_t bytes);

static ra_status_t fill(perf_t *p, char *memory, int64_t bytes, int value)
{
    memset(p->host, value, CHECK_BYTES);
    for (int64_t at = 0; at < bytes; at += CHECK_BYTES) {
        int64_t count = bytes - at < CHECK_BYTES ? bytes - at : CHECK_BYTES;
        RA_TRY(ra_stream_copy(p->stream, memory + at, p->host, count));
    }
    return ra_stream_sync(p->stream);
}

/* The two ends of what arrived. */
static ra_status_t check(perf_t *p, const char *memory, int64_t bytes, int value)
{
    int64_t count = bytes < CHECK_BYTES ? bytes : CHECK_BYTES;
    const char *place[] = {memory, memory + bytes - count};
    for (int i = 0; i < 2; i++) {
        RA_TRY(ra_stream_copy(p->stream, p->host, place[i], count));
        RA_TRY(ra_stream_sync(p->stream));
        for (int64_t j = 0; j < count; j++) {
            if (p->host[j] != value) {
                return ra_fail(RA_ERR_INTEGRITY, "bench", "rank %d got %d, not %d, at %lld of %lld",
                               p->rank, p->host[j], value, (long long)j, (long long)bytes);
            }
        }
    }
    return RA_OK;
}

static ra_status_t run_group(perf_t *p, const ra_transfer_t *group, int count)
{
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(p->comm, group, count, &request));
    ra_status_t status = ra_comm_wait(request, ra_comm_deadline(p->comm));
    ra_request_free(request);
    return status;
}

static ra_status_t ring_step(perf_t *p, int64_t bytes)
{
    ra_transfer_t group[] = {
        {.kind = RA_SEND, .peer = (p->rank + 1) % p->size, .data = p->mine, .bytes = bytes},
        {.kind = RA_RECV,
         .peer = (p->rank + p->size - 1) % p->size,
         .data = p->theirs,
         .bytes = bytes}};
    return run_group(p, group, 2);
}

/* Even ranks send to the next one. */
static ra_status_t one_way(perf_t *p, int64_t bytes)
{
    bool sends = p->rank % 2 == 0;
    ra_transfer_t one = {.kind = sends ? RA_SEND : RA_RECV,
                         .peer = sends ? p->rank + 1 : p->rank - 1,
                         .data = sends ? p->mine : p->theirs,
                         .bytes = bytes};
    return one.peer < p->size ? run_group(p, &one, 1) : RA_OK;
}

static ra_status_t all_gather(perf_t *p, int64_t bytes)
{
    return ra_comm_allgather(p->comm, p->mine, bytes, p->theirs);
}

static ra_status_t all_to_all(perf_t *p, int64_t bytes)
{
    int64_t sizes[64], offsets[64];
    for (int r = 0; r < p->size; r++) {
        sizes[r] = bytes;
        offsets[r] = r * bytes;
    }
    return ra_comm_alltoallv(p->comm, p->mine, sizes, offsets, p->theirs, sizes, offsets);
}

static ra_status_t host_gather(perf_t *p, int64_t bytes)
{
    int64_t mine = p->rank, all[64] = {0};
    (void)bytes;
    RA_TRY(ra_comm_allgather(p->comm, &mine, sizeof(mine), all));
    return all[p->size - 1] == p->size - 1
               ? RA_OK
               : ra_fail(RA_ERR_INTEGRITY, "bench", "host all-gather: wrong");
}

/* Seconds of one step, best of the rounds. */
static ra_status_t time_steps(perf_t *p, step_func_t step, int64_t bytes, int times, bool alone,
                              double *seconds_p)
{
    double best = 1e30;
    RA_TRY(step(p, bytes));
    for (int round = 0; round < ROUNDS; round++) {
        RA_TRY(ra_stream_sync(p->stream));
        RA_TRY(ra_comm_barrier(p->comm));
        double begin = ra_clock_s();
        for (int i = 0; i < times; i++) {
            RA_TRY(step(p, bytes));
            if (alone) {
                RA_TRY(ra_stream_sync(p->stream));
            }
        }
        RA_TRY(ra_stream_sync(p->stream));
        RA_TRY(ra_comm_barrier(p->comm));
        double seconds = (ra_clock_s() - begin) / times;
        best = seconds < best ? seconds : best;
    }
    *seconds_p = best;
    return RA_OK;
}

static ra_status_t sweep(perf_t *p)
{
    for (int64_t bytes = 65536; bytes <= MOST_BYTES; bytes *= 4) {
        double both = 0.0, one = 0.0;
        int times = bytes > (64 << 20) ? 8 : 64;
        RA_TRY(time_steps(p, ring_step, bytes, times, false, &both));
        RA_TRY(check(p, p->theirs, bytes, 1 + (p->rank + p->size - 1) % p->size));
        RA_TRY(time_steps(p, one_way, bytes, times, false, &one));
        if (p->rank == 0) {
            printf("%-6s %10lld bytes: both ways %7.1f GB/s into each rank, one way %7.1f GB/s\n",
                   ra_comm_transport(p->comm), (long long)bytes, (double)bytes / both * 1e-9,
                   p->size > 1 ? (double)bytes / one * 1e-9 : 0.0);
        }
    }
    return RA_OK;
}

static ra_status_t small(perf_t *p)
{
    const struct {
        const char *name;
        step_func_t step;
        int64_t bytes;
    } cases[] = {
        {"ring step", ring_step, 8},         {"ring step", ring_step, 65536},
        {"all-gather", all_gather, 4096},    {"all-gather", all_gather, 1 << 20},
        {"all-to-all", all_to_all, 4096},    {"all-to-all", all_to_all, 1 << 20},
        {"host all-gather", host_gather, 8},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        double queued = 0.0, alone = 0.0;
        RA_TRY(time_steps(p, cases[i].step, cases[i].bytes, 200, false, &queued));
        RA_TRY(time_steps(p, cases[i].step, cases[i].bytes, 200, true, &alone));
        if (p->rank == 0) {
            printf("%-6s %-15s of %7lld bytes: %6.1f us one after another, %6.1f us alone\n",
                   ra_comm_transport(p->comm), cases[i].name, (long long)cases[i].bytes,
                   queued * 1e6, alone * 1e6);
        }
    }
    return RA_OK;
}

static ra_status_t measure(perf_t *p)
{
    RA_TRY(ra_device_alloc(p->device, MOST_BYTES, (void **)&p->mine));
    RA_TRY(ra_device_alloc(p->device, MOST_BYTES, (void **)&p->theirs));
    double begin = ra_clock_s();
    RA_TRY(ra_comm_attach(p->comm, p->stream));
    double attached = ra_clock_s() - begin;
    /* The whole buffer by doubling what is there. */
    RA_TRY(fill(p, p->mine, CHECK_BYTES, 1 + p->rank));
    for (int64_t have = CHECK_BYTES; have < MOST_BYTES; have *= 2) {
        RA_TRY(ra_stream_copy(p->stream, p->mine + have, p->mine, have));
    }
    if (p->rank == 0) {
        printf("%-6s %d ranks, attached in %.3f s\n", ra_comm_transport(p->comm), p->size,
               attached);
    }
    RA_TRY(sweep(p));
    RA_TRY(small(p));
    return ra_stream_sync(p->stream);
}

static ra_status_t rank_main(ra_comm_t *comm, void *arg)
{
    int devices = *(const int *)arg;
    ra_launch_t launch;
    RA_TRY(ra_launch_find(&launch));
    perf_t p = {.comm = comm, .rank = ra_comm_rank(comm), .size = ra_comm_size(comm)};
    p.host = malloc(CHECK_BYTES);
    ra_status_t status;
    RA_TRY_GOTO(ra_device_open("cuda", (launch.size > 1 ? launch.local_rank : p.rank) % devices,
                               NULL, &p.device),
                out);
    RA_TRY_GOTO(ra_stream_create(p.device, &p.stream), out);
    status = measure(&p);
    ra_device_free(p.device, p.mine);
    ra_device_free(p.device, p.theirs);
out:
    ra_stream_destroy(p.stream);
    ra_device_close(p.device);
    free(p.host);
    return status;
}

int main(int argc, char **argv)
{
    static const char *const both[] = {"peer", "nccl"};
    int ranks = argc > 1 ? atoi(argv[1]) : 2, devices = 0;
    if (ranks < 1 || ranks > 64) {
        fprintf(stderr, "usage: comm_cuda_perf RANKS [TRANSPORT...]   (1 to 64 ranks)\n");
        return 2;
    }
    if (ra_device_count("cuda", &devices) != RA_OK) {
        return 2;
    }
    int count = argc > 2 ? argc - 2 : 2;
    int code = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 0; i < count; i++) {
        const char *row = argc > 2 ? argv[2 + i] : both[i];
        ra_status_t status = ra_ranks_run(row, ranks, rank_main, &devices);
        if (status != RA_OK) {
            code = ra_status_exit_code(status);
        }
    }
    return code;
}
