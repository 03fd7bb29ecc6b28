/* The CUDA linear attention kernels against the oracle (token by token in double), over shapes with
 * poisoned outputs and poisoned rows between segments, and the bits attention/linear_cuda.h
 * promises. Skips without a GPU. */
#include "attention/linear_cuda.h"
#include "tests/cuda_support.h"
#include <string.h>

enum { MAX_SEGMENTS = 6, PAD = 8 };

typedef struct shape {
    int32_t heads, key_dim, value_dim;
    int64_t rows[MAX_SEGMENTS]; /* of each segment; 0 ends the list */
    float log_decay;            /* of head 0; head h has this / (h + 1)^2 */
    bool decay_per_token;
    bool state_in;
    int64_t part_rows; /* of the Hopper kernel; 0: its own choice */
} shape_t;

static const shape_t any_shapes[] = {
    {1, 32, 32, {1}, -0.1F, false, false, 0},
    {4, 64, 64, {200}, -0.7F, false, false, 0},
    {2, 64, 64, {64, 128, 1}, -0.05F, false, true, 0},
    {3, 128, 128, {130, 65}, -0.004F, false, true, 0},
    {1, 256, 256, {70}, -0.3F, false, true, 0},
    {2, 32, 64, {127, 3}, 0.0F, false, true, 0},
    {1, 7, 5, {67, 2}, -0.2F, false, true, 0},
    {2, 33, 49, {100}, -0.01F, false, false, 0},
    {2, 64, 64, {100}, -INFINITY, false, true, 0},
    {4, 64, 64, {200, 90}, -0.7F, true, true, 0},
    {2, 128, 128, {150}, -0.01F, true, false, 0},
    {1, 24, 40, {77, 1, 64}, -3.0F, true, true, 0},
    {2, 64, 64, {130}, -200.0F, true, true, 0},
};

