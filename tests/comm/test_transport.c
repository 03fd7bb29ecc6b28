/* What every row of the transport table must do. */
#include "base/clock.h"
#include "tests/comm/device_ranks.h"
#include "tests/comm/transfers.h"
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *row; /* transport under test */
static bool in_order;   /* its groups run one after another, without tags */
static bool checks;     /* it compares the two sides, and withdraws a group alone */

static void needs_tags(void)
{
    if (in_order) {
        print_message("%s matches in order alone\n", row);
        skip();
    }
}

static void needs_checks(void)
{
    if (!checks) {
        print_message("%s neither compares the two sides nor withdraws single groups\n", row);
        skip();
    }
}

static bool can_run(int ranks)
{
    static int told = 0;
    if (gpu_row_can_run(row, ranks)) {
        return true;
    }
    if (told < ranks) {
        told = ranks;
        print_message("%s: not run with %d ranks on %d GPUs\n", row, ranks, gpu_count());
    }
    return false;
}

static void run_on(int ranks, ra_rank_func_t func, void *arg)
{
    if (can_run(ranks)) {
        assert_int_equal(host_ranks_run(row, ranks, func, arg), RA_OK);
    }
}

static ra_status_t transfer_one(ra_comm_t *comm, ra_transfer_t transfer)
{
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &transfer, 1, &request));
    return wait_free(comm, request);
}

static uint8_t pattern(int rank, int64_t index)
{
    return (uint8_t)(index * 31 + index / 251 + rank * 77 + 5);
}

static ra_status_t shift_round_ring(ra_comm_t *comm, void *arg)
{
    int64_t bytes = *(int64_t *)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int right = (rank + 1) % size, left = (rank + size - 1) % size;
    uint8_t *mine = malloc((size_t)bytes + 1), *theirs = malloc((size_t)bytes + 1);
    for (int64_t i = 0; i < bytes; i++) {
        mine[i] = pattern(rank, i);
        theirs[i] = 0;
    }
    ra_transfer_t group[] = {make_tagged(RA_SEND, right, 7, mine, bytes),
                             make_tagged(RA_RECV, left, 7, theirs, bytes)};
    ra_request_t *request = NULL;
    ra_status_t status = ra_comm_post(comm, group, 2, &request);
    if (status == RA_OK) {
        status = wait_free(comm, request);
    }
    for (int64_t i = 0; i < bytes && status == RA_OK; i++) {
        if (theirs[i] != pattern(left, i)) {
            status = ra_fail(RA_ERR_INTERNAL, "test", "byte %lld differs", (long long)i);
        }
    }
    free(mine);
    free(theirs);
    return status;
}

static void bytes_of_any_number_arrive(void **state)
{
    (void)state;
    int64_t sizes[] = {0, 1, 3, 4096, (1 << 19) + 3};
    int ranks[] = {1, 2, 3, 5, 8};
    for (size_t s = 0; s < RA_ARRAY_LEN(sizes); s++) {
        for (size_t r = 0; r < RA_ARRAY_LEN(ranks); r++) {
            run_on(ranks[r], shift_round_ring, &sizes[s]);
        }
    }
}

enum { TAGS = 200 };

static ra_status_t send_tags_backwards(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t values[TAGS];
    ra_transfer_t group[TAGS];
    for (int i = 0; i < TAGS; i++) {
        int tag = rank == 0 ? i : TAGS - 1 - i;
        values[i] = rank == 0 ? 1000 + tag : -1;
        group[i] =
            make_tagged(rank == 0 ? RA_SEND : RA_RECV, 1 - rank, (uint32_t)tag, &values[i], 4);
    }
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, group, TAGS, &request));
    RA_TRY(wait_free(comm, request));
    for (int i = 0; i < TAGS && rank == 1; i++) {
        RANK_CHECK(comm, values[i] == 1000 + TAGS - 1 - i);
    }
    return RA_OK;
}

static void tags_match_in_any_order(void **state)
{
    (void)state;
    needs_tags();
    run_on(2, send_tags_backwards, NULL);
}

