/*
 * The trained model on real documents (slow). Reference: an independent fp32 implementation, held
 * in tests/goldens/ring-tiny-linear.
 *
 * Where two experts (or groups) are tied to within fp32 rounding, two correct implementations may
 * choose differently, and from that token on log-probabilities differ visibly; which way such a
 * tie falls changes with any change of rounding. At Luke 16458 and 30148 and Genesis 51955 a
 * float64 forward decides against the reference, by margins of 8e-8 to 2.5e-7. So tokens are held
 * to the bounds up to the first such tie, the first one beyond must be a tie itself, and what
 * follows is counted, printed and bounded in the mean; 99.9 % of all tokens within 2e-4 is not
 * asserted, as float64 itself misses it.
 */
#include "ring/layout.h"
#include "tests/model/golden_support.h"

static const char model[] = "configs/models/ring-tiny-linear";
static const char held[] = "tests/goldens/ring-tiny-linear/held_logprob_public.safetensors";

typedef struct difference {
    double mean, worst;
    int64_t beyond; /* tokens above the bound */
} difference_t;

static difference_t compare(const float *got, const float *want, int64_t n, double bound)
{
    difference_t d = {0};
    for (int64_t t = 0; t < n; t++) {
        double one = fabs((double)got[t] - want[t]);
        assert_true(isfinite(one));
        d.mean += one / (double)n;
        d.worst = one > d.worst ? one : d.worst;
        d.beyond += one > bound;
    }
    return d;
}

static double nll(const float *logprob, int64_t n)
{
    double sum = 0;
    for (int64_t t = 0; t < n; t++) {
        sum -= logprob[t];
    }
    return sum;
}

static float *score(const golden_t *golden, int ranks, bool reproducible, bool expert_parallel,
                    float *gap)
{
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = model;
    options.ranks = ranks;
    options.reproducible = reproducible;
    options.expert_parallel = expert_parallel;
    ra_session_t *session = session_open(options);
    float *logprob = session_score_one(session, golden->ids, golden->count, gap);
    ra_session_close(session);
    return logprob;
}

/* A margin of expert choice that the rounding of two fp32 implementations can turn. */
static const double near_tie = 1e-6;

/* First token that differs by more than the bound, or n. */
static int64_t first_beyond(const float *got, const float *want, int64_t n, double bound)
{
    int64_t t = 0;
    while (t < n && fabs((double)got[t] - want[t]) <= bound) {
        t++;
    }
    return t;
}

static void check_against_reference(const char *name, const golden_t *golden, const float *got,
                                    const float *gap, int ranks)
{
    int64_t n = golden->count - 1, split = first_beyond(got, golden->logprob, n, 2e-4);
    difference_t all = compare(got, golden->logprob, n, 2e-4);
    difference_t before = compare(got, golden->logprob, split, 2e-4);
    double relative = fabs(nll(got, n) / nll(golden->logprob, n) - 1.0);

    print_message("%s %d ranks against the reference: nll %.2e relative; before the first tie, "
                  "%lld tokens: mean %.2e, worst %.2e; in all: mean %.2e, within 2e-4: %.3f %%\n",
                  name, ranks, relative, (long long)split, before.mean, before.worst, all.mean,
                  100.0 * (1.0 - (double)all.beyond / (double)n));
    assert_true(relative <= 1e-5);
    assert_true(before.mean <= 2e-5);
    assert_true(split >= 16000);
    if (split < n) {
        print_message("  first beyond 2e-4: token %lld, its margin of choice %.2e\n",
                      (long long)split, gap[split]);
        assert_true(gap[split] < near_tie);
    }
    assert_true(all.mean <= 1e-4);
}

