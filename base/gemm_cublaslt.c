/*
 * The CUDA rows: cuBLASLt, y^T = W x^T in its column-major terms. "cublaslt" takes the library's
 * choice for each shape; "cublaslt-pinned" takes one algorithm for each weight shape, whatever the
 * number of rows, without splitting K: an output row then depends on its input row and the weights.
 */
#include "base/checked.h"
#include "base/device_cuda.h"
#include "base/gemm_kernels.h"
#include "base/log.h"
#include <cublasLt.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { CACHED_MOST = 512, DEVICES_MOST = 64, CANDIDATES = 16, PINNED_ROWS = 4096 };

/* What an algorithm was chosen for. */
typedef struct shape_key {
    int64_t rows, out, in, x_stride, y_stride;
    int32_t x_dtype, y_dtype, alignment;
    bool accumulate, pinned;
} shape_key_t;

typedef struct cached_algorithm {
    shape_key_t key;
    cublasLtMatmulAlgo_t algorithm;
} cached_algorithm_t;

/* One device's library handle and the algorithms chosen so far; lives as long as the process. */
typedef struct device_library {
    cublasLtHandle_t handle;
    cached_algorithm_t cache[CACHED_MOST];
    int cached, oldest;
} device_library_t;

static device_library_t *libraries[DEVICES_MOST];
static pthread_mutex_t library_mutex = PTHREAD_MUTEX_INITIALIZER;

/* The descriptors of one product. */
typedef struct product {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
    float alpha, beta;
} product_t;

static ra_status_t check(cublasStatus_t error, const char *what)
{
    if (error == CUBLAS_STATUS_SUCCESS) {
        return RA_OK;
    }
    return ra_fail(RA_ERR_DEVICE, "gemm", "cuBLASLt: %s: %s", what, cublasLtGetStatusString(error));
}

