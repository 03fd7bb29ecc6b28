/**
 * @file  comm/cuda_memory.h
 * @brief What transports of CUDA device memory share. Internal to comm/; built with RA_CUDA.
 */
#ifndef RA_COMM_CUDA_MEMORY_H
#define RA_COMM_CUDA_MEMORY_H

#include "comm/comm.h"

struct CUstream_st;

/** Tell device memory (true) from host memory, pinned or not, for a transfer on @a device.
 * @retval RA_ERR_INVALID  memory of another device. */
ra_status_t ra_cuda_is_device_memory(const ra_transfer_t *transfer, int device, bool *is_device_p);
/** Set *gate in device memory to @a value in stream order, by the copy front end: no kernel. */
ra_status_t ra_cuda_write_gate(struct CUstream_st *stream, uint32_t *gate, uint32_t value);

#endif
