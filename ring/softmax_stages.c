#include "ring/softmax_stages.h"

#include "base/checked.h"
#include <stdlib.h>

void ra_softmax_visit_schedule(ra_softmax_schedule_t *schedule, ra_softmax_visit_t visit)
{
    if (visit.source == RA_STAGE_HALO) {
        ra_softmax_schedule_halo(schedule);
    } else if (visit.source == RA_STAGE_GATHERED) {
        ra_softmax_schedule_gathered(schedule);
    } else {
        ra_softmax_schedule_block(schedule, visit.source == RA_STAGE_PREFIX, visit.owner);
    }
}

/* A launch's worth of keys of a stage. */
typedef struct stage_part {
    int stage;
    bool whole; /* all keys of the stage */
    ra_schedule_part_t keys;
} stage_part_t;

/* Scratch of making the stages. */
typedef struct stage_rows {
    const ra_softmax_kernel_t *kernel;
    const ra_softmax_block_t *shape;
    const ra_softmax_visit_t *visits;
    ra_softmax_schedule_t *schedule;
    int64_t rows;
    stage_part_t *parts;
    int part_count, part_room;
    int32_t *first, *last;  /* [rows] part of each row */
    ra_row_group_t *groups; /* of one launch */
    int64_t group_room;
} stage_rows_t;

enum { STAGE_FRESH = 1, STAGE_OUT = 2, STAGE_KINDS = 4 };

/* Rows of keys of a stage. */
static int64_t keys_of(const stage_rows_t *scratch, ra_softmax_visit_t visit)
{
    const ra_softmax_schedule_params_t *params = &scratch->schedule->params;
    switch (visit.source) {
    case RA_STAGE_GATHERED:
        return params->gather->rows;
    case RA_STAGE_HALO:
        return params->halo_rows;
    case RA_STAGE_PREFIX:
        return params->prefix->rows[visit.owner];
    default:
        return params->layout->rows[visit.owner];
    }
}

/* Where the section that begins at row @a begin of a stage's keys ends. */
static int64_t section_end(const stage_rows_t *scratch, ra_softmax_visit_t visit, int64_t begin)
{
    const ra_kv_gather_t *gather = scratch->schedule->params.gather;
    int64_t runs = visit.source == RA_STAGE_GATHERED ? gather->run_count : 0;
    for (int64_t i = 1; i < runs; i++) {
        if (gather->runs[i].row > begin && gather->runs[i].section != gather->runs[i - 1].section) {
            return gather->runs[i].row;
        }
    }
    return keys_of(scratch, visit);
}

static ra_status_t push_part(stage_rows_t *scratch, stage_part_t part)
{
    if (scratch->part_count == scratch->part_room) {
        int room = 2 * scratch->part_room + 64;
        void *grown = realloc(scratch->parts, (size_t)room * sizeof(part));
        if (grown == NULL) {
            return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %d parts", room);
        }
        scratch->parts = grown;
        scratch->part_room = room;
    }
    scratch->parts[scratch->part_count++] = part;
    return RA_OK;
}

static ra_status_t cut_section(stage_rows_t *scratch, int stage, ra_schedule_part_t keys)
{
    int64_t parts = ra_softmax_schedule_parts(scratch->schedule, &keys);
    for (keys.index = 0; keys.index < parts; keys.index++) {
        RA_TRY(push_part(scratch, (stage_part_t){.stage = stage, .keys = keys}));
    }
    return RA_OK;
}

/* Section after section; one part at least a stage. */
static ra_status_t cut_stages(stage_rows_t *scratch, int count, const ra_stage_cut_t *cut)
{
    for (int i = 0; i < count; i++) {
        int64_t keys = keys_of(scratch, scratch->visits[i]), begin = 0;
        if (cut->part_keys == 0 || keys == 0) {
            RA_TRY(push_part(scratch, (stage_part_t){.stage = i, .whole = true}));
            continue;
        }
        ra_softmax_visit_schedule(scratch->schedule, scratch->visits[i]);
        while (begin < keys) {
            int64_t end = section_end(scratch, scratch->visits[i], begin);
            RA_TRY(cut_section(scratch, i,
                               (ra_schedule_part_t){.begin = begin,
                                                    .end = end,
                                                    .keys = cut->part_keys,
                                                    .long_keys = cut->long_keys}));
            begin = end;
        }
    }
    return RA_OK;
}

static void schedule_part(stage_rows_t *scratch, int p)
{
    const stage_part_t *part = &scratch->parts[p];
    if (p == 0 || part[-1].stage != part->stage) {
        ra_softmax_visit_schedule(scratch->schedule, scratch->visits[part->stage]);
    }
    if (!part->whole) {
        ra_softmax_schedule_clip(scratch->schedule, &part->keys);
    }
    if (p == 0) {
        ra_softmax_schedule_cover(scratch->schedule); /* rows that see nothing are written too */
    }
}

