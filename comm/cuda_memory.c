#include "comm/cuda_memory.h"

#include "base/device_cuda.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

ra_status_t ra_cuda_is_device_memory(const ra_transfer_t *transfer, int device, bool *is_device_p)
{
    const void *memory = transfer->bytes > 0 ? transfer->data : transfer->gate;
    struct cudaPointerAttributes attributes;
    *is_device_p = false;
    if (memory == NULL) {
        return RA_OK;
    }
    RA_TRY(ra_cuda_check(cudaPointerGetAttributes(&attributes, memory), "looking at a pointer"));
    *is_device_p =
        attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device) {
        return ra_fail(RA_ERR_INVALID, "comm",
                       "%lld bytes in memory of GPU %d posted on a rank of GPU %d",
                       (long long)transfer->bytes, attributes.device, device);
    }
    return RA_OK;
}

typedef CUresult (*write_value_t)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

static pthread_once_t write_value_once = PTHREAD_ONCE_INIT;
static union {
    void *symbol;
    write_value_t call;
} write_value;

/* Through the runtime, so that nothing links with libcuda. */
static void find_write_value(void)
{
    enum cudaDriverEntryPointQueryResult result;
    cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuStreamWriteValue32", &write_value.symbol, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
        write_value.symbol = NULL;
    }
}

ra_status_t ra_cuda_write_gate(struct CUstream_st *stream, uint32_t *gate, uint32_t value)
{
    pthread_once(&write_value_once, find_write_value);
    if (write_value.symbol == NULL) {
        return ra_fail(RA_ERR_UNSUPPORTED, "comm",
                       "the driver has no cuStreamWriteValue32: gates cannot be written");
    }
    CUresult result = write_value.call(stream, (CUdeviceptr)(uintptr_t)gate, value, 0);
    if (result != CUDA_SUCCESS) {
        return ra_fail(RA_ERR_DEVICE, "comm", "cuStreamWriteValue32: error %d", (int)result);
    }
    return RA_OK;
}