static ra_status_t keep_order_in_a_tag(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t values[64];
    for (int i = 0; i < 64; i++) {
        values[i] = rank == 0 ? i : -1;
        ra_transfer_t one =
            make_tagged(rank == 0 ? RA_SEND : RA_RECV, 1 - rank, (uint32_t)(i % 2), &values[i], 4);
        RA_TRY(transfer_one(comm, one));
    }
    for (int i = 0; i < 64; i++) {
        RANK_CHECK(comm, values[i] == i);
    }
    /* The same in one group: post order is the order in the array. */
    ra_transfer_t group[64];
    for (int i = 0; i < 64; i++) {
        values[i] = rank == 0 ? 2 * i : -1;
        group[i] = make_tagged(rank == 0 ? RA_SEND : RA_RECV, 1 - rank, 9, &values[i], 4);
    }
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, group, 64, &request));
    RA_TRY(wait_free(comm, request));
    for (int i = 0; i < 64; i++) {
        RANK_CHECK(comm, values[i] == 2 * i);
    }
    return RA_OK;
}

static void order_is_kept_per_peer_and_tag(void **state)
{
    (void)state;
    run_on(2, keep_order_in_a_tag, NULL);
}

static ra_status_t send_to_self_in_a_group(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), right = (rank + 1) % ra_comm_size(comm);
    int left = (rank + ra_comm_size(comm) - 1) % ra_comm_size(comm);
    int32_t from = 40 + rank, to = 0, other = 0;
    ra_transfer_t group[] = {
        make_tagged(RA_SEND, rank, 1, &from, 4), make_tagged(RA_RECV, left, 2, &other, 4),
        make_tagged(RA_SEND, right, 2, &from, 4), make_tagged(RA_RECV, rank, 1, &to, 4)};
    ra_request_t *request = NULL;
    bool alone = right == rank; /* all four match by order then */
    RA_TRY(ra_comm_post(comm, group, 4, &request));
    RA_TRY(wait_free(comm, request));
    RANK_CHECK(comm, to == 40 + rank && other == 40 + (alone ? rank : left));
    return RA_OK;
}

static void a_group_may_hold_transfers_to_oneself(void **state)
{
    (void)state;
    run_on(1, send_to_self_in_a_group, NULL);
    run_on(3, send_to_self_in_a_group, NULL);
}

static ra_status_t post_two_groups_that_cross(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t mine = rank, theirs = -1;
    ra_transfer_t send = make_tagged(RA_SEND, 1 - rank, 1, &mine, 4);
    ra_transfer_t receive = make_tagged(RA_RECV, 1 - rank, 1, &theirs, 4);
    ra_request_t *first = NULL, *second = NULL;
    RA_TRY(ra_comm_post(comm, &send, 1, &first));
    RA_TRY(ra_comm_post(comm, &receive, 1, &second));
    if (ra_comm_in_order(comm)) {
        ra_log_set_quiet(1);
        RANK_CHECK(comm, ra_comm_wait(second, ra_deadline_in(0.02)) == RA_ERR_TIMEOUT);
        RANK_CHECK(comm, strstr(ra_last_error(), "behind a group") != NULL);
        RA_TRY(ra_comm_cancel(second));
        RANK_CHECK(comm, ra_comm_test(second) == RA_ERR_CANCELED);
        ra_request_free(first); /* still open: withdrawn */
    } else {
        RA_TRY(wait_free(comm, first));
        RA_TRY(ra_comm_wait(second, ra_comm_deadline(comm)));
        RANK_CHECK(comm, theirs == 1 - rank);
    }
    ra_request_free(second);
    return RA_OK;
}

static void crossing_groups_hang_only_where_groups_run_in_order(void **state)
{
    (void)state;
    needs_checks();
    run_on(2, post_two_groups_that_cross, NULL);
}

/* Which step of the next test has been reached; a rank spins until its own. */
static void reach(atomic_int *step, int value)
{
    atomic_store(step, value);
}

static void await(atomic_int *step, int value)
{
    while (atomic_load(step) < value) {
        sched_yield();
    }
}

