#include "ring/gather.h"

#include "ring/ring_tags.h"
#include <stdlib.h>

static ra_status_t transfer_rows(ra_comm_t *comm, ra_transfer_kind_t kind, int peer, void *rows,
                                 int64_t bytes)
{
    ra_transfer_t transfer = {
        .kind = kind, .peer = peer, .tag = RA_TAG_RING_GATHER, .data = rows, .bytes = bytes};
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &transfer, 1, &request));
    ra_status_t status = ra_comm_wait(request, ra_comm_deadline(comm));
    ra_request_free(request);
    return status;
}

ra_status_t ra_ring_gather(ra_comm_t *comm, const ra_layout_t *layout, int root, int64_t row_bytes,
                           const void *packed, void *ordered)
{
    int rank = ra_comm_rank(comm);
    if (rank != root) {
        return transfer_rows(comm, RA_SEND, root, (void *)(uintptr_t)packed,
                             layout->rows[rank] * row_bytes);
    }
    void *landing = malloc((size_t)(layout->max_rows * row_bytes) + 1);
    if (landing == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate %lld rows of %lld bytes",
                       (long long)layout->max_rows, (long long)row_bytes);
    }
    ra_layout_unpack(layout, rank, row_bytes, packed, ordered);
    ra_status_t status = RA_OK;
    for (int r = 0; r < layout->ranks && status == RA_OK; r++) {
        if (r != rank) {
            status = transfer_rows(comm, RA_RECV, r, landing, layout->rows[r] * row_bytes);
            if (status == RA_OK) {
                ra_layout_unpack(layout, r, row_bytes, landing, ordered);
            }
        }
    }
    free(landing);
    return status;
}
