#include "cli/doctor.h"

#include "base/clock.h"
#include "base/device.h"
#include "base/fma_peak.h"
#include "base/gemm.h"
#include "base/pool.h"
#include "comm/ranks.h"
#include "model/file_io.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FMA_STEPS = 4 << 20, FMA_TRIES = 5, GEMM_SIZE = 512, COPY_BYTES = 64 << 20 };
enum { RING_BYTES = 1 << 20, RING_ROUNDS = 16, RING_TAG = 7, FSYNC_TRIES = 9 };

static void run_fma(void *arg, int64_t index)
{
    float sink;
    double flops = ra_fma_loop(ra_cpu_isa(), FMA_STEPS, &sink);
    ((double *)arg)[index] = sink != 0 ? flops : 0;
}

/* Best of several runs of @a threads loops side by side. */
static ra_status_t time_fma(int threads, double *best_p)
{
    ra_pool_t *pool;
    double best = 0;
    double *flops = calloc((size_t)threads, sizeof(*flops));
    if (flops == NULL) {
        return ra_fail(RA_ERR_NOMEM, "doctor", "cannot test %d threads", threads);
    }
    ra_status_t status = ra_pool_create(threads, &pool);
    for (int i = 0; status == RA_OK && i < FMA_TRIES; i++) {
        double sum = 0, start = ra_clock_s();
        ra_pool_for(pool, threads, run_fma, flops);
        double rate = 1 / (ra_clock_s() - start);
        for (int t = 0; t < threads; t++) {
            sum += flops[t];
        }
        best = fmax(best, sum * rate);
    }
    if (status == RA_OK) {
        ra_pool_destroy(pool);
        *best_p = best;
    }
    free(flops);
    return status;
}

ra_status_t ra_probe_fma(int threads, double *one_p, double *all_p)
{
    RA_TRY(time_fma(1, one_p));
    return time_fma(threads, all_p);
}

/* A value in [-1, 1) that differs from place to place, the same on every machine. */
static float sample(int64_t i)
{
    uint64_t z = (uint64_t)i * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9u;
    return (float)((double)(z >> 11) * 0x1p-52 - 1.0);
}

/* Compare rows with a product in double; a few rows suffice to see a broken kernel. */
static bool gemm_is_right(const float *x, const float *w, const float *y)
{
    for (int r = 0; r < GEMM_SIZE; r += 37) {
        for (int n = 0; n < GEMM_SIZE; n++) {
            double sum = 0;
            for (int k = 0; k < GEMM_SIZE; k++) {
                sum += (double)x[r * GEMM_SIZE + k] * (double)w[n * GEMM_SIZE + k];
            }
            if (!(fabs(sum - (double)y[r * GEMM_SIZE + n]) <= 1e-4)) {
                return false;
            }
        }
    }
    return true;
}

static ra_status_t multiply_repeatedly(const ra_gemm_job_t *job, ra_stream_t *stream, float *again,
                                       ra_gemm_probe_t *probe)
{
    ra_gemm_job_t repeat = *job;
    size_t bytes = sizeof(float) * GEMM_SIZE * GEMM_SIZE;
    RA_TRY(ra_gemm(job, 1, false, stream));
    probe->repeats_equal = true;
    repeat.y = again;
    for (int i = 0; i < 3; i++) {
        double start = ra_clock_s();
        RA_TRY(ra_gemm(&repeat, 1, false, stream));
        double rate = 2.0 * GEMM_SIZE * GEMM_SIZE * GEMM_SIZE / (ra_clock_s() - start);
        probe->flops = fmax(probe->flops, rate);
        probe->repeats_equal &= memcmp(job->y, again, bytes) == 0;
    }
    return RA_OK;
}

