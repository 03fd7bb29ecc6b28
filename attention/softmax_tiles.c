#include "attention/softmax_tiles.h"
#include "base/checked.h"
#include <stdlib.h>
#include <string.h>

static const char subsystem[] = "attention";

struct ra_softmax_tiles {
    ra_softmax_tiles_layout_t layout;
    ra_softmax_tile_t *tiles;
    ra_softmax_segment_t *segments;
    int64_t segment_count, segment_room;
    int32_t *run_end; /* [keys] last key of consecutive positions from key j on; of keys in spans */
    int searches;
    unsigned char *data;
};

/* What one row tile sees: the hull of its rows' intervals and their intersection. */
typedef struct {
    int64_t any_lo, any_hi, all_lo, all_hi;
} view_t;

static view_t view_of(const ra_attention_mask_t *mask, int64_t begin, int64_t count)
{
    view_t view = {INT64_MAX, INT64_MIN, INT64_MIN, INT64_MAX};
    for (int64_t r = begin; r < begin + count; r++) {
        int64_t lo = mask->row_lo[r], hi = mask->row_hi[r];
        if (lo < hi) {
            view.any_lo = lo < view.any_lo ? lo : view.any_lo;
            view.any_hi = hi > view.any_hi ? hi : view.any_hi;
        }
        view.all_lo = lo > view.all_lo ? lo : view.all_lo;
        view.all_hi = hi < view.all_hi ? hi : view.all_hi;
    }
    return view;
}

