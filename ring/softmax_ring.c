#include "ring/softmax_ring.h"

#include "attention/softmax_block.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include "ring/block_tour.h"
#include "ring/halo.h"
#include "ring/kv_gather.h"
#include "ring/ring_tags.h"
#include "ring/softmax_schedule.h"
#include "ring/softmax_stages.h"
#include <stdlib.h>

/* Left free beside transfers that are kernels: as many thread blocks as comm/ gives to NCCL. */
enum { TRANSFER_PROCESSORS = 16 };

/*
 * Keys of a launch where documents are long: keys and values of a head of 128 are 32 MiB then,
 * which stay in the L2. Up to LONG_KEYS one rank's multiprocessors keep together by themselves, as
 * each row begins at its own key; those of several ranks, whose rows see whole runs, up to half of
 * it.
 */
enum { PART_KEYS = 1 << 16, LONG_KEYS = 1 << 20 };

struct ra_softmax_ring {
    ra_comm_t *comm;     /* borrowed */
    ra_stream_t *stream; /* borrowed */
    ra_softmax_ring_params_t params;
    int rank;
    int64_t rows;
    const ra_softmax_kernel_t *kernel;
    ra_softmax_schedule_t *schedule;
    ra_block_tour_t *ring;         /* without a window */
    ra_block_tour_t *prefix;       /* without a window, with a prefix */
    ra_halo_t *halo;               /* with a window */
    ra_kv_gather_t *gather;        /* in place of all of these */
    void *halo_kv;                 /* [2][halo rows][G * D] */
    float *m, *l;                  /* [H, rows]; without stages */
    int ring_count;                /* blocks that go round */
    ra_block_stop_t *prefix_stops; /* [prefix_count] cached blocks that this rank visits */
    int prefix_count;
    ra_softmax_stages_t *stages; /* on devices that fold by lists */
    int stage;                   /* during a call: the next one */
    ra_ring_stats_t stats;       /* but for the waits, which the parts count */
};

static ra_status_t check_params(const ra_comm_t *comm, const ra_softmax_ring_params_t *params)
{
    const ra_layout_t *layout = params->layout;
    if (layout->ranks != ra_comm_size(comm) || params->window < 0 ||
        (params->window > 0 && !params->causal)) {
        return ra_fail(RA_ERR_INVALID, "ring",
                       "softmax ring: layout of %d ranks on %d, window %lld, causal %d",
                       layout->ranks, ra_comm_size(comm), (long long)params->window,
                       params->causal);
    }
    if (params->reproducible &&
        (!params->causal || (layout->kind != RA_LAYOUT_CONTIGUOUS && layout->ranks > 1))) {
        return ra_fail(RA_ERR_UNSUPPORTED, "ring",
                       "reproducible attention needs a causal mask and the contiguous layout");
    }
    return ra_layout_check_prefix(layout, params->prefix);
}

/* What all folds have in common. */
static ra_softmax_block_t shape_of(const ra_softmax_ring_t *plan)
{
    int64_t width = (int64_t)plan->params.kv_heads * plan->params.head_dim;
    return (ra_softmax_block_t){.rows = plan->rows,
                                .heads = plan->params.heads,
                                .kv_heads = plan->params.kv_heads,
                                .head_dim = plan->params.head_dim,
                                .scale = plan->params.scale,
                                .dtype = plan->params.dtype,
                                .k_stride = width,
                                .v_stride = width};
}

static ra_status_t choose_kernel(ra_softmax_ring_t *plan)
{
    const char *name = plan->params.kernel == NULL ? "auto" : plan->params.kernel;
    ra_softmax_block_t shape = shape_of(plan);
    return ra_softmax_select(name, ra_stream_kind(plan->stream), &shape, &plan->kernel);
}

static int64_t kv_row_bytes(const ra_softmax_ring_t *plan)
{
    return (int64_t)plan->params.kv_heads * plan->params.head_dim *
           ra_dtype_bytes(plan->params.dtype);
}

static int64_t kv_bytes(const ra_softmax_ring_t *plan, int64_t rows)
{
    return 2 * rows * kv_row_bytes(plan);
}

/* Blocks that must go round: one more than the farthest one that any rank needs. */
static int ring_steps(const ra_layout_t *layout, bool causal)
{
    for (int step = layout->ranks - 1; step > 0; step--) {
        for (int r = 0; r < layout->ranks; r++) {
            int owner = (r - step + layout->ranks) % layout->ranks;
            if (ra_softmax_schedule_needs(layout, layout, r, owner, causal)) {
                return step + 1;
            }
        }
    }
    return 1;
}

