/** @file model/session_state.h  @brief Internal to model/: what a session holds, and one sharded
 * pass. */
#ifndef RA_MODEL_SESSION_STATE_H
#define RA_MODEL_SESSION_STATE_H

#include "comm/ranks.h"
#include "model/forward.h"
#include "model/pass_memory.h"
#include "model/session.h"

struct ra_session {
    ra_session_options_t options; /**< strings point into the caller's or at literals */
    char *model_dir;              /**< owned copy */
    ra_layout_kind_t layout_kind;
    ra_model_config_t *config;
    ra_model_weights_t *weights;
    ra_pool_t *pool;
    ra_dtype_t act;
    int places;                       /**< devices in use; rank r works on place r % places */
    ra_device_t **device;             /**< [places] */
    ra_prepared_weights_t **prepared; /**< [places] */
    ra_place_memory_t *memory;        /**< [places] of the last pass */
    atomic_llong exposed_ppm;         /**< of the last pass's time, of the rank with the most */
    const char *model_digest;         /**< owned by weights */
    ra_ranks_t *ranks;                /**< connected by the first pass, kept until close */
    ra_stream_t **stream;             /**< [options.ranks], of each rank while connected */
    ra_forward_control_t control;
    atomic_llong rows_total; /**< rows x layers of the running call */
};

/** Prepare the ranks of all passes; after devices and transport are known. */
ra_status_t ra_session_open_ranks(ra_session_t *session);

/** One sharded forward pass over documents in document order. Everything is borrowed. */
typedef struct ra_pass {
    ra_session_t *session;
    const ra_layout_t *layout;
    const ra_layout_t *prefix;       /**< may be NULL */
    const ra_forward_cache_t *cache; /**< may be NULL */
    const int32_t *token;            /**< [total rows] in document order */
    const int32_t *target;           /**< [total rows], -1 where nothing is scored; NULL: nowhere */
    float *logprob;                  /**< out [total rows] on the process of rank 0, with target */
    float *routing_gap;              /**< optional out [total rows] */
    const int32_t *forced; /**< optional [total rows, routing width], see ra_router_replay_t */
    int32_t *chosen;       /**< optional out, likewise */
    float *next_logprob;   /**< optional out [vocab]: after the last row of the last document */
} ra_pass_t;

/** Run the pass on the session's ranks. @retval RA_ERR_STOPPED and everything ra_forward_run() has.
 */
ra_status_t ra_pass_run(ra_pass_t *pass);

#endif
