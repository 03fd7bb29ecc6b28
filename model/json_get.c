#include "model/json_check.h"

#include <math.h>

const cJSON *ra_json_member(const cJSON *object, const char *key)
{
    const cJSON *node = cJSON_GetObjectItemCaseSensitive(object, key);
    return node == NULL || cJSON_IsNull(node) ? NULL : node;
}

static const char *type_name(const cJSON *node)
{
    if (cJSON_IsObject(node)) {
        return "an object";
    }
    if (cJSON_IsArray(node)) {
        return "an array";
    }
    if (cJSON_IsString(node)) {
        return "a string";
    }
    if (cJSON_IsNumber(node)) {
        return "a number";
    }
    return cJSON_IsBool(node) ? "a boolean" : "null";
}

static ra_status_t expect(const char *file, const char *key, const cJSON *node, bool right,
                          const char *what)
{
    if (node == NULL) {
        return ra_fail(RA_ERR_INPUT, "json", "%s: key \"%s\" is missing (%s is needed)", file, key,
                       what);
    }
    if (!right) {
        return ra_fail(RA_ERR_INPUT, "json", "%s: key \"%s\" must be %s, not %s", file, key, what,
                       type_name(node));
    }
    return RA_OK;
}

ra_status_t ra_json_expect_object(const char *file, const char *key, const cJSON *node)
{
    return expect(file, key, node, cJSON_IsObject(node), "an object");
}

ra_status_t ra_json_int(const char *file, const cJSON *object, const char *key, int64_t low,
                        int64_t high, int64_t *value)
{
    const cJSON *node = ra_json_member(object, key);
    RA_TRY(expect(file, key, node, cJSON_IsNumber(node), "an integer"));
    double number = node->valuedouble;
    if (!(fabs(number) < (double)RA_JSON_MAX_INT) || number != floor(number) ||
        (int64_t)number < low || (int64_t)number > high) {
        return ra_fail(RA_ERR_INPUT, "json",
                       "%s: key \"%s\" is %.17g; an integer from %lld to %lld is allowed", file,
                       key, number, (long long)low, (long long)high);
    }
    *value = (int64_t)number;
    return RA_OK;
}

ra_status_t ra_json_int_or(const char *file, const cJSON *object, const char *key, int64_t low,
                           int64_t high, int64_t fallback, int64_t *value)
{
    if (ra_json_member(object, key) == NULL) {
        *value = fallback;
        return RA_OK;
    }
    return ra_json_int(file, object, key, low, high, value);
}

ra_status_t ra_json_double(const char *file, const cJSON *object, const char *key, double low,
                           double high, double *value)
{
    const cJSON *node = ra_json_member(object, key);
    RA_TRY(expect(file, key, node, cJSON_IsNumber(node), "a number"));
    double number = node->valuedouble;
    if (!isfinite(number) || number < low || number > high) {
        return ra_fail(RA_ERR_INPUT, "json",
                       "%s: key \"%s\" is %.17g; a number from %g to %g is allowed", file, key,
                       number, low, high);
    }
    *value = number;
    return RA_OK;
}

ra_status_t ra_json_double_or(const char *file, const cJSON *object, const char *key, double low,
                              double high, double fallback, double *value)
{
    if (ra_json_member(object, key) == NULL) {
        *value = fallback;
        return RA_OK;
    }
    return ra_json_double(file, object, key, low, high, value);
}

ra_status_t ra_json_bool(const char *file, const cJSON *object, const char *key, bool *value)
{
    const cJSON *node = ra_json_member(object, key);
    RA_TRY(expect(file, key, node, cJSON_IsBool(node), "true or false"));
    *value = cJSON_IsTrue(node);
    return RA_OK;
}

ra_status_t ra_json_bool_or(const char *file, const cJSON *object, const char *key, bool fallback,
                            bool *value)
{
    if (ra_json_member(object, key) == NULL) {
        *value = fallback;
        return RA_OK;
    }
    return ra_json_bool(file, object, key, value);
}

ra_status_t ra_json_string(const char *file, const cJSON *object, const char *key,
                           const char **value)
{
    const cJSON *node = ra_json_member(object, key);
    RA_TRY(expect(file, key, node, cJSON_IsString(node), "a string"));
    *value = node->valuestring;
    return RA_OK;
}

ra_status_t ra_json_string_or(const char *file, const cJSON *object, const char *key,
                              const char *fallback, const char **value)
{
    if (ra_json_member(object, key) == NULL) {
        *value = fallback;
        return RA_OK;
    }
    return ra_json_string(file, object, key, value);
}
