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

/* Memory of one layer's tensors; with keep one a layer, else one that every layer reuses. */
typedef struct block {
    struct block *next;
    void *memory;
    int64_t bytes;
} block_t;

struct ra_random_weights {
    uint64_t seed;
    bool keep;
    ra_pool_t *pool;
    wanted_t *wanted;
    int64_t count, capacity;
    block_t *kept;  /* of layers that stay */
    block_t reused; /* of the layer at hand */
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
    while (random->kept != NULL) {
        block_t *block = random->kept;
        random->kept = block->next;
        free(block->memory);
        free(block);
    }
    free(random->reused.memory);
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

/* Every tensor of a layer, cut into pieces that threads make one by one. */
typedef struct fill {
    const ra_random_weights_t *random;
    const wanted_t **tensor; /* [tensors] */
    int64_t *first;          /* [tensors + 1] number of each tensor's first piece */
    int64_t tensors;
} fill_t;

static void fill_values(const wanted_t *wanted, uint64_t start, int64_t begin, int64_t end)
{
    uint16_t *data = wanted->view->data;
    float scale = wanted->scale / 32768.0f;
    for (int64_t i = begin; i < end; i += 4) {
        uint64_t bits = mix(start + (uint64_t)(i / 4 + 1) * 0x9e3779b97f4a7c15u);
        for (int64_t j = i; j < i + 4 && j < end; j++, bits >>= 16) {
            data[j] = ra_bf16_from_f32(wanted->offset + scale * (float)(int16_t)(uint16_t)bits);
        }
    }
}

static void fill_piece(void *arg, int64_t index)
{
    const fill_t *fill = arg;
    int64_t low = 0, high = fill->tensors;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (fill->first[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const wanted_t *wanted = fill->tensor[low];
    int64_t begin = (index - fill->first[low]) * PIECE;
    int64_t end = ra_min_i64(begin + PIECE, ra_tensor_count(wanted->view));
    fill_values(wanted, mix(fill->random->seed ^ wanted->key), begin, end);
}

/* Places of a layer's tensors from `memory` on, or, without memory, only their bytes. */
static ra_status_t place(const ra_random_weights_t *random, int64_t layer, void *memory,
                         int64_t *bytes_p)
{
    int64_t at = 0;
    for (int64_t i = 0; i < random->count; i++) {
        const wanted_t *wanted = &random->wanted[i];
        int64_t extent[2] = {wanted->rows, wanted->columns}, bytes;
        if (wanted->layer != layer) {
            continue;
        }
        if (!ra_mul_ok(wanted->rows, ra_max_i64(wanted->columns, 1), &bytes) ||
            !ra_mul_ok(bytes, 2, &bytes) || !ra_add_ok(bytes, at + 63, &bytes)) {
            return ra_fail(RA_ERR_NOMEM, "weights", "layer %lld passes 2^63 bytes",
                           (long long)layer);
        }
        if (memory != NULL) {
            *wanted->view =
                ra_tensor_view((char *)memory + at, RA_BF16, wanted->columns > 0 ? 2 : 1, extent);
        }
        at = bytes / 64 * 64;
    }
    *bytes_p = at;
    return RA_OK;
}

/* Memory for a layer: its own when it stays, else the one that layers share in turn. */
static ra_status_t take_block(ra_random_weights_t *random, bool stays, int64_t bytes,
                              void **memory_p)
{
    if (!stays && random->reused.bytes >= bytes) {
        *memory_p = random->reused.memory;
        return RA_OK;
    }
    block_t *block = stays ? calloc(1, sizeof(*block)) : &random->reused;
    if (!stays) {
        free(block->memory);
        *block = (block_t){0};
    }
    void *memory = aligned_alloc(64, (size_t)bytes + 64);
    if (block == NULL || memory == NULL) {
        free(memory);
        if (stays) {
            free(block);
        }
        return ra_fail(RA_ERR_NOMEM, "weights", "cannot allocate %.1f MiB of random weights",
                       (double)bytes / 1048576.0);
    }
    *block = (block_t){.next = stays ? random->kept : NULL, .memory = memory, .bytes = bytes};
    if (stays) {
        random->kept = block;
    }
    *memory_p = memory;
    return RA_OK;
}

static ra_status_t fill_layer(const ra_random_weights_t *random, int64_t layer)
{
    size_t most = (size_t)random->count + 1;
    fill_t fill = {.random = random,
                   .tensor = calloc(most, sizeof(*fill.tensor)),
                   .first = calloc(most, sizeof(*fill.first))};
    ra_status_t status = RA_OK;
    if (fill.tensor == NULL || fill.first == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "weights", "cannot list %zu random tensors", most);
    }
    for (int64_t i = 0; i < random->count && status == RA_OK; i++) {
        const wanted_t *wanted = &random->wanted[i];
        if (wanted->layer == layer) {
            int64_t pieces = ra_ceil_div(ra_tensor_count(wanted->view), PIECE);
            fill.first[fill.tensors + 1] = fill.first[fill.tensors] + pieces;
            fill.tensor[fill.tensors++] = wanted;
        }
    }
    if (status == RA_OK) {
        ra_pool_for(random->pool, fill.first[fill.tensors], fill_piece, &fill);
    }
    free(fill.tensor);
    free(fill.first);
    return status;
}

static bool is_made(const ra_random_weights_t *random, int64_t layer)
{
    for (int64_t i = 0; i < random->count; i++) {
        if (random->wanted[i].layer == layer) {
            return random->wanted[i].view->data != NULL;
        }
    }
    return true; /* nothing to make */
}

ra_status_t ra_random_weights_acquire(ra_random_weights_t *random, int64_t layer)
{
    int64_t bytes;
    void *memory = NULL;
    if (is_made(random, layer)) {
        return RA_OK;
    }
    RA_TRY(place(random, layer, NULL, &bytes));
    RA_TRY(take_block(random, random->keep || layer < 0, bytes, &memory));
    RA_TRY(place(random, layer, memory, &bytes));
    return fill_layer(random, layer);
}

void ra_random_weights_release(ra_random_weights_t *random, int64_t layer)
{
    for (int64_t i = 0; i < random->count && !random->keep; i++) {
        if (random->wanted[i].layer == layer) {
            random->wanted[i].view->data = NULL;
        }
    }
}
