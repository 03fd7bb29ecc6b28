#include "model/model_config.h"
#include "tests/model/file_support.h"

static const char base[] =
    "{\"model_type\":\"bailing_moe_linear\",\"hidden_size\":2048,\"num_hidden_layers\":20,"
    "\"num_attention_heads\":16,\"num_key_value_heads\":4,\"head_dim\":128,"
    "\"layer_group_size\":5,\"first_k_dense_replace\":1,\"intermediate_size\":5120,"
    "\"moe_intermediate_size\":512,\"num_experts\":256,\"num_experts_per_tok\":8,"
    "\"num_shared_experts\":1,\"n_group\":8,\"topk_group\":4,\"norm_topk_prob\":true,"
    "\"routed_scaling_factor\":2.5,\"moe_router_enable_expert_bias\":true,\"use_qk_norm\":true,"
    "\"group_norm_size\":4,\"partial_rotary_factor\":0.5,\"rope_theta\":1000000.0,"
    "\"max_position_embeddings\":131072,\"rms_norm_eps\":1e-06,\"vocab_size\":157184}";

/* The configuration above with the value of one key replaced (NULL: left out), or a key added. */
static ra_status_t parse_with(const char *key, const char *value, ra_decay_factor_t factor,
                              ra_model_config_t **config_p)
{
    char text[4096], quoted[128];
    snprintf(quoted, sizeof(quoted), "\"%s\":", key);
    const char *at = strstr(base, quoted);
    if (at == NULL) {
        snprintf(text, sizeof(text), "{\"%s\":%s,%s", key, value, base + 1);
    } else {
        const char *end = at + strcspn(at, ",}");
        if (value != NULL) {
            snprintf(text, sizeof(text), "%.*s%s%s%s", (int)(at - base), base, quoted, value, end);
        } else {
            snprintf(text, sizeof(text), "%.*s\"unused\":0%s", (int)(at - base), base, end);
        }
    }
    return ra_model_config_parse("config.json", text, (int64_t)strlen(text), factor, config_p);
}

static ra_model_config_t *must_parse(const char *key, const char *value, ra_decay_factor_t factor)
{
    ra_model_config_t *config = NULL;
    accepted(parse_with(key, value, factor, &config));
    return config;
}

static void a_broken_config_is_refused_with_file_key_value_and_what_is_allowed(void **state)
{
    static const struct {
        const char *key, *value, *says;
    } cases[] = {
        {"model_type", "\"llama9\"", "\"llama9\"; known families: bailing_moe_linear"},
        {"model_type", "7", "must be a string"},
        {"model_type", NULL, "missing"},
        {"hidden_size", NULL, "missing"},
        {"hidden_size", "0", "is 0; an integer from 1"},
        {"hidden_size", "1e12", "1000000000000"},
        {"hidden_size", "2048.5", "2048.5"},
        {"hidden_size", "\"2048\"", "not a string"},
        {"num_hidden_layers", "1000000", "from 1 to 1024"},
        {"num_attention_heads", "-16", "is -16"},
        {"num_key_value_heads", "5", "not a multiple"},
        {"num_key_value_heads", "32", "from 1 to 16"},
        {"head_dim", "1", "is 1"},
        {"group_norm_size", "3", "head_dim 2048 is not a multiple"},
        {"partial_rotary_factor", "0", "0 of the 128 channels"},
        {"partial_rotary_factor", "1.5", "from 0 to 1"},
        {"rotary_dim", "63", "63 of the 128 channels"},
        {"rope_theta", "1", "\"rope_theta\""},
        {"rope_theta", "1e999", "\"rope_theta\""},
        {"rms_norm_eps", "-1", "\"rms_norm_eps\""},
        {"num_experts", "255", "n_group"},
        {"num_experts_per_tok", "257", "from 1 to 256"},
        {"num_experts_per_tok", "129", "exceeds the 128 experts"},
        {"n_group", "256", "groups of one expert"},
        {"topk_group", "9", "from 1 to 8"},
        {"routed_scaling_factor", "0", "\"routed_scaling_factor\""},
        {"norm_topk_prob", "1", "true or false"},
        {"use_qk_norm", NULL, "missing"},
        {"score_function", "\"softmax\"", "\"sigmoid\" is allowed"},
        {"hidden_act", "\"gelu\"", "\"silu\" is allowed"},
        {"linear_silu", "true", "SiLU on the queries, keys and values is not implemented"},
        {"use_linear_silu", "true", "not implemented"},
        {"linear_rope", "false", "not implemented"},
        {"use_bias", "true", "not implemented"},
        {"use_qkv_bias", "true", "not implemented"},
        {"quantization_config", "{\"quant_method\":\"fp8\"}", "method fp8"},
        {"quantization", "{}", "not implemented"},
        {"layer_group_size", "0", "\"layer_group_size\""},
        {"sliding_window", "-1", "\"sliding_window\""},
        {"bos_token_id", "157184", "from 0 to 157183"},
        {"rope_scaling", "{\"factor\":4}", "\"type\" is missing"},
        {"rope_scaling", "{\"type\":\"linear\",\"factor\":4}", "\"linear\" is not implemented"},
        {"rope_scaling", "{\"type\":\"yarn\"}", "\"factor\" is missing"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":0.5}", "rope_scaling: key \"factor\""},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"truncate\":false}", "\"truncate\""},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"beta_fast\":1}", "must exceed"},
        {"rope_scaling", "[1]", "must be an object"},
        {"Hidden_size\":1,\"vocab_size", "1", "twice"},
    };
    (void)state;
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        ra_model_config_t *config = NULL;
        REFUSED(parse_with(cases[i].key, cases[i].value, RA_DECAY_A, &config), RA_ERR_INPUT,
                "config.json", cases[i].says);
        assert_null(config);
    }
    ra_log_set_quiet(0);
}

