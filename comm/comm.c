#include "comm/comm.h"

#include "base/clock.h"
#include "comm/transport.h"
#include <stdlib.h>

struct ra_comm {
    ra_transport_t *end; /* owned */
    double timeout_s;
};

ra_status_t ra_comm_create(ra_transport_t *end, ra_comm_t **comm_p)
{
    ra_comm_t *comm = calloc(1, sizeof(*comm));
    if (comm == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate a communicator");
    }
    *comm = (ra_comm_t){.end = end, .timeout_s = end->ops->patience_s};
    *comm_p = comm;
    return RA_OK;
}

void ra_comm_destroy(ra_comm_t *comm)
{
    if (comm != NULL) {
        comm->end->ops->close(comm->end);
        free(comm);
    }
}

int ra_comm_rank(const ra_comm_t *comm)
{
    return comm->end->rank;
}

int ra_comm_size(const ra_comm_t *comm)
{
    return comm->end->size;
}

const char *ra_comm_transport(const ra_comm_t *comm)
{
    return comm->end->ops->name;
}

bool ra_comm_lends(const ra_comm_t *comm)
{
    return comm->end->ops->lends;
}

bool ra_comm_in_order(const ra_comm_t *comm)
{
    return comm->end->ops->in_order;
}

bool ra_comm_uses_kernels(const ra_comm_t *comm)
{
    return comm->end->ops->uses_kernels;
}

ra_status_t ra_comm_attach(ra_comm_t *comm, ra_stream_t *compute)
{
    return comm->end->ops->attach(comm->end, compute);
}

ra_status_t ra_comm_measure_waits(ra_comm_t *comm, bool on)
{
    return comm->end->ops->measure_waits(comm->end, on);
}

ra_status_t ra_comm_waited(ra_comm_t *comm, double *seconds_p)
{
    return comm->end->ops->waited(comm->end, seconds_p);
}

void ra_comm_set_timeout(ra_comm_t *comm, double seconds)
{
    comm->timeout_s = seconds;
}

int64_t ra_comm_deadline(const ra_comm_t *comm)
{
    return ra_deadline_in(comm->timeout_s);
}

static ra_status_t check_transfer(const ra_comm_t *comm, const ra_transfer_t *transfer, int index)
{
    const ra_transport_t *end = comm->end;
    if ((unsigned)transfer->kind > RA_BORROW) {
        return ra_fail(RA_ERR_INVALID, "comm", "transfer %d has the unknown kind %d", index,
                       (int)transfer->kind);
    }
    if (transfer->peer < 0 || transfer->peer >= end->size) {
        return ra_fail(RA_ERR_INVALID, "comm", "transfer %d: peer %d of a world of %d ranks", index,
                       transfer->peer, end->size);
    }
    bool may_be_null = transfer->kind == RA_BORROW && end->ops->lends;
    if (transfer->bytes < 0 || (transfer->bytes > 0 && transfer->data == NULL && !may_be_null)) {
        return ra_fail(RA_ERR_INVALID, "comm", "transfer %d: %lld bytes at %p", index,
                       (long long)transfer->bytes, transfer->data);
    }
    return RA_OK;
}

static ra_status_t post(ra_comm_t *comm, const ra_transfer_t *transfers, int count, bool in_turn,
                        ra_request_t **request_p)
{
    if (count < 0) {
        return ra_fail(RA_ERR_INVALID, "comm", "a group of %d transfers", count);
    }
    for (int i = 0; i < count; i++) {
        RA_TRY(check_transfer(comm, &transfers[i], i));
    }
    return comm->end->ops->post(comm->end, transfers, count, in_turn, request_p);
}

static ra_status_t check_tags(const ra_transfer_t *transfers, int count)
{
    for (int i = 0; i < count; i++) {
        if (transfers[i].tag >= RA_TAG_RESERVED) {
            return ra_fail(RA_ERR_INVALID, "comm", "transfer %d: tag %u belongs to the collectives",
                           i, transfers[i].tag);
        }
    }
    return RA_OK;
}

ra_status_t ra_comm_post_reserved(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                                  ra_request_t **request_p)
{
    return post(comm, transfers, count, false, request_p);
}

ra_status_t ra_comm_post(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                         ra_request_t **request_p)
{
    RA_TRY(check_tags(transfers, count));
    return post(comm, transfers, count, false, request_p);
}

ra_status_t ra_comm_post_in_turn(ra_comm_t *comm, const ra_transfer_t *transfers, int count,
                                 ra_request_t **request_p)
{
    RA_TRY(check_tags(transfers, count));
    return post(comm, transfers, count, true, request_p);
}

ra_status_t ra_comm_test(ra_request_t *request)
{
    return request->ops->test(request);
}

ra_status_t ra_comm_wait(ra_request_t *request, int64_t deadline_ns)
{
    return request->ops->wait(request, deadline_ns);
}

ra_status_t ra_comm_cancel(ra_request_t *request)
{
    return request->ops->cancel(request);
}

const void *ra_request_borrowed(const ra_request_t *request, int index)
{
    return request->ops->borrowed(request, index);
}

void ra_request_free(ra_request_t *request)
{
    if (request != NULL) {
        request->ops->free(request);
    }
}

void ra_comm_abort(ra_comm_t *comm, ra_status_t cause)
{
    comm->end->ops->abort(comm->end, cause);
}

bool ra_comm_aborted(const ra_comm_t *comm)
{
    return comm->end->ops->aborted(comm->end);
}
