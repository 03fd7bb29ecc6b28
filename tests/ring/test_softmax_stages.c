/*
 * The folds of a rank by lists, cut into parts or not, against attention in double: blocks in turn
 * and gathered sections, with a kernel that walks the list as softmax_tiles.h tells it to. No
 * ranks: one after another does all its folds with everybody's keys at hand.
 */
#include "attention/softmax_kernel.h"
#include "base/checked.h"
#include "ring/softmax_stages.h"
#include "tests/ring/softmax_ring_case.h"
#include <string.h>

enum { H = RING_HEADS, G = RING_KV_HEADS, D = 32, WIDTH = G * D, GATE = 64, TILE_KEYS = 40 };
enum { STREAM_Q = 1, STREAM_K, STREAM_V };

/* ---- a kernel that takes lists ------------------------------------------------------------- */

static ra_status_t listed_tile(int32_t head_dim, int32_t *tile_rows_p, int32_t *tile_keys_p)
{
    (void)head_dim;
    *tile_rows_p = 24;
    *tile_keys_p = TILE_KEYS;
    return RA_OK;
}

static const void *in_list(const ra_softmax_cuda_call_t *call, int64_t offset)
{
    return (const char *)call->tiles + offset;
}

static bool is_visible(const ra_softmax_cuda_call_t *call, const ra_softmax_segment_t *segment,
                       int64_t row, int64_t key)
{
    const int32_t *interval = in_list(call, call->layout->row_interval);
    int64_t position = key + segment->pos_shift;
    if ((segment->flags & RA_TILE_MASK) == RA_TILE_FULL) {
        return true;
    }
    if (segment->flags & RA_TILE_SEARCH) {
        position = ((const int32_t *)in_list(call, call->layout->key_pos))[key];
    }
    return position >= interval[2 * row] && position < interval[2 * row + 1];
}

static float score_of(const ra_softmax_block_t *block, int64_t row, int64_t h, int64_t key)
{
    const float *q = (const float *)block->q + row * block->q_stride + h * D;
    const float *k = (const float *)block->k + key * WIDTH + h / (H / G) * D;
    float sum = 0;
    for (int d = 0; d < D; d++) {
        sum += q[d] * k[d];
    }
    return sum * block->scale;
}

typedef struct row_state {
    float m, l, o[D];
} row_state_t;

/* Sums of a tile come first, so that bits depend on where tiles are cut. */
static void fold_tile(const ra_softmax_cuda_call_t *call, const ra_softmax_segment_t *segment,
                      int64_t begin, int64_t row, int64_t h, row_state_t *s)
{
    int64_t low = ra_max_i64(begin, segment->key_first);
    int64_t high = ra_min_i64(begin + TILE_KEYS, segment->key_end);
    float score[TILE_KEYS], most = -INFINITY, l = 0, o[D] = {0};
    for (int64_t key = low; key < high; key++) {
        bool visible = is_visible(call, segment, row, key);
        score[key - low] = visible ? score_of(call->block, row, h, key) : -INFINITY;
        most = fmaxf(most, score[key - low]);
    }
    if (most == -INFINITY) {
        return;
    }
    float m = fmaxf(s->m, most), old = expf(s->m - m);
    for (int64_t key = low; key < high; key++) {
        const float *v = (const float *)call->block->v + key * WIDTH + h / (H / G) * D;
        float p = expf(score[key - low] - m);
        l += p;
        for (int d = 0; d < D; d++) {
            o[d] += p * v[d];
        }
    }
    s->m = m;
    s->l = s->l * old + l;
    for (int d = 0; d < D; d++) {
        s->o[d] = s->o[d] * old + o[d];
    }
}

