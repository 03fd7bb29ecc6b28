#include "attention/softmax_list.h"

#include "attention/softmax_kernel.h"
#include <stdlib.h>

struct ra_softmax_list {
    const ra_softmax_kernel_t *kernel;
    ra_stream_t *stream; /* borrowed */
    ra_softmax_tiles_layout_t layout;
    void *tiles; /* on the device */
};

bool ra_softmax_uses_lists(const ra_softmax_kernel_t *kernel)
{
    return kernel->launch != NULL;
}

bool ra_softmax_waits_for_keys(const ra_softmax_kernel_t *kernel)
{
    return kernel->waits_for_keys;
}

static ra_status_t fill_list(ra_softmax_list_t *list, const ra_softmax_tiles_t *tiles)
{
    list->layout = *ra_softmax_tiles_layout(tiles);
    RA_TRY(ra_device_alloc(ra_stream_device(list->stream), list->layout.bytes, &list->tiles));
    return ra_stream_copy(list->stream, list->tiles, ra_softmax_tiles_data(tiles),
                          list->layout.bytes);
}

ra_status_t ra_softmax_list_create(const ra_softmax_kernel_t *kernel,
                                   const ra_softmax_block_t *block, bool merge, ra_stream_t *stream,
                                   ra_softmax_list_t **list_p)
{
    int32_t tile_rows = 0, tile_keys = 0;
    ra_softmax_tiles_t *tiles = NULL;
    RA_TRY(kernel->tile(block->head_dim, &tile_rows, &tile_keys));
    RA_TRY(ra_softmax_tiles_create(block, tile_rows, tile_keys, merge, &tiles));
    ra_softmax_list_t *list = calloc(1, sizeof(*list));
    ra_status_t status = RA_ERR_NOMEM;
    if (list == NULL) {
        ra_fail(RA_ERR_NOMEM, "softmax", "cannot allocate a tile list");
    } else {
        list->kernel = kernel;
        list->stream = stream;
        status = fill_list(list, tiles);
    }
    ra_softmax_tiles_destroy(tiles);
    if (status != RA_OK) {
        ra_softmax_list_destroy(list);
        return status;
    }
    *list_p = list;
    return RA_OK;
}

void ra_softmax_list_destroy(ra_softmax_list_t *list)
{
    if (list != NULL) {
        ra_device_free(ra_stream_device(list->stream), list->tiles);
        free(list);
    }
}

ra_status_t ra_softmax_list_fold(const ra_softmax_list_t *list, const ra_softmax_cuda_call_t *call)
{
    ra_softmax_cuda_call_t launch = *call;
    launch.layout = &list->layout;
    launch.tiles = list->tiles;
    return list->kernel->launch(&launch, list->stream);
}
