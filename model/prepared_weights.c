#include "model/prepared_weights.h"

#include "base/checked.h"
#include <stdlib.h>

struct ra_prepared_weights {
    ra_prepared_params_t params;
    ra_device_t *device;
    ra_prepared_layer_t *layer; /* [layers] */
    ra_tensor_t embeddings;
    void *embeddings_copy; /* on a device other than the CPU */
    float *final_norm;
    ra_gemm_weight_t **head; /* [head_blocks] */
    int64_t head_blocks;
};

ra_moe_shape_t ra_model_moe_shape(const ra_model_config_t *config)
{
    return (ra_moe_shape_t){
        .hidden = config->hidden_size,
        .expert_width = config->moe_intermediate_size,
        .shared_width = config->shared_intermediate_size,
        .router = {.experts = (int32_t)config->experts,
                   .top_k = (int32_t)config->experts_per_token,
                   .groups = (int32_t)config->expert_groups,
                   .top_groups = (int32_t)config->expert_groups_kept,
                   .normalise = config->normalise_expert_weights,
                   .scale = (float)config->routed_scaling_factor},
    };
}

/* fp32 copy of a vector on the device; a view without data gives NULL. */
static ra_status_t copy_vector(const ra_prepared_weights_t *prepared, const ra_tensor_t *view,
                               float **copy_p)
{
    if (view->data == NULL) {
        *copy_p = NULL;
        return RA_OK;
    }
    int64_t n = ra_tensor_count(view), bytes = n * (int64_t)sizeof(float);
    float *wide = malloc((size_t)bytes + 1);
    if (wide == NULL) {
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate a vector of %lld floats",
                       (long long)n);
    }
    for (int64_t i = 0; i < n; i++) {
        wide[i] = view->dtype == RA_BF16 ? ra_bf16_to_f32(((const uint16_t *)view->data)[i])
                                         : ((const float *)view->data)[i];
    }
    ra_status_t status = ra_device_alloc(prepared->device, bytes, (void **)copy_p);
    if (status == RA_OK) {
        status = ra_stream_copy(prepared->params.stream, *copy_p, wide, bytes);
    }
    free(wide);
    return status;
}

static ra_status_t prepare_matrix(const ra_prepared_weights_t *prepared, const ra_tensor_t *view,
                                  ra_gemm_weight_t **weight_p)
{
    if (view->data == NULL) {
        *weight_p = NULL;
        return RA_OK;
    }
    return ra_gemm_weight_create(prepared->params.kernel, view, prepared->params.act,
                                 prepared->params.stream, weight_p);
}

/* Split the experts' views the way moe/ takes them: one array of gates, of ups, of downs. */
static ra_status_t prepare_moe(const ra_prepared_weights_t *prepared,
                               const ra_layer_weights_t *from, ra_moe_weights_t ***moe_p)
{
    const ra_prepared_params_t *params = &prepared->params;
    ra_moe_shape_t shape = ra_model_moe_shape(params->config);
    int64_t n = from->expert_count;
    ra_tensor_t *views = calloc((size_t)n * 3, sizeof(*views));
    ra_moe_weights_t **moe = calloc((size_t)params->expert_ranks, sizeof(*moe));
    if (views == NULL || moe == NULL) {
        free(views);
        free(moe);
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate views of %lld experts",
                       (long long)n);
    }
    for (int64_t e = 0; e < n; e++) {
        views[e] = from->experts[e].gate;
        views[n + e] = from->experts[e].up;
        views[2 * n + e] = from->experts[e].down;
    }
    ra_moe_tensors_t tensors = {.router = from->router,
                                .expert_bias = from->expert_bias,
                                .gate = views,
                                .up = views + n,
                                .down = views + 2 * n,
                                .shared_gate = from->shared.gate,
                                .shared_up = from->shared.up,
                                .shared_down = from->shared.down};
    ra_status_t status = RA_OK;
    *moe_p = moe; /* the owner frees what was made, also after an error */
    bool split = params->expert_ranks > 1;
    for (int r = 0; r < params->expert_ranks && status == RA_OK; r++) {
        int32_t first, last;
        if (split && r % params->rank_step != params->rank_first) {
            continue;
        }
        ra_moe_expert_range(shape.router.experts, params->expert_ranks, r, &first, &last);
        status = ra_moe_weights_create(params->kernel, &shape, &tensors, first, last, params->act,
                                       params->stream, &moe[r]);
    }
    free(views);
    return status;
}

