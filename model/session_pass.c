#include "base/clock.h"
#include "base/trace.h"
#include "model/session_routing.h"
#include "ring/gather.h"
#include <stdlib.h>
#include <string.h>

/* This rank's rows of the pass's arrays, and the device's copies. */
typedef struct local_rows {
    int32_t *token, *target;
    float *logprob, *gap;
    int32_t *device_token, *device_target;
    float *device_logprob, *device_gap, *device_next;
    ra_local_routing_t routing;
    ra_router_replay_t replay;
    bool took; /* memory of the device, for all but the host's arrays */
} local_rows_t;

static void free_local(local_rows_t *local)
{
    free(local->token);
    free(local->target);
    free(local->logprob);
    free(local->gap);
}

static ra_status_t pack_local(const ra_pass_t *pass, int rank, local_rows_t *local)
{
    size_t n = (size_t)pass->layout->rows[rank] + 1; /* a rank without rows still gets addresses */

    *local = (local_rows_t){.token = malloc(n * sizeof(int32_t)),
                            .target = malloc(n * sizeof(int32_t)),
                            .logprob = malloc(n * sizeof(float)),
                            .gap = malloc(n * sizeof(float))};
    if (local->token == NULL || local->target == NULL || local->logprob == NULL ||
        local->gap == NULL) {
        free_local(local);
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate %zu rows of tokens", n);
    }
    ra_layout_pack(pass->layout, rank, sizeof(int32_t), pass->token, local->token);
    if (pass->target != NULL) {
        ra_layout_pack(pass->layout, rank, sizeof(int32_t), pass->target, local->target);
    }
    return RA_OK;
}

/* Row of the last token of the last document when this rank owns it, else -1. */
static int64_t last_row(const ra_pass_t *pass, int rank)
{
    const ra_run_t *run = ra_layout_last_run(pass->layout, pass->layout->document_count - 1);
    if (pass->next_logprob == NULL || run == NULL || run->rank != rank) {
        return -1;
    }
    return run->local + run->count - 1;
}

static void free_device(ra_device_t *device, local_rows_t *local)
{
    ra_device_free(device, local->device_token);
    ra_device_free(device, local->device_target);
    ra_device_free(device, local->device_logprob);
    ra_device_free(device, local->device_gap);
    ra_device_free(device, local->device_next);
    ra_local_routing_free(device, &local->routing);
}

static ra_status_t upload(const ra_pass_t *pass, int64_t rows, ra_stream_t *stream,
                          local_rows_t *local)
{
    ra_device_t *device = ra_stream_device(stream);
    int64_t bytes = rows * 4, vocab_bytes = pass->session->config->vocab_size * 4;

    RA_TRY(ra_device_alloc(device, bytes, (void **)&local->device_token));
    RA_TRY(ra_stream_copy(stream, local->device_token, local->token, bytes));
    if (pass->target != NULL) {
        RA_TRY(ra_device_alloc(device, bytes, (void **)&local->device_target));
        RA_TRY(ra_device_alloc(device, bytes, (void **)&local->device_logprob));
        RA_TRY(ra_stream_copy(stream, local->device_target, local->target, bytes));
    }
    if (pass->routing_gap != NULL) {
        RA_TRY(ra_device_alloc(device, bytes, (void **)&local->device_gap));
    }
    if (pass->next_logprob != NULL) {
        RA_TRY(ra_device_alloc(device, vocab_bytes, (void **)&local->device_next));
    }
    return RA_OK;
}

static ra_status_t download(const ra_pass_t *pass, int64_t rows, bool has_next, ra_stream_t *stream,
                            local_rows_t *local)
{
    int64_t bytes = rows * 4, vocab_bytes = pass->session->config->vocab_size * 4;
    if (pass->target != NULL) {
        RA_TRY(ra_stream_copy(stream, local->logprob, local->device_logprob, bytes));
    }
    if (pass->routing_gap != NULL) {
        RA_TRY(ra_stream_copy(stream, local->gap, local->device_gap, bytes));
    }
    if (has_next) {
        RA_TRY(ra_stream_copy(stream, pass->next_logprob, local->device_next, vocab_bytes));
    }
    return ra_stream_sync(stream);
}

