/* Every row before every run, under any layout: each value tells where it came from. */
#include "ring/gather.h"
#include "ring/halo.h"
#include "tests/comm/device_ranks.h"
#include "tests/ring/ring_values.h"
#include <string.h>

enum { TILE = 8, PLANES = 2, ROW = 3 };

typedef struct halo_case {
    ra_layout_t *layout, *prefix; /* prefix NULL: halos stop at the first laid out position */
    int64_t before, align;
    int calls;
} halo_case_t;

static int64_t mark(int plane, int64_t document, int64_t position, int64_t column)
{
    return ((document * 10000 + position) * PLANES + plane) * ROW + column;
}

static int64_t *marked_rows(const ra_layout_t *layout, int rank)
{
    int64_t rows = layout == NULL ? 0 : layout->rows[rank];
    int64_t *values = malloc((size_t)(rows * PLANES * ROW + 1) * 8);
    for (int64_t i = 0; rows > 0 && i < ra_layout_run_count(layout, rank); i++) {
        const ra_run_t *run = &ra_layout_runs(layout, rank)[i];
        for (int64_t j = 0; j < run->count * PLANES * ROW; j++) {
            int64_t t = j / (PLANES * ROW), plane = j / ROW % PLANES, column = j % ROW;
            values[(plane * rows + run->local + t) * ROW + column] =
                mark((int)plane, run->document, run->start + t, column);
        }
    }
    return values;
}

static ra_status_t check_rows(ra_comm_t *comm, const halo_case_t *c, const ra_halo_t *halo,
                              const int64_t *out)
{
    const ra_layout_t *layout = c->layout;
    int rank = ra_comm_rank(comm);
    int64_t rows = ra_halo_rows(halo), row = 0;
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        const ra_run_t *run = &ra_layout_runs(layout, rank)[i];
        const ra_halo_run_t *got = &ra_halo_runs(halo)[i];
        int64_t start = run->start > c->before ? run->start - c->before : 0;
        start -= start % c->align;
        if (c->prefix == NULL && start < layout->documents[run->document].first) {
            start = layout->documents[run->document].first;
        }
        RANK_CHECK(comm, got->start == start && got->count == run->start - start);
        RANK_CHECK(comm, got->row == row);
        for (int64_t t = 0; t < got->count; t++, row++) {
            for (int64_t j = 0; j < PLANES * ROW; j++) {
                int64_t value = out[(j / ROW * rows + row) * ROW + j % ROW];
                RANK_CHECK(comm, value == mark((int)(j / ROW), run->document, start + t, j % ROW));
            }
        }
    }
    RANK_CHECK(comm, row == rows);
    return RA_OK;
}

static ra_status_t fetch(ra_comm_t *comm, ra_stream_t *stream, void *arg)
{
    const halo_case_t *c = arg;
    int rank = ra_comm_rank(comm);
    ra_halo_t *halo = NULL;
    RA_TRY(ra_halo_create(comm, stream, c->layout, c->prefix, c->before, c->align, PLANES, &halo));
    int64_t *rows = marked_rows(c->layout, rank), *cached = marked_rows(c->prefix, rank);
    int64_t out_rows = ra_halo_rows(halo), plane = ROW * 8;
    int64_t *out = malloc((size_t)(out_rows * PLANES * ROW + 1) * 8);
    ra_status_t status = RA_OK;
    for (int call = 0; call < 2 && status == RA_OK; call++) {
        memset(out, 0xff, (size_t)(out_rows * PLANES * ROW) * 8);
        ra_halo_io_t io = {.row_bytes = ROW * 8,
                           .planes = PLANES,
                           .rows = rows,
                           .plane_bytes = c->layout->rows[rank] * plane,
                           .prefix_rows = cached,
                           .prefix_plane_bytes =
                               c->prefix == NULL ? 0 : c->prefix->rows[rank] * plane,
                           .out = out,
                           .out_plane_bytes = out_rows * plane};
        status = ra_halo_start(halo, &io);
        if (status == RA_OK) {
            status = ra_halo_finish(halo);
        }
        if (status == RA_OK) {
            status = check_rows(comm, c, halo, out);
        }
    }
    ra_halo_destroy(halo);
    free(rows);
    free(cached);
    free(out);
    return status;
}

static void fetch_everywhere(const ra_document_t *documents, int64_t count, bool with_prefix)
{
    const int64_t befores[] = {0, 1, 7, 8, 30, 1000}, aligns[] = {1, TILE};
    for (int ranks = 1; ranks <= 7; ranks++) {
        for (size_t i = 0; i < 2 * 2 * RA_ARRAY_LEN(befores); i++) {
            halo_case_t c = {.before = befores[i / 4], .align = aligns[i % 2]};
            assert_int_equal(
                ra_layout_create(documents, count, TILE, ranks, layout_kinds[i / 2 % 2], &c.layout),
                RA_OK);
            if (with_prefix) {
                assert_int_equal(ra_layout_create_prefix(c.layout, &c.prefix), RA_OK);
            }
            const char *transports[] = {"local", "local-copy", "local-order"};
            assert_int_equal(cpu_ranks_run(transports[i % 3], ranks, NULL, fetch, &c), RA_OK);
            ra_layout_destroy(c.layout);
            ra_layout_destroy(c.prefix);
        }
    }
}

