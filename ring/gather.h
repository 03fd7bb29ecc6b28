/** @file ring/gather.h  @brief Rows of all ranks to one rank, in document order. */
#ifndef RA_RING_GATHER_H
#define RA_RING_GATHER_H

#include "comm/comm.h"
#include "ring/layout.h"

/**
 * Gather packed rows into document order on rank @a root. Every rank calls. Host memory.
 * @param packed   rows[rank] rows of @a row_bytes bytes.
 * @param ordered  total_rows rows, on @a root; ignored elsewhere (may be NULL).
 * Allocates one rank's rows on @a root for the time of the call.
 * @retval RA_ERR_NOMEM; RA_ERR_PEER  another rank failed; RA_ERR_TIMEOUT  rows did not come in
 * time.
 */
ra_status_t ra_ring_gather(ra_comm_t *comm, const ra_layout_t *layout, int root, int64_t row_bytes,
                           const void *packed, void *ordered);

#endif
