#include "model/forward.h"

#include "base/checked.h"
#include "base/trace.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"
#include <math.h>
#include <stdlib.h>

static ra_status_t allocate(ra_forward_t *f, int64_t rows, int64_t channels, ra_dtype_t dtype,
                            void **memory_p)
{
    int64_t count, bytes;
    if (!ra_mul_ok(rows, channels, &count) || !ra_mul_ok(count, ra_dtype_bytes(dtype), &bytes)) {
        return ra_fail(RA_ERR_NOMEM, "forward", "a buffer of %lld x %lld %s passes 2^63 bytes",
                       (long long)rows, (long long)channels, ra_dtype_name(dtype));
    }
    return ra_device_alloc(f->params.device, bytes, memory_p);
}

static ra_status_t allocate_floats(ra_forward_t *f, int64_t rows, int64_t channels,
                                   float **memory_p)
{
    return allocate(f, rows, channels, RA_F32, (void **)memory_p);
}

static bool has_layer(const ra_model_config_t *config, ra_mixer_t mixer, bool windowed)
{
    for (int64_t l = 0; l < config->layers; l++) {
        if (config->layer[l].mixer == mixer && (config->layer[l].window > 0) == windowed) {
            return true;
        }
    }
    return false;
}

static int64_t layer_window(const ra_model_config_t *config)
{
    for (int64_t l = 0; l < config->layers; l++) {
        if (config->layer[l].window > 0) {
            return config->layer[l].window;
        }
    }
    return 0;
}

static ra_status_t create_ring(ra_forward_t *f, int64_t window, ra_softmax_ring_t **ring_p)
{
    const ra_model_config_t *config = f->params.config;
    ra_softmax_ring_params_t params = {.layout = f->params.layout,
                                       .prefix = f->params.prefix,
                                       .heads = (int32_t)config->heads,
                                       .kv_heads = (int32_t)config->kv_heads,
                                       .head_dim = (int32_t)config->head_dim,
                                       .scale = (float)(1.0 / sqrt((double)config->head_dim)),
                                       .window = window,
                                       .causal = true,
                                       .reproducible = f->params.reproducible,
                                       .dtype = f->act,
                                       .kernel = f->params.softmax_kernel,
                                       .walk = f->params.walk};
    return ra_softmax_ring_create(f->params.comm, f->params.stream, &params, ring_p);
}

static ra_status_t create_plans(ra_forward_t *f)
{
    const ra_model_config_t *config = f->params.config;

    if (has_layer(config, RA_MIXER_SOFTMAX, false)) {
        RA_TRY(create_ring(f, 0, &f->full_ring));
    }
    if (has_layer(config, RA_MIXER_SOFTMAX, true)) {
        RA_TRY(create_ring(f, layer_window(config), &f->window_ring));
    }
    if (has_layer(config, RA_MIXER_LINEAR, false)) {
        const ra_forward_cache_t *cache = f->params.cache;
        ra_state_scan_params_t params = {.layout = f->params.layout,
                                         .heads = (int32_t)config->heads,
                                         .key_dim = (int32_t)config->head_dim,
                                         .value_dim = (int32_t)config->head_dim,
                                         .scale = (float)(1.0 / sqrt((double)config->head_dim)),
                                         .reproducible = f->params.reproducible,
                                         .final_at_tile = cache != NULL,
                                         .dtype = f->act,
                                         .kernel = f->params.linear_kernel};
        RA_TRY(ra_state_scan_create(f->params.comm, f->params.stream, &params, &f->scan));
    }
    if (config->experts > 0) {
        ra_moe_shape_t shape = ra_model_moe_shape(config);
        ra_comm_t *comm = f->params.expert_parallel ? f->params.comm : NULL;
        RA_TRY(ra_moe_plan_create(&shape, 0, f->act, f->params.device, comm, &f->moe));
    }
    return RA_OK;
}

