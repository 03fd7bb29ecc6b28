/* Every property of a layout, for 1 to 16 ranks and all small documents. */
#include "base/log.h"
#include "ring/layout.h"
#include "tests/test_support.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS_MOST = 16 };

static const ra_layout_kind_t kinds[] = {RA_LAYOUT_CONTIGUOUS, RA_LAYOUT_ZIGZAG};

/* More than one rank owns rows of the document: a whole one is one run. */
static bool is_sharded(const ra_layout_t *layout, int64_t document)
{
    return layout->document_run_begin[document + 1] - layout->document_run_begin[document] > 1;
}

static ra_layout_t *lay_out(const ra_document_t *documents, int64_t count, int64_t tile, int ranks,
                            ra_layout_kind_t kind)
{
    ra_layout_t *layout = NULL;
    assert_int_equal(ra_layout_create(documents, count, tile, ranks, kind, &layout), RA_OK);
    return layout;
}

/* Exactly once, whole tiles, packed without holes, both lists the same. */
static void check_cover(const ra_layout_t *layout)
{
    int64_t total = 0;
    for (int64_t d = 0; d < layout->document_count; d++) {
        const ra_document_t *document = &layout->documents[d];
        int64_t next = document->first;
        for (int64_t i = layout->document_run_begin[d]; i < layout->document_run_begin[d + 1];
             i++) {
            const ra_run_t *run = &layout->document_runs[i];
            assert_int_equal(run->document, d);
            assert_int_equal(run->start, next);
            assert_int_equal(run->start % layout->tile, 0);
            assert_true(run->count > 0);
            next += run->count;
            assert_ptr_equal(ra_layout_find(layout, d, run->start), run);
            assert_ptr_equal(ra_layout_find(layout, d, next - 1), run);
        }
        assert_int_equal(next, document->first + document->count);
        assert_null(ra_layout_find(layout, d, next));
        assert_null(ra_layout_find(layout, d, document->first - 1));
        assert_int_equal(layout->document_row[d], total);
        total += document->count;
    }
    assert_int_equal(layout->total_rows, total);
    assert_int_equal(layout->document_row[layout->document_count], total);

    int64_t runs = 0, most = 0;
    for (int r = 0; r < layout->ranks; r++) {
        int64_t local = 0;
        for (int64_t i = 0; i < ra_layout_run_count(layout, r); i++, runs++) {
            const ra_run_t *run = &ra_layout_runs(layout, r)[i];
            assert_int_equal(run->rank, r);
            assert_int_equal(run->local, local);
            assert_memory_equal(ra_layout_find(layout, run->document, run->start), run,
                                sizeof(*run));
            local += run->count;
        }
        assert_int_equal(layout->rows[r], local);
        most = local > most ? local : most;
    }
    assert_int_equal(layout->max_rows, most);
    assert_int_equal(runs, layout->document_run_begin[layout->document_count]);
}

static void check_balance_of_one(const ra_layout_t *layout)
{
    int64_t tiles = (layout->total_rows + layout->tile - 1) / layout->tile;
    if (layout->ranks == 1 || tiles < 2 * layout->ranks) {
        assert_false(is_sharded(layout, 0));
        return;
    }
    int64_t least = INT64_MAX;
    for (int r = 0; r < layout->ranks; r++) {
        least = layout->rows[r] < least ? layout->rows[r] : least;
        assert_true(layout->rows[r] > 0);
    }
    assert_true(layout->max_rows - least <= layout->tile);
    for (int64_t i = 0; i < layout->document_run_begin[1]; i++) {
        const ra_run_t *run = &layout->document_runs[i];
        int rank = (int)i;
        if (layout->kind == RA_LAYOUT_ZIGZAG) {
            rank = i < layout->ranks ? (int)i : 2 * layout->ranks - 2 - (int)i;
        }
        assert_int_equal(run->rank, rank);
    }
}