static ra_status_t receive_in_turn(ra_comm_t *comm, atomic_int *step)
{
    int32_t value[4] = {-1, -1, -1, -1};
    ra_transfer_t first = make_tagged(RA_RECV, 1, 1, &value[0], 4);
    ra_transfer_t second = make_tagged(RA_RECV, 2, 2, &value[1], 4);
    ra_request_t *one = NULL, *two = NULL, *free_one = NULL;
    RA_TRY(ra_comm_post_in_turn(comm, &first, 1, &one));
    RA_TRY(ra_comm_post_in_turn(comm, &second, 1, &two));
    await(step, 1); /* the second has been sent, the first has not */
    RANK_CHECK(comm, ra_comm_test(two) == RA_INPROGRESS && value[1] == -1);
    if (!ra_comm_in_order(comm)) {
        ra_transfer_t other = make_tagged(RA_RECV, 2, 3, &value[2], 4);
        RA_TRY(ra_comm_post(comm, &other, 1, &free_one));
        RA_TRY(wait_free(comm, free_one)); /* waits for no turn */
        RANK_CHECK(comm, value[2] == 23);
    }
    reach(step, 2);
    RA_TRY(wait_free(comm, one));
    RA_TRY(wait_free(comm, two));
    RANK_CHECK(comm, value[0] == 11 && value[1] == 22);
    /* One that is withdrawn gives its turn away. */
    first.data = &value[3];
    RA_TRY(ra_comm_post_in_turn(comm, &first, 1, &one));
    RA_TRY(ra_comm_post_in_turn(comm, &second, 1, &two));
    reach(step, 3);
    await(step, 4);
    RANK_CHECK(comm, ra_comm_test(two) == RA_INPROGRESS);
    ra_request_free(one);
    RA_TRY(wait_free(comm, two));
    RANK_CHECK(comm, value[1] == 24 && value[3] == -1);
    return RA_OK;
}

static ra_status_t send_in_turn(ra_comm_t *comm, void *arg)
{
    atomic_int *step = arg;
    int32_t a = 11, b = 22, c = 23, d = 24;
    ra_request_t *request[3] = {NULL};
    if (ra_comm_rank(comm) == 0) {
        return receive_in_turn(comm, step);
    }
    if (ra_comm_rank(comm) == 1) {
        await(step, 2);
        return transfer_one(comm, make_tagged(RA_SEND, 0, 1, &a, 4));
    }
    ra_transfer_t sends[] = {make_tagged(RA_SEND, 0, 2, &b, 4), make_tagged(RA_SEND, 0, 3, &c, 4),
                             make_tagged(RA_SEND, 0, 2, &d, 4)};
    RA_TRY(ra_comm_post(comm, &sends[0], 1, &request[0]));
    if (!ra_comm_in_order(comm)) {
        RA_TRY(ra_comm_post(comm, &sends[1], 1, &request[1]));
    }
    reach(step, 1);
    RA_TRY(wait_free(comm, request[0]));
    if (request[1] != NULL) {
        RA_TRY(wait_free(comm, request[1]));
    }
    await(step, 3);
    RA_TRY(ra_comm_post(comm, &sends[2], 1, &request[2]));
    reach(step, 4);
    return wait_free(comm, request[2]);
}

static void groups_in_turn_start_one_after_another(void **state)
{
    (void)state;
    atomic_int step = 0;
    needs_checks();
    run_on(3, send_in_turn, &step);
}

static ra_status_t wait_at_gates(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t value[2] = {7, 8};
    uint32_t gates[3] = {0, 0, 0};
    if (rank == 0) {
        for (int i = 0; i < 2; i++) {
            RA_TRY(transfer_one(comm, make_tagged(RA_SEND, 1, 3, &value[i], 4)));
        }
        return ra_comm_barrier(comm);
    }
    for (int i = 0; i < 2; i++) {
        ra_transfer_t piece = make_tagged(RA_RECV, 0, 3, &value[i], 4);
        piece.gate = &gates[i];
        piece.gate_value = 11;
        RA_TRY(transfer_one(comm, piece));
        RANK_CHECK(comm, gates[i] == 11 && gates[i + 1] == 0);
    }
    RANK_CHECK(comm, value[0] == 7 && value[1] == 8);
    RA_TRY(ra_comm_barrier(comm));
    if (!checks) {
        return RA_OK;
    }
    /* Nobody sends this one: cancelling opens its gate. */
    ra_transfer_t lost = make_tagged(RA_RECV, 0, 3, value, 4);
    lost.gate = &gates[2];
    lost.gate_value = 5;
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &lost, 1, &request));
    RANK_CHECK(comm, gates[2] == 0);
    ra_request_free(request);
    RANK_CHECK(comm, gates[2] == 5);
    return RA_OK;
}

static void gates_open_when_bytes_have_arrived_or_never_will(void **state)
{
    (void)state;
    run_on(2, wait_at_gates, NULL);
}