static void fold_row(const ra_softmax_cuda_call_t *call, const ra_softmax_tile_t *tile, int64_t row,
                     int64_t h)
{
    const ra_softmax_segment_t *segment = in_list(call, call->layout->segments);
    const ra_softmax_state_t *state = call->state;
    int64_t at = h * call->block->rows + row;
    row_state_t s = {.m = -INFINITY};
    if (!call->fresh) {
        s.m = state->m[at];
        s.l = state->l[at];
        memcpy(s.o, state->o + row * state->o_stride + h * D, sizeof(s.o));
    }
    segment += tile->segment_begin;
    for (int done = 0; done < tile->steps; done += segment->tiles, segment++) {
        for (int64_t t = 0; t < segment->tiles; t++) {
            fold_tile(call, segment, segment->key_begin - t * TILE_KEYS, row, h, &s);
        }
    }
    if (call->out == NULL) {
        state->m[at] = s.m;
        state->l[at] = s.l;
        memcpy(state->o + row * state->o_stride + h * D, s.o, sizeof(s.o));
        return;
    }
    float *out = (float *)call->out + row * call->out_stride + h * D;
    for (int d = 0; d < D; d++) {
        out[d] = s.l > 0 ? s.o[d] / s.l : 0;
    }
    call->lse[at] = s.m + logf(s.l);
}

static ra_status_t listed_launch(const ra_softmax_cuda_call_t *call, ra_stream_t *stream)
{
    (void)stream;
    const ra_softmax_tile_t *tiles = in_list(call, call->layout->tiles);
    for (int64_t t = 0; t < call->layout->tile_count; t++) {
        for (int64_t row = tiles[t].row_begin; row < tiles[t].row_begin + tiles[t].row_count;
             row++) {
            for (int64_t h = 0; h < H; h++) {
                fold_row(call, &tiles[t], row, h);
            }
        }
    }
    return RA_OK;
}

static const ra_softmax_kernel_t listed = {
    .name = "listed", .device = RA_DEVICE_CPU, .tile = listed_tile, .launch = listed_launch};

/* ---- one rank's folds ---------------------------------------------------------------------- */

typedef struct rank_folds {
    ring_result_t *result;
    int rank;
    ra_stage_cut_t cut;
    ra_stream_t *stream;
    ra_kv_gather_t gather;
    float *q, *o, *lse;
} rank_folds_t;

/* Runs of every rank, own first, as kv_gather.h lays out what all of them hold. */
static void fill_gather(rank_folds_t *f)
{
    const ra_layout_t *layout = f->result->layout;
    ra_kv_gather_t *gather = &f->gather;
    gather->gate_keys = GATE;
    gather->gated = true;
    gather->runs = calloc((size_t)layout->rank_run_begin[layout->ranks] + 1, sizeof(*gather->runs));
    for (int hop = 0; hop < layout->ranks; hop++) {
        int owner = (f->rank - hop + layout->ranks) % layout->ranks;
        const ra_run_t *runs = ra_layout_runs(layout, owner);
        for (int64_t i = 0; i < ra_layout_run_count(layout, owner); i++) {
            gather->runs[gather->run_count++] =
                (ra_gathered_run_t){.document = runs[i].document,
                                    .start = runs[i].start,
                                    .count = runs[i].count,
                                    .row = gather->rows + runs[i].local,
                                    .section = hop};
        }
        gather->rows += ra_ceil_div(layout->rows[owner], GATE) * GATE;
    }
}

/* [2][keys][WIDTH] of a visit. */
static float *keys_of_visit(const rank_folds_t *f, ra_softmax_visit_t visit, int64_t keys)
{
    const pack_t *pack = &f->result->c->pack;
    float *kv = calloc((size_t)(2 * keys * WIDTH) + 1, sizeof(*kv));
    for (int plane = 0; plane < 2; plane++) {
        float *rows = kv + plane * keys * WIDTH;
        if (visit.source == RA_STAGE_GATHERED) {
            for (int64_t i = 0; i < f->gather.run_count; i++) {
                const ra_gathered_run_t *run = &f->gather.runs[i];
                for (int64_t t = 0; t < run->count; t++) {
                    value_row(pack->name[run->document], STREAM_K + plane, run->start + t, WIDTH,
                              rows + (run->row + t) * WIDTH);
                }
            }
        } else {
            const ra_layout_t *layout =
                visit.source == RA_STAGE_PREFIX ? f->result->prefix : f->result->layout;
            value_rows(pack, layout, visit.owner, STREAM_K + plane, WIDTH, WIDTH, rows);
        }
    }
    return kv;
}