static ra_status_t create_ring(ra_softmax_ring_t *plan, int64_t *block_bytes)
{
    const ra_layout_t *layout = plan->params.layout;
    for (int r = 0; r < layout->ranks; r++) {
        block_bytes[r] = kv_bytes(plan, layout->rows[r]);
    }
    plan->ring_count = ring_steps(layout, plan->params.causal);
    return ra_block_tour_create_ring(plan->comm, ra_stream_device(plan->stream), RA_TAG_RING_BLOCK,
                                     block_bytes, plan->ring_count, &plan->ring);
}

/*
 * Cached blocks come straight from their owners. Reproducible: from the last owner down, which is
 * descending positions for every document; else each rank starts at its own, to spread the load.
 */
static ra_status_t create_prefix(ra_softmax_ring_t *plan, int64_t *block_bytes,
                                 ra_block_stop_t *borrowers)
{
    const ra_layout_t *layout = plan->params.layout, *prefix = plan->params.prefix;
    int ranks = layout->ranks, borrower_count = 0;
    for (int i = 0; i < ranks; i++) {
        int owner = plan->params.reproducible ? ranks - 1 - i : (plan->rank - i + ranks) % ranks;
        int peer = (plan->rank + i) % ranks;
        block_bytes[i] = kv_bytes(plan, prefix->rows[i]);
        if (ra_softmax_schedule_needs(layout, prefix, plan->rank, owner, false)) {
            plan->prefix_stops[plan->prefix_count++] = (ra_block_stop_t){.rank = owner, .step = i};
        }
        if (i > 0 && ra_softmax_schedule_needs(layout, prefix, peer, plan->rank, false)) {
            int step = plan->params.reproducible ? ranks - 1 - plan->rank : i;
            borrowers[borrower_count++] = (ra_block_stop_t){.rank = peer, .step = step};
        }
    }
    return ra_block_tour_create_direct(
        plan->comm, ra_stream_device(plan->stream), RA_TAG_RING_PREFIX, block_bytes,
        plan->prefix_stops, plan->prefix_count, borrowers, borrower_count, &plan->prefix);
}

static ra_status_t create_tours(ra_softmax_ring_t *plan)
{
    size_t ranks = (size_t)plan->params.layout->ranks;
    int64_t *block_bytes = calloc(ranks, sizeof(int64_t));
    plan->prefix_stops = calloc(ranks, sizeof(*plan->prefix_stops));
    ra_block_stop_t *borrowers = calloc(ranks, sizeof(*borrowers));
    ra_status_t status = RA_OK;
    if (block_bytes == NULL || plan->prefix_stops == NULL || borrowers == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate lists of %zu ranks", ranks);
    }
    if (status == RA_OK) {
        status = create_ring(plan, block_bytes);
    }
    if (status == RA_OK && plan->params.prefix != NULL) {
        status = create_prefix(plan, block_bytes, borrowers);
    }
    free(block_bytes);
    free(borrowers);
    return status;
}

static ra_status_t create_halo(ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    int64_t align = params->reproducible ? params->layout->tile : 1;
    RA_TRY(ra_halo_create(plan->comm, plan->stream, params->layout, params->prefix,
                          params->window - 1, align, 2, &plan->halo));
    return ra_device_alloc(ra_stream_device(plan->stream), kv_bytes(plan, ra_halo_rows(plan->halo)),
                           &plan->halo_kv);
}

/* Where some rank needs another's keys, and the order of the folds is free. */
static ra_status_t create_gather(ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    if (!ra_softmax_uses_lists(plan->kernel) || params->walk || params->reproducible ||
        params->window > 0 || params->prefix != NULL ||
        ring_steps(params->layout, params->causal) == 1) {
        return RA_OK;
    }
    return ra_kv_gather_create(plan->comm, plan->stream, params->layout, params->causal,
                               kv_row_bytes(plan), ra_softmax_waits_for_keys(plan->kernel), 0,
                               &plan->gather);
}