static void note_rows(stage_rows_t *scratch, int p, const ra_row_group_t *group)
{
    for (int64_t r = group->row_begin; r < group->row_begin + group->row_count; r++) {
        scratch->first[r] = scratch->first[r] < 0 ? p : scratch->first[r];
        scratch->last[r] = p;
    }
}

static ra_status_t note_parts(stage_rows_t *scratch)
{
    scratch->first = malloc((size_t)(scratch->rows + 1) * sizeof(int32_t));
    scratch->last = malloc((size_t)(scratch->rows + 1) * sizeof(int32_t));
    if (scratch->first == NULL || scratch->last == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate the stages of %lld rows",
                       (long long)scratch->rows);
    }
    for (int64_t r = 0; r < scratch->rows; r++) {
        scratch->first[r] = scratch->last[r] = -1;
    }
    for (int p = 0; p < scratch->part_count; p++) {
        schedule_part(scratch, p);
        for (int64_t g = 0; g < scratch->schedule->group_count; g++) {
            if (scratch->schedule->groups[g].span_count > 0) {
                note_rows(scratch, p, &scratch->schedule->groups[g]);
            }
        }
    }
    for (int64_t r = 0; r < scratch->rows; r++) { /* see nothing: by the first part's cover */
        if (scratch->first[r] < 0) {
            scratch->first[r] = scratch->last[r] = 0;
        }
    }
    return RA_OK;
}

/* How part @a p treats a row; STAGE_KINDS: not at all. */
static int kind_of(const stage_rows_t *scratch, int64_t row, int p)
{
    if (p < scratch->first[row] || p > scratch->last[row]) {
        return STAGE_KINDS;
    }
    return (scratch->first[row] == p ? STAGE_FRESH : 0) | (scratch->last[row] == p ? STAGE_OUT : 0);
}

static ra_status_t push_group(stage_rows_t *scratch, int64_t count, ra_row_group_t group)
{
    if (count == scratch->group_room) {
        int64_t room = 2 * scratch->group_room + 64;
        void *grown = realloc(scratch->groups, (size_t)room * sizeof(group));
        if (grown == NULL) {
            return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %lld groups", (long long)room);
        }
        scratch->groups = grown;
        scratch->group_room = room;
    }
    scratch->groups[count] = group;
    return RA_OK;
}

/* The rows of part @a p that are of one kind. */
static ra_status_t select_rows(stage_rows_t *scratch, int p, int kind, int64_t *count)
{
    *count = 0;
    for (int64_t g = 0; g < scratch->schedule->group_count; g++) {
        ra_row_group_t some = scratch->schedule->groups[g];
        int64_t end = some.row_begin + some.row_count;
        for (int64_t r = some.row_begin; r < end; r = some.row_begin + some.row_count) {
            int here = kind_of(scratch, r, p);
            some.row_begin = r;
            some.row_count = 1;
            while (r + some.row_count < end && kind_of(scratch, r + some.row_count, p) == here) {
                some.row_count++;
            }
            if (here == kind) {
                RA_TRY(push_group(scratch, (*count)++, some));
            }
        }
    }
    return RA_OK;
}

static ra_status_t create_list(const stage_rows_t *scratch, int64_t group_count,
                               ra_stream_t *stream, ra_softmax_list_t **list_p)
{
    const ra_softmax_schedule_t *schedule = scratch->schedule;
    ra_softmax_block_t block = *scratch->shape;
    block.rows = scratch->rows;
    block.keys = schedule->keys;
    block.mask = (ra_attention_mask_t){
        .row_lo = schedule->row_lo, .row_hi = schedule->row_hi, .key_pos = schedule->key_pos};
    block.groups = scratch->groups;
    block.group_count = group_count;
    block.spans = schedule->spans;
    return ra_softmax_list_create(scratch->kernel, &block, !schedule->params.reproducible, stream,
                                  list_p);
}

static ra_status_t create_launches(ra_softmax_stages_t *stages, stage_rows_t *scratch, int p)
{
    schedule_part(scratch, p);
    for (int kind = 0; kind < STAGE_KINDS; kind++) {
        int64_t group_count = 0;
        RA_TRY(select_rows(scratch, p, kind, &group_count));
        if (group_count == 0) {
            continue;
        }
        ra_softmax_launch_t *launch = &stages->launches[stages->launch_count];
        RA_TRY(create_list(scratch, group_count, stages->stream, &launch->list));
        launch->fresh = (kind & STAGE_FRESH) != 0;
        launch->out = (kind & STAGE_OUT) != 0;
        stages->launch_count++;
    }
    return RA_OK;
}

