/* Linear attention chunks: the oracle against the quadratic form, every row and instruction set
 * against the oracle, and the bits that attention/linear_chunk.h promises. */
#include "attention/linear_chunk.h"
#include "base/cpu_isa.h"
#include "tests/cpu_engine.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* fp32 sums of a few hundred terms that partly cancel: about 100 ulps of the largest output. */
static const double TOLERANCE = 1.2e-5;

enum { MAX_SEGMENTS = 4, STRIDE_PAD = 5 };

typedef struct shape {
    int32_t heads, key_dim, value_dim;
    int64_t rows[MAX_SEGMENTS]; /* of each segment; 0 ends the list */
    float log_decay;            /* of head 0; head h has this / (h + 1) */
    bool decay_per_token;
    bool state_in;
} shape_t;

static const shape_t shapes[] = {
    {1, 32, 32, {1}, -0.1F, false, false},
    {4, 64, 64, {200}, -0.7F, false, false},
    {2, 64, 64, {64, 128, 1}, -0.05F, false, true},
    {3, 128, 128, {130, 65}, -0.004F, false, true},
    {1, 256, 256, {70}, -0.3F, false, true},
    {2, 32, 64, {127, 3}, 0.0F, false, true},
    {2, 128, 64, {129}, -1e-8F, false, true},
    {1, 7, 5, {67, 2}, -0.2F, false, true},
    {2, 33, 49, {100}, -0.01F, false, false},
    {2, 64, 64, {300}, -18.4F, false, true},    /* 1e-8 a token */
    {2, 64, 64, {100}, -INFINITY, false, true}, /* forgets everything but the token itself */
    {1, 64, 64, {2048}, -0.06F, false, true},   /* the first state underflows on the way */
    {4, 64, 64, {200, 90}, -0.7F, true, true},
    {2, 128, 128, {150}, -0.01F, true, false},
    {1, 24, 40, {77, 1, 64}, -3.0F, true, true},
    {2, 64, 64, {130}, -200.0F, true, true},
};

typedef struct problem {
    ra_linear_args_t args;
    ra_linear_segment_t segments[MAX_SEGMENTS];
    int64_t rows, o_count, state_count; /* state_count floats a segment */
    float *q, *k, *v, *o, *decay, *state_in, *state_out;
} problem_t;

static float *floats(int64_t n)
{
    float *values = malloc((size_t)(n > 0 ? n : 1) * sizeof(*values));
    assert_non_null(values);
    return values;
}

static void make_decay(problem_t *p, const shape_t *shape, uint64_t *seed)
{
    int64_t rows = shape->decay_per_token ? p->rows : 1;
    p->decay = floats(rows * shape->heads);
    for (int64_t i = 0; i < rows * shape->heads; i++) {
        float factor = shape->decay_per_token ? test_random(seed, 0, 2) : 1;
        p->decay[i] = shape->log_decay * factor / (float)(i % shape->heads + 1);
    }
    if (shape->decay_per_token && rows > 20) {
        p->decay[9 * shape->heads] = -INFINITY; /* a reset inside a chunk */
        p->decay[17 * shape->heads] = 0;
    }
}

static void make(problem_t *p, const shape_t *shape)
{
    uint64_t seed = 42;
    int64_t key_stride = shape->heads * shape->key_dim + STRIDE_PAD;
    int64_t value_stride = shape->heads * shape->value_dim + STRIDE_PAD;
    *p = (problem_t){.state_count = (int64_t)shape->heads * shape->key_dim * shape->value_dim};
    int64_t count = 0;
    for (; count < MAX_SEGMENTS && shape->rows[count] > 0; count++) {
        p->segments[count].row_begin = p->rows + 1; /* a row between segments that nobody owns */
        p->segments[count].row_count = shape->rows[count];
        p->rows += shape->rows[count] + 1;
    }
    p->rows++;
    p->o_count = p->rows * value_stride;
    p->q = floats(p->rows * key_stride);
    p->k = floats(p->rows * key_stride);
    p->v = floats(p->o_count);
    p->o = floats(p->o_count);
    p->state_in = floats(count * p->state_count);
    p->state_out = floats(count * p->state_count);
    test_fill(p->q, p->rows * key_stride, &seed, -1, 1);
    test_fill(p->k, p->rows * key_stride, &seed, -1, 1);
    test_fill(p->v, p->o_count, &seed, -1, 1);
    test_fill(p->state_in, count * p->state_count, &seed, -2, 2);
    test_poison(p->o, p->o_count);
    test_poison(p->state_out, count * p->state_count);
    make_decay(p, shape, &seed);
    for (int64_t s = 0; s < count; s++) {
        p->segments[s].state_in = shape->state_in ? p->state_in + s * p->state_count : NULL;
        p->segments[s].state_out = p->state_out + s * p->state_count;
    }
    p->args = (ra_linear_args_t){.heads = shape->heads,
                                 .key_dim = shape->key_dim,
                                 .value_dim = shape->value_dim,
                                 .scale = 1 / sqrtf((float)shape->key_dim),
                                 .q = p->q,
                                 .k = p->k,
                                 .v = p->v,
                                 .q_stride = key_stride,
                                 .k_stride = key_stride,
                                 .v_stride = value_stride,
                                 .log_decay = p->decay,
                                 .log_decay_stride = shape->decay_per_token ? shape->heads : 0,
                                 .o = p->o,
                                 .o_stride = value_stride,
                                 .segments = p->segments,
                                 .segment_count = count};
}

