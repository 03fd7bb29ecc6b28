/*
 * attention/linear_ref.c - oracle: the token recurrence in double.
 *
 *     S <- e^{g_t} S + k_t v_t^T ;  o_t = scale S^T q_t
 *
 * Any shape, no chunks, one rounding to fp32 at each output. Slow on purpose.
 */
#include "attention/linear_kernel.h"

#include <math.h>
#include <stdatomic.h>

typedef struct ref {
    const ra_linear_args_t *args;
    bool state_only;
    atomic_bool failed; /* any task sets it; read after the job */
} ref_t;

static bool fits(const ra_linear_args_t *shape)
{
    return shape->dtype == RA_F32;
}

static double log_decay(const ra_linear_args_t *args, int64_t row, int64_t head)
{
    return (double)args->log_decay[row * args->log_decay_stride + head];
}

static void token(const ra_linear_args_t *args, int64_t row, int64_t head, bool state_only,
                  double *state)
{
    int64_t key_dim = args->key_dim, value_dim = args->value_dim;
    const float *k = (const float *)args->k + row * args->k_stride + head * key_dim;
    const float *v = (const float *)args->v + row * args->v_stride + head * value_dim;
    double decay = exp(log_decay(args, row, head));
    for (int64_t d = 0; d < key_dim; d++) {
        for (int64_t e = 0; e < value_dim; e++) {
            double *s = &state[d * value_dim + e];
            *s = decay * *s + (double)k[d] * (double)v[e];
        }
    }
    if (state_only) {
        return;
    }
    const float *q = (const float *)args->q + row * args->q_stride + head * key_dim;
    float *o = (float *)args->o + row * args->o_stride + head * value_dim;
    for (int64_t e = 0; e < value_dim; e++) {
        double sum = 0;
        for (int64_t d = 0; d < key_dim; d++) {
            sum += state[d * value_dim + e] * (double)q[d];
        }
        o[e] = (float)((double)args->scale * sum);
    }
}

static void task(void *arg, int64_t index)
{
    ref_t *ref = arg;
    const ra_linear_args_t *args = ref->args;
    const ra_linear_segment_t *segment = &args->segments[index / args->heads];
    int64_t head = index % args->heads;
    int64_t size = (int64_t)args->key_dim * args->value_dim;
    double *state = ra_scratch(0, size * (int64_t)sizeof(*state));
    if (state == NULL) {
        atomic_store(&ref->failed, true);
        return;
    }
    for (int64_t i = 0; i < size; i++) {
        state[i] = segment->state_in != NULL ? (double)segment->state_in[head * size + i] : 0;
    }
    for (int64_t t = 0; t < segment->row_count; t++) {
        token(args, segment->row_begin + t, head, ref->state_only, state);
    }
    for (int64_t i = 0; segment->state_out != NULL && i < size; i++) {
        segment->state_out[head * size + i] = (float)state[i];
    }
}

static ra_status_t run(const ra_linear_args_t *args, bool state_only, ra_stream_t *stream)
{
    ref_t ref = {.args = args, .state_only = state_only};
    atomic_init(&ref.failed, false);
    ra_pool_for(ra_stream_pool(stream), args->segment_count * args->heads, task, &ref);
    return atomic_load(&ref.failed) ? RA_ERR_NOMEM : RA_OK;
}

const ra_linear_kernel_t ra_linear_ref = {.name = "ref",
                                          .doc = "token by token in double",
                                          .device = RA_DEVICE_CPU,
                                          .fits = fits,
                                          .run = run};