static ra_status_t allocate_buffers(ra_forward_t *f)
{
    const ra_model_config_t *config = f->params.config;
    int64_t q_width = config->heads * config->head_dim;
    int64_t kv_width = config->kv_heads * config->head_dim;
    int64_t tile = ra_min_i64(f->tile, ra_max_i64(1, f->rows));
    int64_t head_tile = ra_min_i64(f->head_tile, ra_max_i64(1, f->rows));
    int64_t softmax_width = 2 * q_width + 2 * kv_width;
    int64_t wide = ra_max_i64(q_width + 2 * kv_width, 2 * config->intermediate_size);

    int64_t prefix_rows = f->params.prefix != NULL ? f->params.prefix->rows[f->rank] : 0;

    RA_TRY(allocate_floats(f, f->rows, config->hidden_size, &f->x));
    RA_TRY(allocate_floats(f, f->rows, config->rope.rotary_dim, &f->rope));
    RA_TRY(allocate(f, f->rows, ra_max_i64(softmax_width, 3 * q_width), f->act, &f->mixer));
    if (f->params.prefix != NULL) {
        RA_TRY(allocate(f, prefix_rows, 2 * kv_width, f->act, &f->prefix_kv));
    }
    RA_TRY(allocate(f, ra_max_i64(tile, head_tile), config->hidden_size, f->act, &f->normed));
    RA_TRY(allocate(f, tile, wide, f->act, &f->wide));
    if (f->params.scores) {
        RA_TRY(ra_device_alloc(f->params.device, ra_lm_head_scratch(f, head_tile), &f->head));
    }
    RA_TRY(allocate_floats(f, head_tile, 1, &f->lse_m));
    RA_TRY(allocate_floats(f, head_tile, 1, &f->lse_l));
    RA_TRY(allocate_floats(f, head_tile, 1, &f->picked));
    RA_TRY(allocate_floats(f, tile, 1, &f->gap));
    RA_TRY(allocate_floats(f, config->heads, config->head_dim * config->head_dim, &f->state));
    if (f->params.cache == NULL) {
        return RA_OK;
    }
    return ra_cache_exchange_create(
        f->params.cache, f->rank, f->act, kv_width, ra_max_i64(f->rows, prefix_rows),
        config->heads * config->head_dim * config->head_dim, f->params.stream, &f->exchange);
}

/* Positions pass through device memory once: before the first layer, that of the mixer is free. */
static ra_status_t fill_rope_table(ra_forward_t *f)
{
    const ra_rope_config_t *rope = &f->params.config->rope;
    int64_t bytes = f->rows * (int64_t)sizeof(int64_t);
    int64_t *positions = malloc((size_t)bytes + 1);
    double *inv_freq = malloc(((size_t)rope->rotary_dim / 2 + 1) * sizeof(*inv_freq));
    ra_status_t status;
    if (positions == NULL || inv_freq == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "forward", "cannot allocate positions of %lld rows",
                         (long long)f->rows);
    } else {
        ra_layout_positions(f->params.layout, f->rank, positions);
        ra_rope_inv_freq(rope, inv_freq);
        status = ra_stream_copy(f->params.stream, f->mixer, positions, bytes);
    }
    if (status == RA_OK) {
        status = ra_op_rope_table(f->mixer, f->rows, inv_freq, rope->rotary_dim,
                                  rope->attention_factor, f->rope, f->params.stream);
    }
    free(positions);
    free(inv_freq);
    return status;
}

ra_status_t ra_forward_create(const ra_forward_params_t *params, ra_forward_t **forward_p)
{
    ra_forward_t *f = calloc(1, sizeof(*f));
    if (f == NULL) {
        return ra_fail(RA_ERR_NOMEM, "forward", "cannot allocate a plan");
    }
    f->params = *params;
    f->rank = ra_comm_rank(params->comm);
    f->rows = params->layout->rows[f->rank];
    f->act = params->act;
    bool cuda = ra_device_kind(params->device) == RA_DEVICE_CUDA;
    f->tile = cuda ? RA_FORWARD_TILE_CUDA : RA_FORWARD_TILE;
    f->head_tile = cuda ? RA_HEAD_TILE_CUDA : RA_HEAD_TILE;

    ra_status_t status;
    RA_TRY_GOTO(create_plans(f), err_destroy);
    RA_TRY_GOTO(allocate_buffers(f), err_destroy);
    *forward_p = f;
    return RA_OK;

err_destroy:
    ra_forward_destroy(f);
    return status;
}