/* Everything that a rank has on its device beside the weights. The caller frees what is local. */
static ra_status_t make_forward(const ra_pass_t *pass, ra_comm_t *comm, ra_stream_t *stream,
                                bool walk, local_rows_t *local, ra_forward_t **forward_p)
{
    ra_session_t *session = pass->session;
    int rank = ra_comm_rank(comm);
    ra_forward_params_t params = {.config = session->config,
                                  .weights = session->prepared[rank % session->places],
                                  .comm = comm,
                                  .device = ra_stream_device(stream),
                                  .stream = stream,
                                  .layout = pass->layout,
                                  .prefix = pass->prefix,
                                  .cache = pass->cache,
                                  .act = session->act,
                                  .expert_parallel = session->options.expert_parallel,
                                  .reproducible = session->options.reproducible,
                                  .softmax_kernel = session->options.softmax_kernel,
                                  .linear_kernel = session->options.linear_kernel,
                                  .scores = pass->target != NULL,
                                  .walk = walk,
                                  .control = &session->control};
    RA_TRY(upload(pass, pass->layout->rows[rank], stream, local));
    RA_TRY(ra_local_routing_upload(pass, rank, stream, &local->routing, &local->replay));
    return ra_forward_create(&params, forward_p);
}

/* The same without memory: how much of it would be taken. */
static ra_status_t count_bytes(const ra_pass_t *pass, ra_comm_t *comm, const ra_device_t *device,
                               bool walk, const local_rows_t *local, int64_t *bytes_p)
{
    local_rows_t counted = *local; /* its host arrays, and device arrays of its own */
    ra_device_t *counting = NULL;
    ra_stream_t *stream = NULL;
    ra_forward_t *forward = NULL;
    ra_device_memory_t memory;
    ra_status_t status;

    RA_TRY(ra_device_open_counting(device, &counting));
    RA_TRY_GOTO(ra_stream_create(counting, &stream), out);
    RA_TRY_GOTO(make_forward(pass, comm, stream, walk, &counted, &forward), out);
    RA_TRY_GOTO(ra_device_memory(counting, &memory), out);
    *bytes_p = memory.peak;
out:
    ra_forward_destroy(forward);
    free_device(counting, &counted);
    ra_stream_destroy(stream);
    ra_device_close(counting);
    return status;
}

/* Collective: choose a plan for which every device has room, the faster one first. Looks at the
 * device first, which makes it current: one rank alone has its caller's thread. */
static ra_status_t find_room(const ra_pass_t *pass, ra_comm_t *comm, ra_device_t *device,
                             ra_place_memory_t *place, const local_rows_t *local, bool *walk_p)
{
    int64_t limit = pass->session->options.memory_limit, bytes = 0;
    RA_TRY(ra_place_memory_look(place, device));
    for (int walk = 0; walk < 2; walk++) {
        bool fits = false;
        RA_TRY(count_bytes(pass, comm, device, walk, local, &bytes));
        RA_TRY(ra_place_memory_ask(place, device, comm, walk, bytes, limit, &fits));
        if (fits) {
            *walk_p = walk;
            return RA_OK;
        }
    }
    return ra_place_memory_refuse(place, device, limit);
}

static ra_status_t run_forward(const ra_pass_t *pass, ra_comm_t *comm, ra_stream_t *stream,
                               ra_forward_t *forward, local_rows_t *local)
{
    ra_session_t *session = pass->session;
    int rank = ra_comm_rank(comm);
    ra_forward_io_t io = {.token = local->device_token,
                          .target = local->device_target,
                          .logprob = local->device_logprob,
                          .routing_gap = local->device_gap,
                          .logits_row = last_row(pass, rank),
                          .next_logprob = local->device_next,
                          .replay = local->replay};
    int64_t before = ra_clock_ns();
    double waited = 0;
    RA_TRY(ra_comm_measure_waits(comm, session->options.measure_waits));
    RA_TRY(ra_forward_run(forward, &io));
    RA_TRY(ra_local_routing_download(pass, rank, stream, &local->routing));
    RA_TRY(download(pass, pass->layout->rows[rank], io.logits_row >= 0, stream, local));
    if (session->options.measure_waits) {
        RA_TRY(ra_comm_waited(comm, &waited));
        double part = waited * 1e9 / (double)(ra_clock_ns() - before);
        ra_raise_to(&session->exposed_ppm, (int64_t)(part * 1e6));
    }
    return ra_place_memory_see(&session->memory[rank % session->places], ra_stream_device(stream));
}

