/**
 * @file  base/tensor_map.cuh
 * @brief Host side of bulk tensor copies: describe a strided bf16 array to the copy engine.
 */
#ifndef RA_BASE_TENSOR_MAP_CUH
#define RA_BASE_TENSOR_MAP_CUH

extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include <cuda_runtime.h>
#include <cudaTypedefs.h>
#include <stdint.h>

typedef decltype(&cuTensorMapEncodeTiled) ra_tensor_map_encode_t;

/** The driver's encoder, looked up once; NULL where the driver has none. */
static inline ra_tensor_map_encode_t ra_tensor_map_encoder(void)
{
    static const ra_tensor_map_encode_t encode = []() -> ra_tensor_map_encode_t {
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &result);
        bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return found ? (ra_tensor_map_encode_t)entry : nullptr;
    }();
    return encode;
}

/**
 * Map of a bf16 array of @a RANK dimensions, innermost (contiguous) first, in the 128-byte swizzle.
 * Reads beyond an extent give zeros, writes beyond it are dropped.
 * @param base    16-byte aligned.
 * @param stride  [RANK - 1] bytes from one index to the next of dimensions 1 ..; multiples of 16.
 * @param box     [RANK] elements a copy moves; box[0] = 64.
 * @param promotion  bytes that the L2 fetches for a read of fewer.
 */
template <int RANK>
static inline ra_status_t
ra_tensor_map_bf16(const char *subsystem, const void *base, const int64_t (&extent)[RANK],
                   const int64_t (&stride)[RANK - 1], const int32_t (&box)[RANK],
                   CUtensorMapL2promotion promotion, CUtensorMap *map_p)
{
    cuuint64_t dims[RANK], strides[RANK];
    cuuint32_t boxes[RANK], steps[RANK];
    for (int i = 0; i < RANK; i++) {
        dims[i] = (cuuint64_t)(extent[i] > 0 ? extent[i] : 1);
        boxes[i] = (cuuint32_t)box[i];
        steps[i] = 1;
        if (i > 0)
            strides[i - 1] = (cuuint64_t)stride[i - 1];
    }
    ra_tensor_map_encode_t encode = ra_tensor_map_encoder();
    if (!encode)
        return ra_fail(RA_ERR_DEVICE, subsystem, "the driver has no cuTensorMapEncodeTiled");
    CUresult result =
        encode(map_p, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, RANK, const_cast<void *>(base), dims,
               strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return ra_fail(RA_ERR_DEVICE, subsystem,
                       "tensor map of %lld x %lld, stride %lld bytes: driver error %d",
                       (long long)extent[1], (long long)extent[0], (long long)stride[0],
                       (int)result);
    return RA_OK;
}

/**
 * Map of [rows, heads, head_dim] bf16, rows @a stride elements apart, as (64 columns, rows, heads,
 * head_dim / 64 boxes): a copy moves @a box_rows rows of one head.
 * @param head_dim  a multiple of 64.
 */
static inline ra_status_t ra_tensor_map_heads(const char *subsystem, const void *base, int64_t rows,
                                              int64_t stride, int32_t heads, int32_t head_dim,
                                              int32_t box_rows, CUtensorMapL2promotion promotion,
                                              CUtensorMap *map_p)
{
    return ra_tensor_map_bf16<4>(subsystem, base, {64, rows, heads, head_dim / 64},
                                 {stride * 2, head_dim * (int64_t)2, 128},
                                 {64, box_rows, 1, head_dim / 64}, promotion, map_p);
}

#endif