static const shape_t hopper_shapes[] = {
    {1, 64, 64, {64}, -0.1F, false, false, 0},
    {1, 128, 128, {64}, -0.1F, false, false, 0},
    {1, 128, 128, {128}, 0.0F, false, false, 0},
    {1, 64, 64, {1}, -0.1F, false, true, 0},
    {1, 128, 128, {1}, -0.1F, false, true, 0},
    {3, 128, 128, {63, 65, 1, 200}, -0.2F, false, true, 0},
    {5, 64, 64, {63, 65, 1, 200}, -0.2F, false, true, 0},
    {2, 128, 128, {700}, -0.02F, false, true, 64},
    {2, 64, 64, {700}, -0.02F, false, true, 64},
    {3, 128, 128, {1000, 64, 129, 300}, -0.5F, false, true, 128},
    {3, 64, 64, {1000, 64, 129, 300}, -0.5F, false, false, 128},
    {2, 128, 128, {640, 5}, 0.0F, false, true, 192},
    {2, 64, 64, {640, 5}, -1e-8F, false, true, 192},
    {2, 128, 128, {300}, -INFINITY, false, true, 64},
    {1, 128, 128, {500}, -18.4F, false, true, 256},
    {7, 128, 128, {1500}, -0.8F, false, true, 0},
    {6, 64, 64, {1500, 700}, -0.8F, false, true, 0},
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

typedef struct problem {
    shape_t shape;
    ra_linear_args_t args; /* host; segments and states of the oracle */
    ra_linear_args_t gpu;  /* device */
    ra_linear_segment_t host_segments[MAX_SEGMENTS], gpu_segments[MAX_SEGMENTS];
    int64_t rows, in_count, o_count, state_count; /* state_count floats a segment */
    ra_dtype_t dtype;
    float *in, *o, *decay, *state_in, *state_out; /* host, float whatever the dtype */
    void *d_in, *d_o, *d_decay, *d_state_in, *d_state_out;
} problem_t;

static void *host(int64_t bytes)
{
    void *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    assert_non_null(memory);
    return memory;
}

/* To the device in the dtype; values are already rounded to it. */
static void put(void *to, const float *from, int64_t n, ra_dtype_t dtype)
{
    if (dtype == RA_F32) {
        cuda_ok(cudaMemcpy(to, from, (size_t)n * sizeof(*from), cudaMemcpyHostToDevice));
        return;
    }
    uint16_t *narrow = host(n * (int64_t)sizeof(*narrow));
    for (int64_t i = 0; i < n; i++) {
        narrow[i] = ra_bf16_from_f32(from[i]);
    }
    cuda_ok(cudaMemcpy(to, narrow, (size_t)n * sizeof(*narrow), cudaMemcpyHostToDevice));
    free(narrow);
}

static float *get(const void *from, int64_t n, ra_dtype_t dtype)
{
    float *wide = host(n * (int64_t)sizeof(*wide));
    cuda_ok(cudaDeviceSynchronize());
    if (dtype == RA_F32) {
        cuda_ok(cudaMemcpy(wide, from, (size_t)n * sizeof(*wide), cudaMemcpyDeviceToHost));
        return wide;
    }
    uint16_t *narrow = host(n * (int64_t)sizeof(*narrow));
    cuda_ok(cudaMemcpy(narrow, from, (size_t)n * sizeof(*narrow), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) {
        wide[i] = ra_bf16_to_f32(narrow[i]);
    }
    free(narrow);
    return wide;
}

static void make_decay(problem_t *p, uint64_t *seed)
{
    const shape_t *shape = &p->shape;
    int64_t rows = shape->decay_per_token ? p->rows : 1;
    p->decay = host(rows * shape->heads * (int64_t)sizeof(float));
    for (int64_t i = 0; i < rows * shape->heads; i++) {
        float factor = shape->decay_per_token ? test_random(seed, 0, 2) : 1;
        float h = (float)(i % shape->heads + 1);
        p->decay[i] = shape->log_decay * factor / (h * h);
    }
    if (shape->decay_per_token && rows > 20) {
        p->decay[9 * shape->heads] = -INFINITY; /* a reset inside a chunk */
        p->decay[17 * shape->heads] = 0;
    }
}

static void make_segments(problem_t *p)
{
    int64_t count = 0;
    p->rows = 1;
    for (; count < MAX_SEGMENTS && p->shape.rows[count] > 0; count++) {
        p->host_segments[count].row_begin = p->rows;
        p->host_segments[count].row_count = p->shape.rows[count];
        p->rows += p->shape.rows[count] + 1; /* rows between segments belong to nobody */
    }
    p->args.segment_count = count;
}

static void fill(problem_t *p, uint64_t *seed)
{
    int64_t stride = p->in_count / p->rows;
    for (int64_t i = 0; i < p->in_count; i++) {
        p->in[i] = NAN;
    }
    for (int64_t s = 0; s < p->args.segment_count; s++) {
        const ra_linear_segment_t *segment = &p->host_segments[s];
        test_fill(p->in + segment->row_begin * stride, segment->row_count * stride, seed, -1, 1);
    }
    for (int64_t i = 0; i < p->in_count && p->dtype == RA_BF16; i++) {
        p->in[i] = ra_bf16_to_f32(ra_bf16_from_f32(p->in[i]));
    }
    test_fill(p->state_in, p->args.segment_count * p->state_count, seed, -2, 2);
}

static void point_at_device(problem_t *p)
{
    int64_t count = p->args.segment_count, states = count * p->state_count * 4;
    int64_t element = ra_dtype_bytes(p->dtype);
    int64_t k_at = (const float *)p->args.k - p->in, v_at = (const float *)p->args.v - p->in;
    p->d_in = device_array((size_t)(p->in_count * element), NULL);
    p->d_o = device_array((size_t)(p->o_count * element), NULL);
    p->d_state_in = device_array((size_t)states, NULL);
    p->d_state_out = device_array((size_t)states, NULL);
    put(p->d_in, p->in, p->in_count, p->dtype);
    put(p->d_state_in, p->state_in, count * p->state_count, RA_F32);
    p->gpu = p->args;
    p->gpu.dtype = p->dtype;
    p->gpu.q = p->d_in;
    p->gpu.k = (char *)p->d_in + k_at * element;
    p->gpu.v = (char *)p->d_in + v_at * element;
    p->gpu.o = p->d_o;
    p->gpu.segments = p->gpu_segments;
    if (p->shape.decay_per_token) {
        p->d_decay = device_array((size_t)(p->rows * p->shape.heads * 4), NULL);
        put(p->d_decay, p->decay, p->rows * p->shape.heads, RA_F32);
        p->gpu.log_decay = p->d_decay;
    }
    for (int64_t s = 0; s < count; s++) {
        p->gpu_segments[s] = p->host_segments[s];
        p->gpu_segments[s].state_in =
            p->shape.state_in ? (float *)p->d_state_in + s * p->state_count : NULL;
        p->gpu_segments[s].state_out = (float *)p->d_state_out + s * p->state_count;
    }
}

static void make(problem_t *p, const shape_t *shape, ra_dtype_t dtype)
{
    uint64_t seed = 42;
    int64_t keys = (int64_t)shape->heads * shape->key_dim;
    int64_t values = (int64_t)shape->heads * shape->value_dim;
    int64_t stride = 2 * keys + values + PAD;
    *p = (problem_t){.shape = *shape, .dtype = dtype};
    make_segments(p);
    p->state_count = keys * shape->value_dim;
    p->in_count = p->rows * stride;
    p->o_count = p->rows * (values + PAD);
    p->in = host(p->in_count * 4);
    p->o = host(p->o_count * 4);
    p->state_in = host(p->args.segment_count * p->state_count * 4);
    p->state_out = host(p->args.segment_count * p->state_count * 4);
    fill(p, &seed);
    test_poison(p->o, p->o_count);
    make_decay(p, &seed);
    for (int64_t s = 0; s < p->args.segment_count; s++) {
        p->host_segments[s].state_in = shape->state_in ? p->state_in + s * p->state_count : NULL;
        p->host_segments[s].state_out = p->state_out + s * p->state_count;
    }
    p->args = (ra_linear_args_t){.heads = shape->heads,
                                 .key_dim = shape->key_dim,
                                 .value_dim = shape->value_dim,
                                 .scale = 1 / sqrtf((float)shape->key_dim),
                                 .q = p->in,
                                 .k = p->in + keys,
                                 .v = p->in + 2 * keys,
                                 .q_stride = stride,
                                 .k_stride = stride,
                                 .v_stride = stride,
                                 .log_decay = p->decay,
                                 .log_decay_stride = shape->decay_per_token ? shape->heads : 0,
                                 .o = p->o,
                                 .o_stride = values + PAD,
                                 .segments = p->host_segments,
                                 .segment_count = p->args.segment_count};
    point_at_device(p);
}

static void unmake(problem_t *p)
{
    free(p->in);
    free(p->o);
    free(p->decay);
    free(p->state_in);
    free(p->state_out);
    cudaFree(p->d_in);
    cudaFree(p->d_o);
    cudaFree(p->d_decay);
    cudaFree(p->d_state_in);
    cudaFree(p->d_state_out);
}

static void oracle(problem_t *p)
{
    const ra_linear_kernel_t *kernel;
    assert_int_equal(ra_linear_select("ref", RA_DEVICE_CPU, &p->args, &kernel), RA_OK);
    assert_int_equal(ra_linear_forward(kernel, &p->args, NULL), RA_OK);
}

static void launch(const problem_t *p, bool hopper, bool state_only)
{
    ra_status_t status = hopper
                             ? ra_linear_sm90_launch(&p->gpu, state_only, p->shape.part_rows, NULL)
                             : ra_linear_cuda_launch(&p->gpu, state_only, NULL);
    assert_int_equal(status, RA_OK);
    cuda_ok(cudaDeviceSynchronize());
}

typedef struct bound {
    double l2, worst; /* relative L2 error; largest error over the largest value */
} bound_t;

/* fp32: sums of some hundred terms. bf16: three roundings to 8 bits a term and one of the result;
 * single values of long sums reach four times the mean error. */
static const bound_t F32_BOUND = {3e-6, 2e-5}, BF16_BOUND = {4e-3, 2e-2};
/* States are stored in fp32: one rounding of v with its decay. */
static const bound_t BF16_STATE_BOUND = {2.5e-3, 1e-2};

/* NaN where the oracle left its poison, close elsewhere. */
static void assert_close(const float *got, const float *want, int64_t n, bound_t bound,
                         const char *what)
{
    double error = 0, total = 0, largest = 0, worst = 0;
    int64_t at = -1;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(got[i]) != isnan(want[i])) {
            fail_msg("%s [%lld]: got %.9g, want %.9g", what, (long long)i, (double)got[i],
                     (double)want[i]);
        }
        if (isnan(want[i])) {
            continue;
        }
        double off = fabs((double)got[i] - (double)want[i]);
        error += off * off;
        total += (double)want[i] * (double)want[i];
        largest = fmax(largest, fabs((double)want[i]));
        if (off > worst) {
            worst = off;
            at = i;
        }
    }
    if (!(sqrt(error) <= bound.l2 * sqrt(total)) || !(worst <= bound.worst * largest)) {
        fail_msg("%s: relative L2 error %.3g, worst %.3g at %lld beside values up to %.3g", what,
                 sqrt(error / total), worst, (long long)at, largest);
    }
    if (getenv("RA_TEST_VERBOSE") != NULL) {
        print_message("%s: relative L2 error %.3g, worst %.3g\n", what, sqrt(error / total),
                      worst / largest);
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

static void match_oracle(const shape_t *shape, size_t index, ra_dtype_t dtype, bool hopper)
{
    problem_t p;
    char what[64];
    make(&p, shape, dtype);
    oracle(&p);
    launch(&p, hopper, false);
    float *o = get(p.d_o, p.o_count, dtype);
    float *state = get(p.d_state_out, p.args.segment_count * p.state_count, RA_F32);
    snprintf(what, sizeof(what), "%s shape %zu %s o", hopper ? "sm90" : "cuda", index,
             ra_dtype_name(dtype));
    assert_close(o, p.o, p.o_count, dtype == RA_F32 ? F32_BOUND : BF16_BOUND, what);
    snprintf(what, sizeof(what), "%s shape %zu %s state", hopper ? "sm90" : "cuda", index,
             ra_dtype_name(dtype));
    assert_close(state, p.state_out, p.args.segment_count * p.state_count,
                 hopper ? BF16_STATE_BOUND : F32_BOUND, what);
    free(o);
    free(state);
    unmake(&p);
}

static void the_complete_kernel_matches_the_oracle(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (size_t i = 0; i < COUNT(any_shapes); i++) {
        match_oracle(&any_shapes[i], i, RA_F32, false);
        match_oracle(&any_shapes[i], i, RA_BF16, false);
    }
}

static void the_hopper_kernel_matches_the_oracle(void **unused)
{
    (void)unused;
    skip_without_hopper();
    for (size_t i = 0; i < COUNT(hopper_shapes); i++) {
        match_oracle(&hopper_shapes[i], i, RA_BF16, true);
    }
}

typedef void visit_t(const shape_t *shape, ra_dtype_t dtype, bool hopper);

static void every_kernel(visit_t *visit)
{
    for (size_t i = 0; i < COUNT(any_shapes); i++) {
        visit(&any_shapes[i], i % 2 == 0 ? RA_F32 : RA_BF16, false);
    }
    for (size_t i = 0; cuda_major_version() == 9 && i < COUNT(hopper_shapes); i++) {
        visit(&hopper_shapes[i], RA_BF16, true);
    }
}

static void repeat(const shape_t *shape, ra_dtype_t dtype, bool hopper)
{
    problem_t p;
    make(&p, shape, dtype);
    int64_t states = p.args.segment_count * p.state_count;
    launch(&p, hopper, false);
    float *o = get(p.d_o, p.o_count, dtype), *state = get(p.d_state_out, states, RA_F32);
    for (int i = 0; i < 4; i++) {
        cuda_ok(cudaMemset(p.d_o, 0xFF, (size_t)(p.o_count * ra_dtype_bytes(dtype))));
        cuda_ok(cudaMemset(p.d_state_out, 0xFF, (size_t)states * 4));
        launch(&p, hopper, false);
        float *again = get(p.d_o, p.o_count, dtype), *later = get(p.d_state_out, states, RA_F32);
        assert_same_bits(o, again, p.o_count, "o again");
        assert_same_bits(state, later, states, "state again");
        free(again);
        free(later);
    }
    free(o);
    free(state);
    unmake(&p);
}

static void repeats_give_the_same_bits(void **unused)
{
    (void)unused;
    skip_without_gpu();
    every_kernel(repeat);
}

static void summarise(const shape_t *shape, ra_dtype_t dtype, bool hopper)
{
    problem_t whole, state;
    make(&whole, shape, dtype);
    make(&state, shape, dtype);
    state.gpu.q = NULL; /* never read */
    state.gpu.o = NULL;
    launch(&whole, hopper, false);
    launch(&state, hopper, true);
    int64_t states = whole.args.segment_count * whole.state_count;
    float *a = get(whole.d_state_out, states, RA_F32), *b = get(state.d_state_out, states, RA_F32);
    assert_same_bits(a, b, states, "state");
    free(a);
    free(b);
    unmake(&whole);
    unmake(&state);
}

static void summarise_gives_the_state_bits_of_forward(void **unused)
{
    (void)unused;
    skip_without_gpu();
    every_kernel(summarise);
}

static void on_values(const shape_t *shape, ra_dtype_t dtype, bool hopper)
{
    problem_t apart, together;
    make(&apart, shape, dtype);
    make(&together, shape, dtype);
    together.gpu.o = (void *)(uintptr_t)together.gpu.v;
    together.gpu.o_stride = together.gpu.v_stride;
    launch(&apart, hopper, false);
    launch(&together, hopper, false);
    float *o = get(apart.d_o, apart.o_count, dtype);
    float *in = get(together.d_in, together.in_count, dtype);
    int64_t v_at = (const float *)apart.args.v - apart.in;
    int64_t width = (int64_t)shape->heads * shape->value_dim;
    for (int64_t s = 0; s < apart.args.segment_count; s++) {
        const ra_linear_segment_t *segment = &apart.host_segments[s];
        for (int64_t t = 0; t < segment->row_count; t++) {
            int64_t row = segment->row_begin + t;
            assert_same_bits(o + row * apart.args.o_stride,
                             in + row * together.args.v_stride + v_at, width, "o on v");
        }
    }
    free(o);
    free(in);
    unmake(&apart);
    unmake(&together);
}

static void outputs_may_lie_on_their_values(void **unused)
{
    (void)unused;
    skip_without_gpu();
    every_kernel(on_values);
}

static void in_place(const shape_t *shape, ra_dtype_t dtype, bool hopper)
{
    problem_t apart, together;
    make(&apart, shape, dtype);
    make(&together, shape, dtype);
    for (int64_t s = 0; s < together.args.segment_count; s++) {
        together.gpu_segments[s].state_in = (float *)together.d_state_in + s * apart.state_count;
        together.gpu_segments[s].state_out = (float *)together.d_state_in + s * apart.state_count;
        apart.gpu_segments[s].state_in = (float *)apart.d_state_in + s * apart.state_count;
    }
    launch(&apart, hopper, false);
    launch(&together, hopper, false);
    int64_t states = apart.args.segment_count * apart.state_count;
    float *a = get(apart.d_state_out, states, RA_F32);
    float *b = get(together.d_state_in, states, RA_F32);
    assert_same_bits(a, b, states, "state");
    free(a);
    free(b);
    unmake(&apart);
    unmake(&together);
}

static void a_state_may_be_carried_in_place(void **unused)
{
    (void)unused;
    skip_without_gpu();
    every_kernel(in_place);
}

static void alone(const shape_t *shape, ra_dtype_t dtype, bool hopper)
{
    problem_t together, one;
    make(&together, shape, dtype);
    make(&one, shape, dtype);
    launch(&together, hopper, false);
    ra_linear_segment_t *all = one.gpu_segments;
    one.gpu.segment_count = 1;
    for (int64_t s = 0; s < together.args.segment_count; s++) {
        one.gpu.segments = &all[s];
        launch(&one, hopper, false);
    }
    int64_t states = together.args.segment_count * together.state_count;
    float *a = get(together.d_o, together.o_count, dtype), *b = get(one.d_o, one.o_count, dtype);
    float *c = get(together.d_state_out, states, RA_F32), *d = get(one.d_state_out, states, RA_F32);
    assert_same_bits(a, b, together.o_count, "o");
    assert_same_bits(c, d, states, "state");
    free(a);
    free(b);
    free(c);
    free(d);
    unmake(&together);
    unmake(&one);
}

static void a_segment_does_not_see_its_neighbours(void **unused)
{
    (void)unused;
    skip_without_gpu();
    every_kernel(alone);
}

static void an_empty_segment_passes_its_state_on(void **unused)
{
    (void)unused;
    skip_without_gpu();
    for (int hopper = 0; hopper <= (cuda_major_version() == 9); hopper++) {
        problem_t p;
        make(&p, &hopper_shapes[5], RA_BF16);
        p.gpu_segments[0].row_count = 0;
        p.gpu_segments[1].row_count = 0;
        p.gpu_segments[1].state_in = NULL;
        p.gpu.segment_count = 2;
        launch(&p, hopper != 0, false);
        float *state = get(p.d_state_out, 2 * p.state_count, RA_F32);
        assert_same_bits(state, p.state_in, p.state_count, "state");
        for (int64_t i = 0; i < p.state_count; i++) {
            assert_true(state[p.state_count + i] == 0);
        }
        free(state);
        unmake(&p);
    }
}

static void a_summary_carries_any_state_over_its_segment(void **unused)
{
    (void)unused;
    skip_without_gpu();
    shape_t shape = {3, 64, 32, {150}, -0.02F, false, true, 0};
    problem_t p;
    make(&p, &shape, RA_F32);
    launch(&p, false, true);
    float *want = get(p.d_state_out, p.state_count, RA_F32), total[3];
    for (int h = 0; h < 3; h++) {
        total[h] = 150 * p.decay[h];
    }
    void *d_total = device_array(sizeof(total), NULL);
    put(d_total, total, 3, RA_F32);
    p.gpu_segments[0].state_in = NULL;
    launch(&p, false, true);
    int64_t each = p.state_count / 3;
    assert_int_equal(ra_linear_cuda_carry(3, each, d_total, NULL, p.d_state_out, NULL), RA_OK);
    assert_int_equal(ra_linear_cuda_carry(3, each, d_total, p.d_state_in, p.d_state_out, NULL),
                     RA_OK);
    float *got = get(p.d_state_out, p.state_count, RA_F32);
    assert_close(got, want, p.state_count, F32_BOUND, "carried state");
    cudaFree(d_total);
    free(got);
    free(want);
    unmake(&p);
}

static void the_table_prefers_the_hopper_kernel(void **unused)
{
    (void)unused;
    skip_without_hopper();
    problem_t direct, by_table;
    const ra_linear_kernel_t *kernel;
    ra_device_t *gpu;
    ra_stream_t *stream;
    assert_int_equal(ra_device_open("cuda", 0, NULL, &gpu), RA_OK);
    assert_int_equal(ra_stream_create(gpu, &stream), RA_OK);
    make(&direct, &hopper_shapes[5], RA_BF16);
    make(&by_table, &hopper_shapes[5], RA_BF16);
    launch(&direct, true, false);
    assert_int_equal(ra_linear_select("auto", RA_DEVICE_CUDA, &by_table.gpu, &kernel), RA_OK);
    assert_string_equal(ra_linear_kernel_name(kernel), "sm90");
    assert_int_equal(ra_linear_forward(kernel, &by_table.gpu, stream), RA_OK);
    assert_int_equal(ra_stream_sync(stream), RA_OK);
    float *a = get(direct.d_o, direct.o_count, RA_BF16);
    float *b = get(by_table.d_o, by_table.o_count, RA_BF16);
    assert_same_bits(a, b, direct.o_count, "o");
    by_table.gpu.dtype = RA_F32;
    assert_int_equal(ra_linear_select("auto", RA_DEVICE_CUDA, &by_table.gpu, &kernel), RA_OK);
    assert_string_equal(ra_linear_kernel_name(kernel), "cuda");
    free(a);
    free(b);
    unmake(&direct);
    unmake(&by_table);
    ra_stream_destroy(stream);
    ra_device_close(gpu);
}

static void what_the_hopper_kernel_lacks_is_refused(void **unused)
{
    (void)unused;
    skip_without_hopper();
    problem_t p;
    make(&p, &hopper_shapes[3], RA_BF16);
    ra_linear_args_t args = p.gpu;
    args.q_stride++;
    assert_int_equal(ra_linear_sm90_launch(&args, false, 0, NULL), RA_ERR_UNSUPPORTED);
    assert_int_equal(ra_linear_sm90_launch(&args, true, 0, NULL), RA_OK); /* q is not touched */
    cuda_ok(cudaDeviceSynchronize());
    args = p.gpu;
    args.dtype = RA_F32;
    assert_false(ra_linear_sm90_fits(&args));
    assert_int_equal(ra_linear_sm90_launch(&args, false, 0, NULL), RA_ERR_UNSUPPORTED);
    args = p.gpu;
    args.key_dim = 32;
    assert_false(ra_linear_sm90_fits(&args));
    args = p.gpu;
    args.log_decay_stride = 1;
    assert_false(ra_linear_sm90_fits(&args));
    args = p.gpu;
    args.key_dim = 257;
    assert_false(ra_linear_cuda_fits(&args));
    unmake(&p);
}

/* An argument picks tests by name ("the_*"), for a sanitizer. */
int main(int count, char **words)
{
    if (count > 1) {
        cmocka_set_test_filter(words[1]);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_complete_kernel_matches_the_oracle),
        cmocka_unit_test(the_hopper_kernel_matches_the_oracle),
        cmocka_unit_test(repeats_give_the_same_bits),
        cmocka_unit_test(summarise_gives_the_state_bits_of_forward),
        cmocka_unit_test(outputs_may_lie_on_their_values),
        cmocka_unit_test(a_state_may_be_carried_in_place),
        cmocka_unit_test(a_segment_does_not_see_its_neighbours),
        cmocka_unit_test(an_empty_segment_passes_its_state_on),
        cmocka_unit_test(a_summary_carries_any_state_over_its_segment),
        cmocka_unit_test(the_table_prefers_the_hopper_kernel),
        cmocka_unit_test(what_the_hopper_kernel_lacks_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