static void rows_come_from_their_owners(void **state)
{
    (void)state;
    ra_document_t one = {0, 133}, pack[] = {{0, 5}, {0, 121}, {0, 40}, {0, 3}};
    fetch_everywhere(&one, 1, false);
    fetch_everywhere(pack, 4, false);
}

static void cached_rows_come_from_the_prefix(void **state)
{
    (void)state;
    ra_document_t pack[] = {{96, 70}, {0, 50}, {16, 1}, {8, 130}};
    fetch_everywhere(pack, 4, true);
}

static void without_a_prefix_halos_stop_at_the_first_row(void **state)
{
    (void)state;
    ra_document_t pack[] = {{96, 70}, {8, 130}};
    fetch_everywhere(pack, 2, false);
}

static ra_status_t gather(ra_comm_t *comm, void *arg)
{
    const ra_layout_t *layout = arg;
    int rank = ra_comm_rank(comm), root = ra_comm_size(comm) / 2;
    int64_t *rows = malloc((size_t)(layout->rows[rank] + 1) * 8);
    int64_t *all = calloc((size_t)layout->total_rows + 1, 8);
    for (int64_t i = 0; i < ra_layout_run_count(layout, rank); i++) {
        const ra_run_t *run = &ra_layout_runs(layout, rank)[i];
        for (int64_t t = 0; t < run->count; t++) {
            rows[run->local + t] = mark(0, run->document, run->start + t, 0);
        }
    }
    ra_status_t status = ra_ring_gather(comm, layout, root, 8, rows, rank == root ? all : NULL);
    for (int64_t d = 0; d < layout->document_count && status == RA_OK && rank == root; d++) {
        for (int64_t t = 0; t < layout->documents[d].count; t++) {
            if (all[layout->document_row[d] + t] != mark(0, d, layout->documents[d].first + t, 0)) {
                status = ra_fail(RA_ERR_INTERNAL, "test", "document %lld, row %lld is wrong",
                                 (long long)d, (long long)t);
            }
        }
    }
    free(rows);
    free(all);
    return status;
}

static void gathering_restores_document_order(void **state)
{
    (void)state;
    ra_document_t pack[] = {{96, 70}, {0, 5}, {8, 230}, {0, 0}, {0, 31}};
    for (int ranks = 1; ranks <= 8; ranks++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(layout_kinds); k++) {
            ra_layout_t *layout = NULL;
            assert_int_equal(ra_layout_create(pack, 5, TILE, ranks, layout_kinds[k], &layout),
                             RA_OK);
            assert_int_equal(checked_ranks_run("local", ranks, gather, layout), RA_OK);
            ra_layout_destroy(layout);
        }
    }
}

static ra_status_t misuse(ra_comm_t *comm, void *arg)
{
    const ra_layout_t *layout = arg;
    ra_halo_t *halo = NULL;
    char byte[64] = {0};
    ra_log_set_quiet(1);
    RANK_CHECK(comm, ra_halo_create(comm, NULL, layout, NULL, -1, 1, 1, &halo) == RA_ERR_INVALID);
    RANK_CHECK(comm, ra_halo_create(comm, NULL, layout, NULL, 1, 0, 1, &halo) == RA_ERR_INVALID);
    RANK_CHECK(comm, halo == NULL);
    ra_log_set_quiet(0);
    RA_TRY(ra_halo_create(comm, NULL, layout, NULL, 1, 1, 1, &halo));
    ra_halo_io_t io = {.row_bytes = 1, .planes = 2, .rows = byte, .out = byte};
    ra_log_set_quiet(1);
    ra_status_t status = ra_halo_start(halo, &io);
    ra_log_set_quiet(0);
    ra_halo_destroy(halo);
    RANK_CHECK(comm, status == RA_ERR_INVALID);
    return RA_OK;
}

static void nonsense_is_refused(void **state)
{
    (void)state;
    ra_document_t one = {0, 10};
    ra_layout_t *layout = NULL;
    assert_int_equal(ra_layout_create(&one, 1, TILE, 1, layout_kinds[0], &layout), RA_OK);
    assert_int_equal(checked_ranks_run("local", 1, misuse, layout), RA_OK);
    ra_layout_destroy(layout);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_come_from_their_owners),
        cmocka_unit_test(cached_rows_come_from_the_prefix),
        cmocka_unit_test(without_a_prefix_halos_stop_at_the_first_row),
        cmocka_unit_test(gathering_restores_document_order),
        cmocka_unit_test(nonsense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
