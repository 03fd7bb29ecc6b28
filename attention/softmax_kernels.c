#include "attention/softmax_kernel.h"
#include <string.h>

#if RA_HAVE_CUDA
#include "base/device_cuda.h"
#endif

/* First fitting row is "auto". */
static const ra_softmax_kernel_t *const softmax_table[] = {
    &ra_softmax_cpu,
    &ra_softmax_ref,
#if RA_HAVE_CUDA
    &ra_softmax_sm90,
    &ra_softmax_cuda,
#endif
};

static bool shape_is_sound(const ra_softmax_block_t *shape)
{
    return shape->heads > 0 && shape->kv_heads > 0 && shape->head_dim > 0 &&
           shape->heads % shape->kv_heads == 0 &&
           (shape->mask.key_score == NULL) == (shape->mask.row_threshold == NULL);
}

ra_status_t ra_softmax_select(const char *name, ra_device_kind_t device,
                              const ra_softmax_block_t *shape, const ra_softmax_kernel_t **kernel_p)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(softmax_table) && shape_is_sound(shape); i++) {
        const ra_softmax_kernel_t *kernel = softmax_table[i];
        if (kernel->device == device && kernel->fits(shape) &&
            (strcmp(name, "auto") == 0 || strcmp(name, kernel->name) == 0)) {
            *kernel_p = kernel;
            return RA_OK;
        }
    }
    return ra_fail(RA_ERR_UNSUPPORTED, "softmax",
                   "no kernel '%s' for %s, %d query heads on %d key/value heads of %d %s%s%s", name,
                   device == RA_DEVICE_CPU ? "cpu" : "cuda", shape->heads, shape->kv_heads,
                   shape->head_dim, ra_dtype_name(shape->dtype),
                   shape->mask.key_score != NULL ? ", key scores" : "",
                   shape->mask.key_bias != NULL ? ", key bias" : "");
}

const char *ra_softmax_kernel_name(const ra_softmax_kernel_t *kernel)
{
    return kernel->name;
}

ra_status_t ra_softmax_reset(int64_t rows, int32_t heads, int32_t head_dim,
                             const ra_softmax_state_t *state, ra_stream_t *stream)
{
#if RA_HAVE_CUDA
    if (ra_stream_kind(stream) == RA_DEVICE_CUDA) {
        return ra_softmax_cuda_reset(rows, heads, head_dim, state, ra_stream_cuda(stream));
    }
#endif
    ra_softmax_cpu_reset(rows, heads, head_dim, state, stream);
    return RA_OK;
}

ra_status_t ra_softmax_fold(const ra_softmax_kernel_t *kernel, const ra_softmax_block_t *block,
                            const ra_softmax_state_t *state, ra_stream_t *stream)
{
    return kernel->fold(block, state, stream);
}

ra_status_t ra_softmax_finish(int64_t rows, int32_t heads, int32_t head_dim,
                              const ra_softmax_state_t *state, float *lse, ra_stream_t *stream)
{
#if RA_HAVE_CUDA
    if (ra_stream_kind(stream) == RA_DEVICE_CUDA) {
        return ra_softmax_cuda_finish(rows, heads, head_dim, state, lse, ra_stream_cuda(stream));
    }
#endif
    ra_softmax_cpu_finish(rows, heads, head_dim, state, lse, stream);
    return RA_OK;
}
