/*
 * linear_cuda_perf time | parts | packed | check | once
 *
 * The Hopper linear attention kernel, bf16, q, k, v in one [rows, 3 H D] buffer, medians of event
 * times. time: one segment of 1,048,576 tokens. parts: the same for several part lengths. packed:
 * documents of log-uniform length. check: against the complete kernel. once [128|64]: one call of
 * 262,144 tokens, 32 heads of 128 or 16 of 64, for a profiler. GB/s counts q, k, v read and
 * o written once; tails read twice and states do not count.
 */
#include "attention/linear_cuda.h"
#include "benchmarks/cuda_support.cuh"
#include <cmath>
#include <cstring>
#include <random>

namespace
{

enum decay_t { LIGHTNING, SLOW, NONE };
const char *const decay_name[] = {"lightning", "slow", "none"};

std::vector<float> decays(int heads, decay_t kind)
{
    std::vector<float> g(heads);
    for (int h = 0; h < heads; h++) /* of MiniMax-01's first layer and of one near its last */
        g[h] =
            kind == NONE ? 0.0f : -exp2f(-8.0f * (h + 1) / heads) * (kind == SLOW ? 1e-3f : 1.0f);
    return g;
}

struct problem_t {
    device_t<__nv_bfloat16> in, out;
    std::vector<float> g;
    std::vector<ra_linear_segment_t> segments;
    ra_linear_args_t args = {};

    problem_t(int64_t rows, int heads, int dim, decay_t kind)
        : in((size_t)rows * 3 * heads * dim), out((size_t)rows * heads * dim),
          g(decays(heads, kind))
    {
        fill(in, 7);
        const int64_t width = (int64_t)heads * dim;
        args.heads = heads;
        args.key_dim = args.value_dim = dim;
        args.dtype = RA_BF16;
        args.scale = 1.0f / sqrtf((float)dim);
        args.q = in.data;
        args.k = in.data + width;
        args.v = in.data + 2 * width;
        args.q_stride = args.k_stride = args.v_stride = 3 * width;
        args.log_decay = g.data();
        args.o = out.data;
        args.o_stride = width;
        segments.push_back({0, rows, nullptr, nullptr});
        set_segments();
    }
    void set_segments()
    {
        args.segments = segments.data();
        args.segment_count = (int64_t)segments.size();
    }
    double bytes() const
    {
        double rows = 0;
        for (const ra_linear_segment_t &s : segments)
            rows += (double)s.row_count;
        return rows * args.heads * args.key_dim * 8;
    }
};

double time_launch(stopwatch_t &timer, const ra_linear_args_t &args, bool state_only,
                   int64_t part_rows)
{
    std::vector<float> ms;
    for (int i = -2; i < 11; i++) {
        const float t = timer.ms(
            [&] { RA(ra_linear_sm90_launch(&args, state_only, part_rows, timer.stream)); });
        if (i >= 0)
            ms.push_back(t);
    }
    return median(ms);
}

void time_copy(stopwatch_t &timer)
{
    device_t<unsigned char> from((size_t)4 << 30), to((size_t)4 << 30);
    std::vector<float> ms;
    for (int i = 0; i < 7; i++)
        ms.push_back(timer.ms([&] {
            CUDA(cudaMemcpyAsync(to.data, from.data, from.count, cudaMemcpyDeviceToDevice,
                                 timer.stream));
        }));
    printf("copy %.0f GB/s read and written\n", 2e-6 * from.count / median(ms));
}

void time_one(stopwatch_t &timer, int heads, int dim, decay_t kind)
{
    const int64_t rows = 1 << 20;
    problem_t x(rows, heads, dim, kind);
    device_t<float> state((size_t)heads * dim * dim);
    const double ms = time_launch(timer, x.args, false, 0);
    ra_linear_args_t on_v = x.args;
    on_v.o = (void *)x.args.v;
    on_v.o_stride = x.args.v_stride;
    x.segments[0].state_out = state.data;
    const double summarise = time_launch(timer, x.args, true, 0);
    const double aliased = time_launch(timer, on_v, false, 0);
    printf("%2d heads of %3d, decay %-9s %8.3f ms %5.0f GB/s; o on v %8.3f ms; state only %7.3f "
           "ms\n",
           heads, dim, decay_name[kind], ms, x.bytes() / ms * 1e-6, aliased, summarise);
    fflush(stdout);
}

void sweep_parts(stopwatch_t &timer, int64_t rows, int heads, int dim, decay_t kind)
{
    problem_t x(rows, heads, dim, kind);
    printf("%7lld rows, %2d heads of %3d, decay %-9s rows a part: ms ", (long long)rows, heads, dim,
           decay_name[kind]);
    printf(" chosen: %.3f", time_launch(timer, x.args, false, 0));
    for (int64_t part : {512, 1024, 2048, 4096, 8192, 16384, 31808, 65536, 131072, 262144})
        if (part <= rows && part * 64 >= rows)
            printf(" %lld: %.3f", (long long)part, time_launch(timer, x.args, false, part));
    printf("\n");
    fflush(stdout);
}

/* Documents of log-uniform length in @a least..@a most. */
void time_packed(stopwatch_t &timer, int heads, int dim, double least, double most)
{
    const int64_t rows = 1 << 20;
    problem_t x(rows, heads, dim, LIGHTNING);
    std::mt19937 random(2026);
    x.segments.clear();
    for (int64_t begin = 0; begin < rows;) {
        const double u = (random() >> 8) * 0x1p-24;
        const int64_t length =
            std::min(rows - begin, (int64_t)(least * exp2(log2(most / least) * u)));
        x.segments.push_back({begin, length, nullptr, nullptr});
        begin += length;
    }
    x.set_segments();
    const double ms = time_launch(timer, x.args, false, 0);
    printf("%2d heads of %3d, %zu documents of %.0f to %.0f: %.3f ms %5.0f GB/s\n", heads, dim,
           x.segments.size(), least, most, ms, x.bytes() / ms * 1e-6);
    fflush(stdout);
}

void check(int64_t rows, int heads, int dim, decay_t kind)
{
    problem_t x(rows, heads, dim, kind);
    device_t<__nv_bfloat16> want(x.out.count);
    device_t<float> state((size_t)heads * dim * dim), want_state(state.count);
    x.segments[0].state_out = state.data;
    RA(ra_linear_sm90_launch(&x.args, false, 0, nullptr));
    x.args.o = want.data;
    x.segments[0].state_out = want_state.data;
    RA(ra_linear_cuda_launch(&x.args, false, nullptr));
    CUDA(cudaDeviceSynchronize());
    const std::vector<__nv_bfloat16> a = x.out.get(), b = want.get();
    const std::vector<float> s = state.get(), t = want_state.get();
    double off = 0, all = 0, state_off = 0, state_all = 0;
    for (size_t i = 0; i < a.size(); i++) {
        const double w = __bfloat162float(b[i]), d = __bfloat162float(a[i]) - w;
        off += d * d;
        all += w * w;
    }
    for (size_t i = 0; i < s.size(); i++) {
        state_off += ((double)s[i] - t[i]) * ((double)s[i] - t[i]);
        state_all += (double)t[i] * t[i];
    }
    const double e = sqrt(off / all), f = sqrt(state_off / state_all);
    printf("%s %lld tokens, %d heads of %d, decay %s: relative L2 o %.2e state %.2e\n",
           e < 5e-3 && f < 3e-3 ? "ok  " : "FAIL", (long long)rows, heads, dim, decay_name[kind], e,
           f);
    if (!(e < 5e-3 && f < 3e-3))
        exit(1);
}

} // namespace

