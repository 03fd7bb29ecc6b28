/**
 * @file  comm/transport.h
 * @brief What a transport must do. Internal to comm/: callers use comm/comm.h.
 *
 * One verb, post(), takes a group of transfers that may all run at once. comm.c has checked the
 * arguments. A transport that needs progress owns one thread for it that sleeps when idle; waits
 * sleep, never spin. Adding a transport is one file and one row of transport_table.c; it must pass
 * tests/comm/test_transport.c.
 */
#ifndef RA_COMM_TRANSPORT_H
#define RA_COMM_TRANSPORT_H

#include "comm/comm.h"
#include "comm/launch.h"

typedef struct ra_transport_ops ra_transport_ops_t;

/** One rank's end of a world. First member of each transport's own structure. */
typedef struct ra_transport {
    const ra_transport_ops_t *ops;
    int rank, size;
} ra_transport_t;

/** First member of each transport's own request. */
struct ra_request {
    const ra_transport_ops_t *ops;
};

/** All functions but join are required. Contracts not repeated here are those of comm/comm.h. */
struct ra_transport_ops {
    const char *name, *doc;
    bool lends;        /**< RA_BORROW needs no landing buffer */
    bool in_order;     /**< ra_comm_in_order() */
    bool uses_kernels; /**< ra_comm_uses_kernels() */
    /** Default seconds of one wait: how long a healthy peer may compute before it answers. */
    double patience_s;

    /** Open all @a size ends of a world of threads. On error none is open. */
    ra_status_t (*open)(int size, ra_transport_t **ends_p);
    /** Open the end of this process as one of several. NULL: ranks are threads only. */
    ra_status_t (*join)(const ra_launch_t *launch, ra_transport_t **end_p);
    ra_status_t (*attach)(ra_transport_t *end, ra_stream_t *compute);
    ra_status_t (*measure_waits)(ra_transport_t *end, bool on);
    ra_status_t (*waited)(ra_transport_t *end, double *seconds_p);
    /** Accepts NULL. No request of this end exists. */
    void (*close)(ra_transport_t *end);

    /** Never blocks; all or nothing. RA_ERR_PEER after abort(). @param in_turn  as
     * ra_comm_post_in_turn(). */
    ra_status_t (*post)(ra_transport_t *end, const ra_transfer_t *transfers, int count,
                        bool in_turn, ra_request_t **request_p);
    ra_status_t (*test)(ra_request_t *request);
    ra_status_t (*wait)(ra_request_t *request, int64_t deadline_ns);
    ra_status_t (*cancel)(ra_request_t *request);
    const void *(*borrowed)(const ra_request_t *request, int index);
    void (*free)(ra_request_t *request);
    /** From any thread, any number of times; the first cause is kept. */
    void (*abort)(ra_transport_t *end, ra_status_t cause);
    bool (*aborted)(ra_transport_t *end); /**< by anybody of the world, or for a lost process */
};

extern const ra_transport_ops_t ra_transport_local;
extern const ra_transport_ops_t ra_transport_local_copy;
extern const ra_transport_ops_t ra_transport_local_order;
extern const ra_transport_ops_t ra_transport_peer; /**< built with RA_CUDA, as nccl */
extern const ra_transport_ops_t ra_transport_nccl;

/** Row called @a name; "auto" is the first row. @retval RA_ERR_USAGE unknown, the rows are listed.
 */
ra_status_t ra_transport_find(const char *name, const ra_transport_ops_t **ops_p);

/** Make the caller-facing handle. Owns @a end on success: ra_comm_destroy() closes it. */
ra_status_t ra_comm_create(ra_transport_t *end, ra_comm_t **comm_p);
/** Accepts NULL. */
void ra_comm_destroy(ra_comm_t *comm);

/** True when every later post returns RA_ERR_PEER. Any thread. */
bool ra_comm_aborted(const ra_comm_t *comm);

/** ra_comm_post() without the limit on tags: for the collectives. */
ra_status_t ra_comm_post_reserved(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                                  ra_request_t **request_p);

#endif
