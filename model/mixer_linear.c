#include "base/checked.h"
#include "base/trace.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"
#include <math.h>

/* q, k, v of rows [begin, begin + n) into their place, normed per head and rotated. */
static ra_status_t project_rows(ra_forward_t *f, const ra_prepared_layer_t *layer, int64_t begin,
                                int64_t n)
{
    const ra_model_config_t *config = f->params.config;
    int64_t width = config->heads * config->head_dim;
    int64_t rotary = config->rope.rotary_dim;
    const float *table = f->rope + begin * rotary;
    void *q = ra_dtype_at(f->mixer, begin * 3 * width, f->act);
    void *k = ra_dtype_at(q, width, f->act);

    RA_TRY(ra_project_rows(f, layer, layer->qkv, begin, n, q, 3 * width));
    ra_op_heads_t parts[2] = {{.x = q, .y = q, .weight = layer->q_norm},
                              {.x = k, .y = k, .weight = layer->k_norm}};
    for (int i = 0; i < 2; i++) {
        parts[i].x_stride = parts[i].y_stride = 3 * width;
        parts[i].heads = config->heads;
        parts[i].rotate = true;
    }
    return ra_op_head_norm_rope(parts, 2, n, config->head_dim, config->rms_norm_eps, table, rotary,
                                f->act, f->params.stream);
}

/* The scan's output takes the place of v. */
static ra_status_t run_scan(ra_forward_t *f, int64_t l)
{
    const ra_model_config_t *config = f->params.config;
    int64_t width = config->heads * config->head_dim;
    const float *initial = NULL;
    float *final_state = f->state;
    void *v = ra_dtype_at(f->mixer, 2 * width, f->act);
    ra_state_scan_io_t io = {.q = f->mixer,
                             .k = ra_dtype_at(f->mixer, width, f->act),
                             .v = v,
                             .q_stride = 3 * width,
                             .k_stride = 3 * width,
                             .v_stride = 3 * width,
                             .log_decay = ra_model_log_decay(config, l),
                             .o = v,
                             .o_stride = 3 * width};

    if (f->exchange == NULL) {
        return ra_state_scan_run(f->scan, &io);
    }
    RA_TRY(ra_cache_initial_state(f->exchange, l, &initial));
    io.initial = &initial;
    bool save = f->params.cache->save_state != NULL;
    if (save) {
        io.final_state = &final_state;
    }
    RA_TRY(ra_state_scan_run(f->scan, &io));
    const ra_run_t *last = save ? ra_layout_last_run(f->params.layout, 0) : NULL;
    if (last != NULL && last->rank == f->rank) {
        return ra_cache_save_state(f->exchange, l, f->state);
    }
    return RA_OK;
}

/* x += (group norm of the scan's output, gated by the layer input) W^T. */
static ra_status_t close_rows(ra_forward_t *f, const ra_prepared_layer_t *layer, int64_t begin,
                              int64_t n)
{
    const ra_model_config_t *config = f->params.config;
    ra_stream_t *stream = f->params.stream;
    int64_t hidden = config->hidden_size, width = config->heads * config->head_dim;
    void *o = ra_dtype_at(f->mixer, begin * 3 * width + 2 * width, f->act);

    RA_TRY(ra_project_rows(f, layer, layer->g_proj, begin, n, f->wide, width));
    RA_TRY(ra_op_group_norm_gate(o, 3 * width, n, width, config->group_norm_groups, layer->g_norm,
                                 config->rms_norm_eps, f->wide, width, f->act, stream));
    ra_gemm_job_t out = {.weight = layer->dense,
                         .x = o,
                         .x_stride = 3 * width,
                         .x_dtype = f->act,
                         .rows = n,
                         .y = f->x + begin * hidden,
                         .y_stride = hidden};
    return ra_gemm(&out, 1, true, stream);
}

ra_status_t ra_mixer_linear(ra_forward_t *f, int64_t l, const ra_prepared_layer_t *layer)
{
    ra_span_t span = ra_trace_begin("qkv");
    for (int64_t begin = 0; begin < f->rows; begin += f->tile) {
        RA_TRY(project_rows(f, layer, begin, ra_min_i64(f->tile, f->rows - begin)));
    }
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);

    span = ra_trace_begin("state scan");
    RA_TRY(run_scan(f, l));
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);

    span = ra_trace_begin("gate and out");
    for (int64_t begin = 0; begin < f->rows; begin += f->tile) {
        RA_TRY(close_rows(f, layer, begin, ra_min_i64(f->tile, f->rows - begin)));
    }
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);
    return RA_OK;
}
