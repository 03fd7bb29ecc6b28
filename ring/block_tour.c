#include "ring/block_tour.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include <stdlib.h>
#include <string.h>

struct ra_block_tour {
    ra_comm_t *comm;     /* borrowed */
    ra_device_t *device; /* borrowed */
    uint32_t tag;
    bool is_ring;
    int rank, count;
    int *owner;     /* [count] */
    int64_t *bytes; /* [count] */
    int64_t own_bytes;
    int *borrower; /* direct: who reads this rank's block */
    int borrower_count;
    void *landing[2]; /* transports that do not lend */

    /* One walk. */
    const void *own;
    int next, fetched, released;
    const void **block;       /* [count] */
    ra_request_t **borrows;   /* [count] how block i came; NULL for this rank's own */
    ra_request_t **lends;     /* [count] ring: block i on its way to the right */
    ra_request_t **own_lends; /* [borrower_count] */
    ra_ring_stats_t stats;
};

static ra_status_t tour_allocate(ra_block_tour_t *tour, const int64_t *block_bytes)
{
    size_t count = (size_t)tour->count + 1, borrowers = (size_t)tour->borrower_count + 1;
    tour->owner = calloc(count, sizeof(int));
    tour->bytes = calloc(count, sizeof(int64_t));
    tour->block = calloc(count, sizeof(void *));
    tour->borrows = calloc(count, sizeof(ra_request_t *));
    tour->lends = calloc(count, sizeof(ra_request_t *));
    tour->borrower = calloc(borrowers, sizeof(int));
    tour->own_lends = calloc(borrowers, sizeof(ra_request_t *));
    if (tour->owner == NULL || tour->bytes == NULL || tour->block == NULL ||
        tour->borrows == NULL || tour->lends == NULL || tour->borrower == NULL ||
        tour->own_lends == NULL) {
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a tour of %d blocks", tour->count);
    }
    tour->own_bytes = block_bytes[tour->rank];
    return RA_OK;
}

/* Sizes of the visited blocks and, where blocks are copied, somewhere to put them. */
static ra_status_t tour_finish(ra_block_tour_t *tour, const int64_t *block_bytes)
{
    int64_t most = 0;
    int foreign = 0;
    for (int i = 0; i < tour->count; i++) {
        tour->bytes[i] = block_bytes[tour->owner[i]];
        if (tour->owner[i] != tour->rank) {
            most = ra_max_i64(most, tour->bytes[i]);
            foreign++;
        }
    }
    for (int b = 0; b < 2 && foreign > 0 && !ra_comm_lends(tour->comm); b++) {
        RA_TRY(ra_device_alloc(tour->device, most, &tour->landing[b]));
    }
    return RA_OK;
}

static ra_block_tour_t *tour_new(ra_comm_t *comm, ra_device_t *device, uint32_t tag, int count)
{
    ra_block_tour_t *tour = calloc(1, sizeof(*tour));
    if (tour == NULL) {
        ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a tour");
        return NULL;
    }
    tour->comm = comm;
    tour->device = device;
    tour->tag = tag;
    tour->rank = ra_comm_rank(comm);
    tour->count = count;
    return tour;
}

ra_status_t ra_block_tour_create_ring(ra_comm_t *comm, ra_device_t *device, uint32_t tag,
                                      const int64_t *block_bytes, int count,
                                      ra_block_tour_t **tour_p)
{
    ra_block_tour_t *tour = tour_new(comm, device, tag, count);
    if (tour == NULL) {
        return RA_ERR_NOMEM;
    }
    tour->is_ring = true;
    ra_status_t status = tour_allocate(tour, block_bytes);
    if (status == RA_OK) {
        int size = ra_comm_size(comm);
        for (int i = 0; i < count; i++) {
            tour->owner[i] = (tour->rank - i + size) % size;
        }
        status = tour_finish(tour, block_bytes);
    }
    if (status != RA_OK) {
        ra_block_tour_destroy(tour);
        return status;
    }
    *tour_p = tour;
    return RA_OK;
}

ra_status_t ra_block_tour_create_direct(ra_comm_t *comm, ra_device_t *device, uint32_t tag,
                                        const int64_t *block_bytes, const int *owners, int count,
                                        const int *borrowers, int borrower_count,
                                        ra_block_tour_t **tour_p)
{
    ra_block_tour_t *tour = tour_new(comm, device, tag, count);
    if (tour == NULL) {
        return RA_ERR_NOMEM;
    }
    tour->borrower_count = borrower_count;
    ra_status_t status = tour_allocate(tour, block_bytes);
    if (status == RA_OK) {
        memcpy(tour->owner, owners, (size_t)count * sizeof(int));
        memcpy(tour->borrower, borrowers, (size_t)borrower_count * sizeof(int));
        status = tour_finish(tour, block_bytes);
    }
    if (status != RA_OK) {
        ra_block_tour_destroy(tour);
        return status;
    }
    *tour_p = tour;
    return RA_OK;
}

void ra_block_tour_destroy(ra_block_tour_t *tour)
{
    if (tour == NULL) {
        return;
    }
    for (int b = 0; b < 2; b++) {
        ra_device_free(tour->device, tour->landing[b]);
    }
    free(tour->owner);
    free(tour->bytes);
    free(tour->block);
    free(tour->borrows);
    free(tour->lends);
    free(tour->borrower);
    free(tour->own_lends);
    free(tour);
}

