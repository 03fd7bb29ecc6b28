#include "ring/block_tour.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include <limits.h>
#include <stdlib.h>
#include <string.h>

struct ra_block_tour {
    ra_comm_t *comm;     /* borrowed */
    ra_device_t *device; /* borrowed */
    uint32_t tag;
    bool is_ring;
    bool copies;   /* blocks are copied into landing buffers, not lent */
    bool by_steps; /* direct: lends go out step by step, since groups run in order */
    int rank, count;
    ra_block_stop_t *owner; /* [count] whose block comes, ring: at step i */
    int64_t *bytes;         /* [count] */
    int64_t own_bytes;
    ra_block_stop_t *borrower; /* direct: who reads this rank's block */
    int borrower_count;
    ra_transfer_t *group; /* [borrower_count + 2] */
    void *landing[2];     /* transports that do not lend */

    /* One walk. */
    const void *own;
    int next, released, lent;
    const void **block;       /* [count] */
    ra_request_t **borrows;   /* [count] the group block i came by; NULL for this rank's own */
    ra_request_t **lends;     /* [count] ring of lent blocks: block i on its way to the right */
    ra_request_t **own_lends; /* [borrower_count] groups that lend this rank's block and no more */
    ra_ring_stats_t stats;
};

static ra_status_t tour_allocate(ra_block_tour_t *tour, const int64_t *block_bytes)
{
    size_t count = (size_t)tour->count + 1, borrowers = (size_t)tour->borrower_count + 1;
    tour->owner = calloc(count, sizeof(ra_block_stop_t));
    tour->bytes = calloc(count, sizeof(int64_t));
    tour->block = calloc(count, sizeof(void *));
    tour->borrows = calloc(count, sizeof(ra_request_t *));
    tour->lends = calloc(count, sizeof(ra_request_t *));
    tour->borrower = calloc(borrowers, sizeof(ra_block_stop_t));
    tour->own_lends = calloc(borrowers, sizeof(ra_request_t *));
    tour->group = calloc(borrowers + 1, sizeof(ra_transfer_t));
    if (tour->owner == NULL || tour->bytes == NULL || tour->block == NULL ||
        tour->borrows == NULL || tour->lends == NULL || tour->borrower == NULL ||
        tour->own_lends == NULL || tour->group == NULL) {
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
        tour->bytes[i] = block_bytes[tour->owner[i].rank];
        if (tour->owner[i].rank != tour->rank) {
            most = ra_max_i64(most, tour->bytes[i]);
            foreign++;
        }
    }
    for (int b = 0; b < 2 && foreign > 0 && tour->copies; b++) {
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
    tour->copies = !ra_comm_lends(comm);
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
            tour->owner[i] = (ra_block_stop_t){.rank = (tour->rank - i + size) % size, .step = i};
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
                                        const int64_t *block_bytes, const ra_block_stop_t *owners,
                                        int count, const ra_block_stop_t *borrowers,
                                        int borrower_count, ra_block_tour_t **tour_p)
{
    ra_block_tour_t *tour = tour_new(comm, device, tag, count);
    if (tour == NULL) {
        return RA_ERR_NOMEM;
    }
    tour->borrower_count = borrower_count;
    tour->by_steps = ra_comm_in_order(comm);
    ra_status_t status = tour_allocate(tour, block_bytes);
    if (status == RA_OK) {
        memcpy(tour->owner, owners, (size_t)count * sizeof(*owners));
        memcpy(tour->borrower, borrowers, (size_t)borrower_count * sizeof(*borrowers));
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
    free(tour->group);
    free(tour);
}

static ra_transfer_t lend_to(const ra_block_tour_t *tour, int peer, const void *data, int64_t bytes)
{
    return (ra_transfer_t){.kind = RA_LEND,
                           .peer = peer,
                           .tag = tour->tag,
                           .data = (void *)(uintptr_t)data,
                           .bytes = bytes};
}

static ra_transfer_t borrow_from(ra_block_tour_t *tour, int peer, int i)
{
    tour->stats.received_bytes += tour->bytes[i];
    return (ra_transfer_t){.kind = RA_BORROW,
                           .peer = peer,
                           .tag = tour->tag,
                           .data = tour->landing[i % 2],
                           .bytes = tour->bytes[i]};
}

static ra_status_t wait_for(ra_block_tour_t *tour, ra_request_t *request, const char *what,
                            int owner)
{
    ra_status_t status = ra_comm_test(request);
    if (status != RA_INPROGRESS) {
        return status;
    }
    int64_t before = ra_clock_ns();
    ra_span_t span = ra_trace_begin(what);
    status = ra_comm_wait(request, ra_comm_deadline(tour->comm));
    ra_trace_end(span, tour->rank, RA_LANE_WAIT, owner);
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
    RA_TRY(release_request(tour, &tour->lends[i], "pass on", tour->owner[i].rank));
    ra_request_free(tour->borrows[i]);
    tour->borrows[i] = NULL;
    return RA_OK;
}

/* Where block i will land must be free. */
static ra_status_t make_room(ra_block_tour_t *tour, int i)
{
    for (; tour->copies && tour->released <= i - 2; tour->released++) {
        RA_TRY(release_block(tour, tour->released));
    }
    return RA_OK;
}

/* Ring: block i goes on to the right and the next one comes from the left. Two groups where blocks
 * are lent, since a lend is done only when the neighbour lets go. */
static ra_status_t ring_step(ra_block_tour_t *tour, int i)
{
    int size = ra_comm_size(tour->comm);
    int right = (tour->rank + 1) % size, left = (tour->rank + size - 1) % size;
    RA_TRY(make_room(tour, i + 1));
    ra_transfer_t pair[] = {borrow_from(tour, left, i + 1),
                            lend_to(tour, right, tour->block[i], tour->bytes[i])};
    if (tour->copies) {
        return ra_comm_post(tour->comm, pair, 2, &tour->borrows[i + 1]);
    }
    RA_TRY(ra_comm_post(tour->comm, &pair[1], 1, &tour->lends[i]));
    return ra_comm_post(tour->comm, &pair[0], 1, &tour->borrows[i + 1]);
}

/* Direct: post the lends of the steps up to @a last, those of a step as one group; those of step
 * last together with the borrow of block i, unless i is the number of blocks. */
static ra_status_t post_steps(ra_block_tour_t *tour, int last, int i)
{
    while (tour->lent < tour->borrower_count && tour->borrower[tour->lent].step <= last) {
        int first = tour->lent, step = tour->borrower[first].step, count = 0;
        bool with_borrow = step == last && i < tour->count;
        if (with_borrow) {
            tour->group[count++] = borrow_from(tour, tour->owner[i].rank, i);
        }
        for (; tour->lent < tour->borrower_count && tour->borrower[tour->lent].step == step;
             tour->lent++) {
            tour->group[count++] =
                lend_to(tour, tour->borrower[tour->lent].rank, tour->own, tour->own_bytes);
        }
        ra_request_t **request = with_borrow ? &tour->borrows[i] : &tour->own_lends[first];
        RA_TRY(ra_comm_post(tour->comm, tour->group, count, request));
    }
    if (i < tour->count && tour->borrows[i] == NULL) {
        tour->group[0] = borrow_from(tour, tour->owner[i].rank, i);
        return ra_comm_post(tour->comm, tour->group, 1, &tour->borrows[i]);
    }
    return RA_OK;
}

/* Direct: block i; after the last one, whatever is still to be lent. */
static ra_status_t direct_fetch(ra_block_tour_t *tour, int i)
{
    bool none = i >= tour->count, own = !none && tour->owner[i].rank == tour->rank;
    int last = !tour->by_steps ? -1 : none ? INT_MAX : tour->owner[i].step;
    if (none || own) {
        return post_steps(tour, last, tour->count);
    }
    RA_TRY(make_room(tour, i));
    return post_steps(tour, last, i);
}

ra_status_t ra_block_tour_begin(ra_block_tour_t *tour, const void *own)
{
    tour->own = own;
    tour->next = tour->released = tour->lent = 0;
    if (tour->is_ring) {
        return RA_OK;
    }
    for (int i = 0; i < tour->borrower_count && !tour->by_steps; i++) {
        ra_transfer_t lend = lend_to(tour, tour->borrower[i].rank, own, tour->own_bytes);
        RA_TRY(ra_comm_post(tour->comm, &lend, 1, &tour->own_lends[i]));
        tour->lent++;
    }
    return direct_fetch(tour, 0);
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
        RA_TRY(wait_for(tour, tour->borrows[i], "block", tour->owner[i].rank));
        tour->block[i] = ra_request_borrowed(tour->borrows[i], 0);
    }
    if (!tour->is_ring) {
        RA_TRY(direct_fetch(tour, i + 1));
    } else if (i + 1 < tour->count) {
        RA_TRY(ring_step(tour, i));
    }
    tour->next = i + 1;
    *owner_p = tour->owner[i].rank;
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
    /* Who reads a block that was passed on reads its owner's memory: the owner gets it back through
     * the borrow, so not before. Last block first, as at the end. */
    for (int i = tour->count - 1; i >= 0; i--) {
        ra_request_free(tour->lends[i]);
        ra_request_free(tour->borrows[i]);
        tour->lends[i] = tour->borrows[i] = NULL;
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
