#include "ring/softmax_schedule.h"

#include "base/checked.h"
#include <stdlib.h>
#include <string.h>

static int64_t tiles_of_rank(const ra_layout_t *layout, int rank)
{
    int64_t tiles = 0;
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        tiles += ra_ceil_div(ra_layout_runs(layout, rank)[i].count, layout->tile);
    }
    return tiles;
}

static int64_t most_tiles(const ra_layout_t *layout)
{
    int64_t most = 0;
    for (int r = 0; layout != NULL && r < layout->ranks; r++) {
        most = ra_max_i64(most, tiles_of_rank(layout, r));
    }
    return most;
}

static void fill_row_intervals(ra_softmax_schedule_t *schedule)
{
    const ra_softmax_schedule_params_t *params = &schedule->params;
    const ra_layout_t *layout = params->layout;
    int64_t base = 0;
    for (int64_t d = 0; d < layout->document_count; d++) {
        schedule->base[d] = base;
        base += layout->documents[d].first + layout->documents[d].count;
    }
    const ra_run_t *runs = ra_layout_runs(layout, params->rank);
    for (int64_t i = 0; i < ra_layout_run_count(layout, params->rank); i++) {
        const ra_document_t *document = &layout->documents[runs[i].document];
        int64_t origin = schedule->base[runs[i].document];
        int64_t end = origin + document->first + document->count;
        for (int64_t t = 0; t < runs[i].count; t++) {
            int64_t position = runs[i].start + t, row = runs[i].local + t;
            int64_t lo = params->window > 0 ? position - params->window + 1 : 0;
            schedule->row_lo[row] = origin + ra_max_i64(lo, 0);
            schedule->row_hi[row] = params->causal ? origin + position + 1 : end;
        }
    }
}

ra_status_t ra_softmax_schedule_create(const ra_softmax_schedule_params_t *params,
                                       ra_softmax_schedule_t **schedule_p)
{
    const ra_layout_t *layout = params->layout, *prefix = params->prefix;
    int64_t rows = layout->rows[params->rank], runs = ra_layout_run_count(layout, params->rank);
    int64_t keys = ra_max_i64(layout->max_rows, prefix == NULL ? 0 : prefix->max_rows);
    int64_t groups = runs, spans = 2 * runs; /* a block holds at most two runs of a document */
    if (params->reproducible) {
        int64_t halo_tiles = ra_ceil_div(params->halo_rows, layout->tile);
        groups += tiles_of_rank(layout, params->rank);
        spans += ra_max_i64(ra_max_i64(most_tiles(layout), most_tiles(prefix)), halo_tiles);
    }
    if (params->gather != NULL) { /* runs of the document, and one between sections */
        spans += 4 * runs * layout->ranks;
        keys = ra_max_i64(keys, params->gather->rows);
    }
    ra_softmax_schedule_t *schedule = calloc(1, sizeof(*schedule));
    if (schedule != NULL) {
        schedule->params = *params;
        schedule->base = calloc((size_t)layout->document_count + 1, sizeof(int64_t));
        schedule->row_lo = calloc((size_t)rows + 1, sizeof(int64_t));
        schedule->row_hi = calloc((size_t)rows + 1, sizeof(int64_t));
        schedule->key_pos =
            calloc((size_t)ra_max_i64(keys, params->halo_rows) + 1, sizeof(int64_t));
        /* twice: covering puts one more between each two and at the ends */
        schedule->groups = calloc(2 * (size_t)groups + 2, sizeof(ra_row_group_t));
        schedule->spans = calloc((size_t)spans + 1, sizeof(ra_key_span_t));
        schedule->whole_groups = calloc((size_t)groups + 1, sizeof(ra_row_group_t));
        schedule->whole_spans = calloc((size_t)spans + 1, sizeof(ra_key_span_t));
        schedule->first_of = calloc((size_t)layout->document_count + 1, sizeof(int64_t));
        schedule->next_of = calloc(
            params->gather != NULL ? (size_t)params->gather->run_count + 1 : 1, sizeof(int64_t));
    }
    if (schedule == NULL || schedule->base == NULL || schedule->row_lo == NULL ||
        schedule->row_hi == NULL || schedule->key_pos == NULL || schedule->groups == NULL ||
        schedule->spans == NULL || schedule->whole_groups == NULL ||
        schedule->whole_spans == NULL || schedule->first_of == NULL || schedule->next_of == NULL) {
        ra_softmax_schedule_destroy(schedule);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a schedule of %lld rows",
                       (long long)rows);
    }
    fill_row_intervals(schedule);
    *schedule_p = schedule;
    return RA_OK;
}

