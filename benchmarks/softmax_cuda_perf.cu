/*
 * softmax_cuda_perf time [HEAD_DIM TOKENS] | packed | ring
 *
 * The Hopper softmax kernel, bf16, 32 query heads over 8 key heads, medians of event times. time:
 * causal forward. packed: documents of log-uniform length. ring: what a rank of a ring of two
 * computes, transfers left out. Built as a shared library too: softmax_cuda_pairs.py times it
 * against torch in one process.
 */
#include "benchmarks/cuda_support.cuh"
#include "benchmarks/softmax_cuda_cases.cuh"
#include <cmath>

namespace
{

struct bench_t {
    ra_softmax_block_t block = {};
    ra_softmax_tiles_t *tiles = nullptr;
    unsigned char *list = nullptr;
};

const int HEADS = 32, KV_HEADS = 8; /* of every timing below */

/* A tile list for @a c, on the device; rows are heads x head_dim apart. */
bench_t *open_bench(const case_t &c, int heads, int kv_heads)
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
    if (ra_softmax_sm90_tile(c.head_dim, &bm, &bn) != RA_OK ||
        ra_softmax_tiles_create(&block, bm, bn, 1, &bench->tiles) != RA_OK) {
        delete bench;
        return nullptr;
    }
    const int64_t bytes = ra_softmax_tiles_layout(bench->tiles)->bytes;
    CUDA(cudaMalloc(&bench->list, bytes));
    CUDA(cudaMemcpy(bench->list, ra_softmax_tiles_data(bench->tiles), bytes,
                    cudaMemcpyHostToDevice));
    return bench;
}

} // namespace

extern "C" {

/** A causal (or full) forward over @a tokens of every head, q, k, v as [tokens, heads, head_dim].
 */
void *softmax_bench_open(int64_t tokens, int heads, int kv_heads, int head_dim, int is_causal)
{
    return open_bench(is_causal ? causal(tokens, head_dim) : full(tokens, tokens, head_dim), heads,
                      kv_heads);
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
    return ra_softmax_sm90_launch(&call, (struct CUstream_st *)stream);
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

int repeats_of(double flop)
{
    return flop > 5e13 ? 5 : flop > 5e12 ? 11 : 31;
}

void time_causal(int64_t tokens, int d)
{
    tensors_t x(tokens, tokens, d);
    stopwatch_t timer;
    void *bench = softmax_bench_open(tokens, HEADS, KV_HEADS, d, 1);
    const double flop = 2.0 * tokens * tokens * d * HEADS;
    std::vector<float> ms;
    for (int i = -2; i < repeats_of(flop); i++) {
        float t = timer.ms([&] {
            RA((ra_status_t)softmax_bench_launch(bench, x.q.data, x.k.data, x.v.data, x.out.data,
                                                 x.lse.data, timer.stream));
        });
        if (i >= 0)
            ms.push_back(t);
    }
    printf("causal d%-3d tokens %-7lld %10.3f ms %7.1f TFLOP/s\n", d, (long long)tokens, median(ms),
           flop / median(ms) * 1e-9);
    fflush(stdout);
    softmax_bench_close(bench);
}

/* Documents of log-uniform length in 1k..64k, @a tokens in all. */
void time_packed(int64_t tokens, int d)
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
    bench_t *bench = open_bench(c, HEADS, KV_HEADS);
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
void time_ring(int64_t tokens, int d, int rank)
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
    bench_t *one = open_bench(whole, HEADS, KV_HEADS);
    bench_t *two[2] = {open_bench(step[0], HEADS, KV_HEADS), open_bench(step[1], HEADS, KV_HEADS)};
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
                RA(ra_softmax_sm90_launch(&launch, timer.stream));
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

int usage()
{
    fprintf(stderr, "usage: softmax_cuda_perf time [HEAD_DIM TOKENS] | packed | ring\n");
    return 2;
}

} // namespace

int main(int argc, char **argv)
{
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "time" && argc > 3) {
        time_causal(atoll(argv[3]), atoi(argv[2]));
    } else if (what == "time") {
        for (int64_t tokens : {8192, 16384, 32768, 65536, 131072})
            time_causal(tokens, 128);
        for (int64_t tokens : {16384, 65536})
            time_causal(tokens, 64);
    } else if (what == "packed") {
        for (int d : {128, 64})
            time_packed(524288, d);
    } else if (what == "ring") {
        for (int64_t tokens : {16384, 32768, 65536, 131072})
            for (int rank : {0, 1})
                time_ring(tokens, 128, rank);
    } else {
        return usage();
    }
    return 0;
}
