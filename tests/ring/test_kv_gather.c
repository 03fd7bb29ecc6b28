/*
 * Gathered keys and values: every run that a rank sees lies where the list says, nothing else
 * comes, and what is between sections is zero. Host memory; gates need a GPU a rank.
 */
#include "ring/kv_gather.h"
#include "tests/comm/device_ranks.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { WIDTH = 3, TILE = 16, STREAM_K = 1, STREAM_V };

typedef struct gather_case {
    const pack_t *pack;
    const ra_layout_t *layout;
    bool causal;
    int64_t piece_bytes;
} gather_case_t;

/* Whether a run of @a rank sees a key of @a keys. */
static bool is_seen(const gather_case_t *c, int rank, const ra_run_t *keys)
{
    const ra_run_t *runs = ra_layout_runs(c->layout, rank);
    for (int64_t i = 0; i < ra_layout_run_count(c->layout, rank); i++) {
        if (runs[i].document == keys->document && (!c->causal || keys->start <= runs[i].start)) {
            return true;
        }
    }
    return false;
}

static int64_t rows_wanted(const gather_case_t *c, int rank)
{
    int64_t rows = 0;
    for (int r = 0; r < c->layout->ranks; r++) {
        const ra_run_t *runs = ra_layout_runs(c->layout, r);
        for (int64_t i = 0; i < ra_layout_run_count(c->layout, r) && r != rank; i++) {
            rows += is_seen(c, rank, &runs[i]) ? runs[i].count : 0;
        }
    }
    return rows;
}

static ra_status_t check_rows(ra_comm_t *comm, const gather_case_t *c, const ra_kv_gather_t *gather)
{
    const float *kv = gather->kv;
    int64_t rows = 0;
    double sum = 0, all = 0;
    for (int64_t i = 0; i < gather->run_count; i++) {
        const ra_gathered_run_t *run = &gather->runs[i];
        RANK_CHECK(comm, run->section > 0 && run->row + run->count <= gather->rows);
        RANK_CHECK(comm, i == 0 || run->row >= run[-1].row + run[-1].count);
        const ra_run_t *held = ra_layout_find(c->layout, run->document, run->start);
        RANK_CHECK(comm, held->start == run->start && held->count == run->count);
        RANK_CHECK(comm, is_seen(c, ra_comm_rank(comm), held));
        for (int64_t t = 0; t < run->count; t++, rows++) {
            for (int plane = 0; plane < 2; plane++) {
                float want[WIDTH];
                const float *got = kv + (plane * gather->rows + run->row + t) * WIDTH;
                value_row(c->pack->name[run->document], STREAM_K + plane, run->start + t, WIDTH,
                          want);
                RANK_CHECK(comm, memcmp(got, want, sizeof(want)) == 0);
                for (int w = 0; w < WIDTH; w++) {
                    sum += fabs((double)want[w]);
                }
            }
        }
    }
    for (int64_t i = 0; i < 2 * gather->rows * WIDTH; i++) {
        all += fabs((double)kv[i]);
    }
    RANK_CHECK(comm, rows == rows_wanted(c, ra_comm_rank(comm)));
    RANK_CHECK(comm, fabs(all - sum) <= 1e-9 * sum);
    RANK_CHECK(comm, gather->stats.received_bytes == 2 * 2 * rows * WIDTH * 4);
    return RA_OK;
}

/* Made on a device that only counts, a gather is the same, and says what the real one takes. */
static ra_status_t check_counted(ra_comm_t *comm, ra_stream_t *stream, const gather_case_t *c,
                                 const ra_kv_gather_t *gather)
{
    const int64_t row_bytes = WIDTH * (int64_t)sizeof(float);
    ra_device_t *counting = NULL;
    ra_stream_t *none = NULL;
    ra_kv_gather_t *counted = NULL;
    ra_device_memory_t memory;
    RA_TRY(ra_device_open_counting(ra_stream_device(stream), &counting));
    RA_TRY(ra_stream_create(counting, &none));
    RA_TRY(ra_kv_gather_create(comm, none, c->layout, c->causal, row_bytes, true, c->piece_bytes,
                               &counted));
    RA_TRY(ra_device_memory(counting, &memory));
    RANK_CHECK(comm, counted->rows == gather->rows && counted->gated == gather->gated);
    RANK_CHECK(comm, memory.live == 2 * gather->rows * row_bytes);
    ra_kv_gather_destroy(counted);
    ra_stream_destroy(none);
    ra_device_close(counting);
    return RA_OK;
}