static void the_mini_model_has_the_layers_of_its_description(void **state)
{
    ra_model_config_t *config = must_parse("pad_token_id", "156892", RA_DECAY_A);
    (void)state;
    assert_string_equal(ra_model_type(config), "bailing_moe_linear");
    for (int64_t l = 0; l < 20; l++) {
        bool softmax = l == 4 || l == 9 || l == 14 || l == 19;
        assert_int_equal(config->layer[l].mixer, softmax ? RA_MIXER_SOFTMAX : RA_MIXER_LINEAR);
        assert_int_equal(config->layer[l].kv_heads, softmax ? 4 : 16);
        assert_int_equal(config->layer[l].feed_forward, l == 0 ? RA_FFN_DENSE : RA_FFN_MOE);
        assert_int_equal(config->layer[l].window, 0);
    }
    assert_int_equal(config->rope.rotary_dim, 64);
    assert_int_equal(config->shared_intermediate_size, 512);
    assert_int_equal(config->bos_token_id, -1);
    assert_true(ra_model_log_decay(config, 4)[0] == 0.0f);
    ra_model_config_destroy(config);
}

static void layers_behind_the_last_whole_group_are_softmax(void **state)
{
    ra_model_config_t *config = must_parse("layer_group_size", "8", RA_DECAY_A);
    (void)state;
    for (int64_t l = 0; l < 20; l++) {
        bool softmax = l == 7 || l >= 15;
        assert_int_equal(config->layer[l].mixer, softmax ? RA_MIXER_SOFTMAX : RA_MIXER_LINEAR);
    }
    ra_model_config_destroy(config);
}

static void a_sliding_window_applies_to_the_softmax_layers(void **state)
{
    ra_model_config_t *config = must_parse("sliding_window", "4096", RA_DECAY_A);
    (void)state;
    assert_int_equal(config->layer[4].window, 4096);
    assert_int_equal(config->layer[3].window, 0);
    ra_model_config_destroy(config);
    config = must_parse("use_sliding_window\":false,\"sliding_window", "4096", RA_DECAY_A);
    assert_int_equal(config->layer[4].window, 0);
    ra_model_config_destroy(config);
}

/* Published decays exp(-slope), eight digits; the tolerance is one unit of the last digit plus fp32
 * rounding of the slope. */
