#include "base/gemm.h"

#include "base/checked.h"
#include "base/gemm_kernels.h"
#include "base/log.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/*
 * First fitting row is "auto". packed leads: it was the faster one at every shape measured
 * with bf16 weights (benchmarks/PERFORMANCE.md), and its row invariance keeps a document's bits
 * independent of the documents packed beside it.
 */
static const ra_gemm_kernel_t *const gemm_table[] = {
    &ra_gemm_packed,
    &ra_gemm_openblas,
#if RA_HAVE_CUDA
    &ra_gemm_cublaslt,
    &ra_gemm_cublaslt_pinned,
#endif
};

/* "a, b, c": the rows of a device. */
static void list_rows(ra_device_kind_t device, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "auto");
    for (size_t i = 0; i < RA_ARRAY_LEN(gemm_table) && used < size; i++) {
        if (gemm_table[i]->device == device) {
            used += (size_t)snprintf(text + used, size - used, ", %s", gemm_table[i]->name);
        }
    }
}

ra_status_t ra_gemm_select(const char *name, ra_device_kind_t device, bool row_invariant,
                           const ra_gemm_kernel_t **kernel_p)
{
    bool is_auto = strcmp(name, "auto") == 0;
    char rows[128];
    for (size_t i = 0; i < RA_ARRAY_LEN(gemm_table); i++) {
        const ra_gemm_kernel_t *kernel = gemm_table[i];
        bool fits = kernel->row_invariant || !row_invariant;
        if (kernel->device != device || (!is_auto && strcmp(name, kernel->name) != 0)) {
            continue;
        }
        if (!is_auto && !fits) {
            return ra_fail(RA_ERR_USAGE, "gemm",
                           "kernel '%s' does not promise the same bits for any number of rows, "
                           "which --reproducible needs; use 'auto'",
                           name);
        }
        if (fits) {
            *kernel_p = kernel;
            return RA_OK;
        }
    }
    list_rows(device, rows, sizeof(rows));
    return ra_fail(RA_ERR_USAGE, "gemm", "no kernel '%s' on this device; there are %s", name, rows);
}

const char *ra_gemm_kernel_name(const ra_gemm_kernel_t *kernel)
{
    return kernel->name;
}

/* A device copy of a weight, in its own dtype or, widened or rounded on the host, in another. */
static ra_status_t upload(const ra_tensor_t *w, ra_stream_t *stream, ra_gemm_weight_t *weight)
{
    int64_t count = weight->out * weight->in, bytes = count * ra_dtype_bytes(weight->dtype);
    weight->device = ra_stream_device(stream);
    RA_TRY(ra_device_alloc(weight->device, bytes, &weight->packed));
    if (w->dtype == weight->dtype) {
        return ra_stream_copy(stream, weight->packed, w->data, bytes);
    }
    void *converted = malloc((size_t)bytes + 1);
    if (converted == NULL) {
        return ra_fail(RA_ERR_NOMEM, "gemm", "cannot allocate %lld bytes to convert a weight",
                       (long long)bytes);
    }
    for (int64_t i = 0; i < count; i++) {
        if (weight->dtype == RA_F32) {
            ((float *)converted)[i] = ra_bf16_to_f32(((const uint16_t *)w->data)[i]);
        } else {
            ((uint16_t *)converted)[i] = ra_bf16_from_f32(((const float *)w->data)[i]);
        }
    }
    ra_status_t status = ra_stream_copy(stream, weight->packed, converted, bytes);
    free(converted);
    return status;
}

ra_status_t ra_gemm_weight_create(const ra_gemm_kernel_t *kernel, const ra_tensor_t *w,
                                  ra_dtype_t x_dtype, ra_stream_t *stream,
                                  ra_gemm_weight_t **weight_p)
{
    bool cuda = kernel->device == RA_DEVICE_CUDA;
    if (w->rank != 2 || (w->dtype != RA_BF16 && w->dtype != RA_F32) || w->stride[1] != 1 ||
        w->stride[0] != w->extent[1]) {
        return ra_fail(RA_ERR_SHAPE, "gemm",
                       "a weight is a contiguous [out, in] matrix of BF16 or F32, not rank %d %s",
                       w->rank, ra_dtype_name(w->dtype));
    }
    if (x_dtype != RA_F32 && !(cuda && x_dtype == RA_BF16)) {
        return ra_fail(RA_ERR_UNSUPPORTED, "gemm", "kernel '%s' takes no x of %s", kernel->name,
                       ra_dtype_name(x_dtype));
    }
    ra_gemm_weight_t *weight = calloc(1, sizeof(*weight));
    if (weight == NULL) {
        return ra_fail(RA_ERR_NOMEM, "gemm", "cannot allocate a weight handle");
    }
    *weight = (ra_gemm_weight_t){.kernel = kernel,
                                 .out = w->extent[0],
                                 .in = w->extent[1],
                                 .dtype = cuda ? x_dtype : w->dtype,
                                 .source = w->data,
                                 .isa = ra_cpu_isa()};
    ra_status_t status = RA_OK;
    if (cuda) {
        status = upload(w, stream, weight);
    } else if (kernel->prepare != NULL) {
        status = kernel->prepare(weight);
    }
    if (status != RA_OK) {
        ra_gemm_weight_destroy(weight);
        return status;
    }
    *weight_p = weight;
    return RA_OK;
}

