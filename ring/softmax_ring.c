#include "ring/softmax_ring.h"

#include "attention/softmax_block.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include "ring/block_tour.h"
#include "ring/halo.h"
#include "ring/ring_tags.h"
#include "ring/softmax_schedule.h"
#include <stdlib.h>

struct ra_softmax_ring {
    ra_comm_t *comm;     /* borrowed */
    ra_stream_t *stream; /* borrowed */
    ra_softmax_ring_params_t params;
    int rank;
    int64_t rows;
    const ra_softmax_kernel_t *kernel;
    ra_softmax_schedule_t *schedule;
    ra_block_tour_t *ring;   /* without a window */
    ra_block_tour_t *prefix; /* without a window, with a prefix */
    ra_halo_t *halo;         /* with a window */
    float *halo_kv;          /* [2][halo rows][G * D] */
    float *m, *l;            /* [H, rows] */
    ra_ring_stats_t stats;   /* but for the waits, which the parts count */
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

static ra_status_t choose_kernel(ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    ra_softmax_block_t shape = {.heads = params->heads,
                                .kv_heads = params->kv_heads,
                                .head_dim = params->head_dim,
                                .scale = params->scale,
                                .dtype = RA_F32};
    return ra_softmax_select(params->kernel == NULL ? "auto" : params->kernel,
                             ra_device_kind(ra_stream_device(plan->stream)), &shape, &plan->kernel);
}

static int64_t kv_row_floats(const ra_softmax_ring_t *plan)
{
    return (int64_t)plan->params.kv_heads * plan->params.head_dim;
}

static int64_t kv_bytes(const ra_softmax_ring_t *plan, int64_t rows)
{
    return 2 * rows * kv_row_floats(plan) * (int64_t)sizeof(float);
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
    return ra_block_tour_create_ring(plan->comm, ra_stream_device(plan->stream), RA_TAG_RING_BLOCK,
                                     block_bytes, ring_steps(layout, plan->params.causal),
                                     &plan->ring);
}

/*
 * Cached blocks come straight from their owners. Reproducible: from the last owner down, which is
 * descending positions for every document; else each rank starts at its own, to spread the load.
 */
static ra_status_t create_prefix(ra_softmax_ring_t *plan, int64_t *block_bytes,
                                 ra_block_stop_t *owners, ra_block_stop_t *borrowers)
{
    const ra_layout_t *layout = plan->params.layout, *prefix = plan->params.prefix;
    int ranks = layout->ranks, count = 0, borrower_count = 0;
    for (int i = 0; i < ranks; i++) {
        int owner = plan->params.reproducible ? ranks - 1 - i : (plan->rank - i + ranks) % ranks;
        int peer = (plan->rank + i) % ranks;
        block_bytes[i] = kv_bytes(plan, prefix->rows[i]);
        if (ra_softmax_schedule_needs(layout, prefix, plan->rank, owner, false)) {
            owners[count++] = (ra_block_stop_t){.rank = owner, .step = i};
        }
        if (i > 0 && ra_softmax_schedule_needs(layout, prefix, peer, plan->rank, false)) {
            int step = plan->params.reproducible ? ranks - 1 - plan->rank : i;
            borrowers[borrower_count++] = (ra_block_stop_t){.rank = peer, .step = step};
        }
    }
    return ra_block_tour_create_direct(plan->comm, ra_stream_device(plan->stream),
                                       RA_TAG_RING_PREFIX, block_bytes, owners, count, borrowers,
                                       borrower_count, &plan->prefix);
}

static ra_status_t create_tours(ra_softmax_ring_t *plan)
{
    size_t ranks = (size_t)plan->params.layout->ranks;
    int64_t *block_bytes = calloc(ranks, sizeof(int64_t));
    ra_block_stop_t *owners = calloc(ranks, sizeof(*owners));
    ra_block_stop_t *borrowers = calloc(ranks, sizeof(*borrowers));
    ra_status_t status = RA_OK;
    if (block_bytes == NULL || owners == NULL || borrowers == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate lists of %zu ranks", ranks);
    }
    if (status == RA_OK) {
        status = create_ring(plan, block_bytes);
    }
    if (status == RA_OK && plan->params.prefix != NULL) {
        status = create_prefix(plan, block_bytes, owners, borrowers);
    }
    free(block_bytes);
    free(owners);
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
                           (void **)&plan->halo_kv);
}

