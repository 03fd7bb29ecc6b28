#include "base/checked.h"
#include "base/trace.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"

/* q and o inside f->mixer; keys and values where the ring wants them, else behind o. */
typedef struct softmax_buffers {
    ra_softmax_ring_t *ring;
    void *q, *o, *k, *v;
    int64_t q_width, kv_width; /* H D and Hk D */
} softmax_buffers_t;

static softmax_buffers_t place_buffers(const ra_forward_t *f, int64_t l)
{
    int64_t plane_rows;
    const ra_model_config_t *config = f->params.config;
    softmax_buffers_t b = {.q_width = config->heads * config->head_dim,
                           .kv_width = config->kv_heads * config->head_dim};
    b.q = f->mixer;
    b.o = ra_dtype_at(b.q, f->rows * b.q_width, f->act);
    b.ring = config->layer[l].window > 0 ? f->window_ring : f->full_ring;
    b.k = ra_softmax_ring_own_kv(b.ring, &plane_rows);
    if (b.k == NULL) {
        b.k = ra_dtype_at(b.o, f->rows * b.q_width, f->act);
    }
    b.v = ra_dtype_at(b.k, plane_rows * b.kv_width, f->act);
    return b;
}

/* q, k, v of rows [begin, begin + n): product, per-head norm, rotation at global positions. */
static ra_status_t project_rows(ra_forward_t *f, const ra_prepared_layer_t *layer,
                                const softmax_buffers_t *b, int64_t begin, int64_t n)
{
    const ra_model_config_t *config = f->params.config;
    int64_t width = b->q_width + 2 * b->kv_width;
    int64_t rotary = config->rope.rotary_dim;
    const float *table = f->rope + begin * rotary;

    RA_TRY(ra_project_rows(f, layer, layer->qkv, begin, n, f->wide, width));
    ra_op_heads_t parts[3] = {{.x = f->wide,
                               .y = ra_dtype_at(b->q, begin * b->q_width, f->act),
                               .y_stride = b->q_width,
                               .heads = config->heads,
                               .weight = layer->q_norm,
                               .rotate = true},
                              {.x = ra_dtype_at(f->wide, b->q_width, f->act),
                               .y = ra_dtype_at(b->k, begin * b->kv_width, f->act),
                               .y_stride = b->kv_width,
                               .heads = config->kv_heads,
                               .weight = layer->k_norm,
                               .rotate = true},
                              {.x = ra_dtype_at(f->wide, b->q_width + b->kv_width, f->act),
                               .y = ra_dtype_at(b->v, begin * b->kv_width, f->act),
                               .y_stride = b->kv_width,
                               .heads = config->kv_heads}};
    for (int i = 0; i < 3; i++) {
        parts[i].x_stride = width;
    }
    return ra_op_head_norm_rope(parts, 3, n, config->head_dim, config->rms_norm_eps, table, rotary,
                                f->act, f->params.stream);
}

static ra_status_t run_ring(ra_forward_t *f, int64_t l, const softmax_buffers_t *b)
{
    ra_softmax_ring_io_t io = {.q = b->q,
                               .q_stride = b->q_width,
                               .kv = b->k,
                               .prefix_kv = f->prefix_kv,
                               .o = b->o,
                               .o_stride = b->q_width};
    if (f->exchange != NULL && f->prefix_kv != NULL) {
        int64_t prefix_rows = f->params.prefix->rows[f->rank];
        RA_TRY(ra_cache_load_kv(f->exchange, l, prefix_rows, f->prefix_kv));
    }
    if (f->exchange != NULL) {
        RA_TRY(ra_cache_save_kv(f->exchange, l, f->rows, b->k, b->v));
    }
    return ra_softmax_ring_run(b->ring, &io);
}

ra_status_t ra_mixer_softmax(ra_forward_t *f, int64_t l, const ra_prepared_layer_t *layer)
{
    softmax_buffers_t b = place_buffers(f, l);
    int64_t hidden = f->params.config->hidden_size;

    ra_span_t span = ra_trace_begin("qkv");
    for (int64_t begin = 0; begin < f->rows; begin += f->tile) {
        int64_t n = ra_min_i64(f->tile, f->rows - begin);
        RA_TRY(project_rows(f, layer, &b, begin, n));
    }
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);

    RA_TRY(run_ring(f, l, &b));

    span = ra_trace_begin("attention out");
    ra_gemm_job_t job = {.weight = layer->dense,
                         .x = b.o,
                         .x_stride = b.q_width,
                         .x_dtype = f->act,
                         .rows = f->rows,
                         .y = f->x,
                         .y_stride = hidden};
    RA_TRY(ra_gemm(&job, 1, true, f->params.stream));
    ra_trace_end(span, f->rank, RA_LANE_COMPUTE, l);
    return RA_OK;
}