static void unmake(problem_t *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->o);
    free(p->decay);
    free(p->state_in);
    free(p->state_out);
}

static const ra_linear_kernel_t *kernel_named(const char *name, const ra_linear_args_t *args)
{
    const ra_linear_kernel_t *kernel = NULL;
    assert_int_equal(ra_linear_select(name, RA_DEVICE_CPU, args, &kernel), RA_OK);
    assert_string_equal(ra_linear_kernel_name(kernel), name);
    return kernel;
}

static void forward(const char *name, problem_t *p, ra_stream_t *stream)
{
    assert_int_equal(ra_linear_forward(kernel_named(name, &p->args), &p->args, stream), RA_OK);
}

static void summarise(const char *name, problem_t *p)
{
    assert_int_equal(ra_linear_summarise(kernel_named(name, &p->args), &p->args, NULL), RA_OK);
}

/* |got - want| against the largest |want|; a NaN on one side only fails (poison must agree). */
static void assert_close(const float *got, const float *want, int64_t n, const char *what)
{
    double largest = 0;
    for (int64_t i = 0; i < n; i++) {
        largest = isnan(want[i]) ? largest : fmax(largest, fabs((double)want[i]));
    }
    for (int64_t i = 0; i < n; i++) {
        bool near = fabs((double)got[i] - (double)want[i]) <= TOLERANCE * largest;
        if (!near && !(isnan(got[i]) && isnan(want[i]))) {
            fail_msg("%s [%lld]: got %.9g, want %.9g, largest %.3g, isa %s", what, (long long)i,
                     (double)got[i], (double)want[i], largest, ra_cpu_isa_name(ra_cpu_isa()));
        }
    }
}

static void assert_same_bits(const float *a, const float *b, int64_t n, const char *what)
{
    for (int64_t i = 0; i < n; i++) {
        if (memcmp(&a[i], &b[i], sizeof(*a)) != 0) {
            fail_msg("%s [%lld]: %.9g and %.9g differ in bits", what, (long long)i, (double)a[i],
                     (double)b[i]);
        }
    }
}

/* o_t = scale (e^{G_0..t} S_in^T q_t + sum_{j<=t} e^{G_j+1..t} (q_t . k_j) v_j), head by head. */
static double quadratic(const problem_t *p, const ra_linear_segment_t *segment, int64_t t,
                        int64_t head, int64_t e)
{
    const ra_linear_args_t *a = &p->args;
    const float *q =
        (const float *)a->q + (segment->row_begin + t) * a->q_stride + head * a->key_dim;
    double sum = 0, decay = 0;
    for (int64_t j = t; j >= 0; j--) {
        const float *k =
            (const float *)a->k + (segment->row_begin + j) * a->k_stride + head * a->key_dim;
        double dot = 0;
        for (int64_t d = 0; d < a->key_dim; d++) {
            dot += (double)q[d] * (double)k[d];
        }
        const float *v =
            (const float *)a->v + (segment->row_begin + j) * a->v_stride + head * a->value_dim;
        sum += dot * exp(decay) * (double)v[e];
        decay += (double)a->log_decay[(segment->row_begin + j) * a->log_decay_stride + head];
    }
    for (int64_t d = 0; segment->state_in != NULL && d < a->key_dim; d++) {
        int64_t at = (head * a->key_dim + d) * a->value_dim + e;
        sum += exp(decay) * (double)segment->state_in[at] * (double)q[d];
    }
    return (double)a->scale * sum;
}

static void the_oracle_equals_the_quadratic_form(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        problem_t p;
        make(&p, &shapes[i]);
        forward("ref", &p, NULL);
        const ra_linear_segment_t *segment = &p.segments[p.args.segment_count - 1];
        for (int64_t t = 0; t < segment->row_count; t += 13) {
            int64_t head = t % p.args.heads, e = t * 7 % p.args.value_dim;
            double want = quadratic(&p, segment, t, head, e);
            float got =
                p.o[(segment->row_begin + t) * p.args.o_stride + head * p.args.value_dim + e];
            /* two orders of double sums, one rounding to fp32 */
            assert_true(fabs((double)got - want) <= 1e-7 * fabs(want) + 1e-9);
        }
        unmake(&p);
    }
}

