#include "ring/kv_gather.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/trace.h"
#include "ring/ring_tags.h"
#include <stdlib.h>

enum {
    GATES_MOST = 32, /* a kernel remembers so many open ones */
    PIECES_MOST = 4, /* of a section; more are smaller copies */
    PIECE_ALIGN = 64,
    PIECE_BYTES = 8 << 20 /* of keys: below, the host's part of a copy shows */
};

#define EPOCH_END   0x40000000u
#define GATE_ALWAYS 0x7fffffffu /* open at any epoch before EPOCH_END */

/* Consecutive rows of the buffer (received) or of this rank (sent); the last move of a received
 * piece opens its gate. */
typedef struct ra_gather_move {
    int peer;
    int64_t row, count;
    int64_t gate; /* -1: more of the piece follows, or it is sent */
} ra_gather_move_t;

/* Rows of an owner that land together: consecutive on both sides. */
typedef struct range {
    int64_t source, count, at; /* at: in the section */
} range_t;

static bool any_sees(const ra_layout_t *layout, int reader, const ra_run_t *keys, bool causal)
{
    const ra_run_t *begin = layout->document_runs + layout->document_run_begin[keys->document];
    const ra_run_t *end = layout->document_runs + layout->document_run_begin[keys->document + 1];
    for (const ra_run_t *run = end; run-- > begin;) {
        if (run->rank == reader) {
            return !causal || keys->start <= run->start;
        }
    }
    return false;
}

/* What @a reader needs of @a owner. @a runs (optional) gets the runs, rows counted in the section.
 * @return rows of the section. */
static int64_t list_section(const ra_kv_gather_t *gather, int owner, int reader, range_t *ranges,
                            int64_t *range_count, ra_gathered_run_t *runs, int64_t *run_count)
{
    const ra_layout_t *layout = gather->layout;
    const ra_run_t *held = ra_layout_runs(layout, owner);
    int64_t rows = 0;
    *range_count = 0;
    for (int64_t i = 0; i < ra_layout_run_count(layout, owner); i++) {
        if (held[i].count == 0 || !any_sees(layout, reader, &held[i], gather->causal)) {
            continue;
        }
        range_t *last = *range_count > 0 ? &ranges[*range_count - 1] : NULL;
        if (last != NULL && last->source + last->count == held[i].local) {
            last->count += held[i].count;
        } else {
            ranges[(*range_count)++] = (range_t){held[i].local, held[i].count, rows};
        }
        if (runs != NULL) {
            runs[(*run_count)++] = (ra_gathered_run_t){.document = held[i].document,
                                                       .start = held[i].start,
                                                       .count = held[i].count,
                                                       .row = rows};
        }
        rows += held[i].count;
    }
    return rows;
}

/* The moves of a section, piece after piece from its end. @param base  row of the section in the
 * buffer; < 0: rows of the owner are meant. */
static void add_moves(ra_kv_gather_t *gather, int peer, const range_t *ranges, int64_t range_count,
                      int64_t rows, int64_t base)
{
    int64_t piece = gather->gate_keys;
    for (int64_t p = ra_ceil_div(rows, piece) - 1; p >= 0; p--) {
        int64_t begin = p * piece, end = ra_min_i64(begin + piece, rows);
        for (int64_t i = 0; i < range_count; i++) {
            int64_t from = ra_max_i64(ranges[i].at, begin);
            int64_t to = ra_min_i64(ranges[i].at + ranges[i].count, end);
            if (from < to) {
                bool closes = base >= 0 && to == end;
                gather->moves[gather->move_count++] = (ra_gather_move_t){
                    .peer = peer,
                    .row = base >= 0 ? base + from : ranges[i].source + from - ranges[i].at,
                    .count = to - from,
                    .gate = closes ? (base + begin) / piece : -1};
            }
        }
    }
}

static ra_status_t fail_lists(void)
{
    return ra_fail(RA_ERR_NOMEM, "ring", "cannot allocate the lists of a gather");
}

