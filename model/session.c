#include "model/session.h"

#include "base/checked.h"
#include "base/log.h"
#include "base/trace.h"
#include "model/session_state.h"
#include <stdlib.h>
#include <string.h>

void ra_session_options_default(ra_session_options_t *options)
{
    *options = (ra_session_options_t){.device = "cpu",
                                      .dtype = "auto",
                                      .transport = "auto",
                                      .gemm_kernel = "auto",
                                      .softmax_kernel = "auto",
                                      .linear_kernel = "auto",
                                      .decay_factor = "A",
                                      .ranks = 1,
                                      .tile = 256,
                                      .timeout_s = 0};
}

static ra_status_t resolve_layout(ra_session_t *session)
{
    ra_session_options_t *options = &session->options;
    if (options->layout == NULL) {
        options->layout = options->reproducible ? "contiguous" : "zigzag";
    }
    if (ra_layout_kind_parse(options->layout, &session->layout_kind) != 0) {
        return ra_fail(RA_ERR_USAGE, "session", "layout '%s' is unknown; use zigzag or contiguous",
                       options->layout);
    }
    if (options->reproducible && session->layout_kind != RA_LAYOUT_CONTIGUOUS) {
        return ra_fail(RA_ERR_USAGE, "session",
                       "reproducible results need the contiguous layout, not '%s'",
                       options->layout);
    }
    return RA_OK;
}

static ra_status_t resolve_options(ra_session_t *session, ra_decay_factor_t *decay_factor)
{
    ra_session_options_t *options = &session->options;

    RA_TRY(resolve_layout(session));
    if (options->ranks < 1 || options->tile < 1 || options->threads < 0 ||
        options->memory_limit < 0) {
        return ra_fail(RA_ERR_USAGE, "session",
                       "ranks %d, tile %lld, threads %d, memory limit %lld: ranks and tile start "
                       "at 1, the others at 0",
                       options->ranks, (long long)options->tile, options->threads,
                       (long long)options->memory_limit);
    }
    if (options->threads == 0) {
        options->threads = ra_pool_default_threads();
    }
    if (strcmp(options->decay_factor, "A") != 0 && strcmp(options->decay_factor, "B") != 0) {
        return ra_fail(RA_ERR_USAGE, "session", "decay layer factor '%s' is unknown; use A or B",
                       options->decay_factor);
    }
    *decay_factor = options->decay_factor[0] == 'A' ? RA_DECAY_A : RA_DECAY_B;
    return RA_OK;
}

/* One device for each rank while they last, then shared in turn. */
static ra_status_t open_devices(ra_session_t *session)
{
    const ra_session_options_t *options = &session->options;
    int count;
    RA_TRY(ra_device_count(options->device, &count));
    int places = (int)ra_min_i64(count, options->ranks);
    session->device = calloc((size_t)places, sizeof(*session->device));
    session->prepared = calloc((size_t)places, sizeof(*session->prepared));
    session->memory = calloc((size_t)places, sizeof(*session->memory));
    if (session->device == NULL || session->prepared == NULL || session->memory == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate a table of %d devices", places);
    }
    for (; session->places < places; session->places++) {
        RA_TRY(ra_device_open(options->device, session->places, session->pool,
                              &session->device[session->places]));
    }
    return RA_OK;
}

static ra_status_t resolve_dtype(ra_session_t *session)
{
    ra_session_options_t *options = &session->options;
    bool cuda = ra_device_kind(session->device[0]) == RA_DEVICE_CUDA;
    if (strcmp(options->dtype, "auto") == 0) {
        options->dtype = cuda ? "bf16" : "f32";
    }
    session->act = strcmp(options->dtype, "bf16") == 0 ? RA_BF16 : RA_F32;
    if (session->act == RA_BF16 && !cuda) {
        return ra_fail(RA_ERR_UNSUPPORTED, "session",
                       "activations in bf16 need --device cuda; the cpu computes in f32");
    }
    return RA_OK;
}

static ra_status_t prepare_weights(ra_session_t *session, const ra_gemm_kernel_t *kernel)
{
    const ra_session_options_t *options = &session->options;
    int places = session->places;
    ra_prepared_params_t *params = calloc((size_t)places, sizeof(*params));
    ra_status_t status = RA_OK;
    if (params == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate a table of %d devices", places);
    }
    for (int i = 0; i < places && status == RA_OK; i++) {
        params[i] =
            (ra_prepared_params_t){.config = session->config,
                                   .weights = session->weights,
                                   .kernel = kernel,
                                   .act = session->act,
                                   .expert_ranks = options->expert_parallel ? options->ranks : 1,
                                   .rank_first = i,
                                   .rank_step = places};
        status = ra_stream_create(session->device[i], &params[i].stream);
    }
    if (status == RA_OK) {
        status = ra_prepared_weights_create(params, places, session->prepared);
    }
    for (int i = 0; i < places; i++) {
        ra_stream_destroy(params[i].stream);
    }
    free(params);
    return status;
}

