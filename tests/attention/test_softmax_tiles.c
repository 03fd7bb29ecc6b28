/* The tile list against brute force: walking it the way a kernel does must show every row exactly
 * the keys that its group, spans and interval say, each once, whatever the masks and tile sizes. */
#include "attention/softmax_tiles.h"
#include "base/checked.h"
#include "base/log.h"
#include "tests/test_support.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 700, MAX_KEYS = 900, MAX_GROUPS = 8, MAX_SPANS = 24 };

typedef struct problem {
    ra_softmax_block_t block;
    int64_t row_lo[MAX_ROWS], row_hi[MAX_ROWS], key_pos[MAX_KEYS];
    ra_row_group_t groups[MAX_GROUPS];
    ra_key_span_t spans[MAX_SPANS];
} problem_t;

static uint64_t seed = 20261122;

static int64_t below(int64_t bound)
{
    return (int64_t)(test_random_u64(&seed) % (uint64_t)bound);
}

static void bind(problem_t *p, int64_t rows, int64_t keys)
{
    memset(&p->block, 0, sizeof(p->block));
    p->block.rows = rows;
    p->block.keys = keys;
    p->block.mask.row_lo = p->row_lo;
    p->block.mask.row_hi = p->row_hi;
    p->block.mask.key_pos = p->key_pos;
    p->block.groups = p->groups;
    p->block.spans = p->spans;
}

/* Spans partition the keys in shuffled order; positions ascend in each, with gaps or without. */
static void fill_keys(problem_t *p, int64_t *span_count)
{
    int64_t count = 0, begin = 0;
    while (begin < p->block.keys && count < MAX_SPANS) {
        int64_t length = ra_min_i64(1 + below(260), p->block.keys - begin);
        int64_t position = below(3) ? begin : below(1500), stride = below(3) ? 1 : 1 + below(3);
        for (int64_t j = 0; j < length; j++) {
            p->key_pos[begin + j] = position;
            position += below(40) ? stride : 1 + below(4);
        }
        p->spans[count++] = (ra_key_span_t){begin, length};
        begin += length;
    }
    p->block.keys = begin;
    for (int64_t i = count - 1; i > 0 && below(2); i--) {
        int64_t other = below(i + 1);
        ra_key_span_t span = p->spans[i];
        p->spans[i] = p->spans[other];
        p->spans[other] = span;
    }
    *span_count = count;
}

static void fill_rows(problem_t *p, int64_t span_count)
{
    int kind = (int)below(4);
    int64_t window = 1 + below(300), offset = below(600) - 200;
    for (int64_t r = 0; r < p->block.rows; r++) {
        int64_t position = ra_max_i64(0, r + offset);
        p->row_hi[r] = kind == 1 ? 2000 : position + 1;
        p->row_lo[r] = kind == 2 ? ra_max_i64(0, position + 1 - window) : 0;
        if (kind == 3) {
            p->row_lo[r] = below(900);
            p->row_hi[r] = below(900);
        }
    }
    int64_t begin = below(3);
    p->block.group_count = 0;
    while (begin < p->block.rows && p->block.group_count < MAX_GROUPS) {
        int64_t rows = ra_min_i64(below(300), p->block.rows - begin);
        int64_t first = below(span_count + 1);
        p->groups[p->block.group_count++] =
            (ra_row_group_t){begin, rows, first, below(span_count - first + 1)};
        begin += rows + below(3);
    }
}

static unsigned char expected[MAX_ROWS][MAX_KEYS], seen[MAX_ROWS][MAX_KEYS];
static int covered[MAX_ROWS], claimed[MAX_ROWS];

static void brute_force(const problem_t *p)
{
    memset(expected, 0, sizeof(expected));
    memset(claimed, 0, sizeof(claimed));
    for (int64_t g = 0; g < p->block.group_count; g++) {
        const ra_row_group_t *group = &p->groups[g];
        for (int64_t r = group->row_begin; r < group->row_begin + group->row_count; r++) {
            claimed[r]++;
            for (int64_t s = 0; s < group->span_count; s++) {
                const ra_key_span_t *span = &p->spans[group->span_begin + s];
                for (int64_t j = span->key_begin; j < span->key_begin + span->key_count; j++) {
                    expected[r][j] += p->key_pos[j] >= p->row_lo[r] && p->key_pos[j] < p->row_hi[r];
                }
            }
        }
    }
}

static void walk_tile(const problem_t *p, const ra_softmax_tiles_layout_t *layout,
                      const unsigned char *data, const ra_softmax_tile_t *tile,
                      const ra_softmax_segment_t *segment, int64_t key)
{
    const int32_t *key_pos = (const int32_t *)(const void *)(data + layout->key_pos);
    for (int64_t r = tile->row_begin; r < tile->row_begin + tile->row_count; r++) {
        for (int64_t j = key; j < key + layout->tile_keys; j++) {
            bool inside = j >= segment->key_first && j < segment->key_end, visible = true;
            int32_t kind = segment->flags & RA_TILE_MASK;
            if (kind == RA_TILE_FULL) {
                assert_true(inside);
            } else if (inside) {
                int64_t position = kind == RA_TILE_SHIFT ? j + segment->pos_shift : key_pos[j];
                assert_int_equal(position, p->key_pos[j]);
                visible = position >= p->row_lo[r] && position < p->row_hi[r];
            }
            if (inside && visible) {
                seen[r][j]++;
            }
        }
    }
}

