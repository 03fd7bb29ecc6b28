#include "model/families.h"
#include "model/json_check.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

/* YaRN's correction of the softmax temperature: 0.1 scale ln(factor) + 1 (arXiv 2309.00071). */
static double yarn_magnitude(double factor, double scale)
{
    return factor <= 1.0 ? 1.0 : 0.1 * scale * log(factor) + 1.0;
}

static ra_status_t known_keys_only(const char *file, const cJSON *scaling)
{
    static const char *const known[] = {"type",
                                        "rope_type",
                                        "factor",
                                        "original_max_position_embeddings",
                                        "beta_fast",
                                        "beta_slow",
                                        "attention_factor",
                                        "mscale",
                                        "mscale_all_dim",
                                        "rope_theta",
                                        "partial_rotary_factor",
                                        "finetuned"};
    const cJSON *node;
    cJSON_ArrayForEach(node, scaling)
    {
        size_t i = 0;
        while (i < RA_ARRAY_LEN(known) && strcmp(known[i], node->string) != 0) {
            i++;
        }
        if (i == RA_ARRAY_LEN(known)) {
            return ra_fail(RA_ERR_INPUT, "config", "%s: key \"%s\" is not known for yarn", file,
                           node->string);
        }
    }
    return RA_OK;
}

static ra_status_t read_yarn(const char *file, const cJSON *scaling, int64_t max_positions,
                             ra_rope_config_t *rope)
{
    double mscale = 0, mscale_all = 0;
    RA_TRY(known_keys_only(file, scaling));
    RA_TRY(ra_json_double(file, scaling, "factor", 1.0, 1e6, &rope->factor));
    RA_TRY(ra_json_int_or(file, scaling, "original_max_position_embeddings", 1, (int64_t)1 << 40,
                          max_positions, &rope->original_max_positions));
    RA_TRY(ra_json_double_or(file, scaling, "beta_fast", 1e-3, 1e6, 32.0, &rope->beta_fast));
    RA_TRY(ra_json_double_or(file, scaling, "beta_slow", 1e-3, 1e6, 1.0, &rope->beta_slow));
    if (rope->beta_fast <= rope->beta_slow) {
        return ra_fail(RA_ERR_INPUT, "config", "%s: beta_fast %g must exceed beta_slow %g", file,
                       rope->beta_fast, rope->beta_slow);
    }
    RA_TRY(ra_json_double_or(file, scaling, "mscale", 0.0, 100.0, 0.0, &mscale));
    RA_TRY(ra_json_double_or(file, scaling, "mscale_all_dim", 0.0, 100.0, 0.0, &mscale_all));
    double magnitude = mscale > 0 && mscale_all > 0 ? yarn_magnitude(rope->factor, mscale) /
                                                          yarn_magnitude(rope->factor, mscale_all)
                                                    : yarn_magnitude(rope->factor, 1.0);
    RA_TRY(ra_json_double_or(file, scaling, "attention_factor", 1e-3, 1e3, magnitude,
                             &rope->attention_factor));
    rope->scaling = RA_ROPE_YARN;
    return RA_OK;
}

static ra_status_t read_scaling(const char *file, const char *key, const cJSON *scaling,
                                int64_t max_positions, ra_rope_config_t *rope)
{
    char place[5000];
    const char *type = NULL;
    snprintf(place, sizeof(place), "%s: %s", file, key);
    RA_TRY(ra_json_expect_object(file, key, scaling));
    RA_TRY(ra_json_string_or(place, scaling, "type", NULL, &type));
    RA_TRY(ra_json_string_or(place, scaling, "rope_type", type, &type));
    if (type == NULL) {
        return ra_fail(RA_ERR_INPUT, "config", "%s: key \"type\" is missing", place);
    }
    if (strcmp(type, "default") == 0) {
        return RA_OK;
    }
    if (strcmp(type, "yarn") != 0) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: type \"%s\" is not implemented; \"yarn\" and \"default\" are", place,
                       type);
    }
    return read_yarn(place, scaling, max_positions, rope);
}

static ra_status_t read_rotary_dim(const char *file, const cJSON *root, const cJSON *nested,
                                   int64_t head_dim, int64_t *rotary_dim)
{
    double part = 1.0;
    const cJSON *holder = ra_json_member(root, "partial_rotary_factor") != NULL ? root : nested;
    RA_TRY(ra_json_double_or(file, holder, "partial_rotary_factor", 0.0, 1.0, 1.0, &part));
    RA_TRY(ra_json_int_or(file, root, "rotary_dim", 0, head_dim, (int64_t)((double)head_dim * part),
                          rotary_dim));
    if (*rotary_dim < 2 || *rotary_dim % 2 != 0) {
        return ra_fail(RA_ERR_INPUT, "config",
                       "%s: %lld of the %lld channels of a head are rotated; an even number of at "
                       "least 2 is allowed (rotary_dim, partial_rotary_factor)",
                       file, (long long)*rotary_dim, (long long)head_dim);
    }
    return RA_OK;
}

ra_status_t ra_config_read_rope(const char *file, const cJSON *root, int64_t head_dim,
                                double default_theta, int64_t max_positions, ra_rope_config_t *rope)
{
    const char *key =
        ra_json_member(root, "rope_scaling") != NULL ? "rope_scaling" : "rope_parameters";
    const cJSON *nested = ra_json_member(root, key);
    const cJSON *holder = ra_json_member(root, "rope_theta") != NULL ? root : nested;

    *rope = (ra_rope_config_t){.factor = 1.0, .attention_factor = 1.0};
    RA_TRY(
        ra_json_double_or(file, holder, "rope_theta", 1.0001, 1e15, default_theta, &rope->theta));
    RA_TRY(read_rotary_dim(file, root, nested, head_dim, &rope->rotary_dim));
    if (nested != NULL) {
        RA_TRY(read_scaling(file, key, nested, max_positions, rope));
    }
    return RA_OK;
}

/* Index of the pair that makes `rotations` turns over the original positions. */
static double yarn_pair(const ra_rope_config_t *rope, double rotations)
{
    double turns = (double)rope->original_max_positions / (2.0 * M_PI * rotations);
    return (double)rope->rotary_dim * log(turns) / (2.0 * log(rope->theta));
}

void ra_rope_inv_freq(const ra_rope_config_t *rope, double *inv_freq)
{
    double low = 0.0, high = 0.0;
    if (rope->scaling == RA_ROPE_YARN) {
        low = fmax(floor(yarn_pair(rope, rope->beta_fast)), 0.0);
        high = fmin(ceil(yarn_pair(rope, rope->beta_slow)), (double)(rope->rotary_dim - 1));
        high = high == low ? low + 0.001 : high; /* as the reference: no division by zero */
    }
    for (int64_t i = 0; i < rope->rotary_dim / 2; i++) {
        double plain = pow(rope->theta, -2.0 * (double)i / (double)rope->rotary_dim);
        double ramp = 0.0;
        if (rope->scaling == RA_ROPE_YARN) {
            ramp = fmin(fmax(((double)i - low) / (high - low), 0.0), 1.0);
        }
        inv_freq[i] = plain / rope->factor * ramp + plain * (1.0 - ramp);
    }
}