static void every_token_has_one_owner_for_any_length(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= RANKS_MOST; ranks++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
            for (int64_t count = 1; count <= 4 * 4 * RANKS_MOST + 3; count++) {
                ra_document_t document = {.first = count % 5 * 4, .count = count};
                ra_layout_t *layout = lay_out(&document, 1, 4, ranks, kinds[k]);
                check_cover(layout);
                check_balance_of_one(layout);
                ra_layout_destroy(layout);
            }
        }
    }
}

/* Key tiles each rank's query tiles see: what zigzag is for. */
static void zigzag_balances_causal_work(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= RANKS_MOST; ranks++) {
        int64_t tiles = 2 * ranks * 8;
        ra_document_t document = {0, tiles * 4};
        ra_layout_t *layout = lay_out(&document, 1, 4, ranks, RA_LAYOUT_ZIGZAG);
        for (int r = 0; r < ranks; r++) {
            int64_t work = 0;
            for (int64_t i = 0; i < ra_layout_run_count(layout, r); i++) {
                const ra_run_t *run = &ra_layout_runs(layout, r)[i];
                for (int64_t t = run->start / 4; t < (run->start + run->count) / 4; t++) {
                    work += t + 1;
                }
            }
            assert_int_equal(work, tiles * (tiles + 1) / 2 / ranks);
        }
        ra_layout_destroy(layout);
    }
}

static void packs_of_documents_are_covered_and_balanced(void **state)
{
    (void)state;
    uint64_t seed = 7;
    for (int trial = 0; trial < 400; trial++) {
        ra_document_t documents[40];
        int64_t count = (int64_t)(test_random_u64(&seed) % 40);
        int ranks = 1 + (int)(test_random_u64(&seed) % RANKS_MOST);
        for (int64_t d = 0; d < count; d++) {
            uint64_t size = test_random_u64(&seed);
            documents[d].first = (int64_t)(size % 3) * 16;
            documents[d].count = (int64_t)(size / 3 % (size % 7 == 0 ? 2000 : 100));
        }
        ra_layout_t *layout = lay_out(documents, count, 16, ranks, kinds[trial % 2]);
        check_cover(layout);
        /* Longest first onto the least loaded: no rank is ahead by more than one whole document
         * and the one tile a sharded document may add for each. */
        int64_t least = INT64_MAX, slack = 0;
        for (int r = 0; r < ranks; r++) {
            least = layout->rows[r] < least ? layout->rows[r] : least;
        }
        for (int64_t d = 0; d < count; d++) {
            bool sharded = is_sharded(layout, d);
            slack += sharded ? 16 : 0;
        }
        assert_true(layout->max_rows - least <= slack + 2 * 16 * (int64_t)ranks);
        ra_layout_destroy(layout);
    }
}

static void a_document_is_cut_the_same_way_in_any_company(void **state)
{
    (void)state;
    for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
        ra_document_t alone = {16, 333}, pack[] = {{0, 9}, {0, 700}, {16, 333}, {0, 40}};
        ra_layout_t *one = lay_out(&alone, 1, 16, 4, kinds[k]);
        ra_layout_t *many = lay_out(pack, 4, 16, 4, kinds[k]);
        const ra_run_t *found = &many->document_runs[many->document_run_begin[2]];
        assert_int_equal(many->document_run_begin[3] - many->document_run_begin[2],
                         one->document_run_begin[1]);
        for (int64_t i = 0; i < one->document_run_begin[1]; i++) {
            assert_int_equal(found[i].start, one->document_runs[i].start);
            assert_int_equal(found[i].count, one->document_runs[i].count);
            assert_int_equal(found[i].rank, one->document_runs[i].rank);
        }
        ra_layout_destroy(one);
        ra_layout_destroy(many);
    }
}