static ra_status_t send_to_self(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t from = 40 + rank, to = 0, lent = 90 + rank, landing = 0;
    ra_transfer_t group[] = {
        make_tagged(RA_SEND, rank, 1, &from, 4), make_tagged(RA_RECV, rank, 1, &to, 4),
        make_tagged(RA_BORROW, rank, 2, &landing, 4), make_tagged(RA_LEND, rank, 2, &lent, 4)};
    ra_request_t *pair = NULL, *lend = NULL, *borrow = NULL;
    RA_TRY(ra_comm_post(comm, group, 2, &pair));
    RA_TRY(wait_free(comm, pair));
    RANK_CHECK(comm, to == 40 + rank);
    RA_TRY(ra_comm_post(comm, &group[2], 1, &borrow));
    RA_TRY(ra_comm_post(comm, &group[3], 1, &lend));
    RA_TRY(ra_comm_wait(borrow, ra_comm_deadline(comm)));
    RANK_CHECK(comm, *(const int32_t *)ra_request_borrowed(borrow, 0) == 90 + rank);
    ra_request_free(borrow);
    RA_TRY(wait_free(comm, lend));
    /* Freed in the wrong order, a rank that borrows from itself must not wait for itself. */
    RA_TRY(ra_comm_post(comm, &group[3], 1, &lend));
    RA_TRY(ra_comm_post(comm, &group[2], 1, &borrow));
    ra_request_free(lend);
    ra_request_free(borrow);
    return RA_OK;
}

static void a_rank_can_send_to_itself(void **state)
{
    (void)state;
    needs_tags();
    run_on(1, send_to_self, NULL);
    run_on(3, send_to_self, NULL);
}

static ra_status_t mismatch(ra_comm_t *comm, void *arg)
{
    const ra_transfer_t *pair = arg;
    int rank = ra_comm_rank(comm);
    int64_t values[2] = {0};
    ra_transfer_t mine = pair[rank];
    mine.data = values;
    ra_log_set_quiet(1);
    RANK_CHECK(comm, transfer_one(comm, mine) == RA_ERR_INVALID);
    RANK_CHECK(comm, strstr(ra_last_error(), "16 bytes") != NULL);
    /* The world goes on. */
    mine = make_tagged(rank == 0 ? RA_SEND : RA_RECV, 1 - rank, 6, values, 8);
    RA_TRY(transfer_one(comm, mine));
    return RA_OK;
}

static void mismatched_lengths_and_kinds_fail_on_both_sides(void **state)
{
    (void)state;
    needs_checks();
    ra_transfer_t pairs[][2] = {
        {make_tagged(RA_SEND, 1, 5, NULL, 16), make_tagged(RA_RECV, 0, 5, NULL, 8)},
        {make_tagged(RA_RECV, 1, 5, NULL, 16), make_tagged(RA_SEND, 0, 5, NULL, 0)},
        {make_tagged(RA_LEND, 1, 5, NULL, 16), make_tagged(RA_BORROW, 0, 5, NULL, 8)},
        {make_tagged(RA_LEND, 1, 5, NULL, 16), make_tagged(RA_RECV, 0, 5, NULL, 16)},
        {make_tagged(RA_BORROW, 1, 5, NULL, 16), make_tagged(RA_SEND, 0, 5, NULL, 16)},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(pairs); i++) {
        run_on(2, mismatch, pairs[i]);
    }
}

static ra_status_t post_nonsense(ra_comm_t *comm, void *arg)
{
    (void)arg;
    ra_log_set_quiet(1);
    char byte = 0;
    ra_transfer_t bad[] = {make_tagged(RA_SEND, 2, 0, &byte, 1),
                           make_tagged(RA_SEND, -1, 0, &byte, 1),
                           make_tagged(RA_RECV, 0, 0, &byte, -1),
                           make_tagged(RA_RECV, 0, 0, NULL, 1),
                           make_tagged(RA_SEND, 0, RA_TAG_RESERVED, &byte, 1),
                           make_tagged((ra_transfer_kind_t)9, 0, 0, &byte, 1)};
    for (size_t i = 0; i < RA_ARRAY_LEN(bad); i++) {
        ra_transfer_t group[] = {make_tagged(RA_SEND, 0, 3, &byte, 1), bad[i]};
        ra_request_t *request = NULL;
        RANK_CHECK(comm, ra_comm_post(comm, group, 2, &request) == RA_ERR_INVALID);
        RANK_CHECK(comm, request == NULL);
    }
    /* Nothing of the refused groups was posted. */
    ra_transfer_t receive = make_tagged(RA_RECV, 0, 3, &byte, 1);
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_post(comm, &receive, 1, &request));
    RANK_CHECK(comm, ra_comm_test(request) == RA_INPROGRESS);
    ra_request_free(request);
    RA_TRY(ra_comm_post(comm, NULL, 0, &request));
    RANK_CHECK(comm, ra_comm_test(request) == RA_OK);
    ra_request_free(request);
    ra_log_set_quiet(0);
    return RA_OK;
}

