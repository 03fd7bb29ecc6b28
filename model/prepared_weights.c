#include "model/prepared_weights.h"

#include "base/checked.h"
#include <stdlib.h>

struct ra_prepared_weights {
    const ra_model_config_t *config;
    ra_prepared_layer_t *layer; /* [layers] */
    int expert_ranks;
    ra_tensor_t embeddings;
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

/* fp32 copy of a vector; a view without data gives NULL. */
static ra_status_t copy_vector(const ra_tensor_t *view, float **copy_p)
{
    if (view->data == NULL) {
        *copy_p = NULL;
        return RA_OK;
    }
    int64_t n = ra_tensor_count(view);
    float *copy = malloc((size_t)n * sizeof(*copy));
    if (copy == NULL) {
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate a vector of %lld floats",
                       (long long)n);
    }
    for (int64_t i = 0; i < n; i++) {
        copy[i] = view->dtype == RA_BF16 ? ra_bf16_to_f32(((const uint16_t *)view->data)[i])
                                         : ((const float *)view->data)[i];
    }
    *copy_p = copy;
    return RA_OK;
}

static ra_status_t prepare_matrix(const ra_gemm_kernel_t *kernel, const ra_tensor_t *view,
                                  ra_gemm_weight_t **weight_p)
{
    if (view->data == NULL) {
        *weight_p = NULL;
        return RA_OK;
    }
    return ra_gemm_weight_create(kernel, view, RA_F32, NULL, weight_p);
}

/* Split the experts' views the way moe/ takes them: one array of gates, of ups, of downs. */
static ra_status_t prepare_moe(const ra_model_config_t *config, const ra_layer_weights_t *from,
                               const ra_gemm_kernel_t *kernel, int expert_ranks,
                               ra_moe_weights_t ***moe_p)
{
    ra_moe_shape_t shape = ra_model_moe_shape(config);
    int64_t n = from->expert_count;
    ra_tensor_t *views = calloc((size_t)n * 3, sizeof(*views));
    ra_moe_weights_t **moe = calloc((size_t)expert_ranks, sizeof(*moe));
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
    for (int r = 0; r < expert_ranks && status == RA_OK; r++) {
        int32_t first, last;
        ra_moe_expert_range(shape.router.experts, expert_ranks, r, &first, &last);
        status = ra_moe_weights_create(kernel, &shape, &tensors, first, last, RA_F32, NULL, &moe[r]);
    }
    free(views);
    return status;
}

static ra_status_t prepare_layer(ra_prepared_weights_t *prepared, const ra_layer_weights_t *from,
                                 const ra_gemm_kernel_t *kernel, ra_prepared_layer_t *layer)
{
    RA_TRY(copy_vector(&from->input_norm, &layer->input_norm));
    RA_TRY(copy_vector(&from->post_attention_norm, &layer->post_attention_norm));
    RA_TRY(copy_vector(&from->q_norm, &layer->q_norm));
    RA_TRY(copy_vector(&from->k_norm, &layer->k_norm));
    RA_TRY(copy_vector(&from->g_norm, &layer->g_norm));
    RA_TRY(prepare_matrix(kernel, &from->qkv, &layer->qkv));
    RA_TRY(prepare_matrix(kernel, &from->dense, &layer->dense));
    RA_TRY(prepare_matrix(kernel, &from->g_proj, &layer->g_proj));
    if (from->expert_count > 0) {
        return prepare_moe(prepared->config, from, kernel, prepared->expert_ranks, &layer->moe);
    }
    RA_TRY(prepare_matrix(kernel, &from->mlp.gate, &layer->mlp.gate));
    RA_TRY(prepare_matrix(kernel, &from->mlp.up, &layer->mlp.up));
    return prepare_matrix(kernel, &from->mlp.down, &layer->mlp.down);
}

