/**
 * @file  base/gemm_kernels.h
 * @brief What a row of the GEMM table is. Internal to base/gemm*.c and its tests.
 */
#ifndef RA_BASE_GEMM_KERNELS_H
#define RA_BASE_GEMM_KERNELS_H

#include "base/cpu_isa.h"
#include "base/gemm.h"

struct ra_gemm_weight {
    const ra_gemm_kernel_t *kernel;
    int64_t out, in;
    ra_dtype_t dtype;
    const void *source;  /**< [out, in], borrowed; CPU rows */
    void *packed;        /**< owned copy in the kernel's own order, or NULL; CUDA rows: [out, in] */
    ra_device_t *device; /**< where `packed` lies; NULL: host memory */
    ra_cpu_isa_t isa;    /**< the instruction set `packed` was laid out for */
};

/** A rectangle of one job's output, computed by one thread. */
typedef struct ra_gemm_piece {
    const ra_gemm_job_t *job;
    int64_t row_begin, row_count, out_begin, out_count;
    bool accumulate;
} ra_gemm_piece_t;

/** CPU rows have row_block, out_block, prepare (may be NULL) and run; CUDA rows have run_job. */
struct ra_gemm_kernel {
    const char *name, *doc;
    ra_device_kind_t device;
    bool row_invariant;
    int64_t row_block, out_block; /**< largest piece; out_block is a multiple of every panel */
    /** Fill in packed and isa. */
    ra_status_t (*prepare)(ra_gemm_weight_t *weight);
    ra_status_t (*run)(const ra_gemm_piece_t *piece);
    ra_status_t (*run_job)(const ra_gemm_job_t *job, bool accumulate, ra_stream_t *stream);
};

extern const ra_gemm_kernel_t ra_gemm_openblas, ra_gemm_packed;
extern const ra_gemm_kernel_t ra_gemm_cublaslt, ra_gemm_cublaslt_pinned;

/** One instruction set's half of the packed kernel (gemm_packed_cpu.c). */
typedef struct ra_gemm_packed_ops {
    int64_t panel; /**< columns of a panel */
    /** @a packed [ceil(out / panel)][in][panel] of the weight's dtype, short panels filled with 0.
     */
    void (*pack)(const ra_gemm_weight_t *weight, void *packed);
    ra_status_t (*run)(const ra_gemm_piece_t *piece);
} ra_gemm_packed_ops_t;

extern const ra_gemm_packed_ops_t ra_gemm_packed_ops_generic;
#if defined(__x86_64__)
extern const ra_gemm_packed_ops_t ra_gemm_packed_ops_avx2, ra_gemm_packed_ops_avx512;
#endif

#endif
