/**
 * @file  base/device_cuda.h
 * @brief The CUDA side of a device and a stream, for kernels and transports. Only files built with
 *        RA_CUDA include it.
 */
#ifndef RA_BASE_DEVICE_CUDA_H
#define RA_BASE_DEVICE_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "base/device.h"

struct CUstream_st;

/** Bytes of ra_stream_workspace(): what cuBLASLt asks for on Hopper. */
#define RA_STREAM_WORKSPACE ((int64_t)64 << 20)

/** The queue of a CUDA stream. */
struct CUstream_st *ra_stream_cuda(const ra_stream_t *stream);
/** Scratch of library calls queued on @a stream; contents last until the next such call. */
void *ra_stream_workspace(const ra_stream_t *stream);
/** Make the stream's device the calling thread's. */
ra_status_t ra_stream_make_current(const ra_stream_t *stream);
/** RA_OK for cudaSuccess, else RA_ERR_DEVICE (RA_ERR_NOMEM where memory ran out) with CUDA's text
 * and @a what was being done. @param error  a cudaError_t. */
ra_status_t ra_cuda_check(int error, const char *what);
/** ra_cuda_check() of the launches since the last call; does not wait. */
ra_status_t ra_cuda_check_launch(const char *kernel);

#ifdef __cplusplus
}
#endif

#endif
