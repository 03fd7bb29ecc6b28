#include "attention/linear_kernel.h"

#include "base/checked.h"
#include "base/log.h"
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if RA_HAVE_CUDA
#include "attention/linear_cuda.h"
#include "base/device_cuda.h"

static ra_status_t run_sm90(const ra_linear_args_t *args, bool state_only, ra_stream_t *stream)
{
    return ra_linear_sm90_launch(args, state_only, 0, ra_stream_cuda(stream));
}

static ra_status_t run_cuda(const ra_linear_args_t *args, bool state_only, ra_stream_t *stream)
{
    return ra_linear_cuda_launch(args, state_only, ra_stream_cuda(stream));
}

static const ra_linear_kernel_t linear_sm90 = {.name = "sm90",
                                               .doc = "Hopper, bf16, one decay a head",
                                               .device = RA_DEVICE_CUDA,
                                               .fits = ra_linear_sm90_fits,
                                               .run = run_sm90,
                                               .scratch_bytes = ra_linear_sm90_scratch};
static const ra_linear_kernel_t linear_cuda = {.name = "cuda",
                                               .doc = "any decay and size, fp32 arithmetic",
                                               .device = RA_DEVICE_CUDA,
                                               .fits = ra_linear_cuda_fits,
                                               .run = run_cuda};
#endif

/* Order is preference: "auto" takes the first row of the device that fits. */
static const ra_linear_kernel_t *const linear_table[] = {
    &ra_linear_cpu,
    &ra_linear_ref,
#if RA_HAVE_CUDA
    &linear_sm90,
    &linear_cuda,
#endif
};

ra_status_t ra_linear_select(const char *name, ra_device_kind_t device,
                             const ra_linear_args_t *shape, const ra_linear_kernel_t **kernel_p)
{
    if (shape->heads < 1 || shape->key_dim < 1 || shape->value_dim < 1) {
        return ra_fail(RA_ERR_SHAPE, "linear", "%d heads of key dim %d and value dim %d",
                       shape->heads, shape->key_dim, shape->value_dim);
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(linear_table); i++) {
        const ra_linear_kernel_t *kernel = linear_table[i];
        bool named = strcmp(name, "auto") == 0 || strcmp(name, kernel->name) == 0;
        if (named && kernel->device == device && kernel->fits(shape)) {
            *kernel_p = kernel;
            return RA_OK;
        }
    }
    return ra_fail(
        RA_ERR_UNSUPPORTED, "linear",
        "no kernel '%s' for %s, %d heads of key dim %d and value dim %d, %s, decay per %s", name,
        device == RA_DEVICE_CPU ? "cpu" : "cuda", shape->heads, shape->key_dim, shape->value_dim,
        ra_dtype_name(shape->dtype), shape->log_decay_stride > 0 ? "token" : "head");
}

const char *ra_linear_kernel_name(const ra_linear_kernel_t *kernel)
{
    return kernel->name;
}

int64_t ra_linear_scratch_bytes(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args)
{
    return kernel->scratch_bytes != NULL ? kernel->scratch_bytes(args) : 0;
}

static ra_status_t check(const ra_linear_args_t *args, bool state_only)
{
    int64_t key_width = (int64_t)args->heads * args->key_dim;
    int64_t value_width = (int64_t)args->heads * args->value_dim;
    bool strides_fit =
        args->k_stride >= key_width && args->v_stride >= value_width &&
        (state_only || (args->q_stride >= key_width && args->o_stride >= value_width));
    if (!strides_fit) {
        return ra_fail(RA_ERR_SHAPE, "linear",
                       "row strides q %" PRId64 " k %" PRId64 " v %" PRId64 " o %" PRId64
                       " for %d heads of %d x %d",
                       args->q_stride, args->k_stride, args->v_stride, args->o_stride, args->heads,
                       args->key_dim, args->value_dim);
    }
    if (args->log_decay_stride != 0 && args->log_decay_stride < args->heads) {
        return ra_fail(RA_ERR_SHAPE, "linear", "log decay stride %" PRId64 " for %d heads",
                       args->log_decay_stride, args->heads);
    }
    /* A positive log-decay grows without bound; NaN is refused with it. Rows are checked by their
       producer: reading them all here would cost a pass. */
    for (int32_t h = 0; args->log_decay_stride == 0 && h < args->heads; h++) {
        if (!(args->log_decay[h] <= 0)) {
            return ra_fail(RA_ERR_INVALID, "linear", "log decay %g of head %d is not <= 0",
                           (double)args->log_decay[h], h);
        }
    }
    return RA_OK;
}

ra_status_t ra_linear_forward(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args,
                              ra_stream_t *stream)
{
    RA_TRY(check(args, false));
    return kernel->run(args, false, stream);
}

ra_status_t ra_linear_summarise(const ra_linear_kernel_t *kernel, const ra_linear_args_t *args,
                                ra_stream_t *stream)
{
    RA_TRY(check(args, true));
    return kernel->run(args, true, stream);
}

typedef struct carry {
    int64_t state_per_head;
    const float *total_log_decay, *before;
    float *after;
} carry_t;

static void carry_head(void *arg, int64_t head)
{
    const carry_t *carry = arg;
    const float *before = carry->before + head * carry->state_per_head;
    float *after = carry->after + head * carry->state_per_head;
    float decay = (float)exp((double)carry->total_log_decay[head]);
    for (int64_t i = 0; i < carry->state_per_head; i++) {
        after[i] = decay * before[i] + after[i];
    }
}

ra_status_t ra_linear_carry(int32_t heads, int64_t state_per_head, const float *total_log_decay,
                            const float *before, float *after, ra_stream_t *stream)
{
    if (before == NULL) {
        return RA_OK;
    }
#if RA_HAVE_CUDA
    if (stream != NULL && ra_device_kind(ra_stream_device(stream)) == RA_DEVICE_CUDA) {
        return ra_linear_cuda_carry(heads, state_per_head, total_log_decay, before, after,
                                    ra_stream_cuda(stream));
    }
#endif
    carry_t carry = {.state_per_head = state_per_head,
                     .total_log_decay = total_log_decay,
                     .before = before,
                     .after = after};
    ra_pool_for(ra_stream_pool(stream), heads, carry_head, &carry);
    return RA_OK;
}
