/* Device memory over the transports that move it, in stream order. Skipped where no GPU is. */
#include "base/clock.h"
#include "tests/comm/device_ranks.h"
#include "tests/comm/transfers.h"
#include <stdlib.h>
#include <time.h>

static const char *row; /* transport under test */

static bool is_peer(void)
{
    return strcmp(row, "peer") == 0;
}

static void run_on(int ranks, device_rank_func_t func, void *arg)
{
    if (!gpu_row_can_run(row, ranks)) {
        print_message("%s: not run with %d ranks on %d GPUs\n", row, ranks, gpu_count());
        return;
    }
    assert_int_equal(gpu_ranks_run(row, ranks, func, arg), RA_OK);
}

static uint8_t pattern(int rank, int64_t index)
{
    return (uint8_t)(index * 31 + index / 251 + rank * 77 + 5);
}

/* Buffers of one rank; idle is what keeps a GPU busy for a while. */
enum { IDLE_BYTES = 64 << 20, IDLE_TIMES = 20 };

typedef struct buffers {
    uint8_t *host, *mine, *theirs, *idle;
} buffers_t;

static void free_buffers(ra_stream_t *stream, buffers_t *b)
{
    ra_device_t *device = ra_stream_device(stream);
    ra_stream_sync(stream);
    free(b->host);
    ra_device_free(device, b->mine);
    ra_device_free(device, b->theirs);
    ra_device_free(device, b->idle);
}

static ra_status_t make_buffers(ra_stream_t *stream, int64_t bytes, buffers_t *b)
{
    ra_device_t *device = ra_stream_device(stream);
    *b = (buffers_t){.host = malloc((size_t)bytes + 1)};
    RA_TRY(ra_device_alloc(device, bytes, (void **)&b->mine));
    RA_TRY(ra_device_alloc(device, bytes, (void **)&b->theirs));
    return ra_device_alloc(device, IDLE_BYTES, (void **)&b->idle);
}

static ra_status_t keep_busy(ra_stream_t *stream, const buffers_t *b)
{
    for (int i = 0; i < IDLE_TIMES; i++) {
        RA_TRY(ra_stream_zero(stream, b->idle, IDLE_BYTES));
    }
    return RA_OK;
}

/*
 * Nothing below waits for the GPU until the end: the bytes are made late on a busy queue, the send
 * buffer is cleared and the received bytes are copied on right after the wait.
 */
static ra_status_t shift_once(ra_comm_t *comm, ra_stream_t *stream, int64_t bytes, buffers_t *b)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int right = (rank + 1) % size, left = (rank + size - 1) % size;
    for (int64_t i = 0; i < bytes; i++) {
        b->host[i] = pattern(rank, i);
    }
    RA_TRY(ra_stream_zero(stream, b->theirs, bytes));
    RA_TRY(keep_busy(stream, b));
    RA_TRY(ra_stream_copy(stream, b->mine, b->host, bytes));
    ra_transfer_t group[] = {make(RA_SEND, right, b->mine, bytes),
                             make(RA_RECV, left, b->theirs, bytes)};
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, group, 2, &request));
    RA_TRY(wait_free(comm, request));
    RA_TRY(ra_stream_zero(stream, b->mine, bytes));
    RA_TRY(ra_stream_copy(stream, b->host, b->theirs, bytes));
    RA_TRY(ra_stream_sync(stream));
    for (int64_t i = 0; i < bytes; i++) {
        RANK_CHECK(comm, b->host[i] == pattern(left, i));
    }
    return RA_OK;
}

static ra_status_t shift_round_ring(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    int64_t sizes[] = {1, 3, 4096, (4 << 20) + 3};
    ra_status_t status = RA_OK;
    for (size_t s = 0; s < RA_ARRAY_LEN(sizes) && status == RA_OK; s++) {
        buffers_t b;
        status = make_buffers(stream, sizes[s], &b);
        for (int round = 0; round < 5 && status == RA_OK; round++) {
            status = shift_once(comm, stream, sizes[s], &b);
        }
        free_buffers(stream, &b);
    }
    return status;
}

static void transfers_keep_the_order_of_the_compute_stream(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        run_on(ranks, shift_round_ring, NULL);
    }
}

enum { STEPS = 12, BLOCK = 1 << 20 };

/* A ring with two landing buffers that alternate, never waiting for the GPU before the end. */
static ra_status_t walk_ring(ra_comm_t *comm, ra_stream_t *stream, uint8_t *blocks[3],
                             uint8_t *seen)
{
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    uint8_t *held = blocks[2];
    for (int s = 0; s < STEPS; s++) {
        uint8_t *landing = blocks[s % 2];
        ra_transfer_t group[] = {make(RA_LEND, (rank + 1) % size, held, BLOCK),
                                 make(RA_BORROW, (rank + size - 1) % size, landing, BLOCK)};
        ra_request_t *request = NULL;
        RA_TRY(ra_comm_post(comm, group, 2, &request));
        RA_TRY(ra_stream_copy(stream, seen + (int64_t)s * 16, held + BLOCK - 16, 16));
        RA_TRY(ra_comm_wait(request, ra_comm_deadline(comm)));
        RANK_CHECK(comm, ra_request_borrowed(request, 1) == landing);
        ra_request_free(request);
        held = landing;
    }
    return ra_stream_sync(stream);
}

