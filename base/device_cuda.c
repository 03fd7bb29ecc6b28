#include "base/device_cuda.h"

#include "base/device_ops.h"
#include "base/log.h"
#include <cuda_runtime_api.h>

ra_status_t ra_cuda_check(int error, const char *what)
{
    if (error == cudaSuccess) {
        return RA_OK;
    }
    return ra_fail(error == cudaErrorMemoryAllocation ? RA_ERR_NOMEM : RA_ERR_DEVICE, "cuda",
                   "%s: %s (%s)", what, cudaGetErrorString((cudaError_t)error),
                   cudaGetErrorName((cudaError_t)error));
}

ra_status_t ra_cuda_check_launch(const char *kernel)
{
    return ra_cuda_check(cudaGetLastError(), kernel);
}

static ra_status_t make_current(const ra_device_t *device)
{
    return ra_cuda_check(cudaSetDevice(device->index), "choosing the device");
}

ra_status_t ra_stream_make_current(const ra_stream_t *stream)
{
    return make_current(stream->device);
}

static ra_status_t cuda_count(int *count_p)
{
    cudaError_t error = cudaGetDeviceCount(count_p);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && *count_p == 0)) {
        return ra_fail(RA_ERR_UNSUPPORTED, "cuda", "no GPU on this machine; use --device cpu");
    }
    if (error != cudaSuccess) {
        return ra_fail(RA_ERR_UNSUPPORTED, "cuda",
                       "GPUs cannot be used: %s; check the driver with nvidia-smi, or use "
                       "--device cpu",
                       cudaGetErrorString(error));
    }
    return RA_OK;
}

static ra_status_t cuda_alloc(ra_device_t *device, int64_t bytes, void **memory_p)
{
    RA_TRY(make_current(device));
    cudaError_t error = cudaMalloc(memory_p, bytes > 0 ? (size_t)bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        return ra_fail(RA_ERR_NOMEM, "cuda",
                       "GPU %d: %.1f MiB asked for, %.1f MiB free of %.1f MiB; use more ranks, "
                       "fewer tokens, or --expert-parallel on",
                       device->index, (double)bytes / 1048576.0, (double)free_bytes / 1048576.0,
                       (double)total / 1048576.0);
    }
    return ra_cuda_check(error, "allocating device memory");
}

static void cuda_free(ra_device_t *device, void *memory)
{
    if (make_current(device) == RA_OK) {
        ra_cuda_check(cudaFree(memory), "freeing device memory");
    }
}

static ra_status_t cuda_alloc_host(ra_device_t *device, int64_t bytes, void **memory_p)
{
    RA_TRY(make_current(device));
    if (cudaMallocHost(memory_p, bytes > 0 ? (size_t)bytes : 1) != cudaSuccess) {
        cudaGetLastError();
        return ra_fail(RA_ERR_NOMEM, "cuda", "cannot pin %lld bytes of host memory",
                       (long long)bytes);
    }
    return RA_OK;
}

static void cuda_free_host(ra_device_t *device, void *memory)
{
    if (make_current(device) == RA_OK) {
        ra_cuda_check(cudaFreeHost(memory), "freeing pinned memory");
    }
}

static ra_status_t cuda_look(const ra_device_t *device, ra_device_memory_t *memory)
{
    size_t free_bytes = 0, total = 0;
    RA_TRY(make_current(device));
    RA_TRY(ra_cuda_check(cudaMemGetInfo(&free_bytes, &total), "looking at free memory"));
    memory->used = (int64_t)(total - free_bytes);
    memory->free = (int64_t)free_bytes;
    return RA_OK;
}

static void cuda_close_stream(ra_stream_t *stream)
{
    if (make_current(stream->device) != RA_OK) {
        return;
    }
    if (stream->queue != NULL) {
        ra_cuda_check(cudaStreamDestroy(stream->queue), "closing a stream");
    }
    ra_device_free(stream->device, stream->workspace);
}

static ra_status_t cuda_open_stream(ra_stream_t *stream)
{
    cudaStream_t queue = NULL;
    RA_TRY(make_current(stream->device));
    RA_TRY(
        ra_cuda_check(cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking), "making a stream"));
    stream->queue = queue;
    ra_status_t status = ra_device_alloc(stream->device, RA_STREAM_WORKSPACE, &stream->workspace);
    if (status != RA_OK) {
        cuda_close_stream(stream);
    }
    return status;
}

static ra_status_t cuda_sync(ra_stream_t *stream)
{
    return ra_cuda_check(cudaStreamSynchronize(stream->queue), "waiting for a stream");
}

static ra_status_t cuda_copy(ra_stream_t *stream, void *to, const void *from, int64_t bytes)
{
    if (bytes == 0) {
        return RA_OK;
    }
    return ra_cuda_check(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDefault, stream->queue),
                         "copying");
}

static ra_status_t cuda_zero(ra_stream_t *stream, void *to, int64_t bytes)
{
    if (bytes == 0) {
        return RA_OK;
    }
    return ra_cuda_check(cudaMemsetAsync(to, 0, (size_t)bytes, stream->queue), "zeroing");
}

static ra_status_t cuda_mark(void *queue, void **event_p)
{
    cudaEvent_t event = NULL;
    RA_TRY(ra_cuda_check(cudaEventCreate(&event), "making an event"));
    cudaError_t error = cudaEventRecord(event, queue);
    if (error != cudaSuccess) {
        cudaEventDestroy(event);
        return ra_cuda_check(error, "marking a stream");
    }
    *event_p = event;
    return RA_OK;
}

static ra_status_t cuda_mark_gap(void *from, void *to, double *seconds_p)
{
    float ms = 0.0f;
    cudaError_t error = cudaEventElapsedTime(&ms, from, to);
    *seconds_p = (double)ms * 1e-3;
    if (error == cudaErrorNotReady) {
        cudaGetLastError();
        return RA_INPROGRESS;
    }
    return ra_cuda_check(error, "timing a span");
}

static ra_status_t cuda_mark_wait(void *event)
{
    return ra_cuda_check(cudaEventSynchronize(event), "waiting for a mark");
}

static void cuda_mark_free(void *event)
{
    cudaEventDestroy(event);
}

struct CUstream_st *ra_stream_cuda(const ra_stream_t *stream)
{
    return stream->queue;
}

void *ra_stream_workspace(const ra_stream_t *stream)
{
    return stream->workspace;
}

const ra_device_ops_t ra_device_cuda = {.name = "cuda",
                                        .doc = "NVIDIA GPUs of this process",
                                        .kind = RA_DEVICE_CUDA,
                                        .count = cuda_count,
                                        .alloc = cuda_alloc,
                                        .free = cuda_free,
                                        .alloc_host = cuda_alloc_host,
                                        .free_host = cuda_free_host,
                                        .look = cuda_look,
                                        .open_stream = cuda_open_stream,
                                        .close_stream = cuda_close_stream,
                                        .sync = cuda_sync,
                                        .copy = cuda_copy,
                                        .zero = cuda_zero,
                                        .mark = cuda_mark,
                                        .mark_gap = cuda_mark_gap,
                                        .mark_wait = cuda_mark_wait,
                                        .mark_free = cuda_mark_free};