static void bad_arguments_post_nothing(void **state)
{
    (void)state;
    needs_checks();
    run_on(1, post_nonsense, NULL);
}

static ra_status_t cancel_then_resend(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm);
    int32_t value = rank, other = -1;
    char go = 0;
    ra_request_t *request = NULL;
    if (rank == 0) {
        ra_transfer_t early = make_tagged(RA_RECV, 1, 4, &other, 4);
        RA_TRY(ra_comm_post(comm, &early, 1, &request));
        RANK_CHECK(comm, ra_comm_test(request) == RA_INPROGRESS);
        RA_TRY(ra_comm_cancel(request));
        RANK_CHECK(comm, ra_comm_test(request) == RA_ERR_CANCELED);
        ra_request_free(request);
    }
    /* Rank 1 sends nothing before the receive is withdrawn: in order alone, whatever it sent
       would meet it. */
    RA_TRY(transfer_one(comm, make_tagged(rank == 0 ? RA_SEND : RA_RECV, 1 - rank, 5, &go, 1)));
    /* The withdrawn receive must not catch this message. */
    int32_t landed = -1;
    ra_transfer_t one =
        rank == 0 ? make_tagged(RA_RECV, 1, 4, &landed, 4) : make_tagged(RA_SEND, 0, 4, &value, 4);
    RA_TRY(ra_comm_post(comm, &one, 1, &request));
    RA_TRY(ra_comm_wait(request, ra_comm_deadline(comm)));
    RA_TRY(ra_comm_cancel(request)); /* completed: nothing to withdraw */
    RA_TRY(ra_comm_test(request));
    ra_request_free(request);
    RANK_CHECK(comm, other == -1 && (rank == 1 || landed == 1));
    return RA_OK;
}

static void a_cancelled_group_leaves_no_trace(void **state)
{
    (void)state;
    needs_checks();
    run_on(2, cancel_then_resend, NULL);
}

static ra_status_t wait_in_vain(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int32_t value = 3, landed = 0;
    if (ra_comm_rank(comm) == 0) {
        ra_log_set_quiet(1);
        ra_transfer_t receive = make_tagged(RA_RECV, 1, 8, &landed, 4);
        ra_request_t *request = NULL;
        RA_TRY(ra_comm_post(comm, &receive, 1, &request));
        RANK_CHECK(comm, ra_comm_wait(request, ra_deadline_in(0.02)) == RA_ERR_TIMEOUT);
        RANK_CHECK(comm, strstr(ra_last_error(), "receive from rank 1, tag 8") != NULL);
        RA_TRY(ra_comm_barrier(comm));
        RA_TRY(wait_free(comm, request)); /* still posted */
        RANK_CHECK(comm, landed == 3);
        ra_log_set_quiet(0);
        return RA_OK;
    }
    RA_TRY(ra_comm_barrier(comm));
    return transfer_one(comm, make_tagged(RA_SEND, 0, 8, &value, 4));
}

static void a_deadline_ends_the_wait_and_not_the_transfer(void **state)
{
    (void)state;
    needs_tags();
    run_on(2, wait_in_vain, NULL);
}