void ra_softmax_schedule_destroy(ra_softmax_schedule_t *schedule)
{
    if (schedule == NULL) {
        return;
    }
    free(schedule->base);
    free(schedule->row_lo);
    free(schedule->row_hi);
    free(schedule->key_pos);
    free(schedule->groups);
    free(schedule->spans);
    free(schedule->whole_groups);
    free(schedule->whole_spans);
    free(schedule->first_of);
    free(schedule->next_of);
    free(schedule);
}

static void fill_key_positions(ra_softmax_schedule_t *schedule, int64_t document, int64_t start,
                               int64_t row, int64_t count)
{
    int64_t origin = schedule->base[document] + start;
    for (int64_t t = 0; t < count; t++) {
        schedule->key_pos[row + t] = origin + t;
    }
}

static void begin_block(ra_softmax_schedule_t *schedule, int64_t keys)
{
    schedule->keys = keys;
    schedule->group_count = schedule->span_count = 0;
    schedule->whole_group_count = -1;
}

static void add_group(ra_softmax_schedule_t *schedule, int64_t row, int64_t rows, int64_t span,
                      int64_t spans)
{
    if (rows > 0 && spans > 0) {
        schedule->groups[schedule->group_count++] = (ra_row_group_t){row, rows, span, spans};
    }
}

static void add_span(ra_softmax_schedule_t *schedule, int64_t key, int64_t count)
{
    schedule->spans[schedule->span_count++] = (ra_key_span_t){key, count};
}

/* Tiles of keys [key, key + count), the last one first. @return index of the first span. */
static int64_t add_tiles_downward(ra_softmax_schedule_t *schedule, int64_t key, int64_t count)
{
    int64_t tile = schedule->params.layout->tile, begin = schedule->span_count;
    for (int64_t t = ra_ceil_div(count, tile) - 1; t >= 0; t--) {
        add_span(schedule, key + t * tile, ra_min_i64(tile, count - t * tile));
    }
    return begin;
}

/* First tile that a row of tile @a t sees. */
static int64_t lowest_tile(const ra_softmax_schedule_t *schedule, int64_t t)
{
    int64_t tile = schedule->params.layout->tile, window = schedule->params.window;
    return window == 0 ? 0 : ra_max_i64(t * tile - window + 1, 0) / tile;
}

/* Rows of a run fold the run's own keys: each tile of rows starts at its own tile of keys. */
static void fold_own_tiles(ra_softmax_schedule_t *schedule, const ra_run_t *run)
{
    int64_t tile = schedule->params.layout->tile, first = run->start / tile;
    int64_t last = first + ra_ceil_div(run->count, tile) - 1;
    int64_t spans = add_tiles_downward(schedule, run->local, run->count);
    for (int64_t t = first; t <= last; t++) {
        int64_t row = (t - first) * tile;
        int64_t lowest = ra_max_i64(lowest_tile(schedule, t), first);
        add_group(schedule, run->local + row, ra_min_i64(tile, run->count - row), spans + last - t,
                  t - lowest + 1);
    }
}

/* Rows of @a run fold a run of keys that @a owner holds; NULL keys end the document's list. */
static void fold_key_run(ra_softmax_schedule_t *schedule, const ra_run_t *run, const ra_run_t *keys,
                         bool is_own)
{
    if (schedule->params.reproducible && is_own) {
        fold_own_tiles(schedule, run);
    } else if (schedule->params.reproducible) {
        int64_t spans = add_tiles_downward(schedule, keys->local, keys->count);
        add_group(schedule, run->local, run->count, spans, schedule->span_count - spans);
    } else {
        add_span(schedule, keys->local, keys->count);
    }
}