static ra_status_t allocate_lists(ra_kv_gather_t *gather, range_t **ranges)
{
    const ra_layout_t *layout = gather->layout;
    int size = layout->ranks;
    size_t runs = (size_t)layout->rank_run_begin[size] + 1, most = 1;
    for (int r = 0; r < size; r++) {
        most = (size_t)ra_max_i64((int64_t)most, ra_layout_run_count(layout, r));
    }
    /* Each border of a piece or of a range begins a move. */
    size_t moves = 2 * (size_t)size * (most + PIECES_MOST + 1);
    *ranges = calloc(most, sizeof(range_t));
    gather->runs = calloc(runs, sizeof(*gather->runs));
    gather->moves = calloc(moves, sizeof(*gather->moves));
    gather->transfers = calloc(2 * moves, sizeof(*gather->transfers));
    gather->requests = calloc((size_t)size * (PIECES_MOST + 1) + 1, sizeof(ra_request_t *));
    bool complete = *ranges != NULL && gather->runs != NULL && gather->moves != NULL &&
                    gather->transfers != NULL && gather->requests != NULL;
    return complete ? RA_OK : fail_lists();
}

static int64_t round_up(int64_t rows, int64_t to)
{
    return ra_ceil_div(rows, to) * to;
}

static void place_runs(ra_kv_gather_t *gather, int64_t first, int section, int64_t base)
{
    for (int64_t i = first; i < gather->run_count; i++) {
        gather->runs[i].section = section;
        gather->runs[i].row += base;
    }
}

/* Sections, runs and moves. */
static void fill_lists(ra_kv_gather_t *gather, range_t *ranges)
{
    const ra_layout_t *layout = gather->layout;
    int size = layout->ranks, rank = gather->rank;
    int64_t range_count = 0, own = 0;
    if (gather->gated) {
        own = list_section(gather, rank, rank, ranges, &range_count, gather->runs,
                           &gather->run_count);
    }
    int64_t rows = round_up(own, gather->gate_keys), others = 0;
    for (int hop = 1; hop < size; hop++) {
        int owner = (rank - hop + size) % size;
        int64_t first = gather->run_count;
        int64_t count = list_section(gather, owner, rank, ranges, &range_count, gather->runs,
                                     &gather->run_count);
        place_runs(gather, first, hop, rows);
        add_moves(gather, owner, ranges, range_count, count, rows);
        rows += round_up(count, gather->gate_keys);
        others += count;
    }
    gather->receive_count = gather->move_count;
    gather->rows = others > 0 ? rows : 0;
    gather->run_count = others > 0 ? gather->run_count : 0;
    for (int hop = 1; hop < size; hop++) {
        int reader = (rank + hop) % size;
        int64_t count = list_section(gather, rank, reader, ranges, &range_count, NULL, NULL);
        add_moves(gather, reader, ranges, range_count, count, -1);
    }
}

/* Own gates are always open, the others as of epoch 0, which nobody waits for. */
static ra_status_t reset_gates(ra_kv_gather_t *gather)
{
    int64_t count = gather->rows / gather->gate_keys;
    int64_t own = ra_ceil_div(gather->layout->rows[gather->rank], gather->gate_keys);
    uint32_t *gates = calloc((size_t)count + 1, sizeof(*gates));
    if (gates == NULL) {
        return fail_lists();
    }
    for (int64_t i = 0; i < own && i < count; i++) {
        gates[i] = GATE_ALWAYS;
    }
    gather->epoch = 0;
    ra_status_t status =
        ra_stream_copy(gather->stream, gather->gates, gates, count * (int64_t)sizeof(*gates));
    free(gates);
    return status;
}

static ra_status_t allocate_buffers(ra_kv_gather_t *gather)
{
    ra_device_t *device = ra_stream_device(gather->stream);
    int64_t bytes = 2 * gather->rows * gather->row_bytes;
    if (gather->rows == 0) {
        return RA_OK;
    }
    RA_TRY(ra_device_alloc(device, bytes, &gather->kv));
    RA_TRY(ra_stream_zero(gather->stream, gather->kv, bytes));
    if (!gather->gated) {
        return RA_OK;
    }
    RA_TRY(ra_device_alloc(device, gather->rows / gather->gate_keys * (int64_t)sizeof(uint32_t),
                           (void **)&gather->gates));
    return reset_gates(gather);
}

