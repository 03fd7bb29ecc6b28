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

static ra_status_t create_list(ra_softmax_stages_t *stages, int i,
                               const ra_softmax_kernel_t *kernel, const ra_softmax_block_t *shape,
                               const ra_softmax_schedule_t *schedule)
{
    ra_softmax_block_t block = *shape;
    block.rows = schedule->params.layout->rows[schedule->params.rank];
    block.keys = schedule->keys;
    block.mask = (ra_attention_mask_t){
        .row_lo = schedule->row_lo, .row_hi = schedule->row_hi, .key_pos = schedule->key_pos};
    block.groups = schedule->groups;
    block.group_count = schedule->group_count;
    block.spans = schedule->spans;
    stages->keys[i] = schedule->keys;
    return ra_softmax_list_create(kernel, &block, !schedule->params.reproducible, stages->stream,
                                  &stages->list[i]);
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

static ra_status_t fill_stages(ra_softmax_stages_t *stages, const ra_softmax_kernel_t *kernel,
                               const ra_softmax_block_t *shape, ra_softmax_schedule_t *schedule,
                               const ra_softmax_visit_t *visits)
{
    for (int i = 0; i < stages->count; i++) {
        ra_softmax_visit_schedule(schedule, visits[i]);
        if (schedule->group_count > 0) {
            stages->first = stages->first < 0 ? i : stages->first;
            stages->last = i;
        }
    }
    for (int i = stages->first; i >= 0 && i <= stages->last; i++) {
        ra_softmax_visit_schedule(schedule, visits[i]);
        if (schedule->group_count == 0) {
            continue;
        }
        if (i == stages->first || i == stages->last) {
            ra_softmax_schedule_cover(schedule);
        }
        RA_TRY(create_list(stages, i, kernel, shape, schedule));
    }
    if (stages->first == stages->last) {
        return RA_OK;
    }
    return allocate_state(stages, shape, schedule->params.layout->rows[schedule->params.rank]);
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
        stages->first = stages->last = -1;
        stages->list = calloc((size_t)count + 1, sizeof(ra_softmax_list_t *));
        stages->keys = calloc((size_t)count + 1, sizeof(int64_t));
    }
    if (stages == NULL || stages->list == NULL || stages->keys == NULL) {
        ra_softmax_stages_destroy(stages);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %d folds", count);
    }
    ra_status_t status = fill_stages(stages, kernel, shape, schedule, visits);
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
    for (int i = 0; i < stages->count && stages->list != NULL; i++) {
        ra_softmax_list_destroy(stages->list[i]);
    }
    ra_device_free(device, stages->state.m);
    ra_device_free(device, stages->state.l);
    ra_device_free(device, stages->state.o);
    free(stages->list);
    free(stages->keys);
    free(stages);
}

ra_status_t ra_softmax_stages_fold(const ra_softmax_stages_t *stages, int i,
                                   const ra_softmax_cuda_call_t *call)
{
    if (stages->list[i] == NULL) {
        return RA_OK;
    }
    ra_softmax_cuda_call_t fold = *call;
    ra_softmax_block_t block = *call->block;
    block.keys = stages->keys[i];
    fold.block = &block;
    fold.state = stages->first == stages->last ? NULL : &stages->state;
    fold.fresh = i == stages->first;
    if (i != stages->last) {
        fold.out = NULL;
        fold.lse = NULL;
    }
    return ra_softmax_list_fold(stages->list[i], &fold);
}