static ra_status_t walk_and_look(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    ra_device_t *device = ra_stream_device(stream);
    uint8_t *memory = NULL, *host = malloc(BLOCK);
    RA_TRY(ra_device_alloc(device, 3 * BLOCK + STEPS * 16, (void **)&memory));
    uint8_t *blocks[] = {memory, memory + BLOCK, memory + 2 * BLOCK}, *seen = memory + 3 * BLOCK;
    memset(host, 100 + rank, BLOCK);
    ra_status_t status = ra_stream_copy(stream, blocks[2], host, BLOCK);
    if (status == RA_OK) {
        status = walk_ring(comm, stream, blocks, seen);
    }
    if (status == RA_OK) {
        status = ra_stream_copy(stream, host, seen, STEPS * 16);
    }
    ra_stream_sync(stream);
    for (int i = 0; i < STEPS * 16 && status == RA_OK; i++) {
        int owner = (rank + STEPS * size - i / 16) % size;
        if (host[i] != 100 + owner) {
            status = ra_fail(RA_ERR_INTERNAL, "test", "step %d of rank %d shows %d, not %d", i / 16,
                             rank, host[i], 100 + owner);
        }
    }
    ra_device_free(device, memory);
    free(host);
    return status;
}

static void blocks_go_round_without_waiting_for_the_gpu(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        run_on(ranks, walk_and_look, NULL);
    }
}

/* Pieces of one receive, each with a gate; and host memory in the same group. */
static ra_status_t receive_pieces(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    enum { PIECES = 4, PIECE = 4096 };
    int rank = ra_comm_rank(comm), other = 1 - rank;
    ra_device_t *device = ra_stream_device(stream);
    uint8_t *memory = NULL, host[2 * PIECES * PIECE];
    int64_t rows = 1000 + rank, their_rows = 0;
    uint32_t gates[PIECES] = {0}, *device_gates = NULL;
    RA_TRY(ra_device_alloc(device, sizeof(host), (void **)&memory));
    RA_TRY(ra_device_alloc(device, sizeof(gates), (void **)&device_gates));
    memset(host, 10 + rank, sizeof(host));
    RA_TRY(ra_stream_copy(stream, memory, host, sizeof(host)));
    RA_TRY(ra_stream_zero(stream, device_gates, sizeof(gates)));
    ra_transfer_t group[2 * PIECES + 2];
    for (int i = 0; i < PIECES; i++) {
        group[2 * i] = make(RA_SEND, other, memory + i * PIECE, PIECE);
        group[2 * i + 1] = make(RA_RECV, other, memory + (PIECES + i) * PIECE, PIECE);
        group[2 * i + 1].gate = &device_gates[i];
        group[2 * i + 1].gate_value = 70 + (uint32_t)i;
    }
    group[2 * PIECES] = make(RA_SEND, other, &rows, sizeof(rows));
    group[2 * PIECES + 1] = make(RA_RECV, other, &their_rows, sizeof(rows));
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, group, 2 * PIECES + 2, &request));
    RA_TRY(wait_free(comm, request));
    RANK_CHECK(comm, their_rows == 1000 + other);
    RA_TRY(ra_stream_copy(stream, host, memory, sizeof(host)));
    RA_TRY(ra_stream_copy(stream, gates, device_gates, sizeof(gates)));
    RA_TRY(ra_stream_sync(stream));
    for (int i = 0; i < 2 * PIECES * PIECE; i++) {
        RANK_CHECK(comm, host[i] == 10 + (i < PIECES * PIECE ? rank : other));
    }
    for (uint32_t i = 0; i < PIECES; i++) {
        RANK_CHECK(comm, gates[i] == 70 + i);
    }
    ra_device_free(device, memory);
    ra_device_free(device, device_gates);
    return RA_OK;
}

static void gates_are_written_and_host_memory_rides_along(void **state)
{
    (void)state;
    run_on(2, receive_pieces, NULL);
}