static void every_instruction_set_matches_the_oracle(void **unused)
{
    (void)unused;
    ra_cpu_isa_t best = ra_cpu_isa();
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        problem_t want;
        make(&want, &shapes[i]);
        forward("ref", &want, NULL);
        for (int isa = 0; isa <= (int)best; isa++) {
            assert_int_equal(ra_cpu_isa_force((ra_cpu_isa_t)isa), 0);
            problem_t got;
            make(&got, &shapes[i]);
            forward("cpu", &got, NULL);
            char what[64];
            snprintf(what, sizeof(what), "shape %zu o", i);
            assert_close(got.o, want.o, got.o_count, what);
            snprintf(what, sizeof(what), "shape %zu state", i);
            assert_close(got.state_out, want.state_out, got.args.segment_count * got.state_count,
                         what);
            unmake(&got);
        }
        unmake(&want);
    }
    assert_int_equal(ra_cpu_isa_force(best), 0);
}

static void summarise_gives_the_state_bits_of_forward(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        problem_t whole, state;
        make(&whole, &shapes[i]);
        make(&state, &shapes[i]);
        state.args.q = NULL; /* never read */
        state.args.o = NULL;
        forward("cpu", &whole, NULL);
        summarise("cpu", &state);
        assert_same_bits(whole.state_out, state.state_out,
                         whole.args.segment_count * whole.state_count, "state");
        unmake(&whole);
        unmake(&state);
    }
}

static void outputs_may_lie_on_their_values(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        problem_t apart, together;
        make(&apart, &shapes[i]);
        make(&together, &shapes[i]);
        together.args.o = together.v;
        forward("cpu", &apart, NULL);
        forward("cpu", &together, NULL);
        for (int64_t s = 0; s < apart.args.segment_count; s++) {
            const ra_linear_segment_t *segment = &apart.segments[s];
            for (int64_t t = 0; t < segment->row_count; t++) {
                int64_t at = (segment->row_begin + t) * apart.args.o_stride;
                int64_t width = (int64_t)apart.args.heads * apart.args.value_dim;
                assert_same_bits(apart.o + at, together.v + at, width, "o on v");
            }
        }
        unmake(&apart);
        unmake(&together);
    }
}

static void a_state_may_be_carried_in_place(void **unused)
{
    (void)unused;
    problem_t apart, together;
    make(&apart, &shapes[3]);
    make(&together, &shapes[3]);
    for (int64_t s = 0; s < together.args.segment_count; s++) {
        together.segments[s].state_out = together.state_in + s * together.state_count;
    }
    forward("cpu", &apart, NULL);
    forward("cpu", &together, NULL);
    int64_t n = apart.args.segment_count * apart.state_count;
    assert_same_bits(apart.state_out, together.state_in, n, "state");
    assert_same_bits(apart.o, together.o, apart.o_count, "o");
    unmake(&apart);
    unmake(&together);
}

static void a_segment_does_not_see_its_neighbours(void **unused)
{
    (void)unused;
    problem_t together, alone;
    make(&together, &shapes[2]);
    make(&alone, &shapes[2]);
    forward("cpu", &together, NULL);
    for (int64_t s = 0; s < together.args.segment_count; s++) {
        ra_linear_args_t args = alone.args;
        args.segments = &alone.segments[s];
        args.segment_count = 1;
        assert_int_equal(ra_linear_forward(kernel_named("cpu", &args), &args, NULL), RA_OK);
    }
    assert_same_bits(together.o, alone.o, together.o_count, "o");
    assert_same_bits(together.state_out, alone.state_out,
                     together.args.segment_count * together.state_count, "state");
    unmake(&together);
    unmake(&alone);
}

static void threads_do_not_change_bits(void **unused)
{
    (void)unused;
    engine_t e = engine_make(3);
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        problem_t one, three;
        make(&one, &shapes[i]);
        make(&three, &shapes[i]);
        forward("cpu", &one, NULL);
        forward("cpu", &three, e.stream);
        assert_same_bits(one.o, three.o, one.o_count, "o");
        assert_same_bits(one.state_out, three.state_out, one.args.segment_count * one.state_count,
                         "state");
        unmake(&one);
        unmake(&three);
    }
    engine_free(&e);
}

