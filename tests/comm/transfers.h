/** @file tests/comm/transfers.h  @brief Transfers and waits in as few words as tests want. */
#ifndef RA_TESTS_COMM_TRANSFERS_H
#define RA_TESTS_COMM_TRANSFERS_H

#include "comm/comm.h"

static inline ra_transfer_t make_tagged(ra_transfer_kind_t kind, int peer, uint32_t tag, void *data,
                                        int64_t bytes)
{
    return (ra_transfer_t){.kind = kind, .peer = peer, .tag = tag, .data = data, .bytes = bytes};
}

static inline ra_transfer_t make(ra_transfer_kind_t kind, int peer, void *data, int64_t bytes)
{
    return make_tagged(kind, peer, 5, data, bytes);
}

static inline ra_status_t wait_free(ra_comm_t *comm, ra_request_t *request)
{
    ra_status_t status = ra_comm_wait(request, ra_comm_deadline(comm));
    ra_request_free(request);
    return status;
}

#endif