static void packing_and_unpacking_are_inverse(void **state)
{
    (void)state;
    ra_document_t documents[] = {{0, 130}, {32, 5}, {0, 0}, {16, 400}, {0, 1}};
    for (int ranks = 1; ranks <= 7; ranks++) {
        for (size_t k = 0; k < RA_ARRAY_LEN(kinds); k++) {
            ra_layout_t *layout = lay_out(documents, 5, 16, ranks, kinds[k]);
            int64_t *ordered = malloc((size_t)layout->total_rows * 8);
            int64_t *packed = malloc((size_t)layout->max_rows * 8);
            int64_t *position = malloc((size_t)layout->max_rows * 8);
            int64_t *back = calloc((size_t)layout->total_rows, 8);
            for (int64_t d = 0, at = 0; d < 5; d++) {
                for (int64_t p = 0; p < documents[d].count; p++) {
                    ordered[at++] = d * 100000 + documents[d].first + p;
                }
            }
            for (int r = 0; r < ranks; r++) {
                ra_layout_pack(layout, r, 8, ordered, packed);
                ra_layout_positions(layout, r, position);
                for (int64_t i = 0; i < layout->rows[r]; i++) {
                    assert_int_equal(packed[i] % 100000, position[i]);
                }
                ra_layout_unpack(layout, r, 8, packed, back);
            }
            assert_memory_equal(back, ordered, (size_t)layout->total_rows * 8);
            free(ordered);
            free(packed);
            free(position);
            free(back);
            ra_layout_destroy(layout);
        }
    }
}

static void a_prefix_layout_holds_what_comes_before(void **state)
{
    (void)state;
    ra_document_t documents[] = {{0, 130}, {320, 5}, {48, 400}};
    ra_layout_t *layout = lay_out(documents, 3, 16, 4, RA_LAYOUT_ZIGZAG), *prefix = NULL;
    assert_int_equal(ra_layout_create_prefix(layout, &prefix), RA_OK);
    check_cover(prefix);
    assert_int_equal(prefix->total_rows, 368);
    assert_int_equal(prefix->kind, RA_LAYOUT_CONTIGUOUS);
    assert_null(ra_layout_last_run(prefix, 0));
    assert_true(is_sharded(prefix, 1));
    ra_layout_destroy(prefix);
    ra_layout_destroy(layout);
}

static void nonsense_is_refused(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    ra_layout_t *layout = NULL;
    ra_document_t good = {0, 5}, odd = {3, 5}, negative = {0, -1};
    ra_document_t huge[] = {{0, INT64_MAX - 10}, {0, INT64_MAX - 10}};
    assert_int_equal(ra_layout_create(&good, 1, 0, 1, kinds[0], &layout), RA_ERR_INVALID);
    assert_int_equal(ra_layout_create(&good, 1, 4, 0, kinds[0], &layout), RA_ERR_INVALID);
    assert_int_equal(ra_layout_create(&odd, 1, 4, 1, kinds[0], &layout), RA_ERR_INVALID);
    assert_int_equal(ra_layout_create(&negative, 1, 4, 1, kinds[0], &layout), RA_ERR_INVALID);
    assert_int_equal(ra_layout_create(huge, 2, 1, 1, kinds[0], &layout), RA_ERR_INVALID);
    assert_null(layout);
    ra_log_set_quiet(0);
    ra_layout_kind_t kind;
    assert_int_equal(ra_layout_kind_parse("zigzag", &kind), 0);
    assert_int_equal(kind, RA_LAYOUT_ZIGZAG);
    assert_int_equal(ra_layout_kind_parse("striped", &kind), -1);
    ra_layout_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_token_has_one_owner_for_any_length),
        cmocka_unit_test(zigzag_balances_causal_work),
        cmocka_unit_test(packs_of_documents_are_covered_and_balanced),
        cmocka_unit_test(a_document_is_cut_the_same_way_in_any_company),
        cmocka_unit_test(packing_and_unpacking_are_inverse),
        cmocka_unit_test(a_prefix_layout_holds_what_comes_before),
        cmocka_unit_test(nonsense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