/* One rank has no state in memory otherwise, so none to save memory. */
static ra_stage_cut_t stage_cut(const ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    const ra_layout_t *layout = params->layout;
    bool alone = layout->ranks == 1;
    int64_t long_keys = alone ? LONG_KEYS : LONG_KEYS / 2, longest = 0;
    if (params->reproducible || params->window > 0 || (alone && params->walk)) {
        return (ra_stage_cut_t){0};
    }
    if (params->part_keys > 0) {
        return (ra_stage_cut_t){.part_keys = params->part_keys};
    }
    for (int64_t d = 0; d < layout->document_count; d++) {
        const ra_document_t *document = &layout->documents[d];
        longest = ra_max_i64(longest, document->first + document->count);
    }
    return longest > long_keys ? (ra_stage_cut_t){PART_KEYS, long_keys} : (ra_stage_cut_t){0};
}

/* The folds of a call in their order, which is that of the walks below. */
static ra_status_t create_stages(ra_softmax_ring_t *plan)
{
    int size = plan->params.layout->ranks, count = 0;
    ra_softmax_visit_t *visits =
        calloc((size_t)(plan->ring_count + plan->prefix_count) + 2, sizeof(*visits));
    if (visits == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate visits of %d ranks", size);
    }
    if (plan->halo != NULL) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_RING, plan->rank};
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_HALO, plan->rank};
    }
    if (plan->gather != NULL && (plan->gather->rows == 0 || !plan->gather->gated)) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_RING, plan->rank};
    }
    if (plan->gather != NULL && plan->gather->rows > 0) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_GATHERED, plan->rank};
    }
    for (int i = 0; i < plan->ring_count; i++) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_RING, (plan->rank - i + size) % size};
    }
    for (int i = 0; i < plan->prefix_count; i++) {
        visits[count++] = (ra_softmax_visit_t){RA_STAGE_PREFIX, plan->prefix_stops[i].rank};
    }
    ra_softmax_block_t shape = shape_of(plan);
    ra_status_t status =
        ra_softmax_stages_create(plan->kernel, &shape, plan->schedule, visits, count,
                                 stage_cut(plan), plan->stream, &plan->stages);
    free(visits);
    return status;
}

static ra_status_t fill_plan(ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    RA_TRY(choose_kernel(plan));
    RA_TRY(create_gather(plan));
    if (params->window > 0) {
        RA_TRY(create_halo(plan));
    } else if (plan->gather == NULL) {
        RA_TRY(create_tours(plan));
    }
    ra_softmax_schedule_params_t schedule = {
        .layout = params->layout,
        .prefix = params->prefix,
        .rank = plan->rank,
        .window = params->window,
        .causal = params->causal,
        .reproducible = params->reproducible,
        .halo_runs = plan->halo != NULL ? ra_halo_runs(plan->halo) : NULL,
        .halo_rows = plan->halo != NULL ? ra_halo_rows(plan->halo) : 0,
        .gather = plan->gather,
    };
    RA_TRY(ra_softmax_schedule_create(&schedule, &plan->schedule));
    if (ra_softmax_uses_lists(plan->kernel)) {
        return create_stages(plan);
    }
    int64_t state_bytes = plan->rows * params->heads * (int64_t)sizeof(float);
    ra_device_t *device = ra_stream_device(plan->stream);
    RA_TRY(ra_device_alloc(device, state_bytes, (void **)&plan->m));
    return ra_device_alloc(device, state_bytes, (void **)&plan->l);
}

ra_status_t ra_softmax_ring_create(ra_comm_t *comm, ra_stream_t *stream,
                                   const ra_softmax_ring_params_t *params,
                                   ra_softmax_ring_t **plan_p)
{
    RA_TRY(check_params(comm, params));
    ra_softmax_ring_t *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a softmax ring");
    }
    plan->comm = comm;
    plan->stream = stream;
    plan->params = *params;
    plan->rank = ra_comm_rank(comm);
    plan->rows = params->layout->rows[plan->rank];
    ra_status_t status = fill_plan(plan);
    if (status != RA_OK) {
        ra_softmax_ring_destroy(plan);
        return status;
    }
    *plan_p = plan;
    return RA_OK;
}

void ra_softmax_ring_destroy(ra_softmax_ring_t *plan)
{
    if (plan == NULL) {
        return;
    }
    ra_device_t *device = ra_stream_device(plan->stream);
    ra_device_free(device, plan->m);
    ra_device_free(device, plan->l);
    ra_device_free(device, plan->halo_kv);
    free(plan->prefix_stops);
    ra_softmax_stages_destroy(plan->stages);
    ra_softmax_schedule_destroy(plan->schedule);
    ra_halo_destroy(plan->halo);
    ra_kv_gather_destroy(plan->gather);
    ra_block_tour_destroy(plan->prefix);
    ra_block_tour_destroy(plan->ring);
    free(plan);
}

