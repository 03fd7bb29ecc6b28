#include "ring/halo.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include "ring/ring_tags.h"
#include <stdlib.h>

/* Consecutive rows of one owner that one halo needs, seen from this rank. */
typedef struct piece {
    enum { PIECE_COPY, PIECE_SEND, PIECE_RECV } kind;
    int peer;
    bool from_prefix;
    int64_t source_row; /* in the owner's packed rows (of the prefix layout if from_prefix) */
    int64_t halo_row;   /* in the packed halo rows of the rank that needs it */
    int64_t count;
} piece_t;

struct ra_halo {
    ra_comm_t *comm;                    /* borrowed */
    ra_stream_t *stream;                /* borrowed */
    const ra_layout_t *layout, *prefix; /* borrowed */
    int64_t before, align;
    int max_planes;
    ra_halo_run_t *runs;
    int64_t rows;
    piece_t *pieces;
    int64_t piece_count, remote_count;
    ra_transfer_t *transfers; /* [remote_count * max_planes] */
    ra_request_t *request;    /* between start and finish */
    ra_ring_stats_t stats;
    int64_t started_ns;
};

static int64_t halo_start_of(const ra_halo_t *halo, const ra_run_t *run)
{
    int64_t lowest = halo->prefix != NULL ? 0 : halo->layout->documents[run->document].first;
    int64_t start = ra_max_i64(run->start - halo->before, 0) / halo->align * halo->align;
    return ra_min_i64(ra_max_i64(start, lowest), run->start);
}

/*
 * Pieces of one run's halo that concern this rank, in ascending position: both ends of a transfer
 * list them in the same order. @a pieces NULL: only count.
 */
static int64_t list_pieces(const ra_halo_t *halo, const ra_run_t *run, int64_t halo_row,
                           piece_t *pieces)
{
    int rank = ra_comm_rank(halo->comm);
    int64_t start = halo_start_of(halo, run), found = 0;
    for (int64_t at = start; at < run->start;) {
        bool from_prefix = at < halo->layout->documents[run->document].first;
        const ra_layout_t *source = from_prefix ? halo->prefix : halo->layout;
        const ra_run_t *owner = ra_layout_find(source, run->document, at);
        int64_t end = ra_min_i64(owner->start + owner->count, run->start);
        if (run->rank == rank || owner->rank == rank) {
            if (pieces != NULL) {
                pieces[found] = (piece_t){
                    .kind = run->rank != rank     ? PIECE_SEND
                            : owner->rank != rank ? PIECE_RECV
                                                  : PIECE_COPY,
                    .peer = run->rank != rank ? run->rank : owner->rank,
                    .from_prefix = from_prefix,
                    .source_row = owner->local + at - owner->start,
                    .halo_row = halo_row + at - start,
                    .count = end - at,
                };
            }
            found++;
        }
        at = end;
    }
    return found;
}

static int64_t list_all(ra_halo_t *halo, piece_t *pieces)
{
    const ra_layout_t *layout = halo->layout;
    int rank = ra_comm_rank(halo->comm);
    int64_t found = 0, row = 0;
    for (int r = 0; r < layout->ranks; r++) {
        const ra_run_t *runs = ra_layout_runs(layout, r);
        for (int64_t i = 0; i < ra_layout_run_count(layout, r); i++) {
            found += list_pieces(halo, &runs[i], row, pieces == NULL ? NULL : pieces + found);
            if (r == rank) {
                int64_t start = halo_start_of(halo, &runs[i]);
                int64_t count = runs[i].start - start;
                halo->runs[i] = (ra_halo_run_t){.start = start, .count = count, .row = row};
                row += count;
            }
        }
    }
    halo->rows = row;
    return found;
}

static ra_status_t fill_pieces(ra_halo_t *halo)
{
    int64_t runs = ra_layout_run_count(halo->layout, ra_comm_rank(halo->comm));
    halo->runs = calloc((size_t)runs + 1, sizeof(*halo->runs));
    if (halo->runs == NULL) {
        return RA_ERR_NOMEM;
    }
    halo->piece_count = list_all(halo, NULL);
    halo->pieces = calloc((size_t)halo->piece_count + 1, sizeof(*halo->pieces));
    if (halo->pieces == NULL) {
        return RA_ERR_NOMEM;
    }
    list_all(halo, halo->pieces);
    for (int64_t i = 0; i < halo->piece_count; i++) {
        halo->remote_count += halo->pieces[i].kind != PIECE_COPY;
    }
    halo->transfers =
        calloc((size_t)(halo->remote_count * halo->max_planes) + 1, sizeof(*halo->transfers));
    return halo->transfers == NULL ? RA_ERR_NOMEM : RA_OK;
}

