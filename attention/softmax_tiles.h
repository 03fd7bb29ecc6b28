/**
 * @file  attention/softmax_tiles.h
 * @brief Work list of a tiled softmax kernel: which key tiles each row tile folds, and which of
 *        them need their mask looked at.
 *
 * Rows of a group are cut into row tiles of tile_rows from the group's first row. For each row tile
 * every span becomes at most three segments of key tiles of tile_keys keys, walked from the highest
 * key down: those that cross the upper edge of some row's interval, those visible to every row, and
 * those that cross a lower edge. Key tiles that no row sees are left out. Row tiles are ordered by
 * falling number of key tiles, so that a kernel taking them in order finishes evenly.
 *
 * The list is one block of bytes that a caller copies to the device once and uses for every layer
 * and head with the same mask. It depends on neither heads nor head_dim.
 *
 * Bits    With merge = 0 key tiles are cut from each span's own first key and every span ends with
 * its row sums complete, so a row's bits depend on its spans alone (see softmax_block.h). With
 * merge = 1 touching spans become one and key tiles end at the last key the row tile sees: fewer
 * tiles, but a row's rounding then depends on the rows it shares a tile with.
 *
 * A tile may reach past its span's keys (merge = 0: above, merge = 1: below, also below key 0). A
 * kernel loads such keys and gives them weight 0, so what lies there must be finite.
 */
#ifndef RA_ATTENTION_SOFTMAX_TILES_H
#define RA_ATTENTION_SOFTMAX_TILES_H

#include "attention/softmax_block.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How a segment's keys are tested. */
enum {
    RA_TILE_FULL = 0,    /**< every key visible to every row */
    RA_TILE_SHIFT = 1,   /**< position of key j is j + pos_shift */
    RA_TILE_SEARCH = 2,  /**< positions are looked up */
    RA_TILE_MASK = 3,    /**< bits of the above */
    RA_TILE_SPAN_END = 4 /**< the segment's last tile ends a span */
};

/** @a steps = key tiles of all its segments; they begin at segments[segment_begin]. */
typedef struct ra_softmax_tile {
    int32_t row_begin, row_count, segment_begin, steps;
} ra_softmax_tile_t;

/** Tile t holds those of keys [key_begin - t * tile_keys, + tile_keys) in [key_first, key_end). */
typedef struct ra_softmax_segment {
    int32_t key_begin, key_end, tiles, flags;
    int32_t key_first, pos_shift, unused[2];
} ra_softmax_segment_t;

/** First 64 bytes of the list on the device: the kernel's own counters, zero between launches. */
typedef struct ra_softmax_tiles_head {
    uint32_t next, done, unused[14];
} ra_softmax_tiles_head_t;

/** Byte offsets inside the list. key_pos < 0 when no segment searches. */
typedef struct ra_softmax_tiles_layout {
    int64_t tiles, segments, row_interval, key_pos, bytes;
    int64_t tile_count, steps; /**< row tiles; key tiles of all of them, for one head */
    int32_t tile_rows, tile_keys;
} ra_softmax_tiles_layout_t;

typedef struct ra_softmax_tiles ra_softmax_tiles_t;

/**
 * Cut @a block's groups and spans into tiles. Reads only rows, keys, groups, spans, row_lo, row_hi
 * and key_pos of @a block, all of them host arrays here; q, k and v may be NULL.
 * Scores, thresholds and biases of the mask are the kernel's business, tile by tile.
 * @retval RA_ERR_UNSUPPORTED  A key in a span has a position outside [0, 2^31 - 1).
 * @retval RA_ERR_SHAPE        A group or span leaves the block.
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_softmax_tiles_create(const ra_softmax_block_t *block, int32_t tile_rows,
                                    int32_t tile_keys, int merge, ra_softmax_tiles_t **tiles_p);
/** Accepts NULL. */
void ra_softmax_tiles_destroy(ra_softmax_tiles_t *tiles);
const ra_softmax_tiles_layout_t *ra_softmax_tiles_layout(const ra_softmax_tiles_t *tiles);
/** The layout.bytes bytes to copy to the device (16-byte aligned there). Borrowed. */
const void *ra_softmax_tiles_data(const ra_softmax_tiles_t *tiles);

#ifdef __cplusplus
}
#endif

#endif
