/*
 * softmax_cuda_check [small | soak [TIMES]]
 *
 * The CUDA softmax kernels against a double-precision oracle over a list of masks and shapes,
 * outputs and states poisoned, keys folded in one call and in several; repeats and split calls must
 * agree to the bit where the contract says so. soak repeats one problem and compares bits.
 */
#include "benchmarks/cuda_support.cuh"
#include "benchmarks/softmax_cuda_cases.cuh"
#include <cmath>
#include <cstring>

namespace
{

/* ---- oracle -------------------------------------------------------------------------------- */

struct oracle_t {
    const __nv_bfloat16 *q, *k, *v;
    const int64_t *row_lo, *row_hi, *key_pos, *rows;
    const int32_t *row_group;
    const ra_row_group_t *groups;
    const ra_key_span_t *spans;
    const float *key_score, *row_threshold, *key_bias; /* or NULL */
    int64_t row_count, key_count;
    int heads, kv_heads, head_dim;
    double scale;
    double *out, *lse;
};

__device__ double block_reduce(double x, bool want_max, double *scratch)
{
    scratch[threadIdx.x] = x;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            double other = scratch[threadIdx.x + half];
            scratch[threadIdx.x] =
                want_max ? fmax(scratch[threadIdx.x], other) : scratch[threadIdx.x] + other;
        }
        __syncthreads();
    }
    double result = scratch[0];
    __syncthreads();
    return result;
}

/* One block a (listed row, head); 256 threads; scores are computed twice. */
__global__ void oracle_kernel(oracle_t t)
{
    __shared__ double scratch[256], q[256], o[256];
    const int64_t row = t.rows[blockIdx.x];
    const int head = blockIdx.y, kv = head / (t.heads / t.kv_heads), d = t.head_dim;
    if (threadIdx.x < d) {
        q[threadIdx.x] = __bfloat162float(t.q[(row * t.heads + head) * d + threadIdx.x]);
        o[threadIdx.x] = 0.0;
    }
    __syncthreads();
    const ra_row_group_t group = t.groups[t.row_group[row]];
    double top = -INFINITY, sum = 0.0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t s = group.span_begin; s < group.span_begin + group.span_count; s++) {
            const ra_key_span_t span = t.spans[s];
            for (int64_t base = 0; base < span.key_count; base += blockDim.x) {
                int64_t key = span.key_begin + base + threadIdx.x;
                bool seen = base + threadIdx.x < span.key_count &&
                            t.key_pos[key] >= t.row_lo[row] && t.key_pos[key] < t.row_hi[row];
                if (seen && t.key_score)
                    seen = t.key_score[head * t.key_count + key] >=
                           t.row_threshold[head * t.row_count + row];
                double score = -INFINITY;
                if (seen) {
                    double dot = 0.0;
                    for (int i = 0; i < d; i++)
                        dot +=
                            q[i] * (double)__bfloat162float(t.k[(key * t.kv_heads + kv) * d + i]);
                    score = dot * t.scale + (t.key_bias ? (double)t.key_bias[key] : 0.0);
                }
                if (pass == 0) {
                    top = fmax(top, score);
                } else {
                    scratch[threadIdx.x] = seen ? exp(score - top) : 0.0;
                    sum += scratch[threadIdx.x];
                    __syncthreads();
                    if (threadIdx.x < d)
                        for (int i = 0; i < blockDim.x && base + i < span.key_count; i++)
                            if (scratch[i] != 0.0)
                                o[threadIdx.x] +=
                                    scratch[i] *
                                    (double)__bfloat162float(
                                        t.v[((span.key_begin + base + i) * t.kv_heads + kv) * d +
                                            threadIdx.x]);
                    __syncthreads();
                }
            }
        }
        if (pass == 0)
            top = block_reduce(top, true, scratch);
        else
            sum = block_reduce(sum, false, scratch);
    }
    const int64_t at = (int64_t)blockIdx.x * t.heads + head;
    if (threadIdx.x < d)
        t.out[at * d + threadIdx.x] = sum > 0.0 ? o[threadIdx.x] / sum : 0.0;
    if (threadIdx.x == 0)
        t.lse[at] = sum > 0.0 ? top + log(sum) : -INFINITY;
}

/* ---- running ------------------------------------------------------------------------------- */