static ra_status_t allocate_state(ra_softmax_stages_t *stages, const ra_softmax_block_t *shape,
                                  int64_t rows)
{
    ra_device_t *device = ra_stream_device(stages->stream);
    int64_t floats = rows * shape->heads * (int64_t)sizeof(float);
    stages->state.o_stride = (int64_t)shape->heads * shape->head_dim;
    RA_TRY(ra_device_alloc(device, floats, (void **)&stages->state.m));
    RA_TRY(ra_device_alloc(device, floats, (void **)&stages->state.l));
    return ra_device_alloc(device, floats * shape->head_dim, (void **)&stages->state.o);
}

static ra_status_t fill_stages(ra_softmax_stages_t *stages, stage_rows_t *scratch,
                               const ra_stage_cut_t *cut)
{
    RA_TRY(cut_stages(scratch, stages->count, cut));
    RA_TRY(note_parts(scratch));
    stages->launches =
        calloc(STAGE_KINDS * (size_t)scratch->part_count + 1, sizeof(*stages->launches));
    if (stages->launches == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %d parts", scratch->part_count);
    }
    for (int p = 0; p < scratch->part_count; p++) {
        int stage = scratch->parts[p].stage;
        RA_TRY(create_launches(stages, scratch, p));
        stages->keys[stage] = keys_of(scratch, scratch->visits[stage]);
        stages->begin[stage + 1] = stages->launch_count;
    }
    for (int64_t r = 0; r < scratch->rows; r++) {
        if (scratch->first[r] != scratch->last[r]) {
            return allocate_state(stages, scratch->shape, scratch->rows);
        }
    }
    return RA_OK;
}

ra_status_t ra_softmax_stages_create(const ra_softmax_kernel_t *kernel,
                                     const ra_softmax_block_t *shape,
                                     ra_softmax_schedule_t *schedule,
                                     const ra_softmax_visit_t *visits, int count,
                                     ra_stage_cut_t cut, ra_stream_t *stream,
                                     ra_softmax_stages_t **stages_p)
{
    ra_softmax_stages_t *stages = calloc(1, sizeof(*stages));
    if (stages != NULL) {
        stages->stream = stream;
        stages->count = count;
        stages->begin = calloc((size_t)count + 1, sizeof(int));
        stages->keys = calloc((size_t)count + 1, sizeof(int64_t));
    }
    if (stages == NULL || stages->begin == NULL || stages->keys == NULL) {
        ra_softmax_stages_destroy(stages);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %d folds", count);
    }
    stage_rows_t scratch = {.kernel = kernel,
                            .shape = shape,
                            .visits = visits,
                            .schedule = schedule,
                            .rows = schedule->params.layout->rows[schedule->params.rank]};
    ra_status_t status = fill_stages(stages, &scratch, &cut);
    free(scratch.parts);
    free(scratch.first);
    free(scratch.last);
    free(scratch.groups);
    if (status != RA_OK) {
        ra_softmax_stages_destroy(stages);
        return status;
    }
    *stages_p = stages;
    return RA_OK;
}

void ra_softmax_stages_destroy(ra_softmax_stages_t *stages)
{
    if (stages == NULL) {
        return;
    }
    ra_device_t *device = ra_stream_device(stages->stream);
    for (int i = 0; i < stages->launch_count; i++) {
        ra_softmax_list_destroy(stages->launches[i].list);
    }
    ra_device_free(device, stages->state.m);
    ra_device_free(device, stages->state.l);
    ra_device_free(device, stages->state.o);
    free(stages->launches);
    free(stages->begin);
    free(stages->keys);
    free(stages);
}

ra_status_t ra_softmax_stages_fold(const ra_softmax_stages_t *stages, int i,
                                   const ra_softmax_cuda_call_t *call)
{
    ra_softmax_block_t block = *call->block;
    block.keys = stages->keys[i];
    for (int at = stages->begin[i]; at < stages->begin[i + 1]; at++) {
        const ra_softmax_launch_t *launch = &stages->launches[at];
        ra_softmax_cuda_call_t fold = *call;
        fold.block = &block;
        fold.fresh = launch->fresh;
        fold.state = launch->fresh && launch->out ? NULL : &stages->state;
        fold.out = launch->out ? call->out : NULL;
        fold.lse = launch->out ? call->lse : NULL;
        RA_TRY(ra_softmax_list_fold(launch->list, &fold));
    }
    return RA_OK;
}