void ra_forward_destroy(ra_forward_t *f)
{
    if (f == NULL) {
        return;
    }
    void *const buffers[] = {f->x,    f->rope,  f->mixer, f->prefix_kv, f->normed, f->wide,
                             f->head, f->lse_m, f->lse_l, f->picked,    f->gap,    f->state};
    for (size_t i = 0; i < RA_ARRAY_LEN(buffers); i++) {
        ra_device_free(f->params.device, buffers[i]);
    }
    ra_cache_exchange_destroy(f->exchange);
    ra_softmax_ring_destroy(f->full_ring);
    ra_softmax_ring_destroy(f->window_ring);
    ra_state_scan_destroy(f->scan);
    ra_moe_plan_destroy(f->moe);
    free(f);
}

ra_status_t ra_project_rows(ra_forward_t *f, const ra_prepared_layer_t *layer,
                            const ra_gemm_weight_t *weight, int64_t begin, int64_t n, void *y,
                            int64_t y_stride)
{
    int64_t hidden = f->params.config->hidden_size;
    RA_TRY(ra_op_rms_norm(f->x + begin * hidden, hidden, n, hidden, layer->input_norm,
                          f->params.config->rms_norm_eps, f->normed, hidden, f->act,
                          f->params.stream));
    ra_gemm_job_t job = {.weight = weight,
                         .x = f->normed,
                         .x_stride = hidden,
                         .x_dtype = f->act,
                         .rows = n,
                         .y = y,
                         .y_stride = y_stride,
                         .y_dtype = f->act};
    return ra_gemm(&job, 1, false, f->params.stream);
}

/* One layer on this rank's rows; the same calls on every rank. */
static ra_status_t run_layer(ra_forward_t *f, int64_t l, float *routing_gap,
                             const ra_router_replay_t *replay)
{
    const ra_prepared_layer_t *layer = ra_prepared_acquire(f->params.weights, l);
    bool softmax = f->params.config->layer[l].mixer == RA_MIXER_SOFTMAX;
    ra_span_t span = ra_trace_begin(softmax ? "softmax layer" : "linear layer");

    ra_status_t status = softmax ? ra_mixer_softmax(f, l, layer) : ra_mixer_linear(f, l, layer);
    if (status == RA_OK) {
        ra_span_t inner = ra_trace_begin("feed forward");
        status = ra_feed_forward(f, layer, routing_gap, replay);
        ra_trace_end(inner, f->rank, RA_LANE_COMPUTE, l);
    }
    ra_prepared_release(f->params.weights, l);
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);
    return status;
}

ra_status_t ra_forward_run(ra_forward_t *f, const ra_forward_io_t *io)
{
    ra_forward_control_t *control = f->params.control;

    RA_TRY(fill_rope_table(f));
    RA_TRY(ra_op_embed(ra_prepared_embeddings(f->params.weights), io->token, f->rows, f->x,
                       f->params.config->hidden_size, f->params.stream));
    if (io->routing_gap != NULL) {
        RA_TRY(ra_op_fill(io->routing_gap, f->rows, INFINITY, f->params.stream));
    }
    ra_router_replay_t replay = io->replay;
    for (int64_t l = 0; l < f->params.config->layers; l++) {
        if (atomic_load_explicit(&control->stop, memory_order_relaxed)) {
            return RA_ERR_STOPPED;
        }
        RA_TRY(run_layer(f, l, io->routing_gap, &replay));
        if (f->params.config->layer[l].feed_forward == RA_FFN_MOE) {
            replay = ra_router_replay_at(&replay, f->params.config->experts_per_token);
        }
        RA_TRY(ra_stream_sync(f->params.stream)); /* so that progress is what was done */
        atomic_fetch_add_explicit(&control->rows_done, f->rows, memory_order_relaxed);
    }
    return ra_lm_head(f, io);
}