void *ra_softmax_ring_own_kv(const ra_softmax_ring_t *plan, int64_t *plane_rows_p)
{
    const ra_kv_gather_t *gather = plan->gather;
    bool placed = gather != NULL && gather->gated && gather->rows > 0;
    *plane_rows_p = placed ? gather->rows : plan->rows;
    return placed ? gather->kv : NULL;
}

static ra_softmax_state_t state_of(const ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    return (ra_softmax_state_t){.m = plan->m, .l = plan->l, .o = io->o, .o_stride = io->o_stride};
}

static ra_status_t fold_block(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io,
                              ra_softmax_block_t *block)
{
    const ra_softmax_schedule_t *schedule = plan->schedule;
    if (schedule->group_count == 0) {
        return RA_OK;
    }
    block->mask = (ra_attention_mask_t){
        .row_lo = schedule->row_lo, .row_hi = schedule->row_hi, .key_pos = schedule->key_pos};
    block->groups = schedule->groups;
    block->group_count = schedule->group_count;
    block->spans = schedule->spans;
    ra_softmax_state_t state = state_of(plan, io);
    return ra_softmax_fold(plan->kernel, block, &state, plan->stream);
}

/* What a kernel beside transfers waits for, or leaves to them. */
static void share_device(const ra_softmax_ring_t *plan, ra_softmax_visit_t visit,
                         ra_softmax_cuda_call_t *call)
{
    const ra_kv_gather_t *gather = plan->gather;
    if (visit.source == RA_STAGE_GATHERED && gather->gated) {
        call->ready = gather->gates;
        call->epoch = gather->epoch;
        call->gate_keys = gather->gate_keys;
    }
    bool beside = visit.source == RA_STAGE_RING && (gather != NULL || plan->ring_count > 1);
    if (beside && ra_comm_uses_kernels(plan->comm)) {
        call->spare = TRANSFER_PROCESSORS;
    }
}

/* Fold what was visited: [2][its keys][G * D]. */
static ra_status_t fold(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io, const void *kv,
                        ra_softmax_visit_t visit)
{
    int stage = plan->stage++;
    if (plan->stages == NULL) {
        ra_softmax_visit_schedule(plan->schedule, visit);
    }
    ra_softmax_block_t block = shape_of(plan);
    block.keys = plan->stages != NULL ? plan->stages->keys[stage] : plan->schedule->keys;
    block.q = io->q;
    block.q_stride = io->q_stride;
    block.k = kv;
    block.v = ra_dtype_at(kv, block.keys * block.k_stride, block.dtype);

    ra_span_t span = ra_trace_begin("softmax block");
    ra_status_t status;
    if (plan->stages != NULL) {
        ra_softmax_cuda_call_t call = {.block = &block,
                                       .out = io->o,
                                       .out_dtype = plan->params.dtype,
                                       .out_stride = io->o_stride,
                                       .lse = io->lse};
        share_device(plan, visit, &call);
        status = ra_softmax_stages_fold(plan->stages, stage, &call);
    } else {
        status = fold_block(plan, io, &block);
    }
    ra_trace_end(span, plan->rank, RA_LANE_COMPUTE, visit.owner);
    return status;
}

static ra_status_t walk(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io,
                        ra_block_tour_t *tour, bool of_prefix)
{
    int owner = 0;
    RA_TRY(ra_block_tour_begin(tour, of_prefix ? io->prefix_kv : io->kv));
    for (;;) {
        const void *kv = NULL;
        RA_TRY(ra_block_tour_next(tour, &owner, &kv));
        if (owner < 0) {
            return ra_block_tour_end(tour);
        }
        ra_softmax_visit_t visit = {of_prefix ? RA_STAGE_PREFIX : RA_STAGE_RING, owner};
        RA_TRY(fold(plan, io, kv, visit));
    }
}

static ra_status_t walk_or_cancel(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io,
                                  ra_block_tour_t *tour, bool of_prefix)
{
    ra_status_t status = walk(plan, io, tour, of_prefix);
    if (status != RA_OK) {
        ra_block_tour_cancel(tour, status);
    }
    return status;
}