/* Nobody sends, so each wait lasts to its deadline. */
static ra_status_t measure_a_wait(ra_comm_t *comm, void *arg)
{
    const bool *on = arg;
    int32_t word = 0;
    double waited = -1;
    ra_transfer_t want = make(RA_RECV, ra_comm_rank(comm), &word, sizeof(word));
    ra_request_t *request = NULL;
    RA_TRY(ra_comm_measure_waits(comm, *on));
    RA_TRY(ra_comm_post(comm, &want, 1, &request));
    ra_log_set_quiet(1);
    RANK_CHECK(comm, ra_comm_wait(request, ra_deadline_in(0.002)) == RA_ERR_TIMEOUT);
    ra_log_set_quiet(0);
    ra_request_free(request);
    RA_TRY(ra_comm_waited(comm, &waited));
    RANK_CHECK(comm, *on ? waited > 0 && waited < 3600 : waited == 0);
    RA_TRY(ra_comm_measure_waits(comm, true));
    RA_TRY(ra_comm_waited(comm, &waited));
    RANK_CHECK(comm, waited == 0);
    return RA_OK;
}

static void waits_of_a_thread_are_measured(void **state)
{
    (void)state;
    if (strncmp(row, "local", 5) != 0) {
        print_message("%s measures waits of streams\n", row);
        skip();
    }
    for (int on = 0; on < 2; on++) {
        bool measures = on;
        run_on(2, measure_a_wait, &measures);
    }
}

static ra_status_t abort_or_wait(ra_comm_t *comm, void *arg)
{
    atomic_int *woken = arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    if (rank == size - 1) {
        ra_log_set_quiet(1);
        struct timespec pause = {.tv_nsec = 5000000};
        nanosleep(&pause, NULL);
        return ra_fail(RA_ERR_INPUT, "test", "rank %d has had enough", rank);
    }
    char byte = 0;
    ra_transfer_t receive = make_tagged(RA_RECV, size - 1, 1, &byte, 1);
    ra_request_t *request = NULL;
    ra_status_t status = ra_comm_post(comm, &receive, 1, &request);
    if (status == RA_OK) {
        status = ra_comm_wait(request, RA_NO_DEADLINE);
        ra_request_free(request);
    }
    RANK_CHECK(comm, status == RA_ERR_PEER);
    RANK_CHECK(comm, ra_comm_post(comm, &receive, 1, &request) == RA_ERR_PEER);
    atomic_fetch_add(woken, 1);
    return status;
}

static void a_failing_rank_wakes_all_others_and_its_text_survives(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 8; ranks += 3) {
        atomic_int woken = 0;
        if (!can_run(ranks)) {
            continue;
        }
        assert_int_equal(host_ranks_run(row, ranks, abort_or_wait, &woken), RA_ERR_INPUT);
        assert_int_equal(atomic_load(&woken), ranks - 1);
        assert_non_null(strstr(ra_last_error(), "has had enough"));
    }
}

typedef struct lend_case {
    atomic_int released; /* set by the borrower just before it lets go */
} lend_case_t;

static ra_status_t lend_and_change(ra_comm_t *comm, void *arg)
{
    lend_case_t *shared = arg;
    int rank = ra_comm_rank(comm);
    int64_t block[512], landing[512];
    for (int round = 0; round < 20; round++) {
        ra_request_t *request = NULL;
        if (rank == 0) {
            atomic_store(&shared->released, 0);
            for (int i = 0; i < 512; i++) {
                block[i] = round * 1000 + i;
            }
            ra_transfer_t lend = make_tagged(RA_LEND, 1, 2, block, sizeof(block));
            RA_TRY(ra_comm_post(comm, &lend, 1, &request));
            RA_TRY(wait_free(comm, request));
            RANK_CHECK(comm, !ra_comm_lends(comm) || atomic_load(&shared->released) == 1);
            memset(block, 0, sizeof(block)); /* the lender's again */
        } else {
            void *place = ra_comm_lends(comm) ? NULL : landing;
            ra_transfer_t borrow = make_tagged(RA_BORROW, 0, 2, place, sizeof(block));
            RA_TRY(ra_comm_post(comm, &borrow, 1, &request));
            RA_TRY(ra_comm_wait(request, ra_comm_deadline(comm)));
            const int64_t *lent = ra_request_borrowed(request, 0);
            RANK_CHECK(comm, ra_comm_lends(comm) || lent == landing);
            for (int i = 0; i < 512; i++) {
                RANK_CHECK(comm, lent[i] == round * 1000 + i);
            }
            atomic_store(&shared->released, 1);
            ra_request_free(request);
        }
        RA_TRY(ra_comm_barrier(comm));
    }
    return RA_OK;
}

static void a_lend_completes_only_when_the_borrower_lets_go(void **state)
{
    (void)state;
    lend_case_t shared = {0};
    run_on(2, lend_and_change, &shared);
}

