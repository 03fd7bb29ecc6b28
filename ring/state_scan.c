#include "ring/state_scan.h"

#include "attention/linear_chunk.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include "ring/ring_tags.h"
#include <stdlib.h>

/*
 * A slot holds the map of some tokens, S_out = e^G S_in + B: first G [H], then B [H, Dk, Dv].
 * Folding a slot over its predecessor turns B into the state after those tokens, in place.
 *
 *     default        one slot for each run of a sharded document that has a successor, of all
 *                    ranks (gathered), rank after rank
 *     reproducible   one slot for each tile of this rank
 */
typedef struct own_run {
    const ra_run_t *run;
    int64_t chain;         /* default: slot of run i of its document is chain_slot[chain + i] */
    int64_t index;         /* runs of the document before this one */
    bool is_last;          /* of the document */
    int64_t tiles;         /* including a short one */
    int64_t slot;          /* default: its own, -1 for none; reproducible: of its first tile */
    int64_t landing;       /* reproducible: where the state before it arrives, -1 for none */
    int next_rank;         /* owner of the next run of the document */
    const float *state_in; /* during a call */
} own_run_t;

struct ra_state_scan {
    ra_comm_t *comm;     /* borrowed */
    ra_stream_t *stream; /* borrowed */
    ra_state_scan_params_t params;
    int rank;
    const ra_linear_kernel_t *kernel;
    int64_t state_floats;  /* H * Dk * Dv */
    int64_t header_floats; /* H rounded up, so that states stay aligned */
    own_run_t *runs;
    int64_t run_count;
    int64_t *chain_slot; /* [runs of all ranks], in document order */
    int64_t slot_count;
    float *slots;                      /* [slot_count][header_floats + state_floats] */
    float *totals;                     /* GPU: host copies of G, [slot_count][header_floats] */
    float *device_totals;              /* GPU: the same on the device, in place of the headers */
    int64_t *slot_bytes, *slot_offset; /* [ranks] for the gather */
    float *landing;                    /* [landing_count][state_floats] */
    int64_t landing_count;
    ra_request_t **arrivals, **departures; /* [run_count] */
    ra_linear_segment_t *segments;         /* [segment_most] of a call */
    void *scratch;                         /* the kernel's, on the device */
    int64_t scratch_bytes;
    ra_ring_stats_t stats;
};

static int64_t slot_floats(const ra_state_scan_t *plan)
{
    return plan->header_floats + plan->state_floats;
}

static float *slot_state(const ra_state_scan_t *plan, int64_t slot)
{
    return plan->slots + slot * slot_floats(plan) + plan->header_floats;
}

/* Where G of a slot is for ra_linear_carry(). */
static float *slot_total(const ra_state_scan_t *plan, int64_t slot)
{
    return plan->device_totals != NULL ? plan->device_totals + slot * plan->header_floats
                                       : plan->slots + slot * slot_floats(plan);
}

static ra_status_t check_params(const ra_comm_t *comm, const ra_state_scan_params_t *params)
{
    const ra_layout_t *layout = params->layout;
    int64_t state;
    if (layout->ranks != ra_comm_size(comm) || params->heads < 1 || params->key_dim < 1 ||
        params->value_dim < 1 || !ra_mul_ok(params->key_dim, params->value_dim, &state) ||
        !ra_mul_ok(state, params->heads, &state) || state > INT32_MAX) {
        return ra_fail(RA_ERR_INVALID, "ring",
                       "state scan: %d heads of %d x %d, layout of %d ranks on %d", params->heads,
                       params->key_dim, params->value_dim, layout->ranks, ra_comm_size(comm));
    }
    if (params->reproducible && layout->kind != RA_LAYOUT_CONTIGUOUS && layout->ranks > 1) {
        return ra_fail(RA_ERR_UNSUPPORTED, "ring",
                       "a reproducible state scan needs the contiguous layout");
    }
    return RA_OK;
}

/* Index of a run in layout->document_runs. */
static int64_t place_in_chain(const ra_layout_t *layout, const ra_run_t *run)
{
    return ra_layout_find(layout, run->document, run->start) - layout->document_runs;
}