ra_status_t ra_halo_create(ra_comm_t *comm, ra_stream_t *stream, const ra_layout_t *layout,
                           const ra_layout_t *prefix, int64_t before, int64_t align, int max_planes,
                           ra_halo_t **halo_p)
{
    if (before < 0 || align < 1 || max_planes < 1 || layout->ranks != ra_comm_size(comm)) {
        return ra_fail(RA_ERR_INVALID, "ring",
                       "halo of %lld rows at multiples of %lld, %d planes, layout of %d ranks on "
                       "%d",
                       (long long)before, (long long)align, max_planes, layout->ranks,
                       ra_comm_size(comm));
    }
    if (prefix != NULL) {
        RA_TRY(ra_layout_check_prefix(layout, prefix));
    }
    ra_halo_t *halo = calloc(1, sizeof(*halo));
    if (halo != NULL) {
        *halo = (ra_halo_t){.comm = comm,
                            .stream = stream,
                            .layout = layout,
                            .prefix = prefix,
                            .before = before,
                            .align = align,
                            .max_planes = max_planes};
    }
    if (halo == NULL || fill_pieces(halo) != RA_OK) {
        ra_halo_destroy(halo);
        return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate a halo plan");
    }
    *halo_p = halo;
    return RA_OK;
}

void ra_halo_destroy(ra_halo_t *halo)
{
    if (halo == NULL) {
        return;
    }
    ra_request_free(halo->request);
    free(halo->transfers);
    free(halo->pieces);
    free(halo->runs);
    free(halo);
}

int64_t ra_halo_rows(const ra_halo_t *halo)
{
    return halo->rows;
}

const ra_halo_run_t *ra_halo_runs(const ra_halo_t *halo)
{
    return halo->runs;
}

static char *source_of(const piece_t *piece, const ra_halo_io_t *io, int plane)
{
    const char *base = piece->from_prefix ? io->prefix_rows : io->rows;
    int64_t plane_bytes = piece->from_prefix ? io->prefix_plane_bytes : io->plane_bytes;
    return (char *)(uintptr_t)(base + plane * plane_bytes + piece->source_row * io->row_bytes);
}

static char *target_of(const piece_t *piece, const ra_halo_io_t *io, int plane)
{
    return (char *)io->out + plane * io->out_plane_bytes + piece->halo_row * io->row_bytes;
}

ra_status_t ra_halo_start(ra_halo_t *halo, const ra_halo_io_t *io)
{
    if (halo->request != NULL || io->planes < 1 || io->planes > halo->max_planes) {
        return ra_fail(RA_ERR_INVALID, "ring", "halo fetch of %d planes (at most %d)%s", io->planes,
                       halo->max_planes, halo->request != NULL ? " while another is open" : "");
    }
    halo->started_ns = ra_clock_ns();
    halo->stats.calls++;
    int count = 0;
    for (int64_t i = 0; i < halo->piece_count; i++) {
        const piece_t *piece = &halo->pieces[i];
        int64_t bytes = piece->count * io->row_bytes;
        for (int plane = 0; plane < io->planes; plane++) {
            if (piece->kind == PIECE_COPY) {
                RA_TRY(ra_stream_copy(halo->stream, target_of(piece, io, plane),
                                      source_of(piece, io, plane), bytes));
                continue;
            }
            bool sends = piece->kind == PIECE_SEND;
            halo->transfers[count++] = (ra_transfer_t){.kind = sends ? RA_SEND : RA_RECV,
                                                       .peer = piece->peer,
                                                       .tag = RA_TAG_RING_HALO,
                                                       .data = sends ? source_of(piece, io, plane)
                                                                     : target_of(piece, io, plane),
                                                       .bytes = bytes};
            halo->stats.received_bytes += sends ? 0 : bytes;
        }
    }
    return ra_comm_post(halo->comm, halo->transfers, count, &halo->request);
}

ra_status_t ra_halo_finish(ra_halo_t *halo)
{
    int64_t before = ra_clock_ns();
    ra_span_t span = ra_trace_begin("halo");
    ra_status_t status = ra_comm_wait(halo->request, ra_comm_deadline(halo->comm));
    ra_trace_end(span, ra_comm_rank(halo->comm), RA_LANE_WAIT, halo->rows);
    ra_request_free(halo->request);
    halo->request = NULL;
    int64_t now = ra_clock_ns();
    halo->stats.wait_ns += now - before;
    halo->stats.total_ns += now - halo->started_ns;
    return status;
}

ra_ring_stats_t ra_halo_stats(const ra_halo_t *halo)
{
    return halo->stats;
}