static cudaDataType_t cuda_type(ra_dtype_t dtype)
{
    return dtype == RA_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* The caller holds library_mutex and has the device current. */
static ra_status_t library_of(int device, device_library_t **library_p)
{
    if (device >= DEVICES_MOST) {
        return ra_fail(RA_ERR_UNSUPPORTED, "gemm", "GPU %d: at most %d are used", device,
                       DEVICES_MOST);
    }
    if (libraries[device] == NULL) {
        device_library_t *library = calloc(1, sizeof(*library));
        if (library == NULL) {
            return ra_fail(RA_ERR_NOMEM, "gemm", "cannot allocate a cuBLASLt handle");
        }
        ra_status_t status = check(cublasLtCreate(&library->handle), "opening the library");
        if (status != RA_OK) {
            free(library);
            return status;
        }
        libraries[device] = library;
    }
    *library_p = libraries[device];
    return RA_OK;
}

static void product_destroy(product_t *product)
{
    if (product->y != NULL) {
        cublasLtMatrixLayoutDestroy(product->y);
    }
    if (product->x != NULL) {
        cublasLtMatrixLayoutDestroy(product->x);
    }
    if (product->w != NULL) {
        cublasLtMatrixLayoutDestroy(product->w);
    }
    if (product->operation != NULL) {
        cublasLtMatmulDescDestroy(product->operation);
    }
}

static ra_status_t product_create(const shape_key_t *key, product_t *product)
{
    cublasOperation_t transpose = CUBLAS_OP_T;
    uint64_t out = (uint64_t)key->out, in = (uint64_t)key->in, rows = (uint64_t)key->rows;
    cudaDataType_t type = cuda_type((ra_dtype_t)key->x_dtype);

    *product = (product_t){.alpha = 1.0f, .beta = key->accumulate ? 1.0f : 0.0f};
    cublasStatus_t error =
        cublasLtMatmulDescCreate(&product->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (error == CUBLAS_STATUS_SUCCESS) {
        error = cublasLtMatmulDescSetAttribute(product->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                               &transpose, sizeof(transpose));
    }
    if (error == CUBLAS_STATUS_SUCCESS) {
        error = cublasLtMatrixLayoutCreate(&product->w, type, in, out, key->in);
    }
    if (error == CUBLAS_STATUS_SUCCESS) {
        error = cublasLtMatrixLayoutCreate(&product->x, type, in, rows, key->x_stride);
    }
    if (error == CUBLAS_STATUS_SUCCESS) {
        error = cublasLtMatrixLayoutCreate(&product->y, cuda_type((ra_dtype_t)key->y_dtype), out,
                                           rows, key->y_stride);
    }
    ra_status_t status = check(error, "describing a product");
    if (status != RA_OK) {
        product_destroy(product);
    }
    return status;
}

static ra_status_t make_preference(const shape_key_t *key, cublasLtMatmulPreference_t *preference_p)
{
    /* Workspace is for partial sums; a pinned algorithm has none. */
    uint64_t workspace = key->pinned ? 0 : (uint64_t)RA_STREAM_WORKSPACE;
    uint32_t alignment = (uint32_t)key->alignment, reductions = CUBLASLT_REDUCTION_SCHEME_NONE;
    RA_TRY(check(cublasLtMatmulPreferenceCreate(preference_p), "making a preference"));
    cublasStatus_t error = cublasLtMatmulPreferenceSetAttribute(
        *preference_p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (size_t i = 0; i < RA_ARRAY_LEN(alignments) && error == CUBLAS_STATUS_SUCCESS; i++) {
        error = cublasLtMatmulPreferenceSetAttribute(*preference_p, alignments[i], &alignment,
                                                     sizeof(alignment));
    }
    if (key->pinned && error == CUBLAS_STATUS_SUCCESS) {
        error = cublasLtMatmulPreferenceSetAttribute(*preference_p,
                                                     CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                     &reductions, sizeof(reductions));
    }
    return check(error, "setting a preference");
}

/* First candidate; pinned: first that splits nothing over K. */
static ra_status_t pick(const shape_key_t *key, const cublasLtMatmulHeuristicResult_t *results,
                        int count, cublasLtMatmulAlgo_t *algorithm_p)
{
    for (int i = 0; i < count; i++) {
        int32_t split = 1;
        size_t written;
        cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
                                             &split, sizeof(split), &written);
        if (results[i].state == CUBLAS_STATUS_SUCCESS &&
            (!key->pinned || (split <= 1 && results[i].workspaceSize == 0))) {
            *algorithm_p = results[i].algo;
            return RA_OK;
        }
    }
    return ra_fail(RA_ERR_UNSUPPORTED, "gemm",
                   "cuBLASLt has no algorithm for %lld rows, out %lld, in %lld, %s to %s",
                   (long long)key->rows, (long long)key->out, (long long)key->in,
                   ra_dtype_name((ra_dtype_t)key->x_dtype),
                   ra_dtype_name((ra_dtype_t)key->y_dtype));
}

static ra_status_t search(device_library_t *library, const shape_key_t *key,
                          const product_t *product, cublasLtMatmulAlgo_t *algorithm_p)
{
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int count = 0;
    ra_status_t status = make_preference(key, &preference);
    if (status == RA_OK) {
        cublasStatus_t error = cublasLtMatmulAlgoGetHeuristic(
            library->handle, product->operation, product->w, product->x, product->y, product->y,
            preference, key->pinned ? CANDIDATES : 1, results, &count);
        status = error == CUBLAS_STATUS_NOT_SUPPORTED ? RA_OK : check(error, "choosing");
    }
    if (preference != NULL) {
        cublasLtMatmulPreferenceDestroy(preference);
    }
    RA_TRY(status);
    return pick(key, results, count, algorithm_p);
}

/* The algorithm for `key`, searched for once. Pinned keys differ in the weight's shape only. */
static ra_status_t algorithm_of(int device, const shape_key_t *key, cublasLtHandle_t *handle_p,
                                cublasLtMatmulAlgo_t *algorithm_p)
{
    device_library_t *library = NULL;
    product_t product;
    ra_status_t status = library_of(device, &library);
    if (status != RA_OK) {
        return status;
    }
    *handle_p = library->handle;
    for (int i = 0; i < library->cached; i++) {
        if (memcmp(&library->cache[i].key, key, sizeof(*key)) == 0) {
            *algorithm_p = library->cache[i].algorithm;
            return RA_OK;
        }
    }
    RA_TRY(product_create(key, &product));
    status = search(library, key, &product, algorithm_p);
    product_destroy(&product);
    RA_TRY(status);
    int at = library->cached < CACHED_MOST ? library->cached++ : library->oldest++ % CACHED_MOST;
    library->cache[at] = (cached_algorithm_t){.key = *key, .algorithm = *algorithm_p};
    return RA_OK;
}

/* Largest power of two up to 256 that divides the addresses and row steps of x and y. */
static int32_t alignment_of(const ra_gemm_job_t *job)
{
    uint64_t bits = (uint64_t)(uintptr_t)job->x | (uint64_t)(uintptr_t)job->y | 256 |
                    (uint64_t)(job->x_stride * ra_dtype_bytes(job->x_dtype)) |
                    (uint64_t)(job->y_stride * ra_dtype_bytes(job->y_dtype));
    return (int32_t)(bits & (~bits + 1));
}

static ra_status_t run(const ra_gemm_job_t *job, bool accumulate, bool pinned, ra_stream_t *stream)
{
    const ra_gemm_weight_t *weight = job->weight;
    cublasLtHandle_t handle = NULL;
    cublasLtMatmulAlgo_t algorithm;
    product_t product;
    shape_key_t key;

    if (job->rows == 0) {
        return RA_OK;
    }
    if (job->x_dtype != weight->dtype) {
        return ra_fail(RA_ERR_INVALID, "gemm", "x is %s, the weight %s",
                       ra_dtype_name(job->x_dtype), ra_dtype_name(weight->dtype));
    }
    memset(&key, 0, sizeof(key)); /* keys are compared byte by byte */
    key.rows = job->rows;
    key.out = weight->out;
    key.in = weight->in;
    key.x_stride = job->x_stride;
    key.y_stride = job->y_stride;
    key.x_dtype = (int32_t)job->x_dtype;
    key.y_dtype = (int32_t)job->y_dtype;
    key.alignment = alignment_of(job);
    key.accumulate = accumulate;
    key.pinned = pinned;
    shape_key_t choice = key;
    if (pinned) {
        choice.rows = PINNED_ROWS;
        choice.x_stride = weight->in;
        choice.y_stride = weight->out;
        choice.alignment = 16;
    }
    pthread_mutex_lock(&library_mutex);
    ra_status_t status =
        algorithm_of(ra_device_index(ra_stream_device(stream)), &choice, &handle, &algorithm);
    pthread_mutex_unlock(&library_mutex);
    RA_TRY(status);
    RA_TRY(product_create(&key, &product));
    status = check(cublasLtMatmul(handle, product.operation, &product.alpha, weight->packed,
                                  product.w, job->x, product.x, &product.beta, job->y, product.y,
                                  job->y, product.y, &algorithm, ra_stream_workspace(stream),
                                  (size_t)RA_STREAM_WORKSPACE, ra_stream_cuda(stream)),
                   "multiplying");
    product_destroy(&product);
    return status;
}

static ra_status_t run_free(const ra_gemm_job_t *job, bool accumulate, ra_stream_t *stream)
{
    return run(job, accumulate, false, stream);
}

static ra_status_t run_pinned(const ra_gemm_job_t *job, bool accumulate, ra_stream_t *stream)
{
    return run(job, accumulate, true, stream);
}

const ra_gemm_kernel_t ra_gemm_cublaslt = {
    .name = "cublaslt",
    .doc = "cuBLASLt, its own choice for each shape",
    .device = RA_DEVICE_CUDA,
    .row_invariant = false,
    .run_job = run_free,
};

const ra_gemm_kernel_t ra_gemm_cublaslt_pinned = {
    .name = "cublaslt-pinned",
    .doc = "cuBLASLt, one algorithm for each weight, the same bits for any number of rows",
    .device = RA_DEVICE_CUDA,
    .row_invariant = true,
    .run_job = run_pinned,
};
