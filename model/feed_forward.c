#include "base/checked.h"
#include "model/forward_plan.h"
#include "model/layer_ops.h"

static ra_status_t dense_rows(ra_forward_t *f, const ra_prepared_layer_t *layer, float *x,
                              int64_t n)
{
    ra_stream_t *stream = f->params.stream;
    int64_t hidden = f->params.config->hidden_size, width = f->params.config->intermediate_size;
    void *gate = f->wide, *up = ra_dtype_at(f->wide, width, f->act);
    ra_gemm_job_t in[2] = {{.weight = layer->mlp.gate, .y = gate},
                           {.weight = layer->mlp.up, .y = up}};

    for (int i = 0; i < 2; i++) {
        in[i].x = f->normed;
        in[i].x_stride = hidden;
        in[i].x_dtype = in[i].y_dtype = f->act;
        in[i].rows = n;
        in[i].y_stride = 2 * width;
    }
    RA_TRY(ra_gemm(in, 2, false, stream));
    RA_TRY(ra_op_silu_mul(gate, 2 * width, up, 2 * width, n, width, f->act, stream));
    ra_gemm_job_t out = {.weight = layer->mlp.down,
                         .x = gate,
                         .x_stride = 2 * width,
                         .x_dtype = f->act,
                         .rows = n,
                         .y = x,
                         .y_stride = hidden};
    return ra_gemm(&out, 1, true, stream);
}

static ra_status_t moe_rows(ra_forward_t *f, const ra_prepared_layer_t *layer, float *x, int64_t n,
                            float *routing_gap, ra_router_replay_t replay)
{
    int64_t hidden = f->params.config->hidden_size;
    ra_moe_args_t args = {.weights = ra_prepared_moe(f->params.weights, layer, f->rank),
                          .rows = n,
                          .x = f->normed,
                          .x_stride = hidden,
                          .y = x,
                          .y_stride = hidden,
                          .accumulate = true,
                          .gap = routing_gap != NULL ? f->gap : NULL,
                          .replay = replay};
    RA_TRY(ra_moe_forward(f->moe, &args, f->params.stream));
    return routing_gap == NULL ? RA_OK : ra_op_min_rows(f->gap, n, routing_gap, f->params.stream);
}

ra_status_t ra_feed_forward(ra_forward_t *f, const ra_prepared_layer_t *layer, float *routing_gap,
                            const ra_router_replay_t *replay)
{
    int64_t hidden = f->params.config->hidden_size;
    /* With experts over ranks every rank takes part in every call, so all make as many as the
     * fullest. */
    int64_t rows =
        layer->moe != NULL && f->params.expert_parallel ? f->params.layout->max_rows : f->rows;

    for (int64_t begin = 0; begin < rows; begin += f->tile) {
        int64_t n = ra_max_i64(0, ra_min_i64(f->tile, f->rows - begin));
        float *x = n > 0 ? f->x + begin * hidden : f->x;
        RA_TRY(ra_op_rms_norm(x, hidden, n, hidden, layer->post_attention_norm,
                              f->params.config->rms_norm_eps, f->normed, hidden, f->act,
                              f->params.stream));
        if (layer->moe == NULL) {
            RA_TRY(dense_rows(f, layer, x, n));
        } else {
            int64_t first = n > 0 ? begin : 0;
            float *gap = routing_gap != NULL ? routing_gap + first : NULL;
            RA_TRY(
                moe_rows(f, layer, x, n, gap, ra_router_replay_at(replay, first * replay->stride)));
        }
    }
    return RA_OK;
}