/* A kernel at a gate holds its whole GPU, so what it waits for may not need that GPU to run. */
static ra_status_t agree_on_gates(ra_kv_gather_t *gather, bool wanted)
{
    int size = gather->layout->ranks;
    int32_t mine[2] = {ra_device_index(ra_stream_device(gather->stream)),
                       wanted && !ra_comm_uses_kernels(gather->comm)};
    int32_t *all = calloc((size_t)size, sizeof(mine));
    if (all == NULL) {
        return fail_lists();
    }
    ra_status_t status = ra_comm_allgather(gather->comm, mine, sizeof(mine), all);
    gather->gated = true;
    for (int a = 0; a < size; a++) {
        gather->gated = gather->gated && all[2 * a + 1];
        for (int b = 0; b < a; b++) {
            gather->gated = gather->gated && all[2 * a] != all[2 * b];
        }
    }
    free(all);
    return status;
}

static ra_status_t agree_on_room(ra_kv_gather_t *gather, bool mine, bool *everybody)
{
    int size = gather->layout->ranks;
    char here = mine, *all = calloc((size_t)size, 1);
    if (all == NULL) {
        return fail_lists();
    }
    ra_status_t status = ra_comm_allgather(gather->comm, &here, 1, all);
    *everybody = true;
    for (int r = 0; r < size; r++) {
        *everybody = *everybody && all[r];
    }
    free(all);
    return status;
}

static ra_status_t fill_gather(ra_kv_gather_t *gather, bool gates_wanted, int64_t piece_bytes,
                               bool *fits)
{
    int size = gather->layout->ranks;
    range_t *ranges = NULL;
    RA_TRY(agree_on_gates(gather, gates_wanted));
    int64_t pieces = ra_max_i64(1, ra_min_i64(PIECES_MOST, GATES_MOST / size));
    int64_t most = gather->layout->max_rows, least = piece_bytes / gather->row_bytes;
    int64_t piece = ra_max_i64(ra_ceil_div(most, pieces), ra_min_i64(least, most));
    gather->gate_keys = round_up(ra_max_i64(piece, 1), PIECE_ALIGN);
    ra_status_t status = allocate_lists(gather, &ranges);
    if (status == RA_OK) {
        fill_lists(gather, ranges);
        status = allocate_buffers(gather);
    }
    free(ranges);
    return agree_on_room(gather, status == RA_OK, fits);
}

ra_status_t ra_kv_gather_create(ra_comm_t *comm, ra_stream_t *stream, const ra_layout_t *layout,
                                bool causal, int64_t row_bytes, bool gates_wanted,
                                int64_t piece_bytes, ra_kv_gather_t **gather_p)
{
    bool fits = false;
    ra_kv_gather_t *gather = calloc(1, sizeof(*gather));
    if (gather == NULL) {
        return fail_lists();
    }
    *gather = (ra_kv_gather_t){.comm = comm,
                               .stream = stream,
                               .layout = layout,
                               .rank = ra_comm_rank(comm),
                               .causal = causal,
                               .row_bytes = row_bytes};
    ra_status_t status =
        fill_gather(gather, gates_wanted, piece_bytes > 0 ? piece_bytes : PIECE_BYTES, &fits);
    if (status != RA_OK || !fits) {
        ra_kv_gather_destroy(gather);
        gather = NULL;
    }
    *gather_p = gather;
    return status;
}

void ra_kv_gather_destroy(ra_kv_gather_t *gather)
{
    if (gather == NULL) {
        return;
    }
    ra_device_t *device = ra_stream_device(gather->stream);
    ra_device_free(device, gather->kv);
    ra_device_free(device, gather->gates);
    free(gather->runs);
    free(gather->moves);
    free(gather->transfers);
    free(gather->requests);
    free(gather);
}

static char *row_at(const void *kv, int64_t rows, int plane, int64_t row, int64_t row_bytes)
{
    return (char *)(uintptr_t)kv + (plane * rows + row) * row_bytes;
}