/* Slots of all runs that have a successor, rank after rank as the gather lays them out. */
static void number_slots_of_runs(ra_state_scan_t *plan)
{
    const ra_layout_t *layout = plan->params.layout;
    int64_t bytes = slot_floats(plan) * (int64_t)sizeof(float);
    for (int r = 0; r < layout->ranks; r++) {
        plan->slot_offset[r] = plan->slot_count * bytes;
        const ra_run_t *runs = ra_layout_runs(layout, r);
        for (int64_t i = 0; i < ra_layout_run_count(layout, r); i++) {
            int64_t at = place_in_chain(layout, &runs[i]);
            int64_t end = layout->document_run_begin[runs[i].document + 1];
            plan->chain_slot[at] = at + 1 < end ? plan->slot_count++ : -1;
        }
        plan->slot_bytes[r] = plan->slot_count * bytes - plan->slot_offset[r];
    }
}

static void describe_own_runs(ra_state_scan_t *plan)
{
    const ra_layout_t *layout = plan->params.layout;
    for (int64_t i = 0; i < plan->run_count; i++) {
        own_run_t *own = &plan->runs[i];
        own->run = &ra_layout_runs(layout, plan->rank)[i];
        own->chain = layout->document_run_begin[own->run->document];
        int64_t end = layout->document_run_begin[own->run->document + 1];
        int64_t at = place_in_chain(layout, own->run);
        own->index = at - own->chain;
        own->is_last = at + 1 == end;
        own->next_rank = own->is_last ? -1 : layout->document_runs[at + 1].rank;
        own->tiles = ra_ceil_div(own->run->count, layout->tile);
        own->landing = -1;
        if (plan->params.reproducible) {
            own->slot = plan->slot_count;
            plan->slot_count += own->tiles;
            own->landing = own->index > 0 ? plan->landing_count++ : -1;
        } else {
            own->slot = plan->chain_slot[at];
        }
    }
}

static ra_status_t allocate_lists(ra_state_scan_t *plan)
{
    const ra_layout_t *layout = plan->params.layout;
    size_t ranks = (size_t)layout->ranks, runs = (size_t)plan->run_count + 1;
    size_t all_runs = (size_t)layout->document_run_begin[layout->document_count] + 1;
    plan->runs = calloc(runs, sizeof(*plan->runs));
    plan->arrivals = calloc(runs, sizeof(ra_request_t *));
    plan->departures = calloc(runs, sizeof(ra_request_t *));
    plan->chain_slot = calloc(all_runs, sizeof(int64_t));
    plan->slot_bytes = calloc(ranks, sizeof(int64_t));
    plan->slot_offset = calloc(ranks, sizeof(int64_t));
    if (plan->runs == NULL || plan->arrivals == NULL || plan->departures == NULL ||
        plan->chain_slot == NULL || plan->slot_bytes == NULL || plan->slot_offset == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a state scan of %zu runs", all_runs);
    }
    return RA_OK;
}

/* Decays that are the same for every token are known here, so that the totals of all slots, of
 * other ranks too, are host arithmetic and one copy. */
static ra_status_t allocate_totals(ra_state_scan_t *plan)
{
    int64_t bytes = plan->slot_count * plan->header_floats * (int64_t)sizeof(float);
    if (plan->slot_count > 0 && plan->params.decay_per_token) {
        return ra_fail(RA_ERR_UNSUPPORTED, "ring",
                       "decays per token of documents on several ranks, or reproducible, on a GPU");
    }
    plan->totals = calloc(1, (size_t)bytes + 1);
    if (plan->totals == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate totals of %lld states",
                       (long long)plan->slot_count);
    }
    return ra_device_alloc(ra_stream_device(plan->stream), bytes, (void **)&plan->device_totals);
}

static ra_linear_args_t args_of(const ra_state_scan_t *plan, const ra_state_scan_io_t *io,
                                int64_t segment_count)
{
    const ra_state_scan_params_t *params = &plan->params;
    return (ra_linear_args_t){.heads = params->heads,
                              .key_dim = params->key_dim,
                              .value_dim = params->value_dim,
                              .dtype = params->dtype,
                              .scale = params->scale,
                              .q = io->q,
                              .k = io->k,
                              .v = io->v,
                              .q_stride = io->q_stride,
                              .k_stride = io->k_stride,
                              .v_stride = io->v_stride,
                              .log_decay = io->log_decay,
                              .log_decay_stride =
                                  params->decay_per_token ? io->log_decay_stride : 0,
                              .o = io->o,
                              .o_stride = io->o_stride,
                              .segments = plan->segments,
                              .segment_count = segment_count,
                              .scratch = plan->scratch,
                              .scratch_bytes = plan->scratch_bytes};
}