static void fold_visits(rank_folds_t *f, ra_softmax_schedule_t *schedule,
                        const ra_softmax_visit_t *visits, int count)
{
    int64_t rows = f->result->layout->rows[f->rank];
    ra_softmax_block_t block = {.rows = rows,
                                .heads = H,
                                .kv_heads = G,
                                .head_dim = D,
                                .scale = 1 / sqrtf(D),
                                .q = f->q,
                                .q_stride = H * D,
                                .k_stride = WIDTH,
                                .v_stride = WIDTH};
    ra_softmax_stages_t *stages = NULL;
    assert_int_equal(ra_softmax_stages_create(&listed, &block, schedule, visits, count, f->cut,
                                              f->stream, &stages),
                     RA_OK);
    if (stages->state.o != NULL) {
        test_poison(stages->state.m, rows * H);
        test_poison(stages->state.l, rows * H);
        test_poison(stages->state.o, rows * H * D);
    }
    for (int i = 0; i < count; i++) {
        float *kv = keys_of_visit(f, visits[i], stages->keys[i]);
        block.k = kv;
        block.v = kv + stages->keys[i] * WIDTH;
        ra_softmax_cuda_call_t call = {
            .block = &block, .out = f->o, .out_dtype = RA_F32, .out_stride = H * D, .lse = f->lse};
        assert_int_equal(ra_softmax_stages_fold(stages, i, &call), RA_OK);
        free(kv);
    }
    if (f->cut.part_keys > 0 && f->result->layout->document_count == 1 && f->cut.long_keys == 0) {
        assert_true(stages->launch_count >= rows / f->cut.part_keys); /* its own keys alone */
    }
    ra_softmax_stages_destroy(stages);
}

static void run_rank(rank_folds_t *f, bool gathered)
{
    const ring_case_t *c = f->result->c;
    const ra_layout_t *layout = f->result->layout, *prefix = f->result->prefix;
    int64_t rows = layout->rows[f->rank];
    ra_softmax_visit_t visits[2 * 8];
    int count = 0;
    if (gathered) {
        fill_gather(f);
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_GATHERED, f->rank};
    }
    for (int i = 0; i < layout->ranks && !gathered; i++) {
        int owner = (f->rank - i + layout->ranks) % layout->ranks;
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_RING, owner};
    }
    for (int i = 0; i < layout->ranks && prefix->total_rows > 0; i++) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_PREFIX, i};
    }
    ra_softmax_schedule_params_t params = {.layout = layout,
                                           .prefix = prefix->total_rows > 0 ? prefix : NULL,
                                           .rank = f->rank,
                                           .causal = !c->full,
                                           .gather = gathered ? &f->gather : NULL};
    ra_softmax_schedule_t *schedule = NULL;
    assert_int_equal(ra_softmax_schedule_create(&params, &schedule), RA_OK);
    f->q = float_array(rows * H * D);
    f->o = float_array(rows * H * D);
    f->lse = float_array(rows * H);
    value_rows(&c->pack, layout, f->rank, STREAM_Q, H * D, H * D, f->q);
    fold_visits(f, schedule, visits, count);
    float *by_row = float_array(rows * H);
    for (int64_t i = 0; i < rows * H; i++) {
        by_row[i] = f->lse[i % H * rows + i / H];
    }
    ra_layout_unpack(layout, f->rank, H * D * 4, f->o, f->result->o);
    ra_layout_unpack(layout, f->rank, H * 4, by_row, f->result->lse);
    ra_softmax_schedule_destroy(schedule);
    free(by_row);
    free(f->q);
    free(f->o);
    free(f->lse);
    free(f->gather.runs);
}

