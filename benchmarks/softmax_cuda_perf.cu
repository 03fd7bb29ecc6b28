/*
 * softmax_cuda_perf check|soak|time|packed|ring (usage() has the arguments)
 *
 * check: the Hopper softmax kernel against a double-precision oracle over a list of masks and
 * shapes, outputs and states poisoned, keys folded in one call and in several; repeats and split
 * calls must agree to the bit where the contract says so. time: causal bf16 forward, medians.
 * Built as a shared library too: softmax_cuda_pairs.py times it against torch in one process.
 */
extern "C" { /* C headers without a C++ guard of their own */
#include "base/status.h"
}
#include "attention/softmax_cuda.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <random>
#include <string>
#include <vector>

namespace
{

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error_));        \
            exit(6);                                                                               \
        }                                                                                          \
    } while (0)

#define RA(call)                                                                                   \
    do {                                                                                           \
        if ((call) != RA_OK)                                                                       \
            exit(6);                                                                               \
    } while (0)

template <class T> struct device_t {
    T *data = nullptr;
    size_t count;
    explicit device_t(size_t n) : count(n)
    {
        CUDA(cudaMalloc(&data, (n ? n : 1) * sizeof(T)));
        CUDA(cudaMemset(data, 0xFF, (n ? n : 1) * sizeof(T))); /* 0xFF..: NaN in every type */
    }
    device_t(const device_t &) = delete;
    ~device_t()
    {
        cudaFree(data);
    }
    void put(const void *host)
    {
        CUDA(cudaMemcpy(data, host, count * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() const
    {
        std::vector<T> host(count);
        CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
    void poison()
    {
        CUDA(cudaMemset(data, 0xFF, count * sizeof(T)));
    }
};

__global__ void fill_normal(__nv_bfloat16 *x, int64_t n, uint32_t seed, float spread)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t z = ((uint64_t)seed << 40) + (uint64_t)i * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        float u = ((uint32_t)(z >> 40) + 1) * 0x1p-24f, v = (uint32_t)(z & 0xFFFFFF) * 0x1p-24f;
        x[i] = __float2bfloat16(spread * sqrtf(-2.0f * __logf(u)) * __cosf(6.2831853f * v));
    }
}

void fill(device_t<__nv_bfloat16> &x, uint32_t seed, float spread = 1.0f)
{
    fill_normal<<<1024, 256>>>(x.data, (int64_t)x.count, seed, spread);
    CUDA(cudaGetLastError());
}

/* ---- oracle -------------------------------------------------------------------------------- */

struct oracle_t {
    const __nv_bfloat16 *q, *k, *v;
    const int64_t *row_lo, *row_hi, *key_pos, *rows;
    const int32_t *row_group;
    const ra_row_group_t *groups;
    const ra_key_span_t *spans;
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

/* One block a (listed row, head); 128 threads; scores are computed twice. */
__global__ void oracle_kernel(oracle_t t)
{
    __shared__ double scratch[128], q[128], o[128];
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
                double score = -INFINITY;
                if (seen) {
                    double dot = 0.0;
                    for (int i = 0; i < d; i++)
                        dot +=
                            q[i] * (double)__bfloat162float(t.k[(key * t.kv_heads + kv) * d + i]);
                    score = dot * t.scale;
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

/* ---- cases --------------------------------------------------------------------------------- */

struct case_t {
    std::string name;
    int64_t rows = 0, keys = 0;
    int heads = 4, kv_heads = 2, head_dim = 128;
    double scale = 0.0; /* 0: 1 / sqrt(head_dim) */
    float spread = 1.0f;
    std::vector<int64_t> row_lo, row_hi, key_pos;
    std::vector<ra_row_group_t> groups;
    std::vector<ra_key_span_t> spans;
};

void positions(case_t &c, int64_t first = 0, int64_t stride = 1)
{
    c.key_pos.resize(c.keys);
    for (int64_t j = 0; j < c.keys; j++)
        c.key_pos[j] = first + j * stride;
}

void one_group(case_t &c)
{
    c.spans = {{0, c.keys}};
    c.groups = {{0, c.rows, 0, 1}};
}

case_t causal(int64_t n, int head_dim, int64_t window = INT64_MAX / 2)
{
    case_t c;
    c.name = "causal";
    c.rows = c.keys = n;
    c.head_dim = head_dim;
    positions(c);
    one_group(c);
    for (int64_t r = 0; r < n; r++) {
        c.row_lo.push_back(std::max<int64_t>(0, r - window + 1));
        c.row_hi.push_back(r + 1);
    }
    return c;
}

case_t full(int64_t rows, int64_t keys, int head_dim)
{
    case_t c;
    c.name = "full";
    c.rows = rows;
    c.keys = keys;
    c.head_dim = head_dim;
    positions(c);
    one_group(c);
    c.row_lo.assign(rows, 0);
    c.row_hi.assign(rows, keys);
    return c;
}

case_t packed(int64_t n, int head_dim, uint32_t seed, bool one_span)
{
    case_t c;
    c.name = one_span ? "packed" : "packed, a group a document";
    c.rows = c.keys = n;
    c.head_dim = head_dim;
    positions(c);
    std::mt19937 random(seed);
    for (int64_t begin = 0; begin < n;) {
        int64_t length = std::min<int64_t>(n - begin, 1 << (random() % 11));
        length = std::min<int64_t>(n - begin, length + random() % length);
        for (int64_t r = begin; r < begin + length; r++) {
            c.row_lo.push_back(begin);
            c.row_hi.push_back(r + 1);
        }
        c.groups.push_back({begin, length, (int64_t)c.spans.size(), 1});
        c.spans.push_back({begin, length});
        begin += length;
    }
    if (one_span)
        one_group(c);
    return c;
}

/* Rows of rank 1 of 4 in a zigzag of tiles, keys in the order they would arrive. */
case_t zigzag(int64_t chunk, int head_dim)
{
    case_t c;
    c.name = "zigzag rank";
    c.head_dim = head_dim;
    const int mine[2] = {1, 6}, order[8] = {1, 6, 0, 7, 3, 4, 2, 5};
    c.rows = 2 * chunk;
    c.keys = 8 * chunk;
    for (int piece : mine)
        for (int64_t i = 0; i < chunk; i++) {
            c.row_lo.push_back(0);
            c.row_hi.push_back(piece * chunk + i + 1);
        }
    for (int piece : order) {
        c.spans.push_back({(int64_t)c.key_pos.size(), chunk});
        for (int64_t i = 0; i < chunk; i++)
            c.key_pos.push_back(piece * chunk + i);
    }
    c.groups = {{0, chunk, 0, 8}, {chunk, chunk, 0, 8}};
    return c;
}

/* Every third position is held; some rows see nothing, some are in no group. */
case_t striped(int64_t n, int head_dim)
{
    case_t c = causal(n, head_dim);
    c.name = "striped, empty and absent rows";
    positions(c, 1, 3);
    for (int64_t r = 0; r < n; r++) {
        c.row_lo[r] = r % 7 == 3 ? r : r / 2;
        c.row_hi[r] = r % 7 == 3 ? r : 3 * r;
    }
    c.groups = {{5, n / 2, 0, 1}, {n / 2 + 9, n / 4, 0, 1}, {n / 2 + 9 + n / 4, 3, 0, 0}};
    return c;
}

case_t by_tiles(int64_t n, int64_t tile, int head_dim)
{
    case_t c = causal(n, head_dim);
    c.name = "spans of tiles";
    c.spans.clear();
    c.groups.clear();
    for (int64_t begin = 0; begin < n; begin += tile)
        c.spans.push_back({begin, std::min(tile, n - begin)});
    for (int64_t begin = 0; begin < n; begin += tile)
        c.groups.push_back({begin, std::min(tile, n - begin), 0, (int64_t)c.spans.size()});
    return c;
}

/* ---- running ------------------------------------------------------------------------------- */

struct result_t {
    std::vector<float> out, lse, m, l, o;
};

struct inputs_t {
    device_t<__nv_bfloat16> q, k, v;
    explicit inputs_t(const case_t &c)
        : q(c.rows * c.heads * c.head_dim), k(c.keys * c.kv_heads * c.head_dim),
          v(c.keys * c.kv_heads * c.head_dim)
    {
        static uint32_t seed = 1;
        fill(q, seed++, c.spread);
        fill(k, seed++, c.spread);
        fill(v, seed++);
    }
};

/* Fold the keys in @a calls blocks cut at span borders where the case has more spans than calls. */
result_t run(const case_t &c, const inputs_t &in, int calls, int merge, int variant, bool f32_out,
             bool want_state)
{
    const size_t elements = (size_t)c.rows * c.heads * c.head_dim, lines = (size_t)c.rows * c.heads;
    device_t<float> m(lines), l(lines), o(elements), lse(lines), out32(elements);
    device_t<__nv_bfloat16> out16(elements);
    ra_softmax_state_t state = {m.data, l.data, o.data, (int64_t)c.heads * c.head_dim};
    cudaStream_t stream;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int32_t bm, bn;
    RA(ra_softmax_sm90_tile(c.head_dim, variant, &bm, &bn));
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
        block.dtype = RA_BF16;
        block.q = in.q.data;
        block.k = in.k.data + begin * c.kv_heads * c.head_dim;
        block.v = in.v.data + begin * c.kv_heads * c.head_dim;
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
        RA(ra_softmax_sm90_launch(&launch, variant, stream));
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
                  c.heads,
                  c.kv_heads,
                  c.head_dim,
                  c.scale != 0.0 ? (double)(float)c.scale
                                 : (double)(float)(1.0 / sqrt((double)c.head_dim)),
                  out.data,
                  lse.data};
    oracle_kernel<<<dim3((unsigned)truth.rows.size(), c.heads), 128>>>(t);
    CUDA(cudaDeviceSynchronize());
    truth.out = out.get();
    truth.lse = lse.get();
    return truth;
}

/* Relative L2 error of a bf16 answer: p is rounded to 2^-9, the answer once more. */
const double OUT_TOLERANCE = 3e-3, LSE_TOLERANCE = 1e-4;

int compare(const case_t &c, const truth_t &truth, const result_t &got, const char *how)
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
    const bool ok = relative <= OUT_TOLERANCE && lse_worst <= LSE_TOLERANCE && bad == 0;
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

int check_case(const case_t &c, int variant)
{
    inputs_t in(c);
    truth_t truth = oracle(c, in);
    int failed = 0;
    result_t once = run(c, in, 1, 1, variant, false, false);
    failed += compare(c, truth, once, "one call, merged");
    for (int calls = 2; calls <= 5 && calls <= c.keys; calls++) {
        std::string how = std::to_string(calls) + " calls";
        failed += compare(c, truth, run(c, in, calls, calls & 1, variant, calls == 3, false),
                          how.c_str());
    }
    bool equal = true;
    for (int i = 0; i < 5; i++)
        equal = equal && same_bits(run(c, in, 1, 1, variant, false, false).out, once.out);
    failed += verdict(equal, c, "repeats are bit-equal");
    if (c.spans.size() > 5) {
        result_t whole = run(c, in, 1, 0, variant, true, true);
        for (int calls = 2; calls <= 5; calls++) {
            result_t parts = run(c, in, calls, 0, variant, true, true);
            equal = same_bits(parts.m, whole.m) && same_bits(parts.l, whole.l) &&
                    same_bits(parts.o, whole.o);
            failed += verdict(equal, c, "state does not depend on the number of calls");
        }
    }
    return failed;
}

int check(int variant128, int variant64)
{
    int failed = 0;
    for (int d : {128, 64}) {
        const int variant = d == 128 ? variant128 : variant64;
        if (variant < 0)
            continue;
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
        for (const case_t &c : cases)
            failed += check_case(c, variant);
    }
    printf("%s\n", failed ? "CHECK FAILED" : "check passed");
    return failed ? 1 : 0;
}

/* ---- timing -------------------------------------------------------------------------------- */

struct bench_t {
    ra_softmax_block_t block = {};
    ra_softmax_tiles_t *tiles = nullptr;
    unsigned char *list = nullptr;
    int variant = 0;
};

const int HEADS = 32, KV_HEADS = 8; /* of every timing below */

/* A tile list for @a c, on the device; rows are heads x head_dim apart. */
bench_t *open_bench(const case_t &c, int heads, int kv_heads, int variant)
{
    bench_t *bench = new bench_t;
    ra_softmax_block_t &block = bench->block;
    block.rows = c.rows;
    block.keys = c.keys;
    block.heads = heads;
    block.kv_heads = kv_heads;
    block.head_dim = c.head_dim;
    block.scale = 1.0f / sqrtf((float)c.head_dim);
    block.dtype = RA_BF16;
    block.q_stride = (int64_t)heads * c.head_dim;
    block.k_stride = block.v_stride = (int64_t)kv_heads * c.head_dim;
    block.mask.row_lo = c.row_lo.data();
    block.mask.row_hi = c.row_hi.data();
    block.mask.key_pos = c.key_pos.data();
    block.groups = c.groups.data();
    block.group_count = (int64_t)c.groups.size();
    block.spans = c.spans.data();
    int32_t bm, bn;
    if (ra_softmax_sm90_tile(c.head_dim, variant, &bm, &bn) != RA_OK ||
        ra_softmax_tiles_create(&block, bm, bn, 1, &bench->tiles) != RA_OK) {
        delete bench;
        return nullptr;
    }
    const int64_t bytes = ra_softmax_tiles_layout(bench->tiles)->bytes;
    CUDA(cudaMalloc(&bench->list, bytes));
    CUDA(cudaMemcpy(bench->list, ra_softmax_tiles_data(bench->tiles), bytes,
                    cudaMemcpyHostToDevice));
    bench->variant = variant;
    return bench;
}

} // namespace

extern "C" {

/** A causal (or full) forward over @a tokens of every head, q, k, v as [tokens, heads, head_dim].
 */
void *softmax_bench_open(int64_t tokens, int heads, int kv_heads, int head_dim, int is_causal,
                         int variant)
{
    return open_bench(is_causal ? causal(tokens, head_dim) : full(tokens, tokens, head_dim), heads,
                      kv_heads, variant);
}

int softmax_bench_launch(void *handle, const void *q, const void *k, const void *v, void *out,
                         float *lse, void *stream)
{
    bench_t *bench = static_cast<bench_t *>(handle);
    bench->block.q = q;
    bench->block.k = k;
    bench->block.v = v;
    ra_softmax_cuda_call_t call = {};
    call.block = &bench->block;
    call.layout = ra_softmax_tiles_layout(bench->tiles);
    call.tiles = bench->list;
    call.fresh = 1;
    call.out = out;
    call.out_dtype = RA_BF16;
    call.out_stride = bench->block.q_stride;
    call.lse = lse;
    return ra_softmax_sm90_launch(&call, bench->variant, (struct CUstream_st *)stream);
}

void softmax_bench_close(void *handle)
{
    bench_t *bench = static_cast<bench_t *>(handle);
    cudaFree(bench->list);
    ra_softmax_tiles_destroy(bench->tiles);
    delete bench;
}
}

namespace
{

struct stopwatch_t {
    cudaStream_t stream;
    cudaEvent_t begin, end;
    stopwatch_t()
    {
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
        CUDA(cudaDeviceSynchronize());
    }
    template <class F> float ms(F work)
    {
        float t;
        CUDA(cudaEventRecord(begin, stream));
        work();
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&t, begin, end));
        return t;
    }
};

struct tensors_t {
    device_t<__nv_bfloat16> q, k, v, out;
    device_t<float> lse;
    tensors_t(int64_t rows, int64_t keys, int d)
        : q(rows * HEADS * d), k(keys * KV_HEADS * d), v(keys * KV_HEADS * d),
          out(rows * HEADS * d), lse(rows * HEADS)
    {
        fill(q, 11);
        fill(k, 12);
        fill(v, 13);
    }
};

double median(std::vector<float> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

int repeats_of(double flop)
{
    return flop > 5e13 ? 5 : flop > 5e12 ? 11 : 31;
}

/* The named variants in turn, so that they share the clock's and the power limit's moods. */
void time_variants(int64_t tokens, int d, const std::vector<int> &variants)
{
    tensors_t x(tokens, tokens, d);
    stopwatch_t timer;
    std::vector<void *> benches;
    for (int variant : variants)
        benches.push_back(softmax_bench_open(tokens, HEADS, KV_HEADS, d, 1, variant));
    const double flop = 2.0 * tokens * tokens * d * HEADS;
    std::vector<std::vector<float>> ms(variants.size());
    for (int i = -2; i < repeats_of(flop); i++)
        for (size_t v = 0; v < variants.size(); v++) {
            float t = timer.ms([&] {
                RA((ra_status_t)softmax_bench_launch(benches[v], x.q.data, x.k.data, x.v.data,
                                                     x.out.data, x.lse.data, timer.stream));
            });
            if (i >= 0)
                ms[v].push_back(t);
        }
    for (size_t v = 0; v < variants.size(); v++) {
        const double t = median(ms[v]);
        printf(
            "causal d%-3d tokens %-7lld variant %d %10.3f ms %7.1f TFLOP/s (min %.3f max %.3f)\n",
            d, (long long)tokens, variants[v], t, flop / t * 1e-9,
            *std::min_element(ms[v].begin(), ms[v].end()),
            *std::max_element(ms[v].begin(), ms[v].end()));
        softmax_bench_close(benches[v]);
    }
    fflush(stdout);
}

/* Documents of log-uniform length in 1k..64k, @a tokens in all. */
void time_packed(int64_t tokens, int d, int variant)
{
    case_t c;
    c.name = "packed";
    c.rows = c.keys = tokens;
    c.head_dim = d;
    positions(c);
    std::mt19937 random(2026);
    double flop = 0.0;
    for (int64_t begin = 0; begin < tokens;) {
        const double u = (random() >> 8) * 0x1p-24;
        const int64_t length = std::min(tokens - begin, (int64_t)(1024.0 * exp2(6.0 * u)));
        for (int64_t r = begin; r < begin + length; r++) {
            c.row_lo.push_back(begin);
            c.row_hi.push_back(r + 1);
        }
        c.groups.push_back({begin, length, (int64_t)c.spans.size(), 1});
        c.spans.push_back({begin, length});
        flop += 2.0 * length * length * d * HEADS;
        begin += length;
    }
    tensors_t x(tokens, tokens, d);
    stopwatch_t timer;
    bench_t *bench = open_bench(c, HEADS, KV_HEADS, variant);
    std::vector<float> ms;
    for (int i = -2; i < 7; i++) {
        float t = timer.ms([&] {
            RA((ra_status_t)softmax_bench_launch(bench, x.q.data, x.k.data, x.v.data, x.out.data,
                                                 x.lse.data, timer.stream));
        });
        if (i >= 0)
            ms.push_back(t);
    }
    printf("packed d%-3d tokens %-7lld documents %zu %10.3f ms %7.1f TFLOP/s\n", d,
           (long long)tokens, c.groups.size(), median(ms), flop / median(ms) * 1e-9);
    fflush(stdout);
    softmax_bench_close(bench);
}

/*
 * What one rank of a zigzag ring of two computes, transfers left out: its own keys, then the
 * other's, in two calls with the state carried through memory, and in one call.
 */
void time_ring(int64_t tokens, int d, int rank, int variant)
{
    const int64_t chunk = tokens / 4;
    const int mine[2] = {rank, 3 - rank}, order[4] = {rank, 3 - rank, 1 - rank, 2 + rank};
    case_t whole, step[2];
    for (case_t *c : {&whole, &step[0], &step[1]}) {
        c->head_dim = d;
        c->rows = 2 * chunk;
        for (int piece : mine)
            for (int64_t i = 0; i < chunk; i++) {
                c->row_lo.push_back(0);
                c->row_hi.push_back(piece * chunk + i + 1);
            }
        const int first = c == &step[1] ? 2 : 0, pieces = c == &whole ? 4 : 2;
        for (int piece = first; piece < first + pieces; piece++) {
            c->spans.push_back({(int64_t)c->key_pos.size(), chunk});
            for (int64_t i = 0; i < chunk; i++)
                c->key_pos.push_back(order[piece] * chunk + i);
        }
        c->keys = (int64_t)c->key_pos.size();
        c->groups = {{0, chunk, 0, pieces}, {chunk, chunk, 0, pieces}};
    }
    tensors_t x(2 * chunk, 4 * chunk, d);
    device_t<float> m(2 * chunk * HEADS), l(m.count), o(x.q.count);
    ra_softmax_state_t state = {m.data, l.data, o.data, (int64_t)HEADS * d};
    stopwatch_t timer;
    bench_t *one = open_bench(whole, HEADS, KV_HEADS, variant);
    bench_t *two[2] = {open_bench(step[0], HEADS, KV_HEADS, variant),
                       open_bench(step[1], HEADS, KV_HEADS, variant)};
    std::vector<float> ms_one, ms_two;
    const double flop = (double)tokens * tokens * d * HEADS;
    for (int i = -2; i < repeats_of(flop); i++) {
        float t1 = timer.ms([&] {
            RA((ra_status_t)softmax_bench_launch(one, x.q.data, x.k.data, x.v.data, x.out.data,
                                                 x.lse.data, timer.stream));
        });
        float t2 = timer.ms([&] {
            for (int call = 0; call < 2; call++) {
                bench_t *bench = two[call];
                const int64_t skip = call * 2 * chunk * KV_HEADS * d;
                bench->block.q = x.q.data;
                bench->block.k = x.k.data + skip;
                bench->block.v = x.v.data + skip;
                ra_softmax_cuda_call_t launch = {};
                launch.block = &bench->block;
                launch.layout = ra_softmax_tiles_layout(bench->tiles);
                launch.tiles = bench->list;
                launch.state = &state;
                launch.fresh = call == 0;
                if (call == 1) {
                    launch.out = x.out.data;
                    launch.out_dtype = RA_BF16;
                    launch.out_stride = bench->block.q_stride;
                    launch.lse = x.lse.data;
                }
                RA(ra_softmax_sm90_launch(&launch, variant, timer.stream));
            }
        });
        if (i >= 0) {
            ms_one.push_back(t1);
            ms_two.push_back(t2);
        }
    }
    printf("ring d%-3d tokens %-7lld rank %d of 2: one call %10.3f ms %7.1f TFLOP/s, carried "
           "%10.3f ms %7.1f TFLOP/s\n",
           d, (long long)tokens, rank, median(ms_one), flop / median(ms_one) * 1e-9, median(ms_two),
           flop / median(ms_two) * 1e-9);
    fflush(stdout);
    for (bench_t *bench : {one, two[0], two[1]})
        softmax_bench_close(bench);
}

/* The same inputs @a times over: any difference is a race. */
int soak(int times, int variant)
{
    int failed = 0;
    for (int d : {128, 64}) {
        case_t c = packed(20000, d, 9, true);
        inputs_t in(c);
        const result_t first = run(c, in, 3, 1, variant, false, false);
        bool equal = true;
        for (int i = 1; i < times; i++) {
            const result_t again = run(c, in, 3, 1, variant, false, false);
            equal = equal && same_bits(again.out, first.out) && same_bits(again.lse, first.lse);
        }
        failed += verdict(equal, c, (std::to_string(times) + " repeats are bit-equal").c_str());
    }
    return failed;
}

int usage()
{
    fprintf(stderr, "usage: softmax_cuda_perf check [VARIANT128 [VARIANT64]] | soak [TIMES] |\n"
                    "       time [HEAD_DIM TOKENS VARIANT...] | packed | ring\n");
    return 2;
}

} // namespace

int main(int argc, char **argv)
{
    const std::string what = argc > 1 ? argv[1] : "";
    auto number = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
    if (what == "check")
        return check(number(2, 0), number(3, 0));
    if (what == "soak")
        return soak(number(2, 100), 0) ? 1 : 0;
    if (what == "time" && argc > 4) {
        std::vector<int> variants;
        for (int i = 4; i < argc; i++)
            variants.push_back(atoi(argv[i]));
        time_variants(number(3, 0), number(2, 0), variants);
    } else if (what == "time") {
        for (int64_t tokens : {8192, 16384, 32768, 65536, 131072})
            time_variants(tokens, 128, {0});
        for (int64_t tokens : {16384, 65536})
            time_variants(tokens, 64, {0});
    } else if (what == "packed") {
        for (int d : {128, 64})
            time_packed(524288, d, 0);
    } else if (what == "ring") {
        for (int64_t tokens : {16384, 32768, 65536, 131072})
            for (int rank : {0, 1})
                time_ring(tokens, 128, rank, 0);
    } else {
        return usage();
    }
    return 0;
}
