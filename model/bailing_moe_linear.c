/*
 * Ring-linear 2.0: in every group of layers the last attends with softmax (grouped queries), the
 * others with lightning attention; the first layers have a dense feed-forward, the others a mixture
 * of experts with a shared one. Source: arXiv 2510.19338 and the authors' serving code.
 */
#include "model/families.h"
#include "model/json_check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bounds that keep every product of two extents below 2^48. */
enum {
    LAYERS_MAX = 1024,
    HEADS_MAX = 1024,
    HEAD_DIM_MAX = 1024,
    HIDDEN_MAX = 1 << 20,
    WIDTH_MAX = 1 << 22,
    VOCAB_MAX = 1 << 24,
    EXPERTS_MAX = 1 << 16
};

static ra_status_t refuse_unimplemented(const char *file, const cJSON *root)
{
    static const struct {
        const char *key, *meaning;
    } flags[] = {{"use_bias", "a bias in the projections"},
                 {"use_qkv_bias", "a bias in query_key_value"},
                 {"attention_bias", "a bias in the attention projections"},
                 {"mlp_bias", "a bias in the feed-forward"}};
    for (size_t i = 0; i < RA_ARRAY_LEN(flags); i++) {
        RA_TRY(ra_config_refuse_true(file, root, flags[i].key, flags[i].meaning));
    }
    const char *silu = ra_json_member(root, "use_linear_silu") ? "use_linear_silu" : "linear_silu";
    RA_TRY(ra_config_refuse_true(file, root, silu, "SiLU on the queries, keys and values"));

    bool linear_rope = true;
    RA_TRY(ra_json_bool_or(file, root, "linear_rope", true, &linear_rope));
    if (!linear_rope) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: key \"linear_rope\" is false: not implemented; true is allowed", file);
    }
    const char *act = NULL;
    RA_TRY(ra_json_string_or(file, root, "hidden_act", "silu", &act));
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: key \"hidden_act\" is \"%s\"; \"silu\" is allowed", file, act);
    }
    return RA_OK;
}

static ra_status_t read_attention(const char *file, const cJSON *root, ra_model_config_t *config)
{
    RA_TRY(ra_json_int(file, root, "num_attention_heads", 1, HEADS_MAX, &config->heads));
    RA_TRY(ra_json_int_or(file, root, "num_key_value_heads", 1, config->heads, config->heads,
                          &config->kv_heads));
    RA_TRY(ra_config_divides(file, "num_attention_heads", config->heads, "num_key_value_heads",
                             config->kv_heads));
    if (ra_json_member(root, "head_dim") == NULL) {
        RA_TRY(ra_config_divides(file, "hidden_size", config->hidden_size, "num_attention_heads",
                                 config->heads));
    }
    RA_TRY(ra_json_int_or(file, root, "head_dim", 2, HEAD_DIM_MAX,
                          config->hidden_size / config->heads, &config->head_dim));
    RA_TRY(ra_json_bool(file, root, "use_qk_norm", &config->use_qk_norm));
    RA_TRY(ra_json_int_or(file, root, "group_norm_size", 1, config->heads * config->head_dim, 1,
                          &config->group_norm_groups));
    RA_TRY(ra_config_divides(file, "num_attention_heads x head_dim",
                             config->heads * config->head_dim, "group_norm_size",
                             config->group_norm_groups));
    return ra_config_read_rope(file, root, config->head_dim, 600000.0,
                               config->max_position_embeddings, &config->rope);
}

static ra_status_t check_expert_groups(const char *file, const ra_model_config_t *config)
{
    RA_TRY(
        ra_config_divides(file, "num_experts", config->experts, "n_group", config->expert_groups));
    int64_t size = config->experts / config->expert_groups;
    if (config->expert_groups > 1 && size < 2) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: n_group %lld leaves groups of one expert; groups are ranked by their "
                       "two best, so two are needed",
                       file, (long long)config->expert_groups);
    }
    if (config->experts_per_token > config->expert_groups_kept * size) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: num_experts_per_tok %lld exceeds the %lld experts of topk_group %lld "
                       "groups",
                       file, (long long)config->experts_per_token,
                       (long long)(config->expert_groups_kept * size),
                       (long long)config->expert_groups_kept);
    }
    return RA_OK;
}