int main(int count, char **word)
{
    const char *what = count > 1 ? word[1] : "";
    if (strcmp(what, "check") == 0) {
        for (decay_t kind : {LIGHTNING, SLOW, NONE}) {
            check(20000, 32, 128, kind);
            check(20000, 16, 64, kind);
            check(9001, 3, 128, kind);
        }
        return 0;
    }
    stopwatch_t timer;
    if (strcmp(what, "time") == 0) {
        time_copy(timer);
        for (decay_t kind : {LIGHTNING, SLOW, NONE}) {
            time_one(timer, 32, 128, kind);
            time_one(timer, 16, 128, kind);
            time_one(timer, 16, 64, kind);
        }
    } else if (strcmp(what, "parts") == 0) {
        for (int64_t rows : {1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20}) {
            sweep_parts(timer, rows, 32, 128, LIGHTNING);
            sweep_parts(timer, rows, 16, 64, LIGHTNING);
        }
        sweep_parts(timer, 1 << 20, 32, 128, NONE);
    } else if (strcmp(what, "packed") == 0) {
        time_packed(timer, 32, 128, 1024, 65536);
        time_packed(timer, 32, 128, 64, 1024);
        time_packed(timer, 16, 64, 1024, 65536);
    } else if (strcmp(what, "once") == 0) {
        const int dim = count > 2 ? atoi(word[2]) : 128;
        problem_t x(1 << 18, dim == 128 ? 32 : 16, dim, LIGHTNING);
        RA(ra_linear_sm90_launch(&x.args, false, 0, timer.stream));
        CUDA(cudaDeviceSynchronize());
    } else {
        fprintf(stderr, "usage: linear_cuda_perf time|parts|packed|check|once\n");
        return 2;
    }
    return 0;
}