static ra_status_t prepare_layer(ra_prepared_weights_t *prepared, const ra_layer_weights_t *from,
                                 ra_prepared_layer_t *layer)
{
    RA_TRY(copy_vector(prepared, &from->input_norm, &layer->input_norm));
    RA_TRY(copy_vector(prepared, &from->post_attention_norm, &layer->post_attention_norm));
    RA_TRY(copy_vector(prepared, &from->q_norm, &layer->q_norm));
    RA_TRY(copy_vector(prepared, &from->k_norm, &layer->k_norm));
    RA_TRY(copy_vector(prepared, &from->g_norm, &layer->g_norm));
    RA_TRY(prepare_matrix(prepared, &from->qkv, &layer->qkv));
    RA_TRY(prepare_matrix(prepared, &from->dense, &layer->dense));
    RA_TRY(prepare_matrix(prepared, &from->g_proj, &layer->g_proj));
    if (from->expert_count > 0) {
        RA_TRY(prepare_moe(prepared, from, &layer->moe));
    } else {
        RA_TRY(prepare_matrix(prepared, &from->mlp.gate, &layer->mlp.gate));
        RA_TRY(prepare_matrix(prepared, &from->mlp.up, &layer->mlp.up));
        RA_TRY(prepare_matrix(prepared, &from->mlp.down, &layer->mlp.down));
    }
    return ra_stream_sync(prepared->params.stream);
}

static ra_status_t prepare_head(ra_prepared_weights_t *prepared, const ra_tensor_t *head)
{
    int64_t vocab = head->extent[0], most = ra_head_block(ra_device_kind(prepared->device));
    prepared->head_blocks = ra_ceil_div(vocab, most);
    prepared->head = calloc((size_t)prepared->head_blocks, sizeof(*prepared->head));
    if (prepared->head == NULL) {
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate the LM head table");
    }
    for (int64_t b = 0; b < prepared->head_blocks; b++) {
        int64_t first = b * most;
        int64_t extent[2] = {ra_min_i64(most, vocab - first), head->extent[1]};
        void *data = ra_dtype_at(head->data, first * extent[1], head->dtype);
        ra_tensor_t block = ra_tensor_view(data, head->dtype, 2, extent);
        RA_TRY(prepare_matrix(prepared, &block, &prepared->head[b]));
    }
    return RA_OK;
}

static ra_status_t prepare_embeddings(ra_prepared_weights_t *prepared, const ra_tensor_t *view)
{
    prepared->embeddings = *view;
    if (ra_device_kind(prepared->device) == RA_DEVICE_CPU) {
        return RA_OK;
    }
    int64_t bytes = ra_tensor_count(view) * ra_dtype_bytes(view->dtype);
    RA_TRY(ra_device_alloc(prepared->device, bytes, &prepared->embeddings_copy));
    prepared->embeddings.data = prepared->embeddings_copy;
    return ra_stream_copy(prepared->params.stream, prepared->embeddings_copy, view->data, bytes);
}

static ra_status_t prepare_rest(ra_prepared_weights_t *prepared)
{
    ra_model_weights_t *weights = prepared->params.weights;
    RA_TRY(prepare_embeddings(prepared, ra_model_embeddings(weights)));
    RA_TRY(copy_vector(prepared, ra_model_final_norm(weights), &prepared->final_norm));
    RA_TRY(prepare_head(prepared, ra_model_lm_head(weights)));
    return ra_stream_sync(prepared->params.stream);
}

static ra_status_t prepare_all(ra_prepared_weights_t **prepared, int count)
{
    ra_model_weights_t *weights = prepared[0]->params.weights;
    for (int64_t l = 0; l < prepared[0]->params.config->layers; l++) {
        const ra_layer_weights_t *from;
        ra_status_t status = ra_model_weights_acquire(weights, l, &from);
        RA_TRY(status);
        for (int i = 0; i < count && status == RA_OK; i++) {
            status = prepare_layer(prepared[i], from, &prepared[i]->layer[l]);
        }
        ra_model_weights_release(weights, l);
        RA_TRY(status);
    }
    for (int i = 0; i < count; i++) {
        RA_TRY(prepare_rest(prepared[i]));
    }
    return RA_OK;
}