static ra_status_t gather_and_exchange(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    enum { WORDS = 1000, RANKS = 4 };
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    ra_device_t *device = ra_stream_device(stream);
    int32_t *memory = NULL, *host = malloc(2 * RANKS * WORDS * sizeof(int32_t));
    int64_t bytes[RANKS], offset[RANKS], piece = WORDS * (int64_t)sizeof(int32_t);
    RA_TRY(ra_device_alloc(device, 2 * RANKS * piece, (void **)&memory));
    for (int i = 0; i < size * WORDS; i++) {
        host[i] = rank * 100000 + i;
    }
    for (int r = 0; r < size; r++) {
        bytes[r] = piece;
        offset[r] = r * piece;
    }
    int32_t *to = memory + RANKS * WORDS;
    for (int round = 0; round < 3; round++) {
        RA_TRY(ra_stream_copy(stream, memory, host, size * piece));
        RA_TRY(ra_comm_alltoallv(comm, memory, bytes, offset, to, bytes, offset));
        RA_TRY(ra_comm_allgather(comm, to + rank * WORDS, piece, memory));
        RA_TRY(ra_comm_broadcast(comm, size - 1, memory, piece));
    }
    RA_TRY(ra_stream_copy(stream, host, memory, 2 * RANKS * piece));
    RA_TRY(ra_stream_sync(stream));
    for (int i = 0; i < size * WORDS; i++) {
        int r = i / WORDS;
        RANK_CHECK(comm, host[i] == r * 100000 + r * WORDS + i % WORDS);
        RANK_CHECK(comm, host[RANKS * WORDS + i] == r * 100000 + rank * WORDS + i % WORDS);
    }
    ra_device_free(device, memory);
    free(host);
    return RA_OK;
}

static void collectives_move_device_memory(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        run_on(ranks, gather_and_exchange, NULL);
    }
}

/* Rank 0 sends after much work, rank 1 has nothing else to do than wait for it. */
static ra_status_t wait_for_a_busy_rank(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    buffers_t b;
    double waited = -1.0;
    RA_TRY(make_buffers(stream, 4096, &b));
    RA_TRY(ra_comm_measure_waits(comm, true));
    if (rank == 0) {
        RA_TRY(keep_busy(stream, &b));
    }
    ra_transfer_t one =
        rank == 0 ? make(RA_SEND, 1, b.mine, 4096) : make(RA_RECV, 0, b.theirs, 4096);
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &one, 1, &request));
    RA_TRY(wait_free(comm, request));
    RA_TRY(ra_stream_sync(stream));
    RA_TRY(ra_comm_waited(comm, &waited));
    RANK_CHECK(comm, waited > 0.0);
    RA_TRY(ra_comm_measure_waits(comm, false));
    RA_TRY(ra_comm_waited(comm, &waited));
    RANK_CHECK(comm, waited == 0.0);
    free_buffers(stream, &b);
    return RA_OK;
}

static void waits_of_the_compute_stream_are_measured(void **state)
{
    (void)state;
    run_on(2, wait_for_a_busy_rank, NULL);
}

static ra_status_t disagree_on_memory(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    void *memory = NULL;
    char host[64] = {0};
    RA_TRY(ra_device_alloc(ra_stream_device(stream), 64, &memory));
    ra_transfer_t one =
        ra_comm_rank(comm) == 0 ? make(RA_SEND, 1, host, 64) : make(RA_RECV, 0, memory, 64);
    ra_request_t *request = NULL;
    ra_log_set_quiet(1);
    RA_TRY(ra_comm_post(comm, &one, 1, &request));
    RANK_CHECK(comm, wait_free(comm, request) == RA_ERR_INVALID);
    RANK_CHECK(comm, strstr(ra_last_error(), "of device memory") != NULL);
    ra_log_set_quiet(0);
    RA_TRY(ra_comm_barrier(comm));
    ra_device_free(ra_stream_device(stream), memory);
    return RA_OK;
}

static void host_and_device_memory_do_not_match(void **state)
{
    (void)state;
    if (!is_peer()) {
        print_message("%s does not compare the two sides\n", row);
        skip();
    }
    run_on(2, disagree_on_memory, NULL);
}

/* Rank 1 fails while rank 0 waits for device memory; its stream and its gate are freed. */
static ra_status_t leave_alone(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)arg;
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 1) {
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        return ra_fail(RA_ERR_INPUT, "test", "rank 1 gives up");
    }
    uint32_t *memory = NULL, gate = 0;
    RA_TRY(ra_device_alloc(ra_stream_device(stream), 1 << 20, (void **)&memory));
    RA_TRY(ra_stream_zero(stream, memory, 64));
    ra_transfer_t receive = make(RA_RECV, 1, memory + 16, 65536);
    receive.gate = memory;
    receive.gate_value = 9;
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &receive, 1, &request));
    ra_status_t status = ra_comm_wait(request, ra_deadline_in(20));
    ra_status_t synced = ra_stream_sync(stream); /* where the host waits on nccl */
    ra_request_free(request);
    RANK_CHECK(comm, status == (is_peer() ? RA_ERR_PEER : RA_OK));
    RANK_CHECK(comm, synced == RA_OK);
    RANK_CHECK(comm, ra_comm_post(comm, &receive, 1, &request) == RA_ERR_PEER);
    struct timespec pause = {.tv_nsec = 20000000};
    nanosleep(&pause, NULL); /* the gate is written beside the compute stream */
    RA_TRY(ra_stream_copy(stream, &gate, memory, sizeof(gate)));
    RA_TRY(ra_stream_sync(stream));
    RANK_CHECK(comm, gate == 9);
    ra_device_free(ra_stream_device(stream), memory);
    return RA_ERR_PEER;
}