static ra_status_t gemm_on(ra_stream_t *stream, const char *name, float *x, float *w, float *y,
                           float *again, ra_gemm_probe_t *probe)
{
    const ra_gemm_kernel_t *kernel;
    ra_gemm_weight_t *weight = NULL;
    const int64_t extent[2] = {GEMM_SIZE, GEMM_SIZE};
    ra_tensor_t view = ra_tensor_view(w, RA_F32, 2, extent);
    RA_TRY(ra_gemm_select(name, RA_DEVICE_CPU, false, &kernel));
    RA_TRY(ra_gemm_weight_create(kernel, &view, RA_F32, NULL, &weight));
    ra_gemm_job_t job = {.weight = weight,
                         .x = x,
                         .x_stride = GEMM_SIZE,
                         .rows = GEMM_SIZE,
                         .y = y,
                         .y_stride = GEMM_SIZE};
    probe->kernel = ra_gemm_kernel_name(kernel);
    ra_status_t status = multiply_repeatedly(&job, stream, again, probe);
    probe->right = status == RA_OK && gemm_is_right(x, w, y);
    ra_gemm_weight_destroy(weight);
    return status;
}

ra_status_t ra_probe_gemm(const char *name, int threads, ra_gemm_probe_t *probe)
{
    enum { CELLS = GEMM_SIZE * GEMM_SIZE };
    ra_status_t status;
    ra_pool_t *pool = NULL;
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    float *memory = aligned_alloc(64, sizeof(float) * 4 * CELLS);
    *probe = (ra_gemm_probe_t){.kernel = name};
    if (memory == NULL) {
        return ra_fail(RA_ERR_NOMEM, "doctor", "cannot test GEMM");
    }
    for (int64_t i = 0; i < 2 * CELLS; i++) {
        memory[i] = sample(i + 1);
    }
    RA_TRY_GOTO(ra_pool_create(threads, &pool), out);
    RA_TRY_GOTO(ra_device_open("cpu", 0, pool, &device), out);
    RA_TRY_GOTO(ra_stream_create(device, &stream), out);
    status = gemm_on(stream, name, memory, memory + CELLS, memory + 2 * CELLS, memory + 3 * CELLS,
                     probe);
out:
    ra_stream_destroy(stream);
    ra_device_close(device);
    ra_pool_destroy(pool);
    free(memory);
    return status;
}

ra_status_t ra_probe_copy(double *bytes_per_second_p)
{
    char *from = malloc(COPY_BYTES), *to = malloc(COPY_BYTES);
    double best = 0;
    if (from == NULL || to == NULL) {
        free(from);
        free(to);
        return ra_fail(RA_ERR_NOMEM, "doctor", "cannot test memory copies");
    }
    memset(from, 1, COPY_BYTES);
    memset(to, 2, COPY_BYTES);
    for (int i = 0; i < 4; i++) {
        double start = ra_clock_s();
        memcpy(to, from, COPY_BYTES);
        best = fmax(best, 2.0 * COPY_BYTES / (ra_clock_s() - start));
        from[i] = (char)(to[i + 1] + 1); /* each copy differs, so that none is left out */
    }
    free(from);
    free(to);
    *bytes_per_second_p = best;
    return RA_OK;
}

typedef struct ring_test {
    atomic_llong wrong;
    double timeout_s;
} ring_test_t;

static unsigned char pattern(int owner, int64_t i)
{
    return (unsigned char)(owner * 31 + i * 7 + (i >> 8));
}

static int64_t count_wrong(const unsigned char *block, int owner)
{
    int64_t wrong = 0;
    for (int64_t i = 0; i < RING_BYTES; i++) {
        wrong += block[i] != pattern(owner, i);
    }
    return wrong;
}

/* Pass blocks on until every rank's block has been at every rank, several times over. */
static ra_status_t rotate(ra_comm_t *comm, ring_test_t *test, unsigned char *have,
                          unsigned char *next)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm), owner = rank;
    for (int step = 0; step < RING_ROUNDS * size; step++) {
        ra_request_t *request;
        ra_transfer_t transfer[2] = {{.kind = RA_SEND,
                                      .peer = (rank + 1) % size,
                                      .tag = RING_TAG,
                                      .data = have,
                                      .bytes = RING_BYTES},
                                     {.kind = RA_RECV,
                                      .peer = (rank + size - 1) % size,
                                      .tag = RING_TAG,
                                      .data = next,
                                      .bytes = RING_BYTES}};
        RA_TRY(ra_comm_post(comm, transfer, 2, &request));
        ra_status_t status = ra_comm_wait(request, ra_comm_deadline(comm));
        ra_request_free(request);
        RA_TRY(status);
        unsigned char *swap = have;
        have = next;
        next = swap;
        owner = (owner + size - 1) % size;
        if (step % size == 0 && count_wrong(have, owner) > 0) {
            atomic_fetch_add(&test->wrong, 1);
        }
    }
    return RA_OK;
}

