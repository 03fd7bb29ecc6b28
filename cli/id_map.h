/**
 * @file  cli/id_map.h
 * @brief Which document ids have been seen: 128-bit digests of ids, each with one digest as value.
 *
 * Ids are kept by their XXH3-128 digest, 32 bytes an id with its value, so that a corpus of many
 * millions of rows fits. Two ids of 10^9 collide with probability below 10^-20.
 */
#ifndef RA_CLI_ID_MAP_H
#define RA_CLI_ID_MAP_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum { RA_DIGEST_HEX = 33 }; /**< 32 hex digits and the end */

typedef struct ra_digest {
    uint64_t low, high;
} ra_digest_t;

/** XXH3-128 of @a bytes bytes. */
ra_digest_t ra_digest_of(const void *data, int64_t bytes);
/** 32 lower-case hex digits, most significant first, as xxhsum prints them. */
void ra_digest_hex(ra_digest_t digest, char out[RA_DIGEST_HEX]);
/** The reverse. @return false when @a hex is not 32 hex digits. */
bool ra_digest_parse(const char *hex, ra_digest_t *digest);

typedef struct ra_id_map {
    struct ra_id_slot *slot;
    int64_t capacity; /**< power of two, or 0 */
    int64_t count;
} ra_id_map_t;

/** Add @a id unless present. *fresh_p tells which. @retval RA_ERR_NOMEM */
ra_status_t ra_id_map_add(ra_id_map_t *map, const char *id, ra_digest_t value, bool *fresh_p);
/** @return false when absent; value_p may be NULL. */
bool ra_id_map_find(const ra_id_map_t *map, const char *id, ra_digest_t *value_p);
void ra_id_map_free(ra_id_map_t *map);

#endif
