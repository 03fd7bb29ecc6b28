/*
 * Collectives written once, on post() alone, so that they run over every transport. Every rank
 * calls them in the same order and transfers match per (peer, tag) in post order, so one tag for
 * each collective is enough.
 */
#include "comm/transport.h"

#include <stdlib.h>
#include <string.h>

enum { TAG_BARRIER = 0, TAG_GATHER, TAG_BROADCAST, TAG_ALLTOALL };

static ra_status_t run_group(ra_comm_t *comm, const ra_transfer_t *transfers, int count)
{
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post_reserved(comm, transfers, count, &request));
    ra_status_t status = ra_comm_wait(request, ra_comm_deadline(comm));
    ra_request_free(request);
    return status;
}

static ra_transfer_t transfer_of(ra_transfer_kind_t kind, int peer, uint32_t tag, const void *data,
                                 int64_t bytes)
{
    return (ra_transfer_t){.kind = kind,
                           .peer = peer,
                           .tag = RA_TAG_RESERVED + tag,
                           .data = (void *)(uintptr_t)data,
                           .bytes = bytes};
}

/* Dissemination: after round i every rank has heard, directly or not, of its 2^(i+1) - 1
 * predecessors (Hensgen, Finkel, Manber 1988). */
ra_status_t ra_comm_barrier(ra_comm_t *comm)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    for (int distance = 1; distance < size; distance *= 2) {
        ra_transfer_t pair[] = {
            transfer_of(RA_SEND, (rank + distance) % size, TAG_BARRIER, NULL, 0),
            transfer_of(RA_RECV, (rank - distance + size) % size, TAG_BARRIER, NULL, 0)};
        RA_TRY(run_group(comm, pair, 2));
    }
    return RA_OK;
}

/* All pairs at once; peers in an order that spreads the load: r+1, r+2, ... */
static ra_status_t exchange(ra_comm_t *comm, uint32_t tag, const char *send,
                            const int64_t *send_bytes, const int64_t *send_offset, char *recv,
                            const int64_t *recv_bytes, const int64_t *recv_offset)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    ra_transfer_t *group = malloc((size_t)size * 2 * sizeof(*group));
    if (group == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate %d transfers", 2 * size);
    }
    int count = 0;
    bool in_place = send + send_offset[rank] == recv + recv_offset[rank];
    for (int step = in_place; step < size; step++) {
        int to = (rank + step) % size, from = (rank - step + size) % size;
        group[count++] =
            transfer_of(RA_RECV, from, tag, recv + recv_offset[from], recv_bytes[from]);
        group[count++] = transfer_of(RA_SEND, to, tag, send + send_offset[to], send_bytes[to]);
    }
    ra_status_t status = run_group(comm, group, count);
    free(group);
    return status;
}

ra_status_t ra_comm_allgatherv(ra_comm_t *comm, const void *mine, void *all, const int64_t *bytes,
                               const int64_t *offset)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int64_t *same = malloc((size_t)size * 2 * sizeof(*same));
    if (same == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate the sizes of %d ranks", size);
    }
    for (int r = 0; r < size; r++) {
        same[r] = bytes[rank];
        same[size + r] = 0;
    }
    ra_status_t status = exchange(comm, TAG_GATHER, mine, same, same + size, all, bytes, offset);
    free(same);
    return status;
}

ra_status_t ra_comm_allgather(ra_comm_t *comm, const void *mine, int64_t bytes, void *all)
{
    int size = ra_comm_size(comm);
    int64_t *sizes = malloc((size_t)size * 2 * sizeof(*sizes));
    if (sizes == NULL) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate the sizes of %d ranks", size);
    }
    for (int r = 0; r < size; r++) {
        sizes[r] = bytes;
        sizes[size + r] = r * bytes;
    }
    ra_status_t status = ra_comm_allgatherv(comm, mine, all, sizes, sizes + size);
    free(sizes);
    return status;
}

/* Binomial tree: in round i the 2^i ranks that have the bytes pass them on. */
ra_status_t ra_comm_broadcast(ra_comm_t *comm, int root, void *data, int64_t bytes)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    if (root < 0 || root >= size) {
        return ra_fail(RA_ERR_INVALID, "comm", "broadcast from rank %d of %d", root, size);
    }
    int relative = (rank - root + size) % size;
    int have = 1;
    while (have <= relative) {
        have *= 2;
    }
    if (relative > 0) {
        int from = (relative - have / 2 + root) % size;
        ra_transfer_t receive = transfer_of(RA_RECV, from, TAG_BROADCAST, data, bytes);
        RA_TRY(run_group(comm, &receive, 1));
    }
    for (; relative + have < size; have *= 2) {
        int to = (relative + have + root) % size;
        ra_transfer_t send = transfer_of(RA_SEND, to, TAG_BROADCAST, data, bytes);
        RA_TRY(run_group(comm, &send, 1));
    }
    return RA_OK;
}

ra_status_t ra_comm_alltoallv(ra_comm_t *comm, const void *send, const int64_t *send_bytes,
                              const int64_t *send_offset, void *recv, const int64_t *recv_bytes,
                              const int64_t *recv_offset)
{
    return exchange(comm, TAG_ALLTOALL, send, send_bytes, send_offset, recv, recv_bytes,
                    recv_offset);
}