static void decays_are_the_published_ones_for_both_layer_factors(void **state)
{
    static const struct {
        int64_t heads, layers, l;
        double decay[2][4]; /* A, B at heads 0, 1, H/2-1, H-1 */
    } cases[] = {
        {16,
         20,
         0,
         {{.49306520, .60652762, .93941247, .99610133},
          {.47505246, .59077454, .93632738, .99589656}}},
        {16,
         20,
         3,
         {{.55130592, .65635227, .94872889, .99671589},
          {.53116554, .63930513, .94561320, .99651100}}},
        {16,
         20,
         18,
         {{.96346105, .97402258, .99671531, .99979439},
          {.92826376, .94872474, .99344203, .99958886}}},
        {32,
         32,
         0,
         {{.43132007, .49306520, .93941247, .99610133},
          {.41977749, .48194575, .93752041, .99597582}}},
        {32,
         32,
         30,
         {{.97323072, .97744137, .99798528, .99987396},
          {.94718601, .95539839, .99597524, .99974798}}},
    };
    (void)state;
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        int64_t heads = cases[i].heads;
        int64_t at[4] = {0, 1, heads / 2 - 1, heads - 1};
        for (int factor = 0; factor < 2; factor++) {
            float slopes[32];
            test_poison(slopes, 32);
            ra_decay_slopes(heads, cases[i].l, cases[i].layers, (ra_decay_factor_t)factor, slopes);
            for (int k = 0; k < 4; k++) {
                float decay = (float)exp(-(double)slopes[at[k]]);
                test_near(&decay, &cases[i].decay[factor][k], 1, 7e-8, 0, "decay");
            }
        }
    }
}

static void the_config_holds_the_log_decays_of_its_factor(void **state)
{
    float slopes[16];
    (void)state;
    for (int factor = 0; factor < 2; factor++) {
        ra_model_config_t *config = must_parse("bos_token_id", "5", (ra_decay_factor_t)factor);
        ra_decay_slopes(16, 18, 20, (ra_decay_factor_t)factor, slopes);
        for (int h = 0; h < 16; h++) {
            assert_true(ra_model_log_decay(config, 18)[h] == -slopes[h]);
        }
        ra_model_config_destroy(config);
    }
}

/* 12 heads: the 8-head schedule 2^-(h+1), then entries 0, 2, 4, 6 of the 16-head one. */
static void heads_that_are_no_power_of_two_mix_two_schedules(void **state)
{
    float slopes[12];
    double want[12];
    (void)state;
    for (int h = 0; h < 8; h++) {
        want[h] = exp2(-(h + 1.0));
    }
    for (int i = 0; i < 4; i++) {
        want[8 + i] = exp2(-(2.0 * i + 1.0) / 2.0);
    }
    for (int h = 0; h < 12; h++) {
        want[h] *= 1.0 + 1e-5;
    }
    ra_decay_slopes(12, 0, 20, RA_DECAY_A, slopes);
    test_near(slopes, want, 12, 0, 2e-7, "slope");
}

static void one_layer_alone_divides_by_nothing(void **state)
{
    float slopes[2];
    double want[2] = {0x1p-4 * (1 + 1e-5), 0x1p-8 * (1 + 1e-5)};
    (void)state;
    ra_decay_slopes(2, 0, 1, RA_DECAY_B, slopes);
    test_near(slopes, want, 2, 0, 2e-7, "slope");
}

static void plain_rope_has_the_published_frequencies(void **state)
{
    ra_model_config_t *config = must_parse("rope_scaling", "null", RA_DECAY_A);
    double f[32];
    (void)state;
    ra_rope_inv_freq(&config->rope, f);
    assert_true(f[0] == 1.0);
    assert_true(fabs(f[1] - 0.64938163) < 1e-8);
    assert_true(fabs(f[2] - 0.42169650) < 1e-8);
    assert_true(fabs(f[16] - 0.001) < 1e-15);
    assert_true(fabs(f[31] - 1.54e-6) < 1e-8);
    assert_true(config->rope.attention_factor == 1.0);
    ra_model_config_destroy(config);
}

/* theta 1e6, 131072 positions, factor 4: c(32) = 15.009, c(1) = 23.036, so pairs up to 15 stay,
 * from 24 on they are divided by 4, in between linear; cos and sin gain 0.1 ln 4 + 1 = 1.138629. */
