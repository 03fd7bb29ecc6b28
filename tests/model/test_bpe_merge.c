/* Mirrors model/bpe_merge.c. Oracle: look at every pair, merge the lowest rank, begin again. */
#include "model/bpe_merge.h"
#include "tests/test_support.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { LETTERS = 3, MAX_RANKS = 400, MAX_WORD = 1500 };

/* Tokens are strings over LETTERS letters; an id is the index of its string. */
typedef struct rules {
    char text[LETTERS + MAX_RANKS][64];
    int32_t left[MAX_RANKS], right[MAX_RANKS], merged[MAX_RANKS];
    int tokens, ranks;
} rules_t;

static int find_token(const rules_t *rules, const char *text)
{
    for (int i = 0; i < rules->tokens; i++) {
        if (strcmp(rules->text[i], text) == 0) {
            return i;
        }
    }
    return -1;
}

static bool has_pair(const rules_t *rules, int32_t left, int32_t right)
{
    for (int i = 0; i < rules->ranks; i++) {
        if (rules->left[i] == left && rules->right[i] == right) {
            return true;
        }
    }
    return false;
}

/* Random merges; then shuffled, so that a merge often comes before those that make its parts. */
static void make_rules(rules_t *rules, int ranks, uint64_t *seed)
{
    memset(rules, 0, sizeof(*rules));
    for (rules->tokens = 0; rules->tokens < LETTERS; rules->tokens++) {
        rules->text[rules->tokens][0] = (char)('a' + rules->tokens);
    }
    for (int tries = 0; rules->ranks < ranks && tries < 100 * ranks; tries++) {
        char text[128];
        int32_t left = (int32_t)(test_random_u64(seed) % (uint64_t)rules->tokens);
        int32_t right = (int32_t)(test_random_u64(seed) % (uint64_t)rules->tokens);
        snprintf(text, sizeof(text), "%s%s", rules->text[left], rules->text[right]);
        if (strlen(text) >= 40 || has_pair(rules, left, right)) {
            continue;
        }
        int token = find_token(rules, text);
        if (token < 0) {
            token = rules->tokens++;
            snprintf(rules->text[token], sizeof(rules->text[token]), "%s", text);
        }
        rules->left[rules->ranks] = left;
        rules->right[rules->ranks] = right;
        rules->merged[rules->ranks++] = token;
    }
    for (int i = rules->ranks - 1; i > 0; i--) {
        int j = (int)(test_random_u64(seed) % (uint64_t)(i + 1));
        int32_t left = rules->left[i], right = rules->right[i], merged = rules->merged[i];
        rules->left[i] = rules->left[j];
        rules->right[i] = rules->right[j];
        rules->merged[i] = rules->merged[j];
        rules->left[j] = left;
        rules->right[j] = right;
        rules->merged[j] = merged;
    }
}

static int64_t merge_plainly(const rules_t *rules, int32_t *ids, int64_t count)
{
    static int32_t rank[LETTERS + MAX_RANKS][LETTERS + MAX_RANKS];
    memset(rank, 0x7f, sizeof(rank));
    for (int i = 0; i < rules->ranks; i++) {
        rank[rules->left[i]][rules->right[i]] = i;
    }
    for (;;) {
        int32_t lowest = 0x7f7f7f7f;
        int64_t best = -1;
        for (int64_t i = 0; i + 1 < count; i++) {
            if (rank[ids[i]][ids[i + 1]] < lowest) {
                lowest = rank[ids[i]][ids[i + 1]];
                best = i;
            }
        }
        if (best < 0) {
            return count;
        }
        ids[best] = rules->merged[lowest];
        memmove(ids + best + 1, ids + best + 2, (size_t)(count - best - 2) * sizeof(*ids));
        count--;
    }
}

static void check_words(const rules_t *rules, ra_merge_work_t *work, uint64_t *seed)
{
    static const int64_t lengths[] = {0, 1, 2, 3, 31, 32, 33, 34, 100, 500, MAX_WORD};
    ra_merge_table_t table;
    assert_int_equal(ra_merge_table_init(&table, rules->ranks), RA_OK);
    for (int i = 0; i < rules->ranks; i++) {
        ra_merge_table_add(&table, rules->left[i], rules->right[i], rules->merged[i]);
    }
    for (size_t l = 0; l < sizeof(lengths) / sizeof(lengths[0]); l++) {
        int32_t want[MAX_WORD + 1], got[MAX_WORD + 1];
        int64_t count = -1;
        uint64_t letters = 1 + test_random_u64(seed) % LETTERS; /* 1: one long run */
        for (int64_t i = 0; i < lengths[l]; i++) {
            want[i] = got[i] = (int32_t)(test_random_u64(seed) % letters);
        }
        int64_t want_count = merge_plainly(rules, want, lengths[l]);
        assert_int_equal(ra_bpe_merge(&table, work, got, lengths[l], &count), RA_OK);
        assert_int_equal(count, want_count);
        assert_memory_equal(got, want, (size_t)count * sizeof(*got));
    }
    ra_merge_table_release(&table);
}

static void any_word_merges_as_the_plain_loop_does(void **state)
{
    (void)state;
    static rules_t rules;
    ra_merge_work_t work = {0}; /* shared, so that leftovers of one word would be seen */
    uint64_t seed = 5;
    for (int round = 0; round < 60; round++) {
        make_rules(&rules, 1 + (int)(test_random_u64(&seed) % MAX_RANKS), &seed);
        check_words(&rules, &work, &seed);
    }
    ra_merge_work_release(&work);
}

static void without_merges_a_word_stays_as_it_is(void **state)
{
    (void)state;
    ra_merge_table_t table;
    ra_merge_work_t work = {0};
    int32_t ids[100] = {0};
    int64_t count = 0;
    assert_int_equal(ra_merge_table_init(&table, 0), RA_OK);
    assert_int_equal(ra_bpe_merge(&table, &work, ids, 100, &count), RA_OK);
    assert_int_equal(count, 100);
    ra_merge_table_release(&table);
    ra_merge_work_release(&work);
}

static void a_pair_added_twice_keeps_the_later_rank(void **state)
{
    (void)state;
    ra_merge_table_t table;
    ra_merge_work_t work = {0};
    int32_t ids[3] = {0, 1, 2};
    int64_t count = 0;
    assert_int_equal(ra_merge_table_init(&table, 3), RA_OK);
    ra_merge_table_add(&table, 0, 1, 3);
    ra_merge_table_add(&table, 1, 2, 4);
    ra_merge_table_add(&table, 0, 1, 3);
    assert_int_equal(ra_bpe_merge(&table, &work, ids, 3, &count), RA_OK);
    assert_int_equal(count, 2);
    assert_int_equal(ids[0], 0);
    assert_int_equal(ids[1], 4);
    ra_merge_table_release(&table);
    ra_merge_work_release(&work);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_word_merges_as_the_plain_loop_does),
        cmocka_unit_test(without_merges_a_word_stays_as_it_is),
        cmocka_unit_test(a_pair_added_twice_keeps_the_later_rank),
    };
    return cmocka_run_group_tests_name("bpe_merge", tests, NULL, NULL);
}