static ra_status_t read_experts(const char *file, const cJSON *root, ra_model_config_t *config)
{
    int64_t shared_experts = 0, shared_width = 0;
    const char *score = NULL;
    RA_TRY(ra_json_int(file, root, "num_experts", 1, EXPERTS_MAX, &config->experts));
    RA_TRY(ra_json_int(file, root, "num_experts_per_tok", 1, config->experts,
                       &config->experts_per_token));
    RA_TRY(ra_json_int(file, root, "moe_intermediate_size", 1, WIDTH_MAX,
                       &config->moe_intermediate_size));
    RA_TRY(ra_json_int_or(file, root, "n_group", 1, config->experts, 1, &config->expert_groups));
    RA_TRY(ra_json_int_or(file, root, "topk_group", 1, config->expert_groups, config->expert_groups,
                          &config->expert_groups_kept));
    RA_TRY(check_expert_groups(file, config));
    RA_TRY(ra_json_int_or(file, root, "num_shared_experts", 0, 64, 0, &shared_experts));
    RA_TRY(ra_json_int_or(file, root, "moe_shared_expert_intermediate_size", 1, WIDTH_MAX,
                          config->moe_intermediate_size, &shared_width));
    config->shared_intermediate_size = shared_experts * shared_width;

    RA_TRY(ra_json_string_or(file, root, "score_function", "sigmoid", &score));
    if (strcmp(score, "sigmoid") != 0) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: key \"score_function\" is \"%s\"; \"sigmoid\" is allowed", file, score);
    }
    RA_TRY(ra_json_bool(file, root, "norm_topk_prob", &config->normalise_expert_weights));
    RA_TRY(ra_json_bool(file, root, "moe_router_enable_expert_bias", &config->expert_bias));
    return ra_json_double(file, root, "routed_scaling_factor", 1e-6, 1e6,
                          &config->routed_scaling_factor);
}

static ra_status_t read_config(const char *file, const cJSON *root, ra_model_config_t *config)
{
    RA_TRY(refuse_unimplemented(file, root));
    RA_TRY(ra_json_int(file, root, "num_hidden_layers", 1, LAYERS_MAX, &config->layers));
    RA_TRY(ra_json_int(file, root, "hidden_size", 1, HIDDEN_MAX, &config->hidden_size));
    RA_TRY(ra_json_int(file, root, "vocab_size", 1, VOCAB_MAX, &config->vocab_size));
    RA_TRY(ra_json_int(file, root, "max_position_embeddings", 1, (int64_t)1 << 40,
                       &config->max_position_embeddings));
    RA_TRY(ra_json_int(file, root, "intermediate_size", 1, WIDTH_MAX, &config->intermediate_size));
    RA_TRY(ra_json_double(file, root, "rms_norm_eps", 0.0, 1.0, &config->rms_norm_eps));
    RA_TRY(ra_json_bool_or(file, root, "tie_word_embeddings", false, &config->tie_word_embeddings));
    RA_TRY(read_attention(file, root, config));
    return read_experts(file, root, config);
}

static ra_status_t read_layers(const char *file, const cJSON *root, ra_model_config_t *config)
{
    int64_t group = 0, dense = 0, window = 0;
    bool use_window = true;
    RA_TRY(ra_json_int(file, root, "layer_group_size", 1, 1 << 20, &group));
    RA_TRY(ra_json_int(file, root, "first_k_dense_replace", 0, 1 << 20, &dense));
    RA_TRY(ra_json_int_or(file, root, "sliding_window", 0, (int64_t)1 << 40, 0, &window));
    RA_TRY(ra_json_bool_or(file, root, "use_sliding_window", true, &use_window));
    int64_t tail = config->layers / group * group;
    for (int64_t l = 0; l < config->layers; l++) {
        bool softmax = (l + 1) % group == 0 || l >= tail;
        config->layer[l] = (ra_layer_config_t){
            .mixer = softmax ? RA_MIXER_SOFTMAX : RA_MIXER_LINEAR,
            .feed_forward = l < dense ? RA_FFN_DENSE : RA_FFN_MOE,
            .window = softmax && use_window ? window : 0,
            .kv_heads = softmax ? config->kv_heads : config->heads,
        };
    }
    return RA_OK;
}

static void want_ffn(ra_weight_binder_t *binder, ra_ffn_weights_t *ffn, int64_t hidden,
                     int64_t width, long long l, const char *part)
{
    ra_weight_want(binder, &ffn->gate, width, hidden, "model.layers.%lld.mlp%s.gate_proj.weight", l,
                   part);
    ra_weight_want(binder, &ffn->up, width, hidden, "model.layers.%lld.mlp%s.up_proj.weight", l,
                   part);
    ra_weight_want(binder, &ffn->down, hidden, width, "model.layers.%lld.mlp%s.down_proj.weight", l,
                   part);
}

