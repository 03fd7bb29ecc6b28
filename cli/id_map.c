#include "cli/id_map.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

typedef struct ra_id_slot {
    ra_digest_t key; /* all zero: free */
    ra_digest_t value;
} slot_t;

ra_digest_t ra_digest_of(const void *data, int64_t bytes)
{
    XXH128_hash_t hash = XXH3_128bits(data, (size_t)bytes);
    return (ra_digest_t){.low = hash.low64, .high = hash.high64};
}

void ra_digest_hex(ra_digest_t digest, char out[RA_DIGEST_HEX])
{
    snprintf(out, RA_DIGEST_HEX, "%016llx%016llx", (unsigned long long)digest.high,
             (unsigned long long)digest.low);
}

bool ra_digest_parse(const char *hex, ra_digest_t *digest)
{
    if (strlen(hex) != RA_DIGEST_HEX - 1) {
        return false;
    }
    uint64_t part[2] = {0, 0};
    for (int i = 0; i < RA_DIGEST_HEX - 1; i++) {
        if (!isxdigit((unsigned char)hex[i])) {
            return false;
        }
        char digit[2] = {hex[i], '\0'};
        part[i / 16] = part[i / 16] << 4 | strtoull(digit, NULL, 16);
    }
    digest->high = part[0];
    digest->low = part[1];
    return true;
}

static ra_digest_t key_of(const char *id)
{
    ra_digest_t key = ra_digest_of(id, (int64_t)strlen(id));
    key.low += key.low == 0 && key.high == 0; /* zero marks a free slot */
    return key;
}

/* Slot of @a key, or the free slot where it belongs. The table is never full. */
static slot_t *find_slot(slot_t *slot, int64_t capacity, ra_digest_t key)
{
    int64_t at = (int64_t)(key.low & (uint64_t)(capacity - 1));
    while ((slot[at].key.low | slot[at].key.high) != 0 &&
           (slot[at].key.low != key.low || slot[at].key.high != key.high)) {
        at = (at + 1) & (capacity - 1);
    }
    return &slot[at];
}

static ra_status_t grow(ra_id_map_t *map)
{
    int64_t capacity = map->capacity == 0 ? 64 : map->capacity * 2;
    slot_t *slot = calloc((size_t)capacity, sizeof(*slot));
    if (slot == NULL) {
        return ra_fail(RA_ERR_NOMEM, "input", "cannot remember more than %lld ids",
                       (long long)map->count);
    }
    for (int64_t i = 0; i < map->capacity; i++) {
        if ((map->slot[i].key.low | map->slot[i].key.high) != 0) {
            *find_slot(slot, capacity, map->slot[i].key) = map->slot[i];
        }
    }
    free(map->slot);
    map->slot = slot;
    map->capacity = capacity;
    return RA_OK;
}

ra_status_t ra_id_map_add(ra_id_map_t *map, const char *id, ra_digest_t value, bool *fresh_p)
{
    if ((map->count + 1) * 2 > map->capacity) {
        RA_TRY(grow(map));
    }
    ra_digest_t key = key_of(id);
    slot_t *slot = find_slot(map->slot, map->capacity, key);
    *fresh_p = (slot->key.low | slot->key.high) == 0;
    if (*fresh_p) {
        slot->key = key;
        slot->value = value;
        map->count++;
    }
    return RA_OK;
}

bool ra_id_map_find(const ra_id_map_t *map, const char *id, ra_digest_t *value_p)
{
    if (map->capacity == 0) {
        return false;
    }
    const slot_t *slot = find_slot(map->slot, map->capacity, key_of(id));
    if ((slot->key.low | slot->key.high) == 0) {
        return false;
    }
    if (value_p != NULL) {
        *value_p = slot->value;
    }
    return true;
}

void ra_id_map_free(ra_id_map_t *map)
{
    free(map->slot);
    *map = (ra_id_map_t){0};
}