struct result_t {
    std::vector<float> out, lse, m, l, o;
};

__global__ void widen(float *to, const __nv_bfloat16 *from, int64_t n)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x)
        to[i] = __bfloat162float(from[i]);
}

struct inputs_t {
    device_t<__nv_bfloat16> q, k, v;
    device_t<float> q32, k32, v32, key_score, row_threshold, key_bias;
    explicit inputs_t(const case_t &c)
        : q(c.rows * c.heads * c.head_dim), k(c.keys * c.kv_heads * c.head_dim), v(k.count),
          q32(q.count), k32(k.count), v32(v.count), key_score(c.key_score.size()),
          row_threshold(c.row_threshold.size()), key_bias(c.key_bias.size())
    {
        static uint32_t seed = 1;
        fill(q, seed++, c.spread);
        fill(k, seed++, c.spread);
        fill(v, seed++);
        widen<<<256, 256>>>(q32.data, q.data, (int64_t)q.count);
        widen<<<256, 256>>>(k32.data, k.data, (int64_t)k.count);
        widen<<<256, 256>>>(v32.data, v.data, (int64_t)v.count);
        key_score.put(c.key_score.data());
        row_threshold.put(c.row_threshold.data());
        key_bias.put(c.key_bias.data());
    }
};

/* Which kernel on which inputs; the last two are the complete one. */
enum kernel_choice { SM90, CUDA_BF16, CUDA_F32 };
const char *const kernel_names[] = {"sm90", "cuda bf16", "cuda f32"};

/* Fold the keys in @a calls blocks cut at span borders where the case has more spans than calls. */
result_t run(const case_t &c, const inputs_t &in, kernel_choice kernel, int calls, int merge,
             bool f32_out, bool want_state)
{
    const size_t elements = (size_t)c.rows * c.heads * c.head_dim, lines = (size_t)c.rows * c.heads;
    device_t<float> m(lines), l(lines), o(elements), lse(lines), out32(elements);
    device_t<__nv_bfloat16> out16(elements);
    ra_softmax_state_t state = {m.data, l.data, o.data, (int64_t)c.heads * c.head_dim};
    cudaStream_t stream;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int32_t bm, bn;
    if (kernel == SM90)
        RA(ra_softmax_sm90_tile(c.head_dim, &bm, &bn));
    else
        ra_softmax_cuda_tile(&bm, &bn);
    for (int call = 0; call < calls; call++) {
        int64_t begin = c.keys * call / calls, end = c.keys * (call + 1) / calls;
        if ((int64_t)c.spans.size() > calls) {
            begin = c.spans[c.spans.size() * call / calls].key_begin;
            end =
                call + 1 == calls ? c.keys : c.spans[c.spans.size() * (call + 1) / calls].key_begin;
        }
        std::vector<ra_key_span_t> spans;
        std::vector<ra_row_group_t> groups = c.groups;
        for (auto &group : groups) {
            int64_t first = (int64_t)spans.size();
            for (int64_t s = group.span_begin; s < group.span_begin + group.span_count; s++) {
                int64_t lo = std::max(begin, c.spans[s].key_begin);
                int64_t hi = std::min(end, c.spans[s].key_begin + c.spans[s].key_count);
                if (lo < hi)
                    spans.push_back({lo - begin, hi - lo});
            }
            group.span_begin = first;
            group.span_count = (int64_t)spans.size() - first;
        }
        ra_softmax_block_t block = {};
        block.rows = c.rows;
        block.keys = end - begin;
        block.heads = c.heads;
        block.kv_heads = c.kv_heads;
        block.head_dim = c.head_dim;
        block.scale = (float)(c.scale != 0.0 ? c.scale : 1.0 / sqrt((double)c.head_dim));
        const int64_t skip = begin * c.kv_heads * c.head_dim;
        block.dtype = kernel == CUDA_F32 ? RA_F32 : RA_BF16;
        block.q = kernel == CUDA_F32 ? (const void *)in.q32.data : in.q.data;
        block.k = kernel == CUDA_F32 ? (const void *)(in.k32.data + skip) : in.k.data + skip;
        block.v = kernel == CUDA_F32 ? (const void *)(in.v32.data + skip) : in.v.data + skip;
        block.q_stride = (int64_t)c.heads * c.head_dim;
        block.k_stride = block.v_stride = (int64_t)c.kv_heads * c.head_dim;
        block.mask.row_lo = c.row_lo.data();
        block.mask.row_hi = c.row_hi.data();
        block.mask.key_pos = c.key_pos.data() + begin;
        block.groups = groups.data();
        block.group_count = (int64_t)groups.size();
        block.spans = spans.data();
        ra_softmax_tiles_t *tiles;
        RA(ra_softmax_tiles_create(&block, bm, bn, merge, &tiles));
        device_t<unsigned char> list(ra_softmax_tiles_layout(tiles)->bytes);
        list.put(ra_softmax_tiles_data(tiles));
        std::vector<float> score; /* [heads, keys of this call] */
        for (int h = 0; h < c.heads && !c.key_score.empty(); h++)
            score.insert(score.end(), c.key_score.begin() + h * c.keys + begin,
                         c.key_score.begin() + h * c.keys + end);
        device_t<float> key_score(score.size());
        key_score.put(score.data());
        if (!c.key_score.empty()) {
            block.mask.key_score = key_score.data;
            block.mask.row_threshold = in.row_threshold.data;
            block.mask.key_bias = in.key_bias.data + begin;
        }
        CUDA(cudaDeviceSynchronize());
        ra_softmax_cuda_call_t launch = {};
        launch.block = &block;
        launch.layout = ra_softmax_tiles_layout(tiles);
        launch.tiles = list.data;
        launch.state = &state;
        launch.fresh = call == 0;
        if (call + 1 == calls && !want_state) {
            launch.out = f32_out ? (void *)out32.data : (void *)out16.data;
            launch.out_dtype = f32_out ? RA_F32 : RA_BF16;
            launch.out_stride = (int64_t)c.heads * c.head_dim;
            launch.lse = lse.data;
        }
        RA(kernel == SM90 ? ra_softmax_sm90_launch(&launch, stream)
                          : ra_softmax_cuda_launch(&launch, stream));
        CUDA(cudaStreamSynchronize(stream));
        ra_softmax_tiles_destroy(tiles);
    }
    CUDA(cudaStreamDestroy(stream));
    result_t result;
    result.lse = lse.get();
    if (f32_out) {
        result.out = out32.get();
    } else {
        for (__nv_bfloat16 x : out16.get())
            result.out.push_back(__bfloat162float(x));
    }
    result.m = m.get();
    result.l = l.get();
    result.o = o.get();
    return result;
}