static ra_status_t open_weights(ra_session_t *session)
{
    const ra_session_options_t *options = &session->options;
    if (options->random_weights) {
        /* The CPU's kernels keep reading the host's arrays; a GPU has its own. */
        bool keep = ra_device_kind(session->device[0]) == RA_DEVICE_CPU;
        return ra_model_weights_random(session->config, options->seed, keep, session->pool,
                                       &session->weights);
    }
    return ra_model_weights_open(session->model_dir, session->config, &session->weights);
}

static ra_status_t open_parts(ra_session_t *session)
{
    ra_session_options_t *options = &session->options;
    ra_decay_factor_t decay_factor = RA_DECAY_A;
    const ra_gemm_kernel_t *kernel = NULL;

    RA_TRY(resolve_options(session, &decay_factor));
    RA_TRY(ra_pool_create(options->threads, &session->pool));
    RA_TRY(open_devices(session));
    RA_TRY(resolve_dtype(session));
    ra_device_kind_t kind = ra_device_kind(session->device[0]);
    options->transport = ra_transport_choose(options->transport, kind);
    RA_TRY(ra_session_open_ranks(session));
    RA_TRY(ra_gemm_select(options->gemm_kernel, kind, options->reproducible, &kernel));
    options->gemm_kernel = ra_gemm_kernel_name(kernel);
    RA_TRY(ra_model_config_load(session->model_dir, decay_factor, &session->config));
    RA_TRY(open_weights(session));
    RA_TRY(ra_model_digest(session->weights, &session->model_digest));
    RA_TRY(prepare_weights(session, kernel));
    if (options->trace_file != NULL) {
        RA_TRY(ra_trace_open(options->trace_file));
    }
    ra_log(RA_LOG_INFO, "session",
           "%s: %d ranks on %d %s, %d threads, %s, layout %s, tile %lld, gemm %s, transport %s",
           session->model_dir, options->ranks, session->places, options->device, options->threads,
           options->dtype, options->layout, (long long)options->tile, options->gemm_kernel,
           options->transport);
    return RA_OK;
}

ra_status_t ra_session_open(const ra_session_options_t *options, ra_session_t **session_p)
{
    if (options->model_dir == NULL) {
        return ra_fail(RA_ERR_USAGE, "session", "no model directory given");
    }
    ra_session_t *session = calloc(1, sizeof(*session));
    if (session == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate a session");
    }
    session->options = *options;
    session->model_dir = strdup(options->model_dir);
    session->options.model_dir = session->model_dir;
    ra_status_t status = session->model_dir != NULL
                             ? open_parts(session)
                             : ra_fail(RA_ERR_NOMEM, "session", "cannot copy the model path");
    if (status != RA_OK) {
        ra_session_close(session);
        return status;
    }
    *session_p = session;
    return RA_OK;
}

void ra_session_close(ra_session_t *session)
{
    if (session == NULL) {
        return;
    }
    ra_ranks_close(session->ranks);
    free(session->stream);
    if (session->options.trace_file != NULL) {
        ra_trace_close(); /* has reported its own failure; results do not depend on it */
    }
    for (int i = 0; i < session->places; i++) {
        ra_prepared_weights_destroy(session->prepared[i]);
    }
    ra_model_weights_destroy(session->weights);
    ra_model_config_destroy(session->config);
    for (int i = 0; i < session->places; i++) {
        ra_device_close(session->device[i]);
    }
    free(session->memory);
    free(session->prepared);
    free(session->device);
    ra_pool_destroy(session->pool);
    free(session->model_dir);
    free(session);
}

const ra_model_config_t *ra_session_config(const ra_session_t *session)
{
    return session->config;
}

const char *ra_session_model_digest(const ra_session_t *session)
{
    return session->model_digest;
}

const ra_session_options_t *ra_session_options(const ra_session_t *session)
{
    return &session->options;
}

ra_session_stats_t ra_session_stats(const ra_session_t *session)
{
    ra_session_stats_t stats = {.exposed = (double)atomic_load(&session->exposed_ppm) * 1e-6};
    for (int i = 0; i < session->places; i++) {
        int64_t peak = atomic_load(&session->memory[i].peak);
        if (peak >= stats.peak_bytes) {
            stats.peak_bytes = peak;
            stats.predicted_bytes = atomic_load(&session->memory[i].predicted);
        }
    }
    return stats;
}

void ra_session_stop(ra_session_t *session)
{
    atomic_store(&session->control.stop, 1);
}

double ra_session_progress(const ra_session_t *session)
{
    long long total = atomic_load(&session->rows_total);
    return total > 0 ? (double)atomic_load(&session->control.rows_done) / (double)total : 0.0;
}