static ra_status_t prepare_head(ra_prepared_weights_t *prepared, const ra_tensor_t *head,
                                const ra_gemm_kernel_t *kernel)
{
    int64_t vocab = head->extent[0];
    prepared->head_blocks = ra_ceil_div(vocab, RA_HEAD_BLOCK);
    prepared->head = calloc((size_t)prepared->head_blocks, sizeof(*prepared->head));
    if (prepared->head == NULL) {
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate the LM head table");
    }
    for (int64_t b = 0; b < prepared->head_blocks; b++) {
        int64_t first = b * RA_HEAD_BLOCK;
        int64_t extent[2] = {ra_min_i64(RA_HEAD_BLOCK, vocab - first), head->extent[1]};
        char *data = (char *)head->data + first * extent[1] * ra_dtype_bytes(head->dtype);
        ra_tensor_t block = ra_tensor_view(data, head->dtype, 2, extent);
        RA_TRY(ra_gemm_weight_create(kernel, &block, RA_F32, NULL, &prepared->head[b]));
    }
    return RA_OK;
}

static ra_status_t prepare_all(ra_prepared_weights_t *prepared, ra_model_weights_t *weights,
                               const ra_gemm_kernel_t *kernel)
{
    for (int64_t l = 0; l < prepared->config->layers; l++) {
        const ra_layer_weights_t *from;
        RA_TRY(ra_model_weights_acquire(weights, l, &from));
        ra_status_t status = prepare_layer(prepared, from, kernel, &prepared->layer[l]);
        ra_model_weights_release(weights, l);
        RA_TRY(status);
    }
    prepared->embeddings = *ra_model_embeddings(weights);
    RA_TRY(copy_vector(ra_model_final_norm(weights), &prepared->final_norm));
    return prepare_head(prepared, ra_model_lm_head(weights), kernel);
}

ra_status_t ra_prepared_weights_create(const ra_model_config_t *config, ra_model_weights_t *weights,
                                       const ra_gemm_kernel_t *kernel, int expert_ranks,
                                       ra_prepared_weights_t **prepared_p)
{
    ra_prepared_weights_t *prepared = calloc(1, sizeof(*prepared));
    ra_prepared_layer_t *layer = calloc((size_t)config->layers, sizeof(*layer));
    if (prepared == NULL || layer == NULL) {
        free(prepared);
        free(layer);
        return ra_fail(RA_ERR_NOMEM, "model", "cannot allocate the table of %lld layers",
                       (long long)config->layers);
    }
    prepared->config = config;
    prepared->layer = layer;
    prepared->expert_ranks = expert_ranks;
    ra_status_t status = prepare_all(prepared, weights, kernel);
    if (status != RA_OK) {
        ra_prepared_weights_destroy(prepared);
        return status;
    }
    *prepared_p = prepared;
    return RA_OK;
}

static void destroy_layer(const ra_prepared_weights_t *prepared, ra_prepared_layer_t *layer)
{
    free(layer->input_norm);
    free(layer->post_attention_norm);
    free(layer->q_norm);
    free(layer->k_norm);
    free(layer->g_norm);
    ra_gemm_weight_destroy(layer->qkv);
    ra_gemm_weight_destroy(layer->dense);
    ra_gemm_weight_destroy(layer->g_proj);
    ra_gemm_weight_destroy(layer->mlp.gate);
    ra_gemm_weight_destroy(layer->mlp.up);
    ra_gemm_weight_destroy(layer->mlp.down);
    for (int r = 0; layer->moe != NULL && r < prepared->expert_ranks; r++) {
        ra_moe_weights_destroy(layer->moe[r]);
    }
    free(layer->moe);
}

void ra_prepared_weights_destroy(ra_prepared_weights_t *prepared)
{
    if (prepared == NULL) {
        return;
    }
    for (int64_t l = 0; l < prepared->config->layers; l++) {
        destroy_layer(prepared, &prepared->layer[l]);
    }
    for (int64_t b = 0; prepared->head != NULL && b < prepared->head_blocks; b++) {
        ra_gemm_weight_destroy(prepared->head[b]);
    }
    free(prepared->head);
    free(prepared->final_norm);
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
    return layer->moe[prepared->expert_ranks == 1 ? 0 : rank];
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