/* One document cut in pieces whose states are handed on equals the document in one piece. */
static void pieces_with_carried_states_equal_the_whole(void **unused)
{
    (void)unused;
    static const int64_t cuts[] = {0, 1, 16, 17, 80, 144, 145, 200};
    for (int per_token = 0; per_token < 2; per_token++) {
        shape_t shape = {2, 64, 64, {200}, -0.03F, per_token == 1, true};
        problem_t whole, cut;
        make(&whole, &shape);
        make(&cut, &shape);
        forward("cpu", &whole, NULL);
        ra_linear_segment_t piece = {.state_in = cut.state_in, .state_out = cut.state_out};
        cut.args.segments = &piece;
        for (size_t c = 0; c + 1 < sizeof(cuts) / sizeof(cuts[0]); c++) {
            piece.row_begin = cut.segments[0].row_begin + cuts[c];
            piece.row_count = cuts[c + 1] - cuts[c];
            forward("cpu", &cut, NULL);
            piece.state_in = cut.state_out;
        }
        assert_close(cut.o, whole.o, whole.o_count, "o");
        assert_close(cut.state_out, whole.state_out, whole.state_count, "state");
        unmake(&whole);
        unmake(&cut);
    }
}

/* S_out = e^G S_in + B: what the ring does with runs that were summarised from zero. */
static void a_summary_carries_any_state_over_its_segment(void **unused)
{
    (void)unused;
    shape_t shape = {3, 64, 32, {150}, -0.02F, false, true};
    problem_t p;
    make(&p, &shape);
    summarise("cpu", &p);
    float *after = floats(p.state_count);
    float total[3];
    for (int h = 0; h < 3; h++) {
        total[h] = 150 * p.decay[h];
    }
    p.segments[0].state_in = NULL;
    p.segments[0].state_out = after;
    summarise("cpu", &p);
    int64_t per_head = p.state_count / 3;
    assert_int_equal(ra_linear_carry(3, per_head, total, NULL, after, NULL), RA_OK);
    assert_int_equal(ra_linear_carry(3, per_head, total, p.state_in, after, NULL), RA_OK);
    assert_close(after, p.state_out, p.state_count, "state");
    free(after);
    unmake(&p);
}

static void an_empty_segment_passes_its_state_on(void **unused)
{
    (void)unused;
    problem_t p;
    make(&p, &shapes[3]);
    p.segments[0].row_count = 0;
    p.segments[1].row_count = 0;
    p.segments[1].state_in = NULL;
    forward("cpu", &p, NULL);
    assert_same_bits(p.state_out, p.state_in, p.state_count, "state");
    for (int64_t i = 0; i < p.state_count; i++) {
        assert_true(p.state_out[p.state_count + i] == 0);
    }
    unmake(&p);
}

static void bad_arguments_are_refused(void **unused)
{
    (void)unused;
    problem_t p;
    make(&p, &shapes[1]);
    const ra_linear_kernel_t *kernel = kernel_named("cpu", &p.args);
    p.decay[1] = 0.5F;
    assert_int_equal(ra_linear_forward(kernel, &p.args, NULL), RA_ERR_INVALID);
    p.decay[1] = NAN;
    assert_int_equal(ra_linear_forward(kernel, &p.args, NULL), RA_ERR_INVALID);
    p.decay[1] = 0;
    p.args.o_stride = 3;
    assert_int_equal(ra_linear_forward(kernel, &p.args, NULL), RA_ERR_SHAPE);
    assert_int_equal(ra_linear_select("nosuch", RA_DEVICE_CPU, &p.args, &kernel),
                     RA_ERR_UNSUPPORTED);
    assert_int_equal(ra_linear_select("cpu", RA_DEVICE_CUDA, &p.args, &kernel), RA_ERR_UNSUPPORTED);
    p.args.dtype = RA_BF16;
    assert_int_equal(ra_linear_select("auto", RA_DEVICE_CPU, &p.args, &kernel), RA_ERR_UNSUPPORTED);
    p.args.dtype = RA_F32;
    p.args.heads = 0;
    assert_int_equal(ra_linear_select("auto", RA_DEVICE_CPU, &p.args, &kernel), RA_ERR_SHAPE);
    unmake(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_oracle_equals_the_quadratic_form),
        cmocka_unit_test(every_instruction_set_matches_the_oracle),
        cmocka_unit_test(summarise_gives_the_state_bits_of_forward),
        cmocka_unit_test(outputs_may_lie_on_their_values),
        cmocka_unit_test(a_state_may_be_carried_in_place),
        cmocka_unit_test(a_segment_does_not_see_its_neighbours),
        cmocka_unit_test(threads_do_not_change_bits),
        cmocka_unit_test(pieces_with_carried_states_equal_the_whole),
        cmocka_unit_test(a_summary_carries_any_state_over_its_segment),
        cmocka_unit_test(an_empty_segment_passes_its_state_on),
        cmocka_unit_test(bad_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