static void bind_feed_forward(ra_weight_binder_t *binder, const ra_model_config_t *config,
                              ra_layer_weights_t *w, int64_t l)
{
    int64_t hidden = config->hidden_size;
    long long at = (long long)l;
    if (config->layer[l].feed_forward == RA_FFN_DENSE) {
        want_ffn(binder, &w->mlp, hidden, config->intermediate_size, at, "");
        return;
    }
    ra_weight_want(binder, &w->router, config->experts, hidden, "model.layers.%lld.mlp.gate.weight",
                   at);
    if (config->expert_bias) {
        ra_weight_want(binder, &w->expert_bias, config->experts, 0,
                       "model.layers.%lld.mlp.gate.expert_bias", at);
    }
    for (int64_t e = 0; e < config->experts; e++) {
        char part[48];
        snprintf(part, sizeof(part), ".experts.%lld", (long long)e);
        want_ffn(binder, &w->experts[e], hidden, config->moe_intermediate_size, at, part);
    }
    if (config->shared_intermediate_size > 0) {
        want_ffn(binder, &w->shared, hidden, config->shared_intermediate_size, at,
                 ".shared_experts");
    }
}

static void bind_attention(ra_weight_binder_t *binder, const ra_model_config_t *config,
                           ra_layer_weights_t *w, int64_t l)
{
    int64_t hidden = config->hidden_size, head = config->head_dim;
    int64_t inner = config->heads * head;
    int64_t qkv_rows = (config->heads + 2 * config->layer[l].kv_heads) * head;
    long long at = (long long)l;
    ra_weight_want(binder, &w->qkv, qkv_rows, hidden,
                   "model.layers.%lld.attention.query_key_value.weight", at);
    if (config->use_qk_norm) {
        ra_weight_want(binder, &w->q_norm, head, 0,
                       "model.layers.%lld.attention.query_layernorm.weight", at);
        ra_weight_want(binder, &w->k_norm, head, 0,
                       "model.layers.%lld.attention.key_layernorm.weight", at);
    }
    ra_weight_want(binder, &w->dense, hidden, inner, "model.layers.%lld.attention.dense.weight",
                   at);
    if (config->layer[l].mixer == RA_MIXER_LINEAR) {
        ra_weight_want(binder, &w->g_proj, inner, hidden,
                       "model.layers.%lld.attention.g_proj.weight", at);
        ra_weight_want(binder, &w->g_norm, inner, 0, "model.layers.%lld.attention.g_norm.weight",
                       at);
    }
}

static void bind(ra_weight_binder_t *binder, const ra_model_config_t *config,
                 const ra_weight_views_t *views)
{
    int64_t hidden = config->hidden_size;
    ra_weight_want(binder, views->embeddings, config->vocab_size, hidden,
                   "model.word_embeddings.weight");
    ra_weight_want(binder, views->final_norm, hidden, 0, "model.norm.weight");
    if (!config->tie_word_embeddings) {
        ra_weight_want(binder, views->lm_head, config->vocab_size, hidden, "lm_head.weight");
    }
    for (int64_t l = 0; l < config->layers; l++) {
        ra_layer_weights_t *w = &views->layers[l];
        ra_weight_want(binder, &w->input_norm, hidden, 0,
                       "model.layers.%lld.input_layernorm.weight", (long long)l);
        ra_weight_want(binder, &w->post_attention_norm, hidden, 0,
                       "model.layers.%lld.post_attention_layernorm.weight", (long long)l);
        bind_attention(binder, config, w, l);
        bind_feed_forward(binder, config, w, l);
    }
}

static bool ignores(const ra_model_config_t *config, const char *tensor)
{
    static const char layer_prefix[] = "model.layers.";
    static const char *const parts[] = {"slope", "inv_freq", "v_head"};
    for (size_t i = 0; i < RA_ARRAY_LEN(parts); i++) {
        if (strstr(tensor, parts[i]) != NULL) {
            return true;
        }
    }
    if (strncmp(tensor, "model.mtp", 9) == 0) {
        return true;
    }
    /* multi-token prediction is exported as layers behind the last one */
    return strncmp(tensor, layer_prefix, sizeof(layer_prefix) - 1) == 0 &&
           strtoll(tensor + sizeof(layer_prefix) - 1, NULL, 10) >= config->layers;
}

const ra_family_t ra_family_bailing_moe_linear = {
    .model_type = "bailing_moe_linear",
    .read = read_config,
    .read_layers = read_layers,
    .bind = bind,
    .ignores = ignores,
};
