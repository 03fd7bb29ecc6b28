/** @file tests/model/routing_support.h  @brief Reference expert choices, counting flips. */
#ifndef RA_TESTS_MODEL_ROUTING_SUPPORT_H
#define RA_TESTS_MODEL_ROUTING_SUPPORT_H

#include "tests/model/golden_support.h"

/** tests/goldens/.../routing.safetensors beside a golden; views into the open file. */
typedef struct routing {
    ra_safetensors_t *file;
    const int32_t *expert;        /**< [count, layers, k] */
    const float *gap;             /**< [count, layers] */
    const float *shifted_logprob; /**< [count - 1] */
    int64_t count, layers, k;
} routing_t;

static inline const void *routing_tensor(const routing_t *routing, const char *name,
                                         ra_dtype_t dtype)
{
    const ra_safetensors_entry_t *entry = ra_safetensors_find(routing->file, name);
    assert_non_null(entry);
    assert_int_equal(entry->view.dtype, dtype);
    return entry->view.data;
}

static inline routing_t routing_open(const char *model_dir)
{
    routing_t routing = {0};
    char path[256];
    snprintf(path, sizeof(path), "%s/routing.safetensors", model_dir);
    assert_int_equal(ra_safetensors_open(path, &routing.file), RA_OK);
    routing.expert = routing_tensor(&routing, "expert", RA_I32);
    routing.gap = routing_tensor(&routing, "gap", RA_F32);
    routing.shifted_logprob = routing_tensor(&routing, "shifted_logprob", RA_F32);
    const int64_t *extent = ra_safetensors_find(routing.file, "expert")->view.extent;
    routing.count = extent[0];
    routing.layers = extent[1];
    routing.k = extent[2];
    return routing;
}

/** Choices of another set than the reference's, and the largest reference gap among them. */
typedef struct flips {
    int64_t count;
    double widest;
} flips_t;

static inline flips_t routing_flips(const routing_t *routing, const int32_t *chosen)
{
    flips_t flips = {0};
    for (int64_t i = 0; i < routing->count * routing->layers; i++) {
        size_t bytes = (size_t)routing->k * sizeof(int32_t);
        if (memcmp(chosen + i * routing->k, routing->expert + i * routing->k, bytes) != 0) {
            flips.count++;
            flips.widest = fmax(flips.widest, (double)routing->gap[i]);
        }
    }
    return flips;
}

/** Poisoned, of the routing's shape; the caller frees. */
static inline int32_t *routing_array(const routing_t *routing)
{
    size_t bytes = (size_t)(routing->count * routing->layers * routing->k) * sizeof(int32_t);
    int32_t *array = malloc(bytes);
    assert_non_null(array);
    memset(array, 0x7f, bytes);
    return array;
}

/** Score the golden document; the log-probabilities are the caller's to free. */
static inline float *routing_score(ra_session_t *session, const golden_t *golden,
                                   const int32_t *forced, int32_t *chosen)
{
    float *logprob = malloc((size_t)golden->count * sizeof(*logprob));
    assert_non_null(logprob);
    test_poison(logprob, golden->count);
    ra_sequence_t document = {.tokens = golden->ids,
                              .count = golden->count,
                              .logprob = logprob,
                              .forced_experts = forced,
                              .chosen_experts = chosen};
    assert_int_equal(ra_session_score(session, &document, 1), RA_OK);
    assert_int_equal(document.status, RA_OK);
    return logprob;
}

#endif