static ra_status_t ring_rank(ra_comm_t *comm, void *arg)
{
    ring_test_t *test = arg;
    unsigned char *blocks = malloc(2 * RING_BYTES);
    if (blocks == NULL) {
        return ra_fail(RA_ERR_NOMEM, "doctor", "cannot test the ring");
    }
    for (int64_t i = 0; i < RING_BYTES; i++) {
        blocks[i] = pattern(ra_comm_rank(comm), i);
    }
    if (test->timeout_s > 0) {
        ra_comm_set_timeout(comm, test->timeout_s);
    }
    ra_status_t status = rotate(comm, test, blocks, blocks + RING_BYTES);
    free(blocks);
    return status;
}

ra_status_t ra_probe_ring(const char *transport, int ranks, double timeout_s,
                          ra_ring_probe_t *probe)
{
    ring_test_t test = {.timeout_s = timeout_s};
    *probe = (ra_ring_probe_t){.ranks = ranks, .rounds = RING_ROUNDS, .bytes = RING_BYTES};
    double start = ra_clock_s();
    RA_TRY(ra_ranks_run(transport, ranks, ring_rank, &test));
    double seconds = ra_clock_s() - start;
    probe->wrong = atomic_load(&test.wrong);
    probe->bytes_per_second = (double)RING_BYTES * RING_ROUNDS * ranks * ranks / seconds;
    return RA_OK;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Replace a file by rename(); it must never be away and always hold one of the two texts. */
static bool rename_keeps_whole_files(const char *path, const char *other)
{
    for (int i = 0; i < 8; i++) {
        char text[8] = "";
        int fd = open(other, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (fd < 0 || write(fd, i % 2 == 0 ? "even" : "odd!", 4) != 4) {
            if (fd >= 0) {
                close(fd);
            }
            return false;
        }
        int reader = i > 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        close(fd);
        bool ok = rename(other, path) == 0;
        if (reader >= 0) {
            ok &= read(reader, text, 4) == 4 && strcmp(text, i % 2 == 0 ? "odd!" : "even") == 0;
            close(reader);
        }
        if (!ok) {
            return false;
        }
    }
    return true;
}

void ra_probe_disk(const char *dir, ra_disk_probe_t *probe)
{
    char path[RA_PATH_MAX], other[RA_PATH_MAX];
    double seconds[FSYNC_TRIES];
    *probe = (ra_disk_probe_t){0};
    snprintf(path, sizeof(path), "%.4000s/.ringattn-doctor-%ld", dir, (long)getpid());
    snprintf(other, sizeof(other), "%.4000s/.ringattn-doctor-%ld-2", dir, (long)getpid());
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        snprintf(probe->message, sizeof(probe->message), "%s", strerror(errno));
        return;
    }
    probe->writable = true;
    for (int i = 0; i < FSYNC_TRIES && probe->writable; i++) {
        double start = ra_clock_s();
        probe->writable = write(fd, "ringattn\n", 9) == 9 && fsync(fd) == 0;
        seconds[i] = ra_clock_s() - start;
    }
    if (!probe->writable) {
        snprintf(probe->message, sizeof(probe->message), "%s", strerror(errno));
    } else {
        qsort(seconds, FSYNC_TRIES, sizeof(seconds[0]), ascending);
        probe->fsync_seconds = seconds[FSYNC_TRIES / 2];
        probe->rename_atomic = rename_keeps_whole_files(path, other);
    }
    close(fd);
    unlink(path);
    unlink(other);
}