/* The largest calls run all rows: whole runs or, reproducible, tiles. */
static ra_status_t allocate_scratch(ra_state_scan_t *plan)
{
    const ra_state_scan_io_t none = {.q = NULL};
    int64_t count = 0;
    for (int64_t i = 0; i < plan->run_count; i++) {
        const ra_run_t *run = plan->runs[i].run;
        int64_t step = plan->params.reproducible ? plan->params.layout->tile : run->count;
        for (int64_t at = 0; at < run->count; at += step) {
            plan->segments[count++] = (ra_linear_segment_t){
                .row_begin = run->local + at, .row_count = ra_min_i64(step, run->count - at)};
        }
    }
    ra_linear_args_t args = args_of(plan, &none, count);
    plan->scratch_bytes = ra_linear_scratch_bytes(plan->kernel, &args);
    if (plan->scratch_bytes == 0) {
        return RA_OK;
    }
    return ra_device_alloc(ra_stream_device(plan->stream), plan->scratch_bytes, &plan->scratch);
}

static ra_status_t fill_plan(ra_state_scan_t *plan)
{
    const ra_state_scan_params_t *params = &plan->params;
    ra_device_t *device = ra_stream_device(plan->stream);
    ra_linear_args_t shape = {.heads = params->heads,
                              .key_dim = params->key_dim,
                              .value_dim = params->value_dim,
                              .dtype = params->dtype,
                              .scale = params->scale,
                              .log_decay_stride = params->decay_per_token ? params->heads : 0};
    RA_TRY(ra_linear_select(params->kernel == NULL ? "auto" : params->kernel,
                            ra_device_kind(device), &shape, &plan->kernel));
    RA_TRY(allocate_lists(plan));
    if (!params->reproducible) {
        number_slots_of_runs(plan);
    }
    describe_own_runs(plan);

    int64_t segments = 0, bytes = 0;
    for (int64_t i = 0; i < plan->run_count; i++) {
        segments += plan->runs[i].tiles;
    }
    plan->segments = calloc((size_t)segments + 1, sizeof(*plan->segments));
    if (plan->segments == NULL || !ra_mul_ok(plan->slot_count, slot_floats(plan) * 4, &bytes)) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %lld states",
                       (long long)plan->slot_count);
    }
    RA_TRY(allocate_scratch(plan));
    RA_TRY(ra_device_alloc(device, bytes, (void **)&plan->slots));
    if (ra_device_kind(device) == RA_DEVICE_CUDA) {
        RA_TRY(allocate_totals(plan));
    }
    return ra_device_alloc(device, plan->landing_count * plan->state_floats * 4,
                           (void **)&plan->landing);
}

ra_status_t ra_state_scan_create(ra_comm_t *comm, ra_stream_t *stream,
                                 const ra_state_scan_params_t *params, ra_state_scan_t **plan_p)
{
    RA_TRY(check_params(comm, params));
    ra_state_scan_t *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a state scan");
    }
    plan->comm = comm;
    plan->stream = stream;
    plan->params = *params;
    plan->rank = ra_comm_rank(comm);
    plan->state_floats = (int64_t)params->heads * params->key_dim * params->value_dim;
    plan->header_floats = ra_ceil_div(params->heads, 16) * 16;
    plan->run_count = ra_layout_run_count(params->layout, plan->rank);
    ra_status_t status = fill_plan(plan);
    if (status != RA_OK) {
        ra_state_scan_destroy(plan);
        return status;
    }
    *plan_p = plan;
    return RA_OK;
}

void ra_state_scan_destroy(ra_state_scan_t *plan)
{
    if (plan == NULL) {
        return;
    }
    ra_device_t *device = ra_stream_device(plan->stream);
    ra_device_free(device, plan->slots);
    ra_device_free(device, plan->landing);
    ra_device_free(device, plan->device_totals);
    ra_device_free(device, plan->scratch);
    free(plan->totals);
    free(plan->runs);
    free(plan->arrivals);
    free(plan->departures);
    free(plan->chain_slot);
    free(plan->slot_bytes);
    free(plan->slot_offset);
    free(plan->segments);
    free(plan);
}

static ra_status_t summarise(ra_state_scan_t *plan, const ra_state_scan_io_t *io, int64_t count)
{
    if (count == 0) {
        return RA_OK;
    }
    ra_linear_args_t args = args_of(plan, io, count);
    ra_span_t span = ra_trace_begin("linear summaries");
    ra_status_t status = ra_linear_summarise(plan->kernel, &args, plan->stream);
    ra_trace_end(span, plan->rank, RA_LANE_COMPUTE, count);
    return status;
}