static void a_rank_that_fails_frees_those_who_wait_for_its_bytes(void **state)
{
    (void)state;
    if (!gpu_row_can_run(row, 2)) {
        print_message("%s: not run with 2 ranks on %d GPUs\n", row, gpu_count());
        skip();
    }
    double before = ra_clock_s();
    assert_int_equal(gpu_ranks_run(row, 2, leave_alone, NULL), RA_ERR_INPUT);
    assert_string_equal(ra_last_error(), "rank 1 gives up");
    print_message("%s: over after %.2f s\n", row, ra_clock_s() - before);
}

static ra_status_t only_meet(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)stream;
    (void)arg;
    return ra_comm_barrier(comm);
}

/* The first call connects. */
static void time_calls(const device_world_t *world, int ranks)
{
    enum { CALLS = 100 };
    double begin = ra_clock_s();
    assert_int_equal(device_world_call(world, only_meet, NULL), RA_OK);
    double first = ra_clock_s();
    for (int i = 0; i < CALLS; i++) {
        assert_int_equal(device_world_call(world, only_meet, NULL), RA_OK);
    }
    print_message("%s, %d ranks: first call %.1f ms, later ones %.3f ms\n", row, ranks,
                  (first - begin) * 1e3, (ra_clock_s() - first) * 1e3 / CALLS);
}

/* Streams, queues, events, staging and connections serve one call after another; a failed call
 * takes its world along. */
static void a_world_serves_many_calls_also_after_a_failed_one(void **state)
{
    (void)state;
    static const device_rank_func_t funcs[] = {gather_and_exchange, walk_and_look, shift_round_ring,
                                               walk_and_look};
    for (int ranks = 1; ranks <= 4; ranks++) {
        device_world_t world = gpu_world();
        if (!gpu_row_can_run(row, ranks)) {
            print_message("%s: not run with %d ranks on %d GPUs\n", row, ranks, gpu_count());
            continue;
        }
        assert_int_equal(device_world_open(row, ranks, &world), RA_OK);
        time_calls(&world, ranks);
        for (int i = 0; i < 24; i++) {
            assert_int_equal(device_world_call(&world, funcs[i % 4], NULL), RA_OK);
            if (ranks == 2) {
                assert_int_equal(device_world_call(&world, receive_pieces, NULL), RA_OK);
            }
            if (ranks == 2 && i % 8 == 3) {
                assert_int_equal(device_world_call(&world, leave_alone, NULL), RA_ERR_INPUT);
                assert_string_equal(ra_last_error(), "rank 1 gives up");
            }
        }
        ra_ranks_close(world.ranks);
    }
}

static ra_status_t do_nothing(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    (void)comm;
    (void)stream;
    (void)arg;
    return RA_OK;
}

static void transports_that_cannot_reach_a_gpu_say_so(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    assert_int_equal(gpu_ranks_run("local", 1, do_nothing, NULL), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "moves host memory only"));
    assert_int_equal(gpu_ranks_run("nccl", gpu_count() + 1, do_nothing, NULL), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), "nccl needs a GPU for each rank"));
    ra_log_set_quiet(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(transfers_keep_the_order_of_the_compute_stream),
        cmocka_unit_test(blocks_go_round_without_waiting_for_the_gpu),
        cmocka_unit_test(gates_are_written_and_host_memory_rides_along),
        cmocka_unit_test(collectives_move_device_memory),
        cmocka_unit_test(waits_of_the_compute_stream_are_measured),
        cmocka_unit_test(host_and_device_memory_do_not_match),
        cmocka_unit_test(a_rank_that_fails_frees_those_who_wait_for_its_bytes),
        cmocka_unit_test(a_world_serves_many_calls_also_after_a_failed_one),
        cmocka_unit_test(transports_that_cannot_reach_a_gpu_say_so),
    };
    if (gpu_count() == 0) {
        print_message("no GPU: transfers of device memory are not tested\n");
        return 77; /* ctest: skipped */
    }
    int failed = 0;
    const char *rows[] = {"peer", "nccl"};
    for (size_t i = 0; i < RA_ARRAY_LEN(rows); i++) {
        row = rows[i];
        failed += cmocka_run_group_tests_name(row, tests, NULL, NULL);
    }
    return failed;
}