static void yarn_interpolates_between_pairs_15_and_24(void **state)
{
    ra_model_config_t *plain = must_parse("rope_scaling", "null", RA_DECAY_A);
    ra_model_config_t *yarn =
        must_parse("rope_scaling",
                   "{\"type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":131072}",
                   RA_DECAY_A);
    double f[32], g[32];
    (void)state;
    ra_rope_inv_freq(&plain->rope, f);
    ra_rope_inv_freq(&yarn->rope, g);
    for (int i = 0; i < 32; i++) {
        double ramp = i <= 15 ? 0.0 : i >= 24 ? 1.0 : (i - 15) / 9.0;
        assert_true(fabs(g[i] / f[i] - (1.0 - 0.75 * ramp)) < 1e-12);
    }
    assert_int_equal(yarn->rope.scaling, RA_ROPE_YARN);
    assert_true(fabs(yarn->rope.attention_factor - 1.138629) < 5e-7);
    ra_model_config_destroy(plain);
    ra_model_config_destroy(yarn);
}

static void yarn_takes_the_attention_factor_where_given(void **state)
{
    ra_model_config_t *config =
        must_parse("rope_scaling",
                   "{\"rope_type\":\"yarn\",\"factor\":4,\"attention_factor\":0.75}", RA_DECAY_A);
    (void)state;
    assert_true(config->rope.attention_factor == 0.75);
    assert_int_equal(config->rope.original_max_positions, 131072);
    ra_model_config_destroy(config);
    config = must_parse("rope_scaling",
                        "{\"type\":\"yarn\",\"factor\":4,\"mscale\":1,\"mscale_all_dim\":1}",
                        RA_DECAY_A);
    assert_true(config->rope.attention_factor == 1.0);
    ra_model_config_destroy(config);
}

static void the_bos_is_looked_up_in_config_then_in_tokenizer_config(void **state)
{
    static const struct {
        const char *text, *token;
    } cases[] = {{"{\"bos_token\":\"<s>\"}", "<s>"},
                 {"{\"bos_token\":{\"content\":\"<b>\",\"lstrip\":false}}", "<b>"},
                 {"{\"bos_token\":null}", ""},
                 {"{}", ""}};
    temp_t temp = temp_make();
    ra_model_config_t *config = must_parse("bos_token_id", "7", RA_DECAY_A);
    ra_bos_t bos;
    (void)state;
    accepted(ra_model_bos(config, temp.path, &bos));
    assert_int_equal(bos.id, 7);
    ra_model_config_destroy(config);

    config = must_parse("bos_token_id", "null", RA_DECAY_A);
    accepted(ra_model_bos(config, temp.path, &bos)); /* no tokenizer_config.json */
    assert_int_equal(bos.id, -1);
    assert_string_equal(bos.token, "");
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        temp_write_text(&temp, "tokenizer_config.json", cases[i].text);
        accepted(ra_model_bos(config, temp.path, &bos));
        assert_int_equal(bos.id, -1);
        assert_string_equal(bos.token, cases[i].token);
    }
    temp_write_text(&temp, "tokenizer_config.json", "{\"bos_token\":3}");
    REFUSED(ra_model_bos(config, temp.path, &bos), RA_ERR_INPUT, "tokenizer_config.json",
            "bos_token");
    ra_model_config_destroy(config);
    temp_remove(&temp);
}

static void a_directory_without_a_config_is_a_usage_error(void **state)
{
    temp_t temp = temp_make();
    ra_model_config_t *config = NULL;
    (void)state;
    REFUSED(ra_model_config_load(temp.path, RA_DECAY_A, &config), RA_ERR_USAGE, "config.json",
            "No such file");
    temp_remove(&temp);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_broken_config_is_refused_with_file_key_value_and_what_is_allowed),
        cmocka_unit_test(the_mini_model_has_the_layers_of_its_description),
        cmocka_unit_test(layers_behind_the_last_whole_group_are_softmax),
        cmocka_unit_test(a_sliding_window_applies_to_the_softmax_layers),
        cmocka_unit_test(decays_are_the_published_ones_for_both_layer_factors),
        cmocka_unit_test(the_config_holds_the_log_decays_of_its_factor),
        cmocka_unit_test(heads_that_are_no_power_of_two_mix_two_schedules),
        cmocka_unit_test(one_layer_alone_divides_by_nothing),
        cmocka_unit_test(plain_rope_has_the_published_frequencies),
        cmocka_unit_test(yarn_interpolates_between_pairs_15_and_24),
        cmocka_unit_test(yarn_takes_the_attention_factor_where_given),
        cmocka_unit_test(the_bos_is_looked_up_in_config_then_in_tokenizer_config),
        cmocka_unit_test(a_directory_without_a_config_is_a_usage_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
