#include "base/log.h"
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

static ra_status_t forward_rank(ra_pass_t *pass, ra_comm_t *comm, ra_stream_t *stream,
                                local_rows_t *local)
{
    ra_session_t *session = pass->session;
    int rank = ra_comm_rank(comm);
    int64_t rows = pass->layout->rows[rank];
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
                                  .control = &session->control};
    ra_forward_t *forward = NULL;

    /* Allocates first, which makes the device current: one rank alone has its caller's thread. */
    RA_TRY(upload(pass, rows, stream, local));
    ra_trace_follow(stream, rank);
    ra_forward_io_t io = {.token = local->device_token,
                          .target = local->device_target,
                          .logprob = local->device_logprob,
                          .routing_gap = local->device_gap,
                          .logits_row = last_row(pass, rank),
                          .next_logprob = local->device_next};
    RA_TRY(ra_local_routing_upload(pass, rank, stream, &local->routing, &io.replay));
    RA_TRY(ra_forward_create(&params, &forward));
    ra_status_t status = ra_forward_run(forward, &io);
    if (status == RA_OK) {
        status = ra_local_routing_download(pass, rank, stream, &local->routing);
    }
    if (status == RA_OK) {
        status = download(pass, rows, io.logits_row >= 0, stream, local);
    }
    if (status == RA_OK) {
        ra_log(RA_LOG_INFO, "session", "%lld rows, %.1f MiB of buffers, %.3f s exposed waiting",
               (long long)rows, (double)ra_forward_bytes(forward) / 1048576.0,
               (double)ra_forward_exposed_ns(forward) * 1e-9);
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
    atomic_store(&session->rows_total, pass->layout->total_rows * session->config->layers);
    ra_status_t status = ra_ranks_call(session->ranks, rank_body, pass);
    /* Ranks that saw the stop flag late return what the early ones' leaving caused. */
    if (status != RA_OK && atomic_load(&session->control.stop)) {
        return RA_ERR_STOPPED;
    }
    RA_TRY(status);
    return ra_model_weights_verify(session->weights);
}
