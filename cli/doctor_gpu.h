/**
 * @file  cli/doctor_gpu.h
 * @brief What `ringattn doctor` finds out about GPUs. doctor_gpu.c looks and measures where CUDA is
 *        in the build, doctor_gpu_none.c says that it is not; doctor_gpu_print.c prints both.
 */
#ifndef RA_CLI_DOCTOR_GPU_H
#define RA_CLI_DOCTOR_GPU_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum { RA_GPUS_MOST = 16 };

/** Rates are bytes or operations a second; 0: not measured. */
typedef struct ra_gpu {
    char name[256];
    int major, minor; /**< compute capability */
    int multiprocessors;
    int64_t memory_bytes, memory_free;
    double device_copy; /**< bytes read and written */
    double host_to_device, device_to_host;
    double gemm;           /**< of one product, x and W bf16, y fp32 */
    bool gemm_right;       /**< its samples are as in double */
    char measure_why[256]; /**< why nothing was measured; empty: all was */
} ra_gpu_t;

typedef struct ra_gpu_link {
    bool access;         /**< copies go straight from memory to memory */
    bool native_atomics; /**< so do atomics: NVLink and its kin, no PCI Express */
    double rate;         /**< of a copy in this direction */
} ra_gpu_link_t;

typedef struct ra_gpu_report {
    bool built;    /**< CUDA is in this build */
    char why[256]; /**< why there are no GPUs; empty: there are */
    char driver[32], runtime[32], cublaslt[32], nccl[32];
    int count; /**< the first RA_GPUS_MOST of the machine */
    ra_gpu_t gpu[RA_GPUS_MOST];
    ra_gpu_link_t link[RA_GPUS_MOST][RA_GPUS_MOST]; /**< [from][to] */
} ra_gpu_report_t;

/**
 * Look for GPUs and measure them. A machine without is no failure: report->why says what is
 * missing.
 */
ra_status_t ra_probe_gpus(ra_gpu_report_t *report);

/** Lines of the text report. */
void ra_gpus_print(const ra_gpu_report_t *report);
/** The member `,"cuda":{...}` of the JSON report. */
void ra_gpus_print_json(const ra_gpu_report_t *report);

#endif