static void walk(const problem_t *p, const ra_softmax_tiles_t *list)
{
    const ra_softmax_tiles_layout_t *layout = ra_softmax_tiles_layout(list);
    const unsigned char *data = ra_softmax_tiles_data(list);
    const ra_softmax_tile_t *tiles = (const void *)(data + layout->tiles);
    const ra_softmax_segment_t *segments = (const void *)(data + layout->segments);
    int64_t steps = 0;
    memset(seen, 0, sizeof(seen));
    memset(covered, 0, sizeof(covered));
    for (int64_t t = 0; t < layout->tile_count; t++) {
        assert_true(tiles[t].row_count <= layout->tile_rows);
        assert_true(t == 0 || tiles[t].steps <= tiles[t - 1].steps);
        for (int64_t r = 0; r < tiles[t].row_count; r++) {
            covered[tiles[t].row_begin + r]++;
        }
        int64_t done = 0;
        for (const ra_softmax_segment_t *s = &segments[tiles[t].segment_begin];
             done < tiles[t].steps; s++) {
            for (int64_t i = 0; i < s->tiles; i++, done++) {
                walk_tile(p, layout, data, &tiles[t], s, s->key_begin - i * layout->tile_keys);
            }
        }
        assert_int_equal(done, tiles[t].steps);
        steps += done;
    }
    assert_int_equal(steps, layout->steps);
    assert_memory_equal(covered, claimed, sizeof(claimed));
    for (int64_t r = 0; r < p->block.rows; r++) {
        assert_memory_equal(seen[r], expected[r], (size_t)p->block.keys);
    }
}

static void every_row_meets_exactly_its_keys(void **unused)
{
    static const int32_t sizes[][2] = {{128, 160}, {192, 128}, {16, 16}, {64, 1}};
    static problem_t p;
    (void)unused;
    for (int round = 0; round < 300; round++) {
        int64_t span_count = 0;
        bind(&p, 1 + below(MAX_ROWS), 1 + below(MAX_KEYS));
        fill_keys(&p, &span_count);
        fill_rows(&p, span_count);
        brute_force(&p);
        for (int merge = 0; merge < 2; merge++) {
            const int32_t *size = sizes[round % 4];
            ra_softmax_tiles_t *list = NULL;
            assert_int_equal(ra_softmax_tiles_create(&p.block, size[0], size[1], merge, &list),
                             RA_OK);
            walk(&p, list);
            ra_softmax_tiles_destroy(list);
        }
    }
}

static void causal_tiles_are_only_masked_at_the_diagonal(void **unused)
{
    static problem_t p;
    (void)unused;
    bind(&p, 640, 640);
    for (int64_t i = 0; i < 640; i++) {
        p.key_pos[i] = i;
        p.row_lo[i] = 0;
        p.row_hi[i] = i + 1;
    }
    p.spans[0] = (ra_key_span_t){0, 640};
    p.groups[0] = (ra_row_group_t){0, 640, 0, 1};
    p.block.group_count = 1;
    ra_softmax_tiles_t *list = NULL;
    assert_int_equal(ra_softmax_tiles_create(&p.block, 128, 128, 0, &list), RA_OK);
    const ra_softmax_tiles_layout_t *layout = ra_softmax_tiles_layout(list);
    const unsigned char *data = ra_softmax_tiles_data(list);
    const ra_softmax_tile_t *tiles = (const void *)(data + layout->tiles);
    const ra_softmax_segment_t *segments = (const void *)(data + layout->segments);
    assert_int_equal(layout->steps, 1 + 2 + 3 + 4 + 5);
    assert_true(layout->key_pos < 0);
    assert_int_equal(tiles[0].row_begin, 512);
    assert_int_equal(segments[tiles[0].segment_begin].tiles, 1);
    assert_int_equal(segments[tiles[0].segment_begin].flags, RA_TILE_SHIFT);
    assert_int_equal(segments[tiles[0].segment_begin + 1].tiles, 4);
    assert_int_equal(segments[tiles[0].segment_begin + 1].flags, RA_TILE_FULL | RA_TILE_SPAN_END);
    ra_softmax_tiles_destroy(list);
}

static void what_the_kernel_lacks_is_refused(void **unused)
{
    static problem_t p;
    ra_softmax_tiles_t *list = NULL;
    (void)unused;
    bind(&p, 4, 4);
    for (int64_t i = 0; i < 4; i++) {
        p.key_pos[i] = i;
        p.row_lo[i] = 0;
        p.row_hi[i] = 4;
    }
    p.spans[0] = (ra_key_span_t){0, 4};
    p.groups[0] = (ra_row_group_t){0, 4, 0, 1};
    p.block.group_count = 1;
    ra_log_set_quiet(1);
    p.key_pos[3] = INT32_MAX;
    assert_int_equal(ra_softmax_tiles_create(&p.block, 128, 160, 1, &list), RA_ERR_UNSUPPORTED);
    p.key_pos[3] = 3;
    p.spans[0].key_count = 5;
    assert_int_equal(ra_softmax_tiles_create(&p.block, 128, 160, 1, &list), RA_ERR_SHAPE);
    ra_log_set_quiet(0);
    assert_null(list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_meets_exactly_its_keys),
        cmocka_unit_test(causal_tiles_are_only_masked_at_the_diagonal),
        cmocka_unit_test(what_the_kernel_lacks_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