static bool is_visible(const ra_softmax_schedule_params_t *params, const ra_run_t *run,
                       const ra_run_t *keys, bool is_own)
{
    if (params->window > 0) {
        return is_own; /* everything before the run comes as its halo */
    }
    return !params->causal || keys->start <= run->start;
}

void ra_softmax_schedule_block(ra_softmax_schedule_t *schedule, bool of_prefix, int owner)
{
    const ra_softmax_schedule_params_t *params = &schedule->params;
    const ra_layout_t *source = of_prefix ? params->prefix : params->layout;
    const ra_run_t *keys = ra_layout_runs(source, owner);
    const ra_run_t *runs = ra_layout_runs(params->layout, params->rank);
    int64_t key_runs = ra_layout_run_count(source, owner), next = 0;

    begin_block(schedule, source->rows[owner]);
    for (int64_t i = 0; i < key_runs; i++) {
        fill_key_positions(schedule, keys[i].document, keys[i].start, keys[i].local, keys[i].count);
    }
    for (int64_t i = 0; i < ra_layout_run_count(params->layout, params->rank); i++) {
        const ra_run_t *run = &runs[i];
        int64_t spans = schedule->span_count;
        while (next < key_runs && keys[next].document < run->document) {
            next++;
        }
        int64_t end = next;
        while (end < key_runs && keys[end].document == run->document) {
            end++;
        }
        for (int64_t j = end - 1; j >= next; j--) {
            bool is_own = !of_prefix && owner == params->rank && keys[j].start == run->start;
            if (is_visible(params, run, &keys[j], is_own)) {
                fold_key_run(schedule, run, &keys[j], is_own);
            }
        }
        if (!params->reproducible) {
            add_group(schedule, run->local, run->count, spans, schedule->span_count - spans);
        }
    }
}

void ra_softmax_schedule_halo(ra_softmax_schedule_t *schedule)
{
    const ra_softmax_schedule_params_t *params = &schedule->params;
    const ra_run_t *runs = ra_layout_runs(params->layout, params->rank);
    int64_t tile = params->layout->tile;

    begin_block(schedule, params->halo_rows);
    for (int64_t i = 0; i < ra_layout_run_count(params->layout, params->rank); i++) {
        const ra_run_t *run = &runs[i];
        const ra_halo_run_t *halo = &params->halo_runs[i];
        fill_key_positions(schedule, run->document, halo->start, halo->row, halo->count);
        if (!params->reproducible) {
            add_group(schedule, run->local, ra_min_i64(run->count, params->window - 1),
                      schedule->span_count, halo->count > 0);
            add_span(schedule, halo->row, halo->count);
            continue;
        }
        int64_t spans = add_tiles_downward(schedule, halo->row, halo->count);
        int64_t first = run->start / tile;
        for (int64_t row = 0; row < run->count; row += tile) {
            int64_t lowest = lowest_tile(schedule, first + row / tile);
            add_group(schedule, run->local + row, ra_min_i64(tile, run->count - row), spans,
                      first - lowest);
        }
    }
}

/* Runs of each document in the order of the sections. */
static void chain_gathered_runs(ra_softmax_schedule_t *schedule)
{
    const ra_kv_gather_t *gather = schedule->params.gather;
    for (int64_t d = 0; d < schedule->params.layout->document_count; d++) {
        schedule->first_of[d] = -1;
    }
    for (int64_t i = gather->run_count - 1; i >= 0; i--) {
        int64_t *first = &schedule->first_of[gather->runs[i].document];
        schedule->next_of[i] = *first;
        *first = i;
    }
}

/* An empty span between two sections keeps them apart: touching spans may become one, and its
 * highest keys come first. */