static ra_status_t post(ra_block_tour_t *tour, ra_transfer_kind_t kind, int peer, const void *data,
                        int64_t bytes, ra_request_t **request_p)
{
    ra_transfer_t transfer = {.kind = kind,
                              .peer = peer,
                              .tag = tour->tag,
                              .data = (void *)(uintptr_t)data,
                              .bytes = bytes};
    return ra_comm_post(tour->comm, &transfer, 1, request_p);
}

static ra_status_t wait_for(ra_block_tour_t *tour, ra_request_t *request, const char *what,
                            int owner)
{
    ra_status_t status = ra_comm_test(request);
    if (status != RA_INPROGRESS) {
        return status;
    }
    int64_t before = ra_clock_ns(), span = ra_trace_begin();
    status = ra_comm_wait(request, ra_comm_deadline(tour->comm));
    ra_trace_end(span, tour->rank, RA_LANE_WAIT, what, owner);
    tour->stats.wait_ns += ra_clock_ns() - before;
    return status;
}

static ra_status_t release_request(ra_block_tour_t *tour, ra_request_t **request, const char *what,
                                   int owner)
{
    if (*request == NULL) {
        return RA_OK;
    }
    RA_TRY(wait_for(tour, *request, what, owner));
    ra_request_free(*request);
    *request = NULL;
    return RA_OK;
}

/* Block i has been used here: let it go once the right neighbour needs it no longer. */
static ra_status_t release_block(ra_block_tour_t *tour, int i)
{
    RA_TRY(release_request(tour, &tour->lends[i], "pass on", tour->owner[i]));
    ra_request_free(tour->borrows[i]);
    tour->borrows[i] = NULL;
    return RA_OK;
}

static ra_status_t fetch(ra_block_tour_t *tour, int i)
{
    if (i >= tour->count || i < tour->fetched) {
        return RA_OK;
    }
    tour->fetched = i + 1;
    if (tour->owner[i] == tour->rank) {
        return RA_OK;
    }
    if (tour->landing[0] != NULL) {
        for (; tour->released <= i - 2; tour->released++) {
            RA_TRY(release_block(tour, tour->released));
        }
    }
    int size = ra_comm_size(tour->comm);
    int from = tour->is_ring ? (tour->rank + size - 1) % size : tour->owner[i];
    tour->stats.received_bytes += tour->bytes[i];
    return post(tour, RA_BORROW, from, tour->landing[i % 2], tour->bytes[i], &tour->borrows[i]);
}

ra_status_t ra_block_tour_begin(ra_block_tour_t *tour, const void *own)
{
    tour->own = own;
    tour->next = tour->fetched = tour->released = 0;
    for (int i = 0; i < tour->borrower_count; i++) {
        RA_TRY(post(tour, RA_LEND, tour->borrower[i], own, tour->own_bytes, &tour->own_lends[i]));
    }
    return fetch(tour, 0);
}

ra_status_t ra_block_tour_next(ra_block_tour_t *tour, int *owner_p, const void **block_p)
{
    int i = tour->next;
    if (i >= tour->count) {
        *owner_p = -1;
        return RA_OK;
    }
    tour->block[i] = tour->own;
    if (tour->borrows[i] != NULL) {
        RA_TRY(wait_for(tour, tour->borrows[i], "block", tour->owner[i]));
        tour->block[i] = ra_request_borrowed(tour->borrows[i], 0);
    }
    if (tour->is_ring && i + 1 < tour->count) {
        int right = (tour->rank + 1) % ra_comm_size(tour->comm);
        RA_TRY(post(tour, RA_LEND, right, tour->block[i], tour->bytes[i], &tour->lends[i]));
    }
    RA_TRY(fetch(tour, i + 1));
    tour->next = i + 1;
    *owner_p = tour->owner[i];
    *block_p = tour->block[i];
    return RA_OK;
}

/* Last block first: nobody waits for its release, so the chain of lends unwinds from its end. */
ra_status_t ra_block_tour_end(ra_block_tour_t *tour)
{
    for (int i = tour->count - 1; i >= tour->released; i--) {
        RA_TRY(release_block(tour, i));
    }
    for (int i = 0; i < tour->borrower_count; i++) {
        RA_TRY(release_request(tour, &tour->own_lends[i], "lend", tour->rank));
    }
    return RA_OK;
}

void ra_block_tour_cancel(ra_block_tour_t *tour, ra_status_t cause)
{
    ra_comm_abort(tour->comm, cause);
    /* What is borrowed goes first, so that no two ranks wait for each other's lends. */
    for (int i = 0; i < tour->count; i++) {
        ra_request_free(tour->borrows[i]);
        tour->borrows[i] = NULL;
    }
    for (int i = 0; i < tour->count; i++) {
        ra_request_free(tour->lends[i]);
        tour->lends[i] = NULL;
    }
    for (int i = 0; i < tour->borrower_count; i++) {
        ra_request_free(tour->own_lends[i]);
        tour->own_lends[i] = NULL;
    }
}

void ra_block_tour_add_stats(const ra_block_tour_t *tour, ra_ring_stats_t *stats)
{
    stats->wait_ns += tour->stats.wait_ns;
    stats->received_bytes += tour->stats.received_bytes;
}