static ra_status_t gather_twice(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    const gather_case_t *c = arg;
    int rank = ra_comm_rank(comm);
    int64_t rows = c->layout->rows[rank];
    float *kv = float_array(2 * rows * WIDTH);
    ra_kv_gather_t *gather = NULL;
    value_rows(c->pack, c->layout, rank, STREAM_K, WIDTH, WIDTH, kv);
    value_rows(c->pack, c->layout, rank, STREAM_V, WIDTH, WIDTH, kv + rows * WIDTH);
    ra_status_t status =
        ra_kv_gather_create(comm, stream, c->layout, c->causal, WIDTH * (int64_t)sizeof(float),
                            true, c->piece_bytes, &gather);
    if (status == RA_OK) {
        status = check_counted(comm, stream, c, gather);
    }
    for (int i = 0; i < 2 && status == RA_OK; i++) {
        status = ra_kv_gather_start(gather, kv);
        status = status == RA_OK ? ra_kv_gather_finish(gather) : status;
    }
    if (status == RA_OK) {
        status = check_rows(comm, c, gather);
    }
    ra_kv_gather_destroy(gather);
    free(kv);
    return status;
}

static const pack_t packs[] = {
    {1, {1}, {{0, 1237}}},
    {1, {2}, {{0, 1}}},
    {5, {5, 6, 7, 8, 9}, {{0, 15}, {0, 826}, {0, 16}, {0, 531}, {0, 3}}},
    {4, {1, 2, 3, 4}, {{0, 60}, {0, 50}, {0, 40}, {0, 64}}},
};

static void every_run_that_is_seen_arrives_and_nothing_else(void **state)
{
    (void)state;
    const char *transports[] = {"local", "local-copy", "local-order"};
    const int ranks[] = {2, 3, 4, 7, 40};
    for (size_t p = 0; p < RA_ARRAY_LEN(packs); p++) {
        for (size_t i = 0; i < 4 * RA_ARRAY_LEN(ranks); i++) {
            ra_layout_t *layout = NULL;
            ra_layout_kind_t kind = i % 2 == 0 ? RA_LAYOUT_CONTIGUOUS : RA_LAYOUT_ZIGZAG;
            assert_int_equal(ra_layout_create(packs[p].documents, packs[p].count, TILE,
                                              ranks[i / 4], kind, &layout),
                             RA_OK);
            gather_case_t c = {.pack = &packs[p],
                               .layout = layout,
                               .causal = i / 2 % 2 == 0,
                               .piece_bytes = i % 3 == 0 ? 0 : 1};
            assert_int_equal(cpu_ranks_run(transports[i % 3], ranks[i / 4], NULL, gather_twice, &c),
                             RA_OK);
            ra_layout_destroy(layout);
        }
    }
}

static ra_status_t leave_out_rank_2(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    ra_log_set_quiet(1);
    if (ra_comm_rank(comm) == 2) {
        return ra_fail(RA_ERR_INPUT, "test", "rank 2 does not take part");
    }
    ra_status_t status = gather_twice(comm, stream, arg);
    RANK_CHECK(comm, status == RA_ERR_PEER);
    return status;
}

static void a_missing_rank_ends_the_gather_on_all_others(void **state)
{
    (void)state;
    ra_layout_t *layout = NULL;
    assert_int_equal(ra_layout_create(packs[0].documents, 1, TILE, 4, RA_LAYOUT_ZIGZAG, &layout),
                     RA_OK);
    gather_case_t c = {.pack = &packs[0], .layout = layout, .causal = true};
    assert_int_equal(cpu_ranks_run("local", 4, NULL, leave_out_rank_2, &c), RA_ERR_INPUT);
    ra_layout_destroy(layout);
    ra_log_set_quiet(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_run_that_is_seen_arrives_and_nothing_else),
        cmocka_unit_test(a_missing_rank_ends_the_gather_on_all_others),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
