/* The library row: sgemm on blocks small enough that a widened bf16 block stays in the L2 cache. */
#include "base/checked.h"
#include "base/gemm_kernels.h"
#include <cblas.h>
#include <pthread.h>

static pthread_once_t limit_once = PTHREAD_ONCE_INIT;

/* The pool is the only source of parallelism. */
static void limit_threads(void)
{
    openblas_set_num_threads(1);
}

static ra_status_t openblas_prepare(ra_gemm_weight_t *weight)
{
    (void)weight;
    pthread_once(&limit_once, limit_threads);
    return RA_OK;
}

static ra_status_t openblas_run(const ra_gemm_piece_t *piece)
{
    const ra_gemm_job_t *job = piece->job;
    const ra_gemm_weight_t *weight = job->weight;
    int64_t in = weight->in, first = piece->out_begin * in, count = piece->out_count * in;
    const float *w = (const float *)weight->source + first;

    if (weight->dtype == RA_BF16) {
        const uint16_t *source = (const uint16_t *)weight->source + first;
        float *wide = ra_scratch(0, count * (int64_t)sizeof(*wide));
        if (wide == NULL) {
            return RA_ERR_NOMEM;
        }
        for (int64_t i = 0; i < count; i++) {
            wide[i] = ra_bf16_to_f32(source[i]);
        }
        w = wide;
    }
    blasint ldw = (blasint)ra_max_i64(in, 1);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)piece->row_count,
                (blasint)piece->out_count, (blasint)in, 1.0f,
                (const float *)job->x + piece->row_begin * job->x_stride,
                (blasint)ra_max_i64(job->x_stride, 1), w, ldw, piece->accumulate ? 1.0f : 0.0f,
                (float *)job->y + piece->row_begin * job->y_stride + piece->out_begin,
                (blasint)job->y_stride);
    return RA_OK;
}

const ra_gemm_kernel_t ra_gemm_openblas = {
    .name = "openblas",
    .doc = "OpenBLAS sgemm, one thread a call",
    .row_invariant = false,
    .row_block = 512,
    .out_block = 256,
    .prepare = openblas_prepare,
    .run = openblas_run,
};