static ra_status_t forward(ra_state_scan_t *plan, const ra_state_scan_io_t *io, int64_t count)
{
    if (count == 0) {
        return RA_OK;
    }
    ra_linear_args_t args = args_of(plan, io, count);
    ra_span_t span = ra_trace_begin("linear forward");
    ra_status_t status = ra_linear_forward(plan->kernel, &args, plan->stream);
    ra_trace_end(span, plan->rank, RA_LANE_COMPUTE, count);
    return status;
}

/* G of rows [row, row + count), summed in double so that its bits depend on those rows alone. */
static void sum_decay(const ra_state_scan_t *plan, const ra_state_scan_io_t *io, int64_t row,
                      int64_t count, float *total)
{
    for (int32_t h = 0; h < plan->params.heads; h++) {
        double sum = 0;
        if (plan->params.decay_per_token) {
            for (int64_t t = 0; t < count; t++) {
                sum += (double)io->log_decay[(row + t) * io->log_decay_stride + h];
            }
        } else {
            sum = (double)count * (double)io->log_decay[h];
        }
        total[h] = (float)sum;
    }
}

static void add_summary(ra_state_scan_t *plan, const ra_state_scan_io_t *io, int64_t row,
                        int64_t count, int64_t slot, int64_t *segments)
{
    if (plan->totals == NULL) {
        sum_decay(plan, io, row, count, slot_total(plan, slot));
    }
    plan->segments[(*segments)++] = (ra_linear_segment_t){
        .row_begin = row, .row_count = count, .state_out = slot_state(plan, slot)};
}

/* GPU: G of every slot that this rank folds, its own or gathered. */
static ra_status_t upload_totals(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    const ra_layout_t *layout = plan->params.layout;
    int64_t tile = layout->tile, bytes = plan->slot_count * plan->header_floats * 4;
    if (plan->totals == NULL || plan->slot_count == 0) {
        return RA_OK;
    }
    if (!plan->params.reproducible) {
        for (int64_t i = 0; i < layout->document_run_begin[layout->document_count]; i++) {
            int64_t slot = plan->chain_slot[i];
            if (slot >= 0) {
                sum_decay(plan, io, 0, layout->document_runs[i].count,
                          plan->totals + slot * plan->header_floats);
            }
        }
    }
    for (int64_t i = 0; i < plan->run_count && plan->params.reproducible; i++) {
        const own_run_t *own = &plan->runs[i];
        for (int64_t t = 0; t < own->tiles; t++) {
            sum_decay(plan, io, 0, ra_min_i64(tile, own->run->count - t * tile),
                      plan->totals + (own->slot + t) * plan->header_floats);
        }
    }
    return ra_stream_copy(plan->stream, plan->device_totals, plan->totals, bytes);
}

static ra_status_t carry(ra_state_scan_t *plan, const float *before, int64_t slot)
{
    return ra_linear_carry(plan->params.heads,
                           (int64_t)plan->params.key_dim * plan->params.value_dim,
                           slot_total(plan, slot), before, slot_state(plan, slot), plan->stream);
}

static const float *initial_state(const ra_state_scan_io_t *io, const own_run_t *own)
{
    return io->initial != NULL ? io->initial[own->run->document] : NULL;
}

/* Where the final state of the run's document goes, NULL when this run is not its end. */
static float *final_state(const ra_state_scan_io_t *io, const own_run_t *own)
{
    return own->is_last && io->final_state != NULL ? io->final_state[own->run->document] : NULL;
}

static ra_status_t keep_final(ra_state_scan_t *plan, float *final, const float *state)
{
    int64_t bytes = plan->state_floats * (int64_t)sizeof(float);
    if (state != NULL) {
        return ra_stream_copy(plan->stream, final, state, bytes);
    }
    return ra_stream_zero(plan->stream, final, bytes);
}

/* Default: fold the predecessors of this rank's runs, document by document. */
static ra_status_t fold_chains(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    int64_t folded = 0; /* runs of the current document that are states already */
    for (int64_t i = 0; i < plan->run_count; i++) {
        own_run_t *own = &plan->runs[i];
        if (own->index == 0) {
            own->state_in = initial_state(io, own);
            folded = 0;
            continue;
        }
        if (i == 0 || plan->runs[i - 1].run->document != own->run->document) {
            folded = 0;
        }
        const int64_t *slot = plan->chain_slot + own->chain;
        for (; folded < own->index; folded++) {
            const float *before =
                folded > 0 ? slot_state(plan, slot[folded - 1]) : initial_state(io, own);
            RA_TRY(carry(plan, before, slot[folded]));
        }
        own->state_in = slot_state(plan, slot[folded - 1]);
    }
    return RA_OK;
}