void ra_softmax_schedule_gathered(ra_softmax_schedule_t *schedule)
{
    const ra_softmax_schedule_params_t *params = &schedule->params;
    const ra_kv_gather_t *gather = params->gather;
    const ra_run_t *runs = ra_layout_runs(params->layout, params->rank);

    begin_block(schedule, gather->rows);
    chain_gathered_runs(schedule);
    for (int64_t j = 0; j < gather->rows; j++) {
        schedule->key_pos[j] = 0; /* between sections */
    }
    for (int64_t i = 0; i < gather->run_count; i++) {
        const ra_gathered_run_t *keys = &gather->runs[i];
        fill_key_positions(schedule, keys->document, keys->start, keys->row, keys->count);
    }
    for (int64_t i = 0; i < ra_layout_run_count(params->layout, params->rank); i++) {
        int64_t spans = schedule->span_count, before = -1;
        for (int64_t k = schedule->first_of[runs[i].document]; k >= 0; k = schedule->next_of[k]) {
            const ra_gathered_run_t *keys = &gather->runs[k];
            if (params->causal && keys->start > runs[i].start) {
                continue;
            }
            if (before >= 0 && keys->section != gather->runs[before].section) {
                add_span(schedule, keys->row, 0);
            }
            add_span(schedule, keys->row, keys->count);
            before = k;
        }
        add_group(schedule, runs[i].local, runs[i].count, spans, schedule->span_count - spans);
    }
}

/* Keys of the document that @a row is of: positions are unique, documents without keys take none.
 */