bool same_bits(const std::vector<float> &a, const std::vector<float> &b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct truth_t {
    std::vector<int64_t> rows;
    std::vector<int32_t> row_group;
    std::vector<double> out, lse;
};

truth_t oracle(const case_t &c, const inputs_t &in)
{
    truth_t truth;
    truth.row_group.assign(c.rows, -1);
    for (size_t g = 0; g < c.groups.size(); g++)
        for (int64_t r = 0; r < c.groups[g].row_count; r++)
            truth.row_group[c.groups[g].row_begin + r] = (int32_t)g;
    const int64_t step = std::max<int64_t>(1, c.rows / 300);
    for (int64_t r = 0; r < c.rows; r++)
        if (truth.row_group[r] >= 0 && (r % step == 0 || r + 3 > c.rows || r % 128 > 125))
            truth.rows.push_back(r);
    device_t<int64_t> lo(c.rows), hi(c.rows), pos(c.keys), rows(truth.rows.size());
    device_t<int32_t> row_group(c.rows);
    device_t<ra_row_group_t> groups(c.groups.size());
    device_t<ra_key_span_t> spans(c.spans.size());
    device_t<double> out(truth.rows.size() * c.heads * c.head_dim);
    device_t<double> lse(truth.rows.size() * c.heads);
    lo.put(c.row_lo.data());
    hi.put(c.row_hi.data());
    pos.put(c.key_pos.data());
    rows.put(truth.rows.data());
    row_group.put(truth.row_group.data());
    groups.put(c.groups.data());
    spans.put(c.spans.data());
    oracle_t t = {in.q.data,
                  in.k.data,
                  in.v.data,
                  lo.data,
                  hi.data,
                  pos.data,
                  rows.data,
                  row_group.data,
                  groups.data,
                  spans.data,
                  c.key_score.empty() ? nullptr : in.key_score.data,
                  c.row_threshold.empty() ? nullptr : in.row_threshold.data,
                  c.key_bias.empty() ? nullptr : in.key_bias.data,
                  c.rows,
                  c.keys,
                  c.heads,
                  c.kv_heads,
                  c.head_dim,
                  c.scale != 0.0 ? (double)(float)c.scale
                                 : (double)(float)(1.0 / sqrt((double)c.head_dim)),
                  out.data,
                  lse.data};
    oracle_kernel<<<dim3((unsigned)truth.rows.size(), c.heads), 256>>>(t);
    CUDA(cudaDeviceSynchronize());
    truth.out = out.get();
    truth.lse = lse.get();
    return truth;
}

/*
 * Relative L2 errors. bf16: p is rounded to 2^-9 (sm90), the answer once more. fp32: a few ulps a
 * sum; scores of 1000 are themselves off by 1e-4, and p with them.
 */
const double BF16_TOLERANCE = 3e-3, F32_TOLERANCE = 2e-6, LSE_TOLERANCE = 1e-6;

int compare(const case_t &c, const truth_t &truth, const result_t &got, double tolerance,
            const char *how)
{
    double error = 0.0, norm = 0.0, worst = 0.0, lse_worst = 0.0;
    int bad = 0;
    for (size_t i = 0; i < truth.rows.size(); i++)
        for (int h = 0; h < c.heads; h++) {
            const double want_lse = truth.lse[i * c.heads + h];
            const double lse = got.lse[(size_t)h * c.rows + truth.rows[i]];
            if (std::isinf(want_lse))
                bad += !(std::isinf(lse) && lse < 0);
            else
                lse_worst = std::fmax(lse_worst, std::isnan(lse) ? INFINITY
                                                                 : fabs(lse - want_lse) /
                                                                       (1.0 + fabs(want_lse)));
            for (int d = 0; d < c.head_dim; d++) {
                const double want = truth.out[(i * c.heads + h) * c.head_dim + d];
                const double x = got.out[((size_t)truth.rows[i] * c.heads + h) * c.head_dim + d];
                const double e = std::isnan(x) ? INFINITY : x - want;
                error += e * e;
                norm += want * want;
                worst = std::fmax(worst, fabs(e));
            }
        }
    for (int64_t r = 0; r < c.rows; r++)
        if (truth.row_group[r] < 0)
            for (int i = 0; i < c.heads * c.head_dim; i++)
                bad += !std::isnan(got.out[(size_t)r * c.heads * c.head_dim + i]);
    const double relative = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
    const bool ok = relative <= tolerance && lse_worst <= LSE_TOLERANCE && bad == 0;
    printf("%s %-32s d%-3d R%-5lld J%-5lld H%d/%d %-22s out %.2e max %.2e lse %.1e%s\n",
           ok ? "ok  " : "FAIL", c.name.c_str(), c.head_dim, (long long)c.rows, (long long)c.keys,
           c.heads, c.kv_heads, how, relative, worst, lse_worst, bad ? " STRAY WRITES" : "");
    fflush(stdout);
    return ok ? 0 : 1;
}

int verdict(bool ok, const case_t &c, const char *what)
{
    printf("%s %-32s d%-3d R%-5lld %s\n", ok ? "ok  " : "FAIL", c.name.c_str(), c.head_dim,
           (long long)c.rows, what);
    fflush(stdout);
    return ok ? 0 : 1;
}

int check_case(const case_t &c, kernel_choice kernel)
{
    inputs_t in(c);
    truth_t truth = oracle(c, in);
    const bool f32 = kernel == CUDA_F32;
    const double tolerance = !f32 ? BF16_TOLERANCE : c.spread > 1.0f ? 1e-3 : F32_TOLERANCE;
    int failed = 0;
    result_t once = run(c, in, kernel, 1, 1, f32, false);
    failed += compare(c, truth, once, tolerance,
                      (std::string(kernel_names[kernel]) + ", one call").c_str());
    for (int calls = 2; calls <= 5 && calls <= c.keys; calls++) {
        std::string how = kernel_names[kernel] + (", " + std::to_string(calls)) + " calls";
        failed += compare(c, truth, run(c, in, kernel, calls, calls & 1, f32 || calls == 3, false),
                          tolerance, how.c_str());
    }
    bool equal = true;
    for (int i = 0; i < 5; i++)
        equal = equal && same_bits(run(c, in, kernel, 1, 1, f32, false).out, once.out);
    failed += verdict(equal, c, "repeats are bit-equal");
    if (c.spans.size() > 5) {
        result_t whole = run(c, in, kernel, 1, 0, true, true);
        for (int calls = 2; calls <= 5; calls++) {
            result_t parts = run(c, in, kernel, calls, 0, true, true);
            equal = same_bits(parts.m, whole.m) && same_bits(parts.l, whole.l) &&
                    same_bits(parts.o, whole.o);
            failed += verdict(equal, c, "state does not depend on the number of calls");
        }
    }
    return failed;
}

std::vector<case_t> all_cases(int d)
{
    std::vector<case_t> cases;
    for (int64_t n : {1, 7, 64, 129, 1000, 2065})
        cases.push_back(causal(n, d));
    cases.push_back(full(1, 1, d));
    cases.push_back(full(130, 777, d));
    cases.push_back(full(700, 3, d));
    cases.push_back(causal(1500, d, 100));
    cases.back().name = "window 100";
    cases.push_back(causal(1500, d, 700));
    cases.back().name = "window 700";
    cases.push_back(packed(3000, d, 5, true));
    cases.push_back(packed(3000, d, 6, false));
    cases.push_back(zigzag(200, d));
    cases.push_back(zigzag(256, d));
    cases.push_back(striped(900, d));
    cases.push_back(by_tiles(2000, 256, d));
    cases.push_back(by_tiles(700, 16, d));
    cases.push_back(causal(900, d));
    cases.back().name = "scores to +-1000";
    cases.back().spread = 6.0f;
    cases.back().scale = 1.0;
    cases.push_back(causal(513, d));
    cases.back().name = "H 6/1, small scale";
    cases.back().heads = 6;
    cases.back().kv_heads = 1;
    cases.back().scale = 1e-3;
    cases.push_back(causal(300, d));
    cases.back().name = "a key head a head";
    cases.back().heads = cases.back().kv_heads = 3;
    return cases;
}

/* One of each kind, for the sanitizers. */
std::vector<case_t> few_cases(int d)
{
    return {causal(129, d), packed(300, d, 5, true), zigzag(40, d), striped(200, d),
            by_tiles(300, 32, d)};
}

int check(bool small)
{
    int failed = 0;
    for (int d : {128, 64})
        for (const case_t &c : small ? few_cases(d) : all_cases(d))
            failed += check_case(c, SM90);
    for (int d : {80, 256, 128, 64, 32, 7}) {
        std::vector<case_t> cases = few_cases(d);
        if (d == 128)
            cases = all_cases(d);
        if (small) /* ordinary shared memory: racecheck takes its time */
            cases = {causal(20, d)};
        cases.push_back(scored(small ? 40 : 300, d));
        if (small && d != 80)
            continue;
        for (const case_t &c : cases)
            for (kernel_choice kernel : {CUDA_BF16, CUDA_F32})
                failed += check_case(c, kernel);
    }
    printf("%s\n", failed ? "CHECK FAILED" : "check passed");
    return failed ? 1 : 0;
}

/* The same inputs @a times over: any difference is a race. */
int soak(int times)
{
    int failed = 0;
    for (int d : {128, 64}) {
        case_t c = packed(20000, d, 9, true);
        inputs_t in(c);
        const result_t first = run(c, in, SM90, 3, 1, false, false);
        bool equal = true;
        for (int i = 1; i < times; i++) {
            const result_t again = run(c, in, SM90, 3, 1, false, false);
            equal = equal && same_bits(again.out, first.out) && same_bits(again.lse, first.lse);
        }
        failed += verdict(equal, c, (std::to_string(times) + " repeats are bit-equal").c_str());
    }
    return failed;
}

} // namespace

int main(int argc, char **argv)
{
    if (argc > 1 && std::string(argv[1]) == "soak")
        return soak(argc > 2 ? atoi(argv[2]) : 100) ? 1 : 0;
    return check(argc > 1 && std::string(argv[1]) == "small");
}
