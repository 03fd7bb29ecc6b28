/** @file model/session_routing.h  @brief Internal to model/: routing replay of documents and of a
 * rank's rows. Choices of a token: [MoE layers, experts per token], ascending for each layer. */
#ifndef RA_MODEL_SESSION_ROUTING_H
#define RA_MODEL_SESSION_ROUTING_H

#include "model/session_state.h"

/** @retval RA_ERR_INPUT  an expert outside the model or given twice; the message names the place.
 */
ra_status_t ra_routing_check(const ra_session_t *session, const ra_sequence_t *document);
/** The document's forced choices in ascending order, or -1 everywhere where it has none. */
void ra_routing_order(const ra_session_t *session, const ra_sequence_t *document, int32_t *rows);

/** One rank's rows of a pass, on the host and on the stream's device; all NULL when not wanted. */
typedef struct ra_local_routing {
    int32_t *forced, *chosen, *device_forced, *device_chosen;
} ra_local_routing_t;

ra_status_t ra_local_routing_upload(const ra_pass_t *pass, int rank, ra_stream_t *stream,
                                    ra_local_routing_t *local, ra_router_replay_t *replay_p);
/** Queue the copy of what was chosen. */
ra_status_t ra_local_routing_download(const ra_pass_t *pass, int rank, ra_stream_t *stream,
                                      ra_local_routing_t *local);
/** Collective, after the copy. */
ra_status_t ra_local_routing_gather(const ra_pass_t *pass, ra_comm_t *comm,
                                    const ra_local_routing_t *local);
void ra_local_routing_free(ra_device_t *device, ra_local_routing_t *local);

#endif