/* Tokens of the last run that belong to whole tiles. */
static int64_t whole_tokens(const ra_state_scan_t *plan, const own_run_t *own)
{
    return own->run->count / plan->params.layout->tile * plan->params.layout->tile;
}

/* Default: a document's tail after its last whole tile is a segment of its own when the state
 * before it is asked for; tails run in a second pass, since they read what the first one wrote. */
static ra_status_t forward_runs(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    int64_t count = 0;
    for (int64_t i = 0; i < plan->run_count; i++) {
        const own_run_t *own = &plan->runs[i];
        float *final = final_state(io, own);
        int64_t tokens = own->run->count;
        if (final != NULL && plan->params.final_at_tile) {
            tokens = whole_tokens(plan, own);
            if (tokens == 0) {
                RA_TRY(keep_final(plan, final, own->state_in));
                continue;
            }
        }
        plan->segments[count++] = (ra_linear_segment_t){.row_begin = own->run->local,
                                                        .row_count = tokens,
                                                        .state_in = own->state_in,
                                                        .state_out = final};
    }
    RA_TRY(forward(plan, io, count));

    count = 0;
    for (int64_t i = 0; i < plan->run_count && plan->params.final_at_tile; i++) {
        const own_run_t *own = &plan->runs[i];
        int64_t tokens = whole_tokens(plan, own);
        if (final_state(io, own) != NULL && tokens < own->run->count) {
            plan->segments[count++] = (ra_linear_segment_t){.row_begin = own->run->local + tokens,
                                                            .row_count = own->run->count - tokens,
                                                            .state_in = final_state(io, own)};
        }
    }
    return forward(plan, io, count);
}

static ra_status_t scan_runs(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    int64_t count = 0;
    for (int64_t i = 0; i < plan->run_count; i++) {
        const own_run_t *own = &plan->runs[i];
        if (own->slot >= 0) {
            add_summary(plan, io, own->run->local, own->run->count, own->slot, &count);
        }
    }
    RA_TRY(summarise(plan, io, count));
    if (plan->slot_count > 0) {
        int64_t before = ra_clock_ns();
        ra_span_t span = ra_trace_begin("states");
        RA_TRY(ra_comm_allgatherv(plan->comm, (char *)plan->slots + plan->slot_offset[plan->rank],
                                  plan->slots, plan->slot_bytes, plan->slot_offset));
        ra_trace_end(span, plan->rank, RA_LANE_WAIT, plan->slot_count);
        plan->stats.wait_ns += ra_clock_ns() - before;
        plan->stats.received_bytes +=
            plan->slot_count * slot_floats(plan) * 4 - plan->slot_bytes[plan->rank];
    }
    RA_TRY(fold_chains(plan, io));
    return forward_runs(plan, io);
}

/* Reproducible: tiles of a run to summarise and fold. The document's last tile counts only when
 * the state after it is the final state. */
static int64_t folded_tiles(const ra_state_scan_t *plan, const ra_state_scan_io_t *io,
                            const own_run_t *own)
{
    bool last_is_whole = own->run->count % plan->params.layout->tile == 0;
    bool wanted = final_state(io, own) != NULL && (last_is_whole || !plan->params.final_at_tile);
    return own->tiles - (own->is_last && !wanted);
}

static ra_status_t post_state(ra_state_scan_t *plan, ra_transfer_kind_t kind, int peer,
                              const float *state, ra_request_t **request_p)
{
    ra_transfer_t transfer = {.kind = kind,
                              .peer = peer,
                              .tag = RA_TAG_RING_STATE,
                              .data = (void *)(uintptr_t)state,
                              .bytes = plan->state_floats * (int64_t)sizeof(float)};
    return ra_comm_post(plan->comm, &transfer, 1, request_p);
}

static ra_status_t await(ra_state_scan_t *plan, ra_request_t **request)
{
    int64_t before = ra_clock_ns();
    ra_span_t span = ra_trace_begin("state");
    ra_status_t status = ra_comm_wait(*request, ra_comm_deadline(plan->comm));
    ra_trace_end(span, plan->rank, RA_LANE_WAIT, 0);
    plan->stats.wait_ns += ra_clock_ns() - before;
    ra_request_free(*request);
    *request = NULL;
    return status;
}

