#include "ring/softmax_stages.h"

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

/* Scratch of making the stages. */
typedef struct stage_rows {
    const ra_softmax_kernel_t *kernel;
    const ra_softmax_block_t *shape;
    ra_softmax_schedule_t *schedule;
    int64_t rows;
    int32_t *first, *last;  /* [rows] stage of each row */
    ra_row_group_t *groups; /* of one launch */
    int64_t group_room;
} stage_rows_t;

enum { STAGE_FRESH = 1, STAGE_OUT = 2, STAGE_KINDS = 4 };

/* How stage @a i treats a row. */
static int kind_of(const stage_rows_t *scratch, int64_t row, int i)
{
    return (scratch->first[row] == i ? STAGE_FRESH : 0) | (scratch->last[row] == i ? STAGE_OUT : 0);
}

static void visit(stage_rows_t *scratch, const ra_softmax_visit_t *visits, int i)
{
    ra_softmax_visit_schedule(scratch->schedule, visits[i]);
    if (i == 0) {
        ra_softmax_schedule_cover(scratch->schedule); /* rows that see nothing are written too */
    }
}

static void note_stages(stage_rows_t *scratch, const ra_softmax_visit_t *visits, int count)
{
    for (int64_t r = 0; r < scratch->rows; r++) {
        scratch->first[r] = scratch->last[r] = -1;
    }
    for (int i = 0; i < count; i++) {
        visit(scratch, visits, i);
        for (int64_t g = 0; g < scratch->schedule->group_count; g++) {
            const ra_row_group_t *group = &scratch->schedule->groups[g];
            for (int64_t r = group->row_begin; r < group->row_begin + group->row_count; r++) {
                scratch->first[r] = scratch->first[r] < 0 ? i : scratch->first[r];
                scratch->last[r] = i;
            }
        }
    }
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

/* The rows of stage @a i that are of one kind. */
static ra_status_t select_rows(stage_rows_t *scratch, int i, int kind, int64_t *count)
{
    *count = 0;
    for (int64_t g = 0; g < scratch->schedule->group_count; g++) {
        ra_row_group_t part = scratch->schedule->groups[g];
        int64_t end = part.row_begin + part.row_count;
        for (int64_t r = part.row_begin; r < end; r = part.row_begin + part.row_count) {
            int here = kind_of(scratch, r, i);
            part.row_begin = r;
            part.row_count = 1;
            while (r + part.row_count < end && kind_of(scratch, r + part.row_count, i) == here) {
                part.row_count++;
            }
            if (here == kind) {
                RA_TRY(push_group(scratch, (*count)++, part));
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

static ra_status_t create_launches(ra_softmax_stages_t *stages, stage_rows_t *scratch, int i)
{
    int made = stages->begin[i];
    for (int kind = 0; kind < STAGE_KINDS; kind++) {
        int64_t group_count = 0;
        RA_TRY(select_rows(scratch, i, kind, &group_count));
        if (group_count == 0) {
            continue;
        }
        ra_softmax_launch_t *launch = &stages->launches[made];
        RA_TRY(create_list(scratch, group_count, stages->stream, &launch->list));
        launch->fresh = (kind & STAGE_FRESH) != 0;
        launch->out = (kind & STAGE_OUT) != 0;
        made++;
    }
    stages->keys[i] = scratch->schedule->keys;
    stages->begin[i + 1] = made;
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
                               const ra_softmax_visit_t *visits)
{
    scratch->first = malloc((size_t)(scratch->rows + 1) * sizeof(int32_t));
    scratch->last = malloc((size_t)(scratch->rows + 1) * sizeof(int32_t));
    if (scratch->first == NULL || scratch->last == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate the stages of %lld rows",
                       (long long)scratch->rows);
    }
    note_stages(scratch, visits, stages->count);
    for (int i = 0; i < stages->count; i++) {
        visit(scratch, visits, i);
        RA_TRY(create_launches(stages, scratch, i));
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
                                     ra_stream_t *stream, ra_softmax_stages_t **stages_p)
{
    ra_softmax_stages_t *stages = calloc(1, sizeof(*stages));
    if (stages != NULL) {
        stages->stream = stream;
        stages->count = count;
        stages->begin = calloc((size_t)count + 1, sizeof(int));
        stages->keys = calloc((size_t)count + 1, sizeof(int64_t));
        stages->launches = calloc(STAGE_KINDS * (size_t)count + 1, sizeof(*stages->launches));
    }
    if (stages == NULL || stages->begin == NULL || stages->keys == NULL ||
        stages->launches == NULL) {
        ra_softmax_stages_destroy(stages);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %d folds", count);
    }
    stage_rows_t scratch = {.kernel = kernel,
                            .shape = shape,
                            .schedule = schedule,
                            .rows = schedule->params.layout->rows[schedule->params.rank]};
    ra_status_t status = fill_stages(stages, &scratch, visits);
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
    for (int i = 0; stages->launches != NULL && i < STAGE_KINDS * stages->count; i++) {
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