/* Every block visits every rank by lending on what was borrowed; released in reverse. */
static ra_status_t lend_in_a_chain(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    int right = (rank + 1) % size, left = (rank + size - 1) % size;
    int64_t own[64], landing[8][64];
    ra_request_t *lends[8] = {0}, *borrows[8] = {0};
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 64; i++) {
            own[i] = rank * 100 + i + round * 10000;
        }
        const int64_t *block = own;
        for (int s = 0; s < size; s++) {
            int owner = (rank - s + size) % size;
            for (int i = 0; i < 64; i++) {
                RANK_CHECK(comm, block[i] == owner * 100 + i + round * 10000);
            }
            if (s == size - 1) {
                break;
            }
            ra_transfer_t lend =
                make_tagged(RA_LEND, right, 3, (void *)(uintptr_t)block, sizeof(own));
            ra_transfer_t borrow = make_tagged(RA_BORROW, left, 3, landing[s], sizeof(own));
            if (ra_comm_lends(comm)) {
                RA_TRY(ra_comm_post(comm, &lend, 1, &lends[s]));
                RA_TRY(ra_comm_post(comm, &borrow, 1, &borrows[s]));
            } else {
                ra_transfer_t group[] = {borrow, lend};
                RA_TRY(ra_comm_post(comm, group, 2, &borrows[s]));
            }
            RA_TRY(ra_comm_wait(borrows[s], ra_comm_deadline(comm)));
            block = ra_request_borrowed(borrows[s], 0);
        }
        for (int s = size - 2; s >= 0; s--) {
            ra_request_free(borrows[s]);
            if (ra_comm_lends(comm)) {
                RA_TRY(wait_free(comm, lends[s]));
            }
        }
    }
    return RA_OK;
}

static void borrowed_blocks_can_be_lent_on(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 8; ranks++) {
        run_on(ranks, lend_in_a_chain, NULL);
    }
}

/* A lender that gives up while its block is read gets it back only when the reader lets go. */
static ra_status_t abandon_lent_block(ra_comm_t *comm, void *arg)
{
    lend_case_t *shared = arg;
    int64_t block[256];
    ra_request_t *request = NULL;
    if (ra_comm_rank(comm) == 0) {
        for (int i = 0; i < 256; i++) {
            block[i] = i;
        }
        ra_transfer_t lend = make_tagged(RA_LEND, 1, 2, block, sizeof(block));
        RA_TRY(ra_comm_post(comm, &lend, 1, &request));
        RA_TRY(ra_comm_barrier(comm)); /* the other rank holds the block */
        ra_comm_abort(comm, RA_ERR_STOPPED);
        ra_request_free(request);
        RANK_CHECK(comm, !ra_comm_lends(comm) || atomic_load(&shared->released) == 1);
        memset(block, 0xff, sizeof(block));
        return RA_ERR_STOPPED;
    }
    int64_t landing[256];
    ra_transfer_t borrow = make_tagged(RA_BORROW, 0, 2, landing, sizeof(landing));
    RA_TRY(ra_comm_post(comm, &borrow, 1, &request));
    RA_TRY(ra_comm_wait(request, ra_comm_deadline(comm)));
    RA_TRY(ra_comm_barrier(comm));
    struct timespec pause = {.tv_nsec = 3000000};
    nanosleep(&pause, NULL);
    const int64_t *lent = ra_request_borrowed(request, 0);
    for (int i = 0; i < 256; i++) {
        RANK_CHECK(comm, lent[i] == i);
    }
    atomic_store(&shared->released, 1);
    ra_request_free(request);
    return RA_OK;
}

static void an_abort_does_not_pull_a_block_from_under_its_reader(void **state)
{
    (void)state;
    lend_case_t shared = {0};
    if (can_run(2)) {
        assert_int_equal(host_ranks_run(row, 2, abandon_lent_block, &shared), RA_ERR_STOPPED);
    }
}

