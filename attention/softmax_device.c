/*
 * The rows of the softmax table that run on a GPU: "sm90" and "cuda". A fold without a list of its
 * own (softmax_list.h) brings one along in stream order, so that nothing waits for the device.
 */
#include "attention/softmax_cuda.h"
#include "attention/softmax_kernel.h"
#include "base/cuda_attribute.h"
#include "base/device_cuda.h"

static bool sm90_fits(const ra_softmax_block_t *shape)
{
    return shape->dtype == RA_BF16 && (shape->head_dim == 64 || shape->head_dim == 128) &&
           shape->scale > 0 && shape->mask.key_score == NULL && shape->mask.key_bias == NULL &&
           ra_cuda_is_sm90();
}

static bool cuda_fits(const ra_softmax_block_t *shape)
{
    return (shape->dtype == RA_BF16 || shape->dtype == RA_F32) && shape->head_dim <= 256;
}

static ra_status_t cuda_tile(int32_t head_dim, int32_t *tile_rows_p, int32_t *tile_keys_p)
{
    (void)head_dim;
    ra_softmax_cuda_tile(tile_rows_p, tile_keys_p);
    return RA_OK;
}

static ra_status_t sm90_launch(const ra_softmax_cuda_call_t *call, ra_stream_t *stream)
{
    return ra_softmax_sm90_launch(call, ra_stream_cuda(stream));
}

static ra_status_t cuda_launch(const ra_softmax_cuda_call_t *call, ra_stream_t *stream)
{
    return ra_softmax_cuda_launch(call, ra_stream_cuda(stream));
}

static ra_status_t launch_with(const ra_softmax_kernel_t *kernel, const ra_softmax_tiles_t *tiles,
                               const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                               ra_stream_t *stream)
{
    const ra_softmax_tiles_layout_t *layout = ra_softmax_tiles_layout(tiles);
    cudaStream_t queue = ra_stream_cuda(stream);
    void *list = NULL;
    RA_TRY(ra_cuda_check(cudaMallocAsync(&list, (size_t)layout->bytes, queue),
                         "allocating a tile list"));
    ra_softmax_cuda_call_t call = {.block = block, .layout = layout, .tiles = list, .state = state};
    ra_status_t status = ra_stream_copy(stream, list, ra_softmax_tiles_data(tiles), layout->bytes);
    if (status == RA_OK) {
        status = kernel->launch(&call, stream);
    }
    ra_status_t freed = ra_cuda_check(cudaFreeAsync(list, queue), "freeing a tile list");
    return status != RA_OK ? status : freed;
}

static ra_status_t fold_with(const ra_softmax_kernel_t *kernel, const ra_softmax_block_t *block,
                             const ra_softmax_state_t *state, ra_stream_t *stream)
{
    int32_t tile_rows = 0, tile_keys = 0;
    ra_softmax_tiles_t *tiles = NULL;
    RA_TRY(kernel->tile(block->head_dim, &tile_rows, &tile_keys));
    RA_TRY(ra_softmax_tiles_create(block, tile_rows, tile_keys, false, &tiles));
    ra_status_t status = launch_with(kernel, tiles, block, state, stream);
    ra_softmax_tiles_destroy(tiles);
    return status;
}

static ra_status_t sm90_fold(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                             ra_stream_t *stream)
{
    return fold_with(&ra_softmax_sm90, block, state, stream);
}

static ra_status_t cuda_fold(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                             ra_stream_t *stream)
{
    return fold_with(&ra_softmax_cuda, block, state, stream);
}

const ra_softmax_kernel_t ra_softmax_sm90 = {
    .name = "sm90",
    .doc = "Hopper, bf16, head size 64 or 128, interval masks",
    .device = RA_DEVICE_CUDA,
    .fits = sm90_fits,
    .fold = sm90_fold,
    .tile = ra_softmax_sm90_tile,
    .launch = sm90_launch,
    .waits_for_keys = true,
};

const ra_softmax_kernel_t ra_softmax_cuda = {
    .name = "cuda",
    .doc = "fp32 arithmetic on F32 or BF16, any head size up to 256, all mask features",
    .device = RA_DEVICE_CUDA,
    .fits = cuda_fits,
    .fold = cuda_fold,
    .tile = cuda_tile,
    .launch = cuda_launch,
};