static ring_result_t run_ranks(const ring_case_t *c, ra_stage_cut_t cut, bool gathered)
{
    ra_device_t *device = NULL;
    ra_stream_t *stream = NULL;
    ring_result_t result = ring_result_make(c);
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    assert_int_equal(ra_stream_create(device, &stream), RA_OK);
    for (int rank = 0; rank < c->ranks; rank++) {
        rank_folds_t f = {.result = &result, .rank = rank, .cut = cut, .stream = stream};
        run_rank(&f, gathered);
    }
    ra_stream_destroy(stream);
    ra_device_close(device);
    return result;
}

static void check_everywhere(ring_case_t c, bool gathered)
{
    const ra_stage_cut_t cuts[] = {{0, 0}, {20, 0}, {150, 0}, {50, 200}};
    double *want = ring_oracle(&c);
    for (int n = 0; n < RANK_COUNTS; n++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
            c.ranks = rank_counts[n];
            c.kind = layout_kinds[k];
            for (size_t p = 0; p < RA_ARRAY_LEN(cuts); p++) {
                ring_result_t result = run_ranks(&c, cuts[p], gathered);
                ring_check_near(&result, want);
                ring_result_free(&result);
            }
        }
    }
    free(want);
}

static const pack_t packs[] = {
    {1, {1}, {{0, 301}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 140}, {0, 64}, {0, 0}, {0, 3}}},
};

static void blocks_in_turn_and_in_parts_are_exact(void **state)
{
    (void)state;
    for (size_t p = 0; p < RA_ARRAY_LEN(packs); p++) {
        check_everywhere((ring_case_t){.pack = packs[p]}, false);
        check_everywhere((ring_case_t){.pack = packs[p], .full = true}, false);
    }
}

static void gathered_sections_in_parts_are_exact(void **state)
{
    (void)state;
    for (size_t p = 0; p < RA_ARRAY_LEN(packs); p++) {
        check_everywhere((ring_case_t){.pack = packs[p]}, true);
        check_everywhere((ring_case_t){.pack = packs[p], .full = true}, true);
    }
}

static void cached_prefixes_in_parts_are_exact(void **state)
{
    (void)state;
    const pack_t prefixed = {3, {5, 6, 8}, {{160, 2}, {0, 130}, {48, 183}}};
    check_everywhere((ring_case_t){.pack = prefixed}, false);
}

static void check_alone(const ring_case_t *c, bool gathered)
{
    const ra_stage_cut_t cut = {50, 200}; /* the longest document is cut, the others are not */
    ring_result_t together = run_ranks(c, cut, gathered);
    for (int64_t d = 0; d < c->pack.count; d++) {
        ring_case_t one = *c;
        one.pack = pack_alone(&c->pack, d);
        ring_result_t alone = run_ranks(&one, cut, gathered);
        ring_check_same_bits(&alone, 0, &together);
        ring_result_free(&alone);
    }
    ring_result_free(&together);
}

static void bits_of_a_document_do_not_depend_on_longer_neighbours(void **state)
{
    (void)state;
    ring_case_t c = {.pack = {4, {5, 6, 7, 8}, {{0, 61}, {0, 307}, {0, 150}, {0, 3}}}};
    for (int ranks = 1; ranks <= 4; ranks++) {
        c.ranks = ranks;
        for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
            c.kind = layout_kinds[k];
            check_alone(&c, false);
            check_alone(&c, true);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_in_turn_and_in_parts_are_exact),
        cmocka_unit_test(gathered_sections_in_parts_are_exact),
        cmocka_unit_test(cached_prefixes_in_parts_are_exact),
        cmocka_unit_test(bits_of_a_document_do_not_depend_on_longer_neighbours),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
