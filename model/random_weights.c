#include "model/random_weights.h"

#include "base/checked.h"
#include "base/dtype.h"
#include "base/log.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* One tensor to make. */
typedef struct wanted {
    ra_tensor_t *view;
    int64_t layer, rows, columns;
    uint64_t key;
    float scale, offset; /* value = offset + scale * [-1, 1) */
} wanted_t;

struct ra_random_weights {
    uint64_t seed;
    bool keep;
    ra_pool_t *pool;
    wanted_t *wanted;
    int64_t count, capacity;
};

enum { PIECE = 1 << 20 }; /* values a thread makes at once; a multiple of 4 */

ra_status_t ra_random_weights_create(uint64_t seed, bool keep, ra_pool_t *pool,
                                     ra_random_weights_t **random_p)
{
    ra_random_weights_t *random = calloc(1, sizeof(*random));
    if (random == NULL) {
        return ra_fail(RA_ERR_NOMEM, "weights", "cannot allocate random weights");
    }
    random->seed = seed;
    random->keep = keep;
    random->pool = pool;
    *random_p = random;
    return RA_OK;
}

void ra_random_weights_destroy(ra_random_weights_t *random)
{
    if (random == NULL) {
        return;
    }
    for (int64_t i = 0; i < random->count; i++) {
        free(random->wanted[i].view->data);
    }
    free(random->wanted);
    free(random);
}

ra_status_t ra_random_weights_add(ra_random_weights_t *random, ra_tensor_t *view, int64_t rows,
                                  int64_t columns, const char *name)
{
    if (random->count == random->capacity) {
        int64_t capacity = 2 * random->capacity + 256;
        wanted_t *grown = realloc(random->wanted, (size_t)capacity * sizeof(*grown));
        if (grown == NULL) {
            return ra_fail(RA_ERR_NOMEM, "weights", "cannot list %lld random tensors",
                           (long long)capacity);
        }
        random->wanted = grown;
        random->capacity = capacity;
    }
    long long layer = -1;
    if (sscanf(name, "model.layers.%lld.", &layer) != 1) {
        layer = -1;
    }
    bool is_norm = columns == 0 && strstr(name, "norm") != NULL;
    float scale = columns > 0 ? (float)sqrt(3.0 / (double)columns) : 0.01f;
    random->wanted[random->count++] = (wanted_t){.view = view,
                                                 .layer = layer,
                                                 .rows = rows,
                                                 .columns = columns,
                                                 .key = XXH3_64bits(name, strlen(name)),
                                                 .scale = is_norm ? 0.0f : scale,
                                                 .offset = is_norm ? 1.0f : 0.0f};
    return RA_OK;
}

/* splitmix64's output function of a counter. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

typedef struct fill {
    uint16_t *data;
    int64_t count;
    uint64_t start;
    float scale, offset;
} fill_t;

static void fill_piece(void *arg, int64_t index)
{
    const fill_t *fill = arg;
    int64_t begin = index * PIECE, end = ra_min_i64(begin + PIECE, fill->count);
    float scale = fill->scale / 32768.0f;
    for (int64_t i = begin; i < end; i += 4) {
        uint64_t bits = mix(fill->start + (uint64_t)(i / 4 + 1) * 0x9e3779b97f4a7c15u);
        for (int64_t j = i; j < i + 4 && j < end; j++, bits >>= 16) {
            fill->data[j] = ra_bf16_from_f32(fill->offset + scale * (float)(int16_t)(uint16_t)bits);
        }
    }
}

static ra_status_t make(const ra_random_weights_t *random, const wanted_t *wanted)
{
    int64_t extent[2] = {wanted->rows, wanted->columns}, count = wanted->rows;
    if (wanted->columns > 0 && !ra_mul_ok(wanted->rows, wanted->columns, &count)) {
        return ra_fail(RA_ERR_NOMEM, "weights", "a tensor of %lld x %lld is too large",
                       (long long)wanted->rows, (long long)wanted->columns);
    }
    uint16_t *data = malloc((size_t)count * sizeof(*data) + 1);
    if (data == NULL) {
        return ra_fail(RA_ERR_NOMEM, "weights", "cannot allocate %lld random values",
                       (long long)count);
    }
    fill_t fill = {.data = data,
                   .count = count,
                   .start = mix(random->seed ^ wanted->key),
                   .scale = wanted->scale,
                   .offset = wanted->offset};
    ra_pool_for(random->pool, ra_ceil_div(count, PIECE), fill_piece, &fill);
    *wanted->view = ra_tensor_view(data, RA_BF16, wanted->columns > 0 ? 2 : 1, extent);
    return RA_OK;
}

ra_status_t ra_random_weights_acquire(ra_random_weights_t *random, int64_t layer)
{
    for (int64_t i = 0; i < random->count; i++) {
        const wanted_t *wanted = &random->wanted[i];
        if (wanted->layer == layer && wanted->view->data == NULL) {
            RA_TRY(make(random, wanted));
        }
    }
    return RA_OK;
}

void ra_random_weights_release(ra_random_weights_t *random, int64_t layer)
{
    for (int64_t i = 0; i < random->count && !random->keep; i++) {
        const wanted_t *wanted = &random->wanted[i];
        if (wanted->layer == layer) {
            free(wanted->view->data);
            wanted->view->data = NULL;
        }
    }
}
