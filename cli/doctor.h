/**
 * @file  cli/doctor.h
 * @brief What `ringattn doctor` finds out: the host (doctor_host.c) and tests of it
 * (doctor_probe.c).
 */
#ifndef RA_CLI_DOCTOR_H
#define RA_CLI_DOCTOR_H

#include "base/cpu_isa.h"
#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_host {
    char name[256], kernel[128], libc[64], cpu[256];
    int cores_online, cores_allowed;        /**< allowed: in the affinity mask */
    int64_t memory_bytes, memory_available; /**< -1: unknown */
    int64_t cgroup_limit;                   /**< -1: none */
    double cgroup_cpus;                     /**< -1: none */
    int64_t lockable_bytes, open_files;     /**< limits of the process; -1: unlimited */
} ra_host_t;

void ra_host_look(ra_host_t *host);

/** FLOP/s of independent fused multiply-adds on one thread and on @a threads, best of several. */
ra_status_t ra_probe_fma(int threads, double *one_p, double *all_p);

typedef struct ra_gemm_probe {
    const char *kernel;
    double flops;       /**< FLOP/s of one product of 512 x 512 x 512 */
    bool right;         /**< within 1e-4 of a product in double */
    bool repeats_equal; /**< three repeats gave the same bits */
} ra_gemm_probe_t;

/** Run the GEMM that row @a name of its table gives. */
ra_status_t ra_probe_gemm(const char *name, int threads, ra_gemm_probe_t *probe);

/** Bytes a second of one thread's memcpy() between buffers beyond the caches (read + written). */
ra_status_t ra_probe_copy(double *bytes_per_second_p);

typedef struct ra_ring_probe {
    int ranks;
    int64_t rounds, bytes; /**< a block of `bytes` went round the ring `rounds` times */
    int64_t wrong;         /**< blocks that did not arrive as they were sent */
    double bytes_per_second;
} ra_ring_probe_t;

ra_status_t ra_probe_ring(const char *transport, int ranks, double timeout_s,
                          ra_ring_probe_t *probe);

typedef struct ra_disk_probe {
    bool writable;
    bool rename_atomic;   /**< a reader saw the old or the new contents, never neither */
    double fsync_seconds; /**< median of several small writes */
    char message[256];    /**< why it is not writable */
} ra_disk_probe_t;

/** Test the directory @a dir. */
void ra_probe_disk(const char *dir, ra_disk_probe_t *probe);

#endif