static ra_status_t storm(ra_comm_t *comm, void *arg)
{
    (void)arg;
    int rank = ra_comm_rank(comm), size = ra_comm_size(comm);
    enum { ROUNDS = 60, PEERS = 8 };
    int64_t out[PEERS], in[PEERS];
    ra_transfer_t group[2 * PEERS];
    for (int round = 0; round < ROUNDS; round++) {
        for (int p = 0; p < size; p++) {
            out[p] = round * 10000 + rank * 100 + p;
            group[2 * p] = make_tagged(RA_RECV, p, (uint32_t)round % 3, &in[p], 8);
            group[2 * p + 1] = make_tagged(RA_SEND, p, (uint32_t)round % 3, &out[p], 8);
        }
        ra_request_t *request = NULL;
        RA_TRY(ra_comm_post(comm, group, 2 * size, &request));
        ra_status_t status;
        while ((status = ra_comm_test(request)) == RA_INPROGRESS && round % 2 == 0) {
            sched_yield();
        }
        RA_TRY(wait_free(comm, request));
        for (int p = 0; p < size; p++) {
            RANK_CHECK(comm, in[p] == round * 10000 + p * 100 + rank);
        }
    }
    return RA_OK;
}

static void all_pairs_many_times_over(void **state)
{
    (void)state;
    run_on(8, storm, NULL);
}

static ra_status_t do_nothing(ra_comm_t *comm, void *arg)
{
    (void)comm;
    (void)arg;
    return RA_OK;
}

static void an_unknown_transport_is_refused_with_the_list(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    assert_int_equal(ra_ranks_run("pigeon", 2, do_nothing, NULL), RA_ERR_USAGE);
    assert_non_null(strstr(ra_last_error(), row));
    assert_int_equal(ra_ranks_run(row, 0, do_nothing, NULL), RA_ERR_USAGE);
    assert_int_equal(ra_ranks_run(row, 4097, do_nothing, NULL), RA_ERR_USAGE);
    ra_log_set_quiet(0);
    assert_int_equal(ra_ranks_run("auto", 2, do_nothing, NULL), RA_OK);
}

static void the_device_and_the_launcher_settle_auto(void **state)
{
    (void)state;
    assert_string_equal(ra_transport_choose("auto", RA_DEVICE_CPU), "auto");
    assert_string_equal(ra_transport_choose("local", RA_DEVICE_CUDA), "local");
    assert_string_equal(ra_transport_choose("auto", RA_DEVICE_CUDA), "peer");
    setenv("RANK", "0", 1);
    setenv("WORLD_SIZE", "2", 1);
    assert_string_equal(ra_transport_choose("auto", RA_DEVICE_CUDA), "nccl");
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
}

static ra_status_t look_at_row(ra_comm_t *comm, void *arg)
{
    (void)arg;
    in_order = ra_comm_in_order(comm);
    checks = !ra_comm_uses_kernels(comm);
    return RA_OK;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_of_any_number_arrive),
        cmocka_unit_test(tags_match_in_any_order),
        cmocka_unit_test(order_is_kept_per_peer_and_tag),
        cmocka_unit_test(a_rank_can_send_to_itself),
        cmocka_unit_test(a_group_may_hold_transfers_to_oneself),
        cmocka_unit_test(crossing_groups_hang_only_where_groups_run_in_order),
        cmocka_unit_test(groups_in_turn_start_one_after_another),
        cmocka_unit_test(gates_open_when_bytes_have_arrived_or_never_will),
        cmocka_unit_test(mismatched_lengths_and_kinds_fail_on_both_sides),
        cmocka_unit_test(bad_arguments_post_nothing),
        cmocka_unit_test(a_cancelled_group_leaves_no_trace),
        cmocka_unit_test(a_deadline_ends_the_wait_and_not_the_transfer),
        cmocka_unit_test(waits_of_a_thread_are_measured),
        cmocka_unit_test(a_failing_rank_wakes_all_others_and_its_text_survives),
        cmocka_unit_test(a_lend_completes_only_when_the_borrower_lets_go),
        cmocka_unit_test(borrowed_blocks_can_be_lent_on),
        cmocka_unit_test(an_abort_does_not_pull_a_block_from_under_its_reader),
        cmocka_unit_test(all_pairs_many_times_over),
        cmocka_unit_test(an_unknown_transport_is_refused_with_the_list),
        cmocka_unit_test(the_device_and_the_launcher_settle_auto),
    };
    int failed = 0;
    for (int i = 0; next_transport(&i, &row);) {
        failed += ra_ranks_run(row, 1, look_at_row, NULL) != RA_OK;
        failed += cmocka_run_group_tests_name(row, tests, NULL, NULL);
    }
    return failed;
}