/* First key of [begin, end) at or past @a position. */
static int64_t lower_bound(const int64_t *key_pos, int64_t begin, int64_t end, int64_t position)
{
    while (begin < end) {
        int64_t middle = begin + (end - begin) / 2;
        if (key_pos[middle] < position) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

static ra_status_t push_segment(ra_softmax_tiles_t *tiles, const ra_softmax_segment_t *segment)
{
    if (tiles->segment_count == tiles->segment_room) {
        int64_t room = tiles->segment_room ? 2 * tiles->segment_room : 256;
        void *grown = realloc(tiles->segments, (size_t)room * sizeof(*segment));
        if (!grown) {
            return ra_fail(RA_ERR_NOMEM, subsystem, "tile list of %lld segments does not fit",
                           (long long)room);
        }
        tiles->segments = grown;
        tiles->segment_room = room;
    }
    tiles->segments[tiles->segment_count++] = *segment;
    return RA_OK;
}

/* Where the key tiles of one span lie: tile i begins at origin + i * tile_keys. */
typedef struct {
    int64_t origin, begin, end; /* [begin, end): the span's keys */
} grid_t;

/* Append tiles [first, last] of @a grid, highest first. */
static ra_status_t push_tiles(ra_softmax_tiles_t *tiles, const int64_t *key_pos, const grid_t *grid,
                              int64_t first, int64_t last, int full)
{
    if (first > last) {
        return RA_OK;
    }
    int64_t bn = tiles->layout.tile_keys;
    int64_t low = ra_max_i64(grid->origin + first * bn, grid->begin);
    int64_t high = ra_min_i64(grid->origin + (last + 1) * bn, grid->end);
    ra_softmax_segment_t segment = {.key_begin = (int32_t)(grid->origin + last * bn),
                                    .key_end = (int32_t)grid->end,
                                    .key_first = (int32_t)grid->begin,
                                    .tiles = (int32_t)(last - first + 1)};
    if (full) {
        segment.flags = RA_TILE_FULL;
    } else if (tiles->run_end[low] >= high - 1) {
        segment.flags = RA_TILE_SHIFT;
        segment.pos_shift = (int32_t)(key_pos[low] - low);
    } else {
        segment.flags = RA_TILE_SEARCH;
        tiles->searches = 1;
    }
    return push_segment(tiles, &segment);
}

static ra_status_t fold_span(ra_softmax_tiles_t *tiles, const int64_t *key_pos, const view_t *view,
                             int64_t begin, int64_t end, int merge)
{
    int64_t bn = tiles->layout.tile_keys, before = tiles->segment_count;
    int64_t any_begin = lower_bound(key_pos, begin, end, view->any_lo);
    int64_t any_end = lower_bound(key_pos, begin, end, view->any_hi);
    if (any_begin >= any_end) {
        return RA_OK;
    }
    grid_t grid = {begin, begin, end};
    if (merge) {
        grid.origin = any_end - (any_end - any_begin + bn - 1) / bn * bn;
    }
    int64_t first = (any_begin - grid.origin) / bn, last = (any_end - 1 - grid.origin) / bn;
    int64_t all_begin = lower_bound(key_pos, begin, end, view->all_lo) - grid.origin;
    int64_t all_end = lower_bound(key_pos, begin, end, view->all_hi) - grid.origin;
    int64_t full_first = all_begin <= 0 ? 0 : (all_begin + bn - 1) / bn;
    int64_t full_last = all_end <= 0 ? -1 : all_end / bn - 1;
    if (full_first > full_last) {
        RA_TRY(push_tiles(tiles, key_pos, &grid, first, last, 0));
    } else {
        RA_TRY(push_tiles(tiles, key_pos, &grid, full_last + 1, last, 0));
        RA_TRY(push_tiles(tiles, key_pos, &grid, full_first, full_last, 1));
        RA_TRY(push_tiles(tiles, key_pos, &grid, first, full_first - 1, 0));
    }
    if (tiles->segment_count > before) {
        tiles->segments[tiles->segment_count - 1].flags |= RA_TILE_SPAN_END;
    }
    return RA_OK;
}

static ra_status_t fold_spans(ra_softmax_tiles_t *tiles, const ra_softmax_block_t *block,
                              const ra_row_group_t *group, const view_t *view, int merge)
{
    const int64_t *key_pos = block->mask.key_pos;
    int64_t span_end = group->span_begin + group->span_count;
    for (int64_t s = group->span_begin; s < span_end; s++) {
        int64_t begin = block->spans[s].key_begin, end = begin + block->spans[s].key_count;
        while (merge && s + 1 < span_end && begin < end && block->spans[s + 1].key_count > 0 &&
               block->spans[s + 1].key_begin == end && key_pos[end] > key_pos[end - 1]) {
            end += block->spans[++s].key_count;
        }
        RA_TRY(fold_span(tiles, key_pos, view, begin, end, merge));
    }
    return RA_OK;
}

/* The keys of all spans lie in [begin, end). */
static ra_key_span_t hull_of_spans(const ra_softmax_block_t *block)
{
    int64_t begin = block->keys, end = 0;
    for (int64_t g = 0; g < block->group_count; g++) {
        const ra_row_group_t *group = &block->groups[g];
        for (int64_t s = group->span_begin; s < group->span_begin + group->span_count; s++) {
            const ra_key_span_t *span = &block->spans[s];
            if (span->key_count > 0) {
                begin = ra_min_i64(begin, span->key_begin);
                end = ra_max_i64(end, span->key_begin + span->key_count);
            }
        }
    }
    return (ra_key_span_t){begin, ra_max_i64(end - begin, 0)};
}

static ra_status_t check_block(const ra_softmax_block_t *block)
{
    if (block->rows > INT32_MAX || block->keys > INT32_MAX) {
        return ra_fail(RA_ERR_UNSUPPORTED, subsystem, "%lld rows or %lld keys pass 2^31",
                       (long long)block->rows, (long long)block->keys);
    }
    for (int64_t g = 0; g < block->group_count; g++) {
        const ra_row_group_t *group = &block->groups[g];
        if (group->row_begin < 0 || group->row_count < 0 ||
            group->row_count > block->rows - group->row_begin) {
            return ra_fail(RA_ERR_SHAPE, subsystem, "row group %lld leaves the block",
                           (long long)g);
        }
        for (int64_t s = 0; s < group->span_count; s++) {
            const ra_key_span_t *span = &block->spans[group->span_begin + s];
            if (span->key_begin < 0 || span->key_count < 0 ||
                span->key_count > block->keys - span->key_begin) {
                return ra_fail(RA_ERR_SHAPE, subsystem, "span %lld leaves the block",
                               (long long)(group->span_begin + s));
            }
        }
    }
    return RA_OK;
}

static ra_status_t check_positions(const int64_t *key_pos, ra_key_span_t keys)
{
    for (int64_t j = keys.key_begin; j < keys.key_begin + keys.key_count; j++) {
        if (key_pos[j] < 0 || key_pos[j] >= INT32_MAX) {
            return ra_fail(RA_ERR_UNSUPPORTED, subsystem,
                           "position %lld of key %lld is outside "
                           "[0, 2^31 - 1)",
                           (long long)key_pos[j], (long long)j);
        }
    }
    return RA_OK;
}

static ra_status_t cut_groups(ra_softmax_tiles_t *tiles, const ra_softmax_block_t *block, int merge)
{
    int64_t bm = tiles->layout.tile_rows, made = 0;
    for (int64_t g = 0; g < block->group_count; g++) {
        const ra_row_group_t *group = &block->groups[g];
        for (int64_t done = 0; done < group->row_count; done += bm) {
            int64_t begin = group->row_begin + done;
            int64_t count = ra_min_i64(bm, group->row_count - done);
            view_t view = view_of(&block->mask, begin, count);
            int64_t before = tiles->segment_count, steps = 0;
            RA_TRY(fold_spans(tiles, block, group, &view, merge));
            for (int64_t i = before; i < tiles->segment_count; i++) {
                steps += tiles->segments[i].tiles;
            }
            tiles->tiles[made++] = (ra_softmax_tile_t){(int32_t)begin, (int32_t)count,
                                                       (int32_t)before, (int32_t)steps};
            tiles->layout.steps += steps;
        }
    }
    return RA_OK;
}

/* Longest first; equal ones stay in row order, which keeps neighbours on the same keys. */
static int by_falling_steps(const void *left, const void *right)
{
    const ra_softmax_tile_t *a = left, *b = right;
    if (a->steps != b->steps) {
        return a->steps < b->steps ? 1 : -1;
    }
    return (a->row_begin > b->row_begin) - (a->row_begin < b->row_begin);
}

static int32_t clamp_i32(int64_t value)
{
    return value < 0 ? 0 : value > INT32_MAX ? INT32_MAX : (int32_t)value;
}

static ra_status_t pack(ra_softmax_tiles_t *tiles, const ra_softmax_block_t *block)
{
    ra_softmax_tiles_layout_t *layout = &tiles->layout;
    int64_t tile_bytes = layout->tile_count * (int64_t)sizeof(ra_softmax_tile_t);
    int64_t segment_bytes = tiles->segment_count * (int64_t)sizeof(ra_softmax_segment_t);
    layout->tiles = (int64_t)sizeof(ra_softmax_tiles_head_t);
    layout->segments = (layout->tiles + tile_bytes + 31) / 32 * 32;
    layout->row_interval = layout->segments + segment_bytes;
    layout->bytes = layout->row_interval + block->rows * 8;
    layout->key_pos = -1;
    if (tiles->searches) {
        layout->key_pos = layout->bytes;
        layout->bytes += block->keys * 4;
    }
    tiles->data = calloc(1, (size_t)layout->bytes);
    if (!tiles->data) {
        return ra_fail(RA_ERR_NOMEM, subsystem, "tile list of %lld bytes does not fit",
                       (long long)layout->bytes);
    }
    if (tile_bytes > 0) {
        memcpy(tiles->data + layout->tiles, tiles->tiles, (size_t)tile_bytes);
    }
    if (segment_bytes > 0) {
        memcpy(tiles->data + layout->segments, tiles->segments, (size_t)segment_bytes);
    }
    int32_t *interval = (int32_t *)(tiles->data + layout->row_interval);
    for (int64_t r = 0; r < block->rows; r++) {
        interval[2 * r] = clamp_i32(block->mask.row_lo[r]);
        interval[2 * r + 1] = clamp_i32(block->mask.row_hi[r]);
    }
    for (int64_t j = 0; tiles->searches && j < block->keys; j++) {
        ((int32_t *)(tiles->data + layout->key_pos))[j] = clamp_i32(block->mask.key_pos[j]);
    }
    return RA_OK;
}

static ra_status_t build(ra_softmax_tiles_t *tiles, const ra_softmax_block_t *block, int merge)
{
    const int64_t *key_pos = block->mask.key_pos;
    const ra_key_span_t keys = hull_of_spans(block);
    const int64_t keys_end = keys.key_begin + keys.key_count;
    RA_TRY(check_positions(key_pos, keys));
    for (int64_t g = 0; g < block->group_count; g++) {
        int64_t bm = tiles->layout.tile_rows;
        tiles->layout.tile_count += (block->groups[g].row_count + bm - 1) / bm;
    }
    tiles->tiles = calloc((size_t)tiles->layout.tile_count + 1, sizeof(*tiles->tiles));
    tiles->run_end = malloc(((size_t)block->keys + 1) * sizeof(*tiles->run_end));
    if (!tiles->tiles || !tiles->run_end) {
        return ra_fail(RA_ERR_NOMEM, subsystem, "tile list of %lld rows and %lld keys does not fit",
                       (long long)block->rows, (long long)block->keys);
    }
    for (int64_t j = keys_end - 1; j >= keys.key_begin; j--) {
        int goes_on = j + 1 < keys_end && key_pos[j + 1] == key_pos[j] + 1;
        tiles->run_end[j] = goes_on ? tiles->run_end[j + 1] : (int32_t)j;
    }
    RA_TRY(cut_groups(tiles, block, merge));
    qsort(tiles->tiles, (size_t)tiles->layout.tile_count, sizeof(*tiles->tiles), by_falling_steps);
    return pack(tiles, block);
}

ra_status_t ra_softmax_tiles_create(const ra_softmax_block_t *block, int32_t tile_rows,
                                    int32_t tile_keys, int merge, ra_softmax_tiles_t **tiles_p)
{
    RA_TRY(check_block(block));
    ra_softmax_tiles_t *tiles = calloc(1, sizeof(*tiles));
    if (!tiles) {
        return ra_fail(RA_ERR_NOMEM, subsystem, "tile list does not fit");
    }
    tiles->layout.tile_rows = tile_rows;
    tiles->layout.tile_keys = tile_keys;
    ra_status_t status = build(tiles, block, merge);
    free(tiles->run_end);
    free(tiles->tiles);
    free(tiles->segments);
    tiles->run_end = NULL;
    tiles->tiles = NULL;
    tiles->segments = NULL;
    if (status != RA_OK) {
        ra_softmax_tiles_destroy(tiles);
        return status;
    }
    *tiles_p = tiles;
    return RA_OK;
}

void ra_softmax_tiles_destroy(ra_softmax_tiles_t *tiles)
{
    if (tiles) {
        free(tiles->data);
        free(tiles);
    }
}

const ra_softmax_tiles_layout_t *ra_softmax_tiles_layout(const ra_softmax_tiles_t *tiles)
{
    return &tiles->layout;
}

const void *ra_softmax_tiles_data(const ra_softmax_tiles_t *tiles)
{
    return tiles->data;
}