void ra_gemm_weight_destroy(ra_gemm_weight_t *weight)
{
    if (weight == NULL) {
        return;
    }
    if (weight->device != NULL) {
        ra_device_free(weight->device, weight->packed);
    } else {
        free(weight->packed);
    }
    free(weight);
}

int64_t ra_gemm_weight_out(const ra_gemm_weight_t *weight)
{
    return weight->out;
}

int64_t ra_gemm_weight_in(const ra_gemm_weight_t *weight)
{
    return weight->in;
}

const void *ra_gemm_weight_on_device(const ra_gemm_weight_t *weight, ra_dtype_t *dtype_p)
{
    *dtype_p = weight->dtype;
    return weight->device != NULL ? weight->packed : NULL;
}

/* Pieces of all jobs are numbered through; first[j] is the number of job j's first piece. */
typedef struct gemm_call {
    const ra_gemm_job_t *jobs;
    int64_t count;
    bool accumulate;
    const int64_t *first; /* [count + 1] */
    atomic_int status;    /* first failure of any piece */
} gemm_call_t;

static int64_t out_blocks(const ra_gemm_job_t *job)
{
    return ra_ceil_div(job->weight->out, job->weight->kernel->out_block);
}

static void run_piece(void *arg, int64_t index)
{
    gemm_call_t *call = arg;
    int64_t low = 0, high = call->count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (call->first[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const ra_gemm_job_t *job = &call->jobs[low];
    const ra_gemm_kernel_t *kernel = job->weight->kernel;
    int64_t at = index - call->first[low], across = out_blocks(job);
    int64_t row = at / across * kernel->row_block, out = at % across * kernel->out_block;
    ra_gemm_piece_t piece = {.job = job,
                             .row_begin = row,
                             .row_count = ra_min_i64(kernel->row_block, job->rows - row),
                             .out_begin = out,
                             .out_count = ra_min_i64(kernel->out_block, job->weight->out - out),
                             .accumulate = call->accumulate};
    ra_status_t status = kernel->run(&piece);
    int none = RA_OK;
    if (status != RA_OK) {
        atomic_compare_exchange_strong(&call->status, &none, (int)status);
    }
}

static ra_status_t run_on_pool(const ra_gemm_job_t *jobs, int64_t count, bool accumulate,
                               ra_stream_t *stream)
{
    int64_t *first = ra_scratch(3, (count + 1) * (int64_t)sizeof(*first));
    if (first == NULL) {
        return RA_ERR_NOMEM;
    }
    first[0] = 0;
    for (int64_t j = 0; j < count; j++) {
        int64_t down = ra_ceil_div(jobs[j].rows, jobs[j].weight->kernel->row_block);
        first[j + 1] = first[j] + down * out_blocks(&jobs[j]);
    }
    gemm_call_t call = {.jobs = jobs, .count = count, .accumulate = accumulate, .first = first};
    atomic_init(&call.status, RA_OK);
    ra_pool_for(ra_stream_pool(stream), first[count], run_piece, &call);
    return (ra_status_t)atomic_load(&call.status);
}

ra_status_t ra_gemm(const ra_gemm_job_t *jobs, int64_t count, bool accumulate, ra_stream_t *stream)
{
    if (count == 0 || jobs[0].weight->kernel->run_job == NULL) {
        return run_on_pool(jobs, count, accumulate, stream);
    }
    for (int64_t j = 0; j < count; j++) {
        RA_TRY(jobs[j].weight->kernel->run_job(&jobs[j], accumulate, stream));
    }
    return RA_OK;
}
