#include "model/session_routing.h"

#include "base/log.h"
#include "ring/gather.h"
#include <stdlib.h>

int64_t ra_session_routing_width(const ra_session_t *session)
{
    const ra_model_config_t *config = session->config;
    int64_t layers = 0;
    for (int64_t l = 0; l < config->layers; l++) {
        layers += config->layer[l].feed_forward == RA_FFN_MOE;
    }
    return layers * config->experts_per_token;
}

static void sort_choice(const int32_t *from, int64_t k, int32_t *to)
{
    for (int64_t i = 0; i < k; i++) {
        int32_t expert = from[i];
        int64_t at = i;
        for (; at > 0 && to[at - 1] > expert; at--) {
            to[at] = to[at - 1];
        }
        to[at] = expert;
    }
}

ra_status_t ra_routing_check(const ra_session_t *session, const ra_sequence_t *document)
{
    const int64_t k = session->config->experts_per_token, experts = session->config->experts;
    const int64_t width = ra_session_routing_width(session);
    int32_t sorted[RA_ROUTER_MAX_TOP_K];

    if (document->forced_experts == NULL) {
        return RA_OK;
    }
    for (int64_t i = 0; i < document->count * width; i += k) {
        long long token = (long long)(i / width), layer = (long long)(i % width / k);
        sort_choice(document->forced_experts + i, k, sorted);
        for (int64_t j = 0; j < k; j++) {
            if (sorted[j] < 0 || sorted[j] >= experts) {
                return ra_fail(
                    RA_ERR_INPUT, "score",
                    "forced expert %d of token %lld, MoE layer %lld; the model's experts "
                    "are [0, %lld)",
                    sorted[j], token, layer, (long long)experts);
            }
            if (j > 0 && sorted[j] == sorted[j - 1]) {
                return ra_fail(RA_ERR_INPUT, "score",
                               "forced expert %d of token %lld, MoE layer %lld is given twice",
                               sorted[j], token, layer);
            }
        }
    }
    return RA_OK;
}

void ra_routing_order(const ra_session_t *session, const ra_sequence_t *document, int32_t *rows)
{
    const int64_t k = session->config->experts_per_token;
    const int64_t total = document->count * ra_session_routing_width(session);

    for (int64_t i = 0; i < total && document->forced_experts == NULL; i++) {
        rows[i] = -1;
    }
    for (int64_t i = 0; i < total && document->forced_experts != NULL; i += k) {
        sort_choice(document->forced_experts + i, k, rows + i);
    }
}

static int64_t row_bytes(const ra_pass_t *pass)
{
    return ra_session_routing_width(pass->session) * (int64_t)sizeof(int32_t);
}

static ra_status_t allocate(const ra_pass_t *pass, int rank, ra_device_t *device, int32_t **host_p,
                            int32_t **device_p)
{
    int64_t bytes = pass->layout->rows[rank] * row_bytes(pass);
    *host_p = malloc((size_t)bytes + 1);
    if (*host_p == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate %lld bytes of expert choices",
                       (long long)bytes);
    }
    return ra_device_alloc(device, bytes, (void **)device_p);
}

ra_status_t ra_local_routing_upload(const ra_pass_t *pass, int rank, ra_stream_t *stream,
                                    ra_local_routing_t *local, ra_router_replay_t *replay_p)
{
    ra_device_t *device = ra_stream_device(stream);
    if (pass->forced != NULL) {
        RA_TRY(allocate(pass, rank, device, &local->forced, &local->device_forced));
        ra_layout_pack(pass->layout, rank, row_bytes(pass), pass->forced, local->forced);
        RA_TRY(ra_stream_copy(stream, local->device_forced, local->forced,
                              pass->layout->rows[rank] * row_bytes(pass)));
    }
    if (pass->chosen != NULL) {
        RA_TRY(allocate(pass, rank, device, &local->chosen, &local->device_chosen));
    }
    *replay_p = (ra_router_replay_t){.forced = local->device_forced,
                                     .chosen = local->device_chosen,
                                     .stride = ra_session_routing_width(pass->session)};
    return RA_OK;
}

ra_status_t ra_local_routing_download(const ra_pass_t *pass, int rank, ra_stream_t *stream,
                                      ra_local_routing_t *local)
{
    if (pass->chosen == NULL) {
        return RA_OK;
    }
    return ra_stream_copy(stream, local->chosen, local->device_chosen,
                          pass->layout->rows[rank] * row_bytes(pass));
}

ra_status_t ra_local_routing_gather(const ra_pass_t *pass, ra_comm_t *comm,
                                    const ra_local_routing_t *local)
{
    if (pass->chosen == NULL) {
        return RA_OK;
    }
    return ra_ring_gather(comm, pass->layout, 0, row_bytes(pass), local->chosen, pass->chosen);
}

void ra_local_routing_free(ra_device_t *device, ra_local_routing_t *local)
{
    ra_device_free(device, local->device_forced);
    ra_device_free(device, local->device_chosen);
    free(local->forced);
    free(local->chosen);
}