static int64_t document_keys(const ra_softmax_schedule_t *schedule, int64_t row)
{
    const ra_layout_t *layout = schedule->params.layout;
    int64_t position = schedule->row_hi[row] - 1, low = 0, high = layout->document_count;
    while (high - low > 1) { /* the last one that begins at or before it */
        int64_t middle = low + (high - low) / 2;
        if (schedule->base[middle] <= position) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return layout->documents[low].first + layout->documents[low].count;
}

/* Keys of @a group in the section: from the first to the last. */
static ra_key_span_t section_of_group(const ra_row_group_t *group, const ra_key_span_t *spans,
                                      int64_t begin, int64_t end)
{
    int64_t low = end, high = begin;
    for (int64_t s = group->span_begin; s < group->span_begin + group->span_count; s++) {
        int64_t from = ra_max_i64(spans[s].key_begin, begin);
        int64_t to = ra_min_i64(spans[s].key_begin + spans[s].key_count, end);
        if (from < to) {
            low = ra_min_i64(low, from);
            high = ra_max_i64(high, to);
        }
    }
    return (ra_key_span_t){low, ra_max_i64(high - low, 0)};
}

/* What @a part is for @a group. */
static ra_key_span_t part_of_group(const ra_softmax_schedule_t *schedule,
                                   const ra_row_group_t *group, const ra_schedule_part_t *part)
{
    ra_key_span_t keys = section_of_group(group, schedule->spans, part->begin, part->end);
    if (document_keys(schedule, group->row_begin) <= part->long_keys) {
        return part->index == 0 ? keys : (ra_key_span_t){keys.key_begin, 0};
    }
    int64_t high = keys.key_begin + keys.key_count - part->index * part->keys;
    int64_t low = ra_max_i64(keys.key_begin, high - part->keys);
    return (ra_key_span_t){low, ra_max_i64(high - low, 0)};
}

int64_t ra_softmax_schedule_parts(const ra_softmax_schedule_t *schedule,
                                  const ra_schedule_part_t *part)
{
    int64_t most = 1;
    for (int64_t g = 0; g < schedule->group_count; g++) {
        const ra_row_group_t *group = &schedule->groups[g];
        if (document_keys(schedule, group->row_begin) > part->long_keys) {
            ra_key_span_t keys = section_of_group(group, schedule->spans, part->begin, part->end);
            most = ra_max_i64(most, ra_ceil_div(keys.key_count, part->keys));
        }
    }
    return most;
}

/* Clip the spans of @a group to @a keys. @return whether some are left, from position @a lowest to
 * @a highest. */
static bool clip_spans(ra_softmax_schedule_t *schedule, const ra_row_group_t *group,
                       ra_key_span_t keys, int64_t *lowest, int64_t *highest)
{
    *lowest = INT64_MAX;
    *highest = INT64_MIN;
    for (int64_t s = group->span_begin; s < group->span_begin + group->span_count; s++) {
        ra_key_span_t *span = &schedule->spans[s];
        int64_t from = ra_max_i64(span->key_begin, keys.key_begin);
        int64_t to = ra_min_i64(span->key_begin + span->key_count, keys.key_begin + keys.key_count);
        if (from >= to) {
            span->key_count = 0;
            continue;
        }
        *span = (ra_key_span_t){from, to - from};
        *lowest = ra_min_i64(*lowest, schedule->key_pos[from]);
        *highest = ra_max_i64(*highest, schedule->key_pos[to - 1]);
    }
    return *lowest <= *highest;
}

static void copy_lists(const ra_row_group_t *groups, int64_t group_count,
                       const ra_key_span_t *spans, int64_t span_count, ra_row_group_t *to_groups,
                       ra_key_span_t *to_spans)
{
    memcpy(to_groups, groups, (size_t)group_count * sizeof(*groups));
    memcpy(to_spans, spans, (size_t)span_count * sizeof(*spans));
}

/* Keep the whole block's lists when it is clipped first, bring them back later. */
static void begin_clip(ra_softmax_schedule_t *schedule)
{
    if (schedule->whole_group_count < 0) {
        schedule->whole_group_count = schedule->group_count;
        copy_lists(schedule->groups, schedule->group_count, schedule->spans, schedule->span_count,
                   schedule->whole_groups, schedule->whole_spans);
    } else {
        schedule->group_count = schedule->whole_group_count;
        copy_lists(schedule->whole_groups, schedule->group_count, schedule->whole_spans,
                   schedule->span_count, schedule->groups, schedule->spans);
    }
}

/* Rows of a group are of one run, so their intervals ascend. */
void ra_softmax_schedule_clip(ra_softmax_schedule_t *schedule, const ra_schedule_part_t *part)
{
    int64_t kept = 0;
    begin_clip(schedule);
    for (int64_t g = 0; g < schedule->group_count; g++) {
        ra_row_group_t group = schedule->groups[g];
        int64_t lowest, highest, first = group.row_begin, last = first + group.row_count;
        ra_key_span_t keys = part_of_group(schedule, &group, part);
        if (!clip_spans(schedule, &group, keys, &lowest, &highest)) {
            continue;
        }
        while (first < last && schedule->row_hi[first] <= lowest) {
            first++;
        }
        while (first < last && schedule->row_lo[last - 1] > highest) {
            last--;
        }
        group.row_begin = first;
        group.row_count = last - first;
        if (group.row_count > 0) {
            schedule->groups[kept++] = group;
        }
    }
    schedule->group_count = kept;
}

void ra_softmax_schedule_cover(ra_softmax_schedule_t *schedule)
{
    int64_t rows = schedule->params.layout->rows[schedule->params.rank], covered = 0;
    int64_t count = schedule->group_count; /* ascending rows, as the runs they come from */
    for (int64_t i = 0; i <= count; i++) {
        ra_row_group_t group =
            i < count ? schedule->groups[i] : (ra_row_group_t){.row_begin = rows};
        if (group.row_begin > covered) {
            schedule->groups[schedule->group_count++] =
                (ra_row_group_t){.row_begin = covered, .row_count = group.row_begin - covered};
        }
        covered = group.row_begin + group.row_count;
    }
}

bool ra_softmax_schedule_needs(const ra_layout_t *layout, const ra_layout_t *keys, int rank,
                               int owner, bool causal)
{
    const ra_run_t *runs = ra_layout_runs(layout, rank), *held = ra_layout_runs(keys, owner);
    int64_t held_count = ra_layout_run_count(keys, owner), next = 0;
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        while (next < held_count && held[next].document < runs[i].document) {
            next++;
        }
        /* Runs ascend, so the first held one of the document is the one most likely seen. */
        if (next < held_count && held[next].document == runs[i].document &&
            (!causal || held[next].start <= runs[i].start)) {
            return true;
        }
    }
    return false;
}