/* Keys and values of one move; @return transfers added at @a to. */
static int fill_transfers(const ra_kv_gather_t *gather, const ra_gather_move_t *move, bool receives,
                          const void *kv, ra_transfer_t *to)
{
    bool here = receives || kv == gather->kv;
    int64_t rows = here ? gather->rows : gather->layout->rows[gather->rank];
    for (int plane = 0; plane < 2; plane++) {
        to[plane] = (ra_transfer_t){
            .kind = receives ? RA_RECV : RA_SEND,
            .peer = move->peer,
            .tag = RA_TAG_RING_KEYS,
            .data = row_at(receives ? gather->kv : kv, rows, plane, move->row, gather->row_bytes),
            .bytes = move->count * gather->row_bytes};
    }
    if (gather->gated && move->gate >= 0) {
        to[1].gate = gather->gates + move->gate;
        to[1].gate_value = gather->epoch;
    }
    return 2;
}

static ra_status_t post(ra_kv_gather_t *gather, int count, bool in_turn)
{
    ra_request_t **request = &gather->requests[gather->request_count];
    RA_TRY((in_turn ? ra_comm_post_in_turn : ra_comm_post)(gather->comm, gather->transfers, count,
                                                           request));
    gather->request_count++;
    return RA_OK;
}

static ra_status_t post_all(ra_kv_gather_t *gather, const void *kv)
{
    int count = 0;
    for (int64_t i = 0; i < gather->receive_count; i++) {
        const ra_gather_move_t *move = &gather->moves[i];
        count += fill_transfers(gather, move, true, NULL, gather->transfers + count);
        gather->stats.received_bytes += 2 * move->count * gather->row_bytes;
        if (gather->gated && move->gate >= 0) {
            RA_TRY(post(gather, count, true));
            count = 0;
        }
    }
    for (int64_t i = gather->receive_count; i < gather->move_count; i++) {
        count += fill_transfers(gather, &gather->moves[i], false, kv, gather->transfers + count);
    }
    return count > 0 ? post(gather, count, false) : RA_OK;
}

/* Gated: this rank's own rows stand first in the buffer. */
static ra_status_t copy_own(ra_kv_gather_t *gather, const void *kv)
{
    int64_t rows = gather->layout->rows[gather->rank];
    bool wanted = gather->gated && gather->rows > 0 && kv != gather->kv;
    for (int plane = 0; plane < 2 && wanted; plane++) {
        RA_TRY(ra_stream_copy(
            gather->stream, row_at(gather->kv, gather->rows, plane, 0, gather->row_bytes),
            row_at(kv, rows, plane, 0, gather->row_bytes), rows * gather->row_bytes));
    }
    return RA_OK;
}

ra_status_t ra_kv_gather_start(ra_kv_gather_t *gather, const void *kv)
{
    ra_status_t status = RA_OK;
    if (gather->gates != NULL && gather->epoch + 1 == EPOCH_END) {
        RA_TRY_GOTO(reset_gates(gather), err_cancel);
    }
    gather->epoch++;
    RA_TRY_GOTO(post_all(gather, kv), err_cancel);
    RA_TRY_GOTO(copy_own(gather, kv), err_cancel);
    return RA_OK;

err_cancel:
    ra_kv_gather_cancel(gather, status);
    return status;
}

ra_status_t ra_kv_gather_finish(ra_kv_gather_t *gather)
{
    int64_t before = ra_clock_ns();
    ra_span_t span = ra_trace_begin("keys");
    ra_status_t status = RA_OK;
    for (int i = 0; i < gather->request_count && status == RA_OK; i++) {
        status = ra_comm_wait(gather->requests[i], ra_comm_deadline(gather->comm));
    }
    ra_trace_end(span, gather->rank, RA_LANE_WAIT, gather->rows);
    gather->stats.wait_ns += ra_clock_ns() - before;
    if (status != RA_OK) {
        ra_kv_gather_cancel(gather, status);
        return status;
    }
    for (int i = 0; i < gather->request_count; i++) {
        ra_request_free(gather->requests[i]);
    }
    gather->request_count = 0;
    return RA_OK;
}

void ra_kv_gather_cancel(ra_kv_gather_t *gather, ra_status_t cause)
{
    ra_comm_abort(gather->comm, cause);
    for (int i = 0; i < gather->request_count; i++) {
        ra_request_free(gather->requests[i]);
    }
    gather->request_count = 0;
}