static ra_status_t make_empty(const ra_prepared_params_t *params, ra_prepared_weights_t **made_p)
{
    ra_prepared_weights_t *made = calloc(1, sizeof(*made));
    ra_prepared_layer_t *layer = calloc((size_t)params->config->layers, sizeof(*layer));
    if (made == NULL || layer == NULL) {
        free(made);
        free(layer);
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate the table of %lld layers",
                       (long long)params->config->layers);
    }
    made->params = *params;
    made->device = ra_stream_device(params->stream);
    made->layer = layer;
    *made_p = made;
    return RA_OK;
}

ra_status_t ra_prepared_weights_create(const ra_prepared_params_t *params, int count,
                                       ra_prepared_weights_t **prepared_p)
{
    ra_status_t status = RA_OK;
    int made = 0;
    for (; made < count && status == RA_OK; made += status == RA_OK) {
        status = make_empty(&params[made], &prepared_p[made]);
    }
    if (status == RA_OK) {
        status = prepare_all(prepared_p, count);
    }
    for (int i = 0; i < made && status != RA_OK; i++) {
        ra_prepared_weights_destroy(prepared_p[i]);
        prepared_p[i] = NULL;
    }
    return status;
}

static void destroy_layer(const ra_prepared_weights_t *prepared, ra_prepared_layer_t *layer)
{
    float *const vectors[] = {layer->input_norm, layer->post_attention_norm, layer->q_norm,
                              layer->k_norm, layer->g_norm};
    for (size_t i = 0; i < RA_ARRAY_LEN(vectors); i++) {
        ra_device_free(prepared->device, vectors[i]);
    }
    ra_gemm_weight_destroy(layer->qkv);
    ra_gemm_weight_destroy(layer->dense);
    ra_gemm_weight_destroy(layer->g_proj);
    ra_gemm_weight_destroy(layer->mlp.gate);
    ra_gemm_weight_destroy(layer->mlp.up);
    ra_gemm_weight_destroy(layer->mlp.down);
    for (int r = 0; layer->moe != NULL && r < prepared->params.expert_ranks; r++) {
        ra_moe_weights_destroy(layer->moe[r]);
    }
    free(layer->moe);
}

void ra_prepared_weights_destroy(ra_prepared_weights_t *prepared)
{
    if (prepared == NULL) {
        return;
    }
    for (int64_t l = 0; l < prepared->params.config->layers; l++) {
        destroy_layer(prepared, &prepared->layer[l]);
    }
    for (int64_t b = 0; prepared->head != NULL && b < prepared->head_blocks; b++) {
        ra_gemm_weight_destroy(prepared->head[b]);
    }
    free(prepared->head);
    ra_device_free(prepared->device, prepared->final_norm);
    ra_device_free(prepared->device, prepared->embeddings_copy);
    free(prepared->layer);
    free(prepared);
}

const ra_prepared_layer_t *ra_prepared_acquire(ra_prepared_weights_t *prepared, int64_t l)
{
    return &prepared->layer[l];
}

void ra_prepared_release(ra_prepared_weights_t *prepared, int64_t l)
{
    (void)prepared;
    (void)l; /* everything is resident in this placement */
}

const ra_moe_weights_t *ra_prepared_moe(const ra_prepared_weights_t *prepared,
                                        const ra_prepared_layer_t *layer, int rank)
{
    return layer->moe[prepared->params.expert_ranks == 1 ? 0 : rank];
}

const ra_tensor_t *ra_prepared_embeddings(const ra_prepared_weights_t *prepared)
{
    return &prepared->embeddings;
}

const float *ra_prepared_final_norm(const ra_prepared_weights_t *prepared)
{
    return prepared->final_norm;
}

const ra_gemm_weight_t *ra_prepared_head(const ra_prepared_weights_t *prepared, int64_t block)
{
    return block < prepared->head_blocks ? prepared->head[block] : NULL;
}