/* The halo is in flight while the run's own keys are folded. */
static ra_status_t fold_window(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    int64_t row_bytes = kv_row_bytes(plan);
    const ra_layout_t *prefix = plan->params.prefix;
    ra_halo_io_t fetch = {
        .row_bytes = row_bytes,
        .planes = 2,
        .rows = io->kv,
        .plane_bytes = plan->rows * row_bytes,
        .prefix_rows = io->prefix_kv,
        .prefix_plane_bytes = prefix == NULL ? 0 : prefix->rows[plan->rank] * row_bytes,
        .out = plan->halo_kv,
        .out_plane_bytes = ra_halo_rows(plan->halo) * row_bytes,
    };
    ra_status_t status = ra_halo_start(plan->halo, &fetch);
    if (status != RA_OK) {
        ra_comm_abort(plan->comm, status);
        return status;
    }
    status = fold(plan, io, io->kv, (ra_softmax_visit_t){RA_STAGE_RING, plan->rank});
    if (status != RA_OK) {
        ra_comm_abort(plan->comm, status); /* ends the wait below */
        ra_halo_finish(plan->halo);
        return status;
    }
    RA_TRY_GOTO(ra_halo_finish(plan->halo), err_abort);
    RA_TRY_GOTO(fold(plan, io, plan->halo_kv, (ra_softmax_visit_t){RA_STAGE_HALO, plan->rank}),
                err_abort);
    return RA_OK;

err_abort:
    ra_comm_abort(plan->comm, status);
    return status;
}

/* The others' keys are on their way while the own ones are folded. */
static ra_status_t fold_gathered(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    ra_kv_gather_t *gather = plan->gather;
    const ra_softmax_visit_t own = {RA_STAGE_RING, plan->rank};
    const ra_softmax_visit_t all = {RA_STAGE_GATHERED, plan->rank};
    bool at_once = gather->gated && gather->rows > 0;
    RA_TRY(ra_kv_gather_start(gather, io->kv));
    ra_status_t status = fold(plan, io, at_once ? gather->kv : io->kv, at_once ? all : own);
    if (status != RA_OK) {
        ra_kv_gather_cancel(gather, status);
        return status;
    }
    RA_TRY(ra_kv_gather_finish(gather));
    if (at_once || gather->rows == 0) {
        return RA_OK;
    }
    status = fold(plan, io, gather->kv, all);
    if (status != RA_OK) {
        ra_comm_abort(plan->comm, status);
    }
    return status;
}

static ra_status_t fold_all(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    plan->stage = 0;
    if (plan->gather != NULL) {
        return fold_gathered(plan, io);
    }
    if (plan->halo != NULL) {
        RA_TRY(fold_window(plan, io));
    } else {
        RA_TRY(walk_or_cancel(plan, io, plan->ring, false));
    }
    return plan->prefix != NULL ? walk_or_cancel(plan, io, plan->prefix, true) : RA_OK;
}

ra_status_t ra_softmax_ring_run(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    ra_softmax_state_t state = state_of(plan, io);
    int64_t before = ra_clock_ns();
    plan->stats.calls++;
    if (plan->stages != NULL) { /* they reset and finish */
        RA_TRY(fold_all(plan, io));
    } else {
        RA_TRY(ra_softmax_reset(plan->rows, params->heads, params->head_dim, &state, plan->stream));
        RA_TRY(fold_all(plan, io));
        RA_TRY(ra_softmax_finish(plan->rows, params->heads, params->head_dim, &state, io->lse,
                                 plan->stream));
    }
    plan->stats.total_ns += ra_clock_ns() - before;
    return RA_OK;
}

ra_ring_stats_t ra_softmax_ring_stats(const ra_softmax_ring_t *plan)
{
    ra_ring_stats_t stats = plan->stats;
    if (plan->halo != NULL) {
        ra_ring_stats_t halo = ra_halo_stats(plan->halo);
        stats.wait_ns += halo.wait_ns;
        stats.received_bytes += halo.received_bytes;
    }
    if (plan->ring != NULL) {
        ra_block_tour_add_stats(plan->ring, &stats);
    }
    if (plan->prefix != NULL) {
        ra_block_tour_add_stats(plan->prefix, &stats);
    }
    if (plan->gather != NULL) {
        stats.wait_ns += plan->gather->stats.wait_ns;
        stats.received_bytes += plan->gather->stats.received_bytes;
    }
    return stats;
}