static ra_status_t forward_rank(ra_pass_t *pass, ra_comm_t *comm, ra_stream_t *stream,
                                local_rows_t *local)
{
    ra_session_t *session = pass->session;
    ra_place_memory_t *place = &session->memory[ra_comm_rank(comm) % session->places];
    ra_device_t *device = ra_stream_device(stream);
    ra_forward_t *forward = NULL;
    bool walk = false;
    ra_status_t status;

    RA_TRY(find_room(pass, comm, device, place, local, &walk));
    ra_trace_follow(stream, ra_comm_rank(comm));
    ra_place_memory_take(place, device, walk);
    local->took = true;
    RA_TRY_GOTO(make_forward(pass, comm, stream, walk, local, &forward), out);
    RA_TRY_GOTO(run_forward(pass, comm, stream, forward, local), out);
out:
    if (status != RA_OK) {
        ra_stream_sync(stream); /* what was queued may still be reading and writing */
    }
    ra_forward_destroy(forward);
    return status;
}

static ra_status_t gather_results(const ra_pass_t *pass, ra_comm_t *comm, const local_rows_t *local)
{
    if (pass->target != NULL) {
        RA_TRY(ra_ring_gather(comm, pass->layout, 0, sizeof(float), local->logprob, pass->logprob));
    }
    if (pass->routing_gap != NULL) {
        RA_TRY(ra_ring_gather(comm, pass->layout, 0, sizeof(float), local->gap, pass->routing_gap));
    }
    return ra_local_routing_gather(pass, comm, &local->routing);
}

static ra_status_t rank_body(ra_comm_t *comm, void *arg)
{
    ra_pass_t *pass = arg;
    int rank = ra_comm_rank(comm);
    ra_stream_t *stream = pass->session->stream[rank];
    local_rows_t local;
    ra_status_t status;

    RA_TRY(pack_local(pass, rank, &local));
    RA_TRY_GOTO(forward_rank(pass, comm, stream, &local), out);
    RA_TRY_GOTO(gather_results(pass, comm, &local), out);
out:
    ra_trace_settle();
    free_device(ra_stream_device(stream), &local);
    if (local.took) {
        ra_device_reserve_end(ra_stream_device(stream));
    }
    free_local(&local);
    return status;
}

static ra_status_t open_rank(ra_comm_t *comm, void *arg)
{
    ra_session_t *session = arg;
    int rank = ra_comm_rank(comm);

    if (session->options.timeout_s > 0) {
        ra_comm_set_timeout(comm, session->options.timeout_s);
    }
    RA_TRY(ra_stream_create(session->device[rank % session->places], &session->stream[rank]));
    return ra_comm_attach(comm, session->stream[rank]);
}

static void close_rank(ra_comm_t *comm, void *arg)
{
    ra_session_t *session = arg;
    int rank = ra_comm_rank(comm);
    ra_stream_destroy(session->stream[rank]);
    session->stream[rank] = NULL;
}

ra_status_t ra_session_open_ranks(ra_session_t *session)
{
    const ra_session_options_t *options = &session->options;
    ra_rank_hooks_t hooks = {.open = open_rank, .close = close_rank, .arg = session};
    session->stream = calloc((size_t)options->ranks, sizeof(*session->stream));
    if (session->stream == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate a table of %d streams",
                       options->ranks);
    }
    return ra_ranks_open(options->transport, options->ranks, &hooks, &session->ranks);
}

ra_status_t ra_pass_run(ra_pass_t *pass)
{
    ra_session_t *session = pass->session;

    atomic_store(&session->control.rows_done, 0);
    atomic_store(&session->exposed_ppm, 0);
    for (int i = 0; i < session->places; i++) {
        ra_place_memory_reset(&session->memory[i], session->device[i]);
    }
    atomic_store(&session->rows_total, pass->layout->total_rows * session->config->layers);
    ra_status_t status = ra_ranks_call(session->ranks, rank_body, pass);
    /* Ranks that saw the stop flag late return what the early ones' leaving caused. */
    if (status != RA_OK && atomic_load(&session->control.stop)) {
        return RA_ERR_STOPPED;
    }
    RA_TRY(status);
    return ra_model_weights_verify(session->weights);
}