static float *landing_state(const ra_state_scan_t *plan, const own_run_t *own)
{
    return plan->landing + own->landing * plan->state_floats;
}

static ra_status_t summarise_tiles(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    const ra_layout_t *layout = plan->params.layout;
    int64_t tile = layout->tile, count = 0;
    for (int64_t i = 0; i < plan->run_count; i++) {
        const own_run_t *own = &plan->runs[i];
        if (own->landing >= 0) {
            const ra_run_t *previous = &layout->document_runs[own->chain + own->index - 1];
            RA_TRY(post_state(plan, RA_RECV, previous->rank, landing_state(plan, own),
                              &plan->arrivals[i]));
            plan->stats.received_bytes += plan->state_floats * (int64_t)sizeof(float);
        }
        for (int64_t t = 0; t < folded_tiles(plan, io, own); t++) {
            add_summary(plan, io, own->run->local + t * tile,
                        ra_min_i64(tile, own->run->count - t * tile), own->slot + t, &count);
        }
    }
    return summarise(plan, io, count);
}

/* State before tile t of a run. */
static const float *state_before(const ra_state_scan_t *plan, const own_run_t *own, int64_t t)
{
    return t > 0 ? slot_state(plan, own->slot + t - 1) : own->state_in;
}

/* Reproducible: documents in order on every rank, so the chain of ranks cannot lock. */
static ra_status_t fold_tiles(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    for (int64_t i = 0; i < plan->run_count; i++) {
        own_run_t *own = &plan->runs[i];
        own->state_in = initial_state(io, own);
        if (own->landing >= 0) {
            RA_TRY(await(plan, &plan->arrivals[i]));
            own->state_in = landing_state(plan, own);
        }
        int64_t folded = folded_tiles(plan, io, own);
        for (int64_t t = 0; t < folded; t++) {
            RA_TRY(carry(plan, state_before(plan, own, t), own->slot + t));
        }
        if (!own->is_last) {
            RA_TRY(post_state(plan, RA_SEND, own->next_rank, state_before(plan, own, folded),
                              &plan->departures[i]));
        } else if (final_state(io, own) != NULL) {
            RA_TRY(keep_final(plan, final_state(io, own), state_before(plan, own, folded)));
        }
    }
    return RA_OK;
}

static ra_status_t scan_tiles(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    int64_t tile = plan->params.layout->tile, count = 0;
    RA_TRY(summarise_tiles(plan, io));
    RA_TRY(fold_tiles(plan, io));
    for (int64_t i = 0; i < plan->run_count; i++) {
        const own_run_t *own = &plan->runs[i];
        for (int64_t t = 0; t < own->tiles; t++) {
            plan->segments[count++] =
                (ra_linear_segment_t){.row_begin = own->run->local + t * tile,
                                      .row_count = ra_min_i64(tile, own->run->count - t * tile),
                                      .state_in = state_before(plan, own, t)};
        }
    }
    RA_TRY(forward(plan, io, count));
    for (int64_t i = 0; i < plan->run_count; i++) {
        if (plan->departures[i] != NULL) {
            RA_TRY(await(plan, &plan->departures[i]));
        }
    }
    return RA_OK;
}

static void cancel(ra_state_scan_t *plan, ra_status_t cause)
{
    ra_comm_abort(plan->comm, cause);
    for (int64_t i = 0; i < plan->run_count; i++) {
        ra_request_free(plan->arrivals[i]);
        ra_request_free(plan->departures[i]);
        plan->arrivals[i] = plan->departures[i] = NULL;
    }
}

ra_status_t ra_state_scan_run(ra_state_scan_t *plan, const ra_state_scan_io_t *io)
{
    int64_t before = ra_clock_ns();
    plan->stats.calls++;
    ra_status_t status = upload_totals(plan, io);
    if (status == RA_OK) {
        status = plan->params.reproducible ? scan_tiles(plan, io) : scan_runs(plan, io);
    }
    if (status != RA_OK) {
        cancel(plan, status);
        return status;
    }
    plan->stats.total_ns += ra_clock_ns() - before;
    return RA_OK;
}

ra_ring_stats_t ra_state_scan_stats(const ra_state_scan_t *plan)
{
    return plan->stats;
}