/* Mean difference of the 64 tokens on either side of every shard border. */
static double mean_near_borders(const golden_t *golden, const float *a, const float *b, int ranks,
                                int64_t *counted_p)
{
    ra_document_t document = {.count = golden->count};
    ra_layout_t *layout = NULL;
    double sum = 0;
    int64_t counted = 0;

    assert_int_equal(ra_layout_create(&document, 1, 256, ranks, RA_LAYOUT_ZIGZAG, &layout), RA_OK);
    for (int64_t i = layout->document_run_begin[0] + 1; i < layout->document_run_begin[1]; i++) {
        int64_t border = layout->document_runs[i].start;
        for (int64_t t = border - 64; t < border + 64 && t < golden->count - 1; t++) {
            sum += fabs((double)a[t] - b[t]);
            counted++;
        }
    }
    ra_layout_destroy(layout);
    *counted_p = counted;
    return counted > 0 ? sum / (double)counted : 0;
}

static void check_four_against_one(const char *name, const golden_t *golden, const float *one,
                                   const float *four, const float *gap)
{
    int64_t n = golden->count - 1, near_count;
    difference_t d = compare(four, one, n, 1e-4);
    double near = mean_near_borders(golden, four, one, 4, &near_count);
    double smallest_gap = INFINITY;
    int64_t unexplained = 0, first = n;

    for (int64_t t = 0; t < n; t++) {
        smallest_gap = gap[t] < smallest_gap ? gap[t] : smallest_gap;
        if (fabs((double)four[t] - one[t]) > 1e-4) {
            first = t < first ? t : first;
            unexplained += smallest_gap >= 1e-5;
        }
    }
    print_message("%s 4 ranks against 1: mean %.2e, worst %.2e, within 1e-4: %.3f %%, all %lld "
                  "others at or after a margin < 1e-5 (first at token %lld); near borders mean "
                  "%.2e over %lld tokens\n",
                  name, d.mean, d.worst, 100.0 * (1.0 - (double)d.beyond / (double)n),
                  (long long)d.beyond, (long long)first, near, (long long)near_count);
    assert_int_equal(unexplained, 0);
    assert_true(compare(four, one, first, 1e-4).mean <= 1e-5);
    assert_true(d.mean <= 1e-4);
    /* no worse than the rest, with room for the noise of a few hundred tokens */
    assert_true(near <= 2.0 * d.mean + 1e-6);
}

static void check_document(const char *name, const char *prefix)
{
    golden_t golden = golden_open(held, prefix);
    float *gap = malloc((size_t)golden.count * sizeof(*gap));
    assert_non_null(gap);
    float *gap4 = malloc((size_t)golden.count * sizeof(*gap4));
    assert_non_null(gap4);
    float *one = score(&golden, 1, false, false, gap);
    check_against_reference(name, &golden, one, gap, 1);
    float *four = score(&golden, 4, false, false, gap4);
    check_against_reference(name, &golden, four, gap4, 4);
    check_four_against_one(name, &golden, one, four, gap);
    free(one), free(four), free(gap), free(gap4);
    ra_safetensors_close(golden.file);
}

static void genesis_matches_the_reference_on_1_and_4_ranks(void **state)
{
    (void)state;
    check_document("Genesis", "kjv-Ge.");
}

static void luke_matches_the_reference_on_1_and_4_ranks(void **state)
{
    (void)state;
    check_document("Luke", "kjv-Luke.");
}

/* The first chapters: causality makes them a document of their own, and five runs stay short. */
static void reproducible_bits_are_the_same_on_any_rank_count(void **state)
{
    (void)state;
    static const int ranks[] = {2, 3, 4, 8};
    golden_t golden = golden_open(held, "kjv-Luke.");
    golden.count = 10000;
    size_t bytes = (size_t)(golden.count - 1) * sizeof(float);
    float *want = score(&golden, 1, true, false, NULL);

    for (size_t n = 0; n < RA_ARRAY_LEN(ranks); n++) {
        float *got = score(&golden, ranks[n], true, n % 2 == 1, NULL);
        assert_memory_equal(got, want, bytes);
        free(got);
    }
    free(want);
    ra_safetensors_close(golden.file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(genesis_matches_the_reference_on_1_and_4_ranks),
        cmocka_unit_test(luke_matches_the_reference_on_1_and_4_ranks),
        cmocka_unit_test(reproducible_bits_are_the_same_on_any_rank_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