static ra_status_t fill_plan(ra_softmax_ring_t *plan)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    RA_TRY(choose_kernel(plan));
    if (params->window > 0) {
        RA_TRY(create_halo(plan));
    } else {
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
    };
    RA_TRY(ra_softmax_schedule_create(&schedule, &plan->schedule));
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
    ra_softmax_schedule_destroy(plan->schedule);
    ra_halo_destroy(plan->halo);
    ra_block_tour_destroy(plan->prefix);
    ra_block_tour_destroy(plan->ring);
    free(plan);
}

static ra_softmax_state_t state_of(const ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    return (ra_softmax_state_t){.m = plan->m, .l = plan->l, .o = io->o, .o_stride = io->o_stride};
}

/* Fold the block that the schedule was last filled for. */
static ra_status_t fold(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io, const float *kv,
                        int owner)
{
    const ra_softmax_schedule_t *schedule = plan->schedule;
    if (schedule->group_count == 0) {
        return RA_OK;
    }
    int64_t row_floats = kv_row_floats(plan);
    ra_softmax_block_t block = {.rows = plan->rows,
                                .keys = schedule->keys,
                                .heads = plan->params.heads,
                                .kv_heads = plan->params.kv_heads,
                                .head_dim = plan->params.head_dim,
                                .scale = plan->params.scale,
                                .dtype = RA_F32,
                                .q = io->q,
                                .k = kv,
                                .v = kv + schedule->keys * row_floats,
                                .q_stride = io->q_stride,
                                .k_stride = row_floats,
                                .v_stride = row_floats,
                                .mask = {.row_lo = schedule->row_lo,
                                         .row_hi = schedule->row_hi,
                                         .key_pos = schedule->key_pos},
                                .groups = schedule->groups,
                                .group_count = schedule->group_count,
                                .spans = schedule->spans};
    ra_softmax_state_t state = state_of(plan, io);
    ra_span_t span = ra_trace_begin("softmax block");
    ra_status_t status = ra_softmax_fold(plan->kernel, &block, &state, plan->stream);
    ra_trace_end(span, plan->rank, RA_LANE_COMPUTE, owner);
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
        ra_softmax_schedule_block(plan->schedule, of_prefix, owner);
        RA_TRY(fold(plan, io, kv, owner));
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
    int64_t row_bytes = kv_row_floats(plan) * (int64_t)sizeof(float);
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
    ra_softmax_schedule_block(plan->schedule, false, plan->rank);
    status = fold(plan, io, io->kv, plan->rank);
    if (status != RA_OK) {
        ra_comm_abort(plan->comm, status); /* ends the wait below */
        ra_halo_finish(plan->halo);
        return status;
    }
    RA_TRY_GOTO(ra_halo_finish(plan->halo), err_abort);
    ra_softmax_schedule_halo(plan->schedule);
    RA_TRY_GOTO(fold(plan, io, plan->halo_kv, plan->rank), err_abort);
    return RA_OK;

err_abort:
    ra_comm_abort(plan->comm, status);
    return status;
}

ra_status_t ra_softmax_ring_run(ra_softmax_ring_t *plan, const ra_softmax_ring_io_t *io)
{
    const ra_softmax_ring_params_t *params = &plan->params;
    ra_softmax_state_t state = state_of(plan, io);
    int64_t before = ra_clock_ns();
    plan->stats.calls++;
    RA_TRY(ra_softmax_reset(plan->rows, params->heads, params->head_dim, &state, plan->stream));
    if (plan->halo != NULL) {
        RA_TRY(fold_window(plan, io));
    } else {
        RA_TRY(walk_or_cancel(plan, io, plan->ring, false));
    }
    if (plan->prefix != NULL) {
        RA_TRY(walk_or_cancel(plan, io, plan->prefix, true));
    }
    RA_TRY(ra_softmax_finish(plan->rows, params->heads, params->head_dim, &state, io->lse,
                             plan->stream));
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
    return stats;
}
