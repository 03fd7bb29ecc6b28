/*
 * Mixture of experts on GPUs: grouped products beside cuBLAS in the same run, a whole layer step by
 * step, and the layer with its experts over ranks.
 *   moe_cuda_perf gemm | layer | ranks N [TRANSPORT]
 */
#include "benchmarks/cuda_support.cuh"
extern "C" { /* C headers without a C++ guard of their own */
#include "base/clock.h"
#include "comm/ranks.h"
#include "moe/moe.h"
}
#include "moe/experts_cuda.h"
#include <cstring>
#include <cublas_v2.h>
#include <functional>
#include <string>

namespace
{

typedef __nv_bfloat16 bf16;

#define CUBLAS(call)                                                                               \
    do {                                                                                           \
        cublasStatus_t status_ = (call);                                                           \
        if (status_ != CUBLAS_STATUS_SUCCESS) {                                                    \
            fprintf(stderr, "%s:%d: cublas %d\n", __FILE__, __LINE__, (int)status_);               \
            exit(6);                                                                               \
        }                                                                                          \
    } while (0)

struct contender_t {
    std::string name;
    std::function<void()> work;
    std::vector<float> ms;
};

/* All take turns, so that the chip's clock is the same for each. */
void race(stopwatch_t &watch, std::vector<contender_t> &all, int rounds)
{
    for (int r = -2; r < rounds; r++)
        for (contender_t &c : all) {
            float ms = watch.ms(c.work);
            if (r >= 0)
                c.ms.push_back(ms);
        }
}

/* ---- grouped products ---------------------------------------------------------------------- */

struct case_t {
    const char *name;
    int experts;
    int64_t rows; /* an expert */
    int64_t n, k;
    bool swiglu, skewed;
};

std::vector<int> draw_rows(const case_t &c)
{
    std::vector<int> rows(c.experts, (int)c.rows);
    if (c.skewed) /* 1, 4, 1, 1/4 ... of the mean, odd numbers */
        for (int e = 0; e < c.experts; e++) {
            const double part[4] = {1.75, 0.25, 1.9, 0.1};
            rows[e] = (int)(part[e % 4] * c.rows) + e % 3;
        }
    return rows;
}

struct library_t {
    cublasHandle_t handle;
    std::vector<int> m, n, k, ldb, ldc, size;
    std::vector<cublasOperation_t> ta, tb;
    std::vector<float> one, zero;
    std::vector<const void *> a, b;
    std::vector<void *> c;
    device_t<const void *> da, db;
    device_t<void *> dc;

    library_t(cublasHandle_t h, const std::vector<int> &rows, const std::vector<int> &begin,
              const bf16 *x, const bf16 *w, bf16 *y, int64_t n_, int64_t k_)
        : handle(h), da(rows.size()), db(rows.size()), dc(rows.size())
    {
        for (size_t e = 0; e < rows.size(); e++) {
            m.push_back((int)n_);
            n.push_back(rows[e]);
            k.push_back((int)k_);
            ldb.push_back((int)k_);
            ldc.push_back((int)n_);
            size.push_back(1);
            ta.push_back(CUBLAS_OP_T);
            tb.push_back(CUBLAS_OP_N);
            one.push_back(1.0f);
            zero.push_back(0.0f);
            a.push_back(w + e * n_ * k_);
            b.push_back(x + begin[e] * k_);
            c.push_back(y + begin[e] * n_);
        }
        da.put(a.data());
        db.put(b.data());
        dc.put(c.data());
    }
    void loop()
    {
        for (size_t e = 0; e < n.size(); e++)
            if (n[e] > 0)
                CUBLAS(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, m[e], n[e], k[e], &one[e],
                                    a[e], CUDA_R_16BF, k[e], b[e], CUDA_R_16BF, ldb[e], &zero[e],
                                    c[e], CUDA_R_16BF, ldc[e], CUBLAS_COMPUTE_32F,
                                    CUBLAS_GEMM_DEFAULT));
    }
    void grouped()
    {
        CUBLAS(cublasGemmGroupedBatchedEx(
            handle, ta.data(), tb.data(), m.data(), n.data(), k.data(), one.data(),
            (const void *const *)da.data, CUDA_R_16BF, k.data(), (const void *const *)db.data,
            CUDA_R_16BF, ldb.data(), zero.data(), (void *const *)dc.data, CUDA_R_16BF, ldc.data(),
            (int)n.size(), size.data(), CUBLAS_COMPUTE_32F));
    }
};

void run_case(const case_t &c, cublasHandle_t handle, stopwatch_t &watch)
{
    const std::vector<int> rows = draw_rows(c);
    std::vector<int> begin, source;
    std::vector<ra_moe_tile_t> tiles;
    int64_t useful = 0;
    for (int e = 0; e < c.experts; e++) {
        begin.push_back((int)source.size());
        for (int at = 0; at < rows[e]; at += RA_MOE_TILE_ROWS)
            tiles.push_back({begin[e] + at, std::min((int)RA_MOE_TILE_ROWS, rows[e] - at), e, 0});
        for (int r = 0; r < rows[e] || source.size() % RA_MOE_ROW_PAD; r++)
            source.push_back(r < rows[e] ? 1 : -1);
        useful += rows[e];
    }
    const int64_t all = (int64_t)source.size(), parts = c.swiglu ? 2 : 1, tokens = useful / 8 + 1;
    uint64_t state = 1;
    for (int &s : source) { /* an expert's tokens are in order, on average 1 of 32 */
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        s = s < 0 ? -1 : (int)((state >> 33) % tokens);
    }
    for (int e = 0; e < c.experts; e++)
        std::sort(source.begin() + begin[e], source.begin() + begin[e] + rows[e]);
    device_t<bf16> x(all * c.k), w(c.experts * parts * c.n * c.k), y(all * c.n * parts);
    fill(x, 1);
    fill(w, 2, 1.0f / sqrtf((float)c.k));
    device_t<int> d_source(source.size()), count(1);
    device_t<ra_moe_tile_t> d_tiles(tiles.size());
    const int tile_count = (int)tiles.size();
    d_source.put(source.data());
    d_tiles.put(tiles.data());
    count.put(&tile_count);
    ra_moe_cuda_gemm_t call = {};
    call.dtype = call.y_dtype = RA_BF16;
    call.x = x.data;
    call.x_rows = all;
    call.x_stride = c.k;
    call.weight = w.data;
    call.groups = c.experts;
    call.swiglu = c.swiglu;
    call.n = c.n;
    call.k = c.k;
    call.tiles = d_tiles.data;
    call.tile_count = count.data;
    call.max_tiles = tile_count;
    call.y = y.data;
    call.y_rows = all;
    call.y_stride = c.n;
    ra_moe_cuda_gemm_t gather = call;
    gather.source = d_source.data;
    gather.x_rows = tokens;
    library_t library(handle, rows, begin, x.data, w.data, y.data, parts * c.n, c.k);
    std::vector<contender_t> race_of = {
        {"sorted", [&] { RA(ra_moe_sm90_gemm(&call, watch.stream)); }, {}},
        {"gather", [&] { RA(ra_moe_sm90_gemm(&gather, watch.stream)); }, {}},
        {"cublas loop", [&] { library.loop(); }, {}},
        {"cublas grouped", [&] { library.grouped(); }, {}},
    };
    race(watch, race_of, 9);
    printf("%-26s", c.name);
    for (contender_t &r : race_of)
        printf(" | %s %.0f", r.name.c_str(), 2e-9 * useful * parts * c.n * c.k / median(r.ms));
    printf(" TFLOP/s\n");
    fflush(stdout);
}

void run_gemm()
{
    static const case_t cases[] = {
        {"mini up 1024", 256, 1024, 512, 2048, true, false},
        {"mini down 1024", 256, 1024, 2048, 512, false, false},
        {"mini up 4096", 64, 4096, 512, 2048, true, false},
        {"mini down 4096", 64, 4096, 2048, 512, false, false},
        {"mini up 256", 256, 256, 512, 2048, true, false},
        {"mini down 256", 256, 256, 2048, 512, false, false},
        {"mini up skewed 1024", 256, 1024, 512, 2048, true, true},
        {"mini down skewed 1024", 256, 1024, 2048, 512, false, true},
        {"flash up 1024", 64, 1024, 1024, 4096, true, false},
        {"flash down 1024", 64, 1024, 4096, 1024, false, false},
        {"flash up 4096", 32, 4096, 1024, 4096, true, false},
        {"flash down 4096", 32, 4096, 4096, 1024, false, false},
    };
    stopwatch_t watch;
    cublasHandle_t handle;
    CUBLAS(cublasCreate(&handle));
    CUBLAS(cublasSetStream(handle, watch.stream));
    for (const case_t &c : cases)
        run_case(c, handle, watch);
    CUBLAS(cublasDestroy(handle));
}

/* ---- layer --------------------------------------------------------------------------------- */

struct layer_case_t {
    const char *name;
    int64_t rows, hidden, width;
    float bias; /* spread of the experts' biases: skew */
};

struct layer_t {
    layer_case_t c;
    ra_router_t router = {256, 8, 8, 4, true, 2.5f};
    int64_t slots, sorted, max_tiles;
    device_t<bf16> x, wr, up, down, shared_up, shared_down, inner, out, shared_inner, shared_out;
    device_t<float> logits, bias, weight, y;
    device_t<int> expert, position, source, tile_count, scratch;
    device_t<ra_moe_tile_t> tiles;

    explicit layer_t(const layer_case_t &l)
        : c(l), slots(l.rows * 8), sorted(ra_moe_cuda_sorted_rows(slots, 256)),
          max_tiles(ra_moe_cuda_tiles(slots, 256)), x(l.rows * l.hidden), wr(256 * l.hidden),
          up(256 * 2 * l.width * l.hidden), down(256 * l.width * l.hidden),
          shared_up(2 * l.width * l.hidden), shared_down(l.width * l.hidden),
          inner(sorted * l.width), out(sorted * l.hidden), shared_inner(l.rows * l.width),
          shared_out(l.rows * l.hidden), logits(l.rows * 256), bias(256), weight(slots),
          y(l.rows * l.hidden), expert(slots), position(slots), source(sorted), tile_count(1),
          scratch(ra_moe_cuda_sort_scratch(l.rows, 256)), tiles(max_tiles)
    {
        fill(x, 1);
        fill(wr, 2, 1.0f / sqrtf((float)l.hidden));
        fill(up, 3, 1.0f / sqrtf((float)l.hidden));
        fill(down, 4, 1.0f / sqrtf((float)l.width));
        fill(shared_up, 5, 1.0f / sqrtf((float)l.hidden));
        fill(shared_down, 6, 1.0f / sqrtf((float)l.width));
        std::vector<float> b(256);
        for (int e = 0; e < 256; e++)
            b[e] = l.bias * ((e * 97 % 256) / 255.0f - 0.5f);
        bias.put(b.data());
        CUDA(cudaMemset(y.data, 0, y.count * 4));
    }

    void product(const bf16 *from, int64_t from_rows, bool gather, const bf16 *w, bool swiglu,
                 int64_t n, int64_t k, bool grouped, void *to, bool f32, int64_t to_rows,
                 cudaStream_t stream)
    {
        ra_moe_cuda_gemm_t call = {};
        call.dtype = RA_BF16;
        call.y_dtype = f32 ? RA_F32 : RA_BF16;
        call.x = from;
        call.x_rows = from_rows;
        call.x_stride = k;
        call.source = gather ? source.data : nullptr;
        call.weight = w;
        call.groups = grouped ? 256 : 1;
        call.swiglu = swiglu;
        call.n = n;
        call.k = k;
        call.tiles = grouped ? tiles.data : nullptr;
        call.tile_count = tile_count.data;
        call.max_tiles = max_tiles;
        call.y = to;
        call.y_rows = to_rows;
        call.y_stride = n;
        RA(ra_moe_cuda_gemm(&call, stream));
    }

    std::vector<std::pair<const char *, std::function<void(cudaStream_t)>>> steps()
    {
        const int64_t h = c.hidden, w = c.width;
        return {
            {"logits",
             [=](cudaStream_t s) {
                 product(x.data, c.rows, false, wr.data, false, 256, h, false, logits.data, true,
                         c.rows, s);
             }},
            {"select",
             [=](cudaStream_t s) {
                 RA(ra_moe_cuda_select(&router, c.rows, logits.data, bias.data, expert.data,
                                       weight.data, nullptr, s));
             }},
            {"sort",
             [=](cudaStream_t s) {
                 ra_moe_cuda_sort_t sort = {};
                 sort.expert = expert.data;
                 sort.rows = c.rows;
                 sort.top_k = 8;
                 sort.last = 256;
                 sort.position = position.data;
                 sort.source = source.data;
                 sort.tiles = tiles.data;
                 sort.tile_count = tile_count.data;
                 sort.scratch = scratch.data;
                 RA(ra_moe_cuda_sort(&sort, s));
             }},
            {"shared up",
             [=](cudaStream_t s) {
                 product(x.data, c.rows, false, shared_up.data, true, w, h, false,
                         shared_inner.data, false, c.rows, s);
             }},
            {"shared down",
             [=](cudaStream_t s) {
                 product(shared_inner.data, c.rows, false, shared_down.data, false, h, w, false,
                         shared_out.data, false, c.rows, s);
             }},
            {"up",
             [=](cudaStream_t s) {
                 product(x.data, c.rows, true, up.data, true, w, h, true, inner.data, false, sorted,
                         s);
             }},
            {"down",
             [=](cudaStream_t s) {
                 product(inner.data, sorted, false, down.data, false, h, w, true, out.data, false,
                         sorted, s);
             }},
            {"combine",
             [=](cudaStream_t s) {
                 ra_moe_cuda_combine_t sum = {};
                 sum.dtype = RA_BF16;
                 sum.rows = c.rows;
                 sum.hidden = h;
                 sum.top_k = 8;
                 sum.position = position.data;
                 sum.weight = weight.data;
                 sum.out = out.data;
                 sum.shared = shared_out.data;
                 sum.accumulate = true;
                 sum.y = y.data;
                 sum.y_stride = h;
                 RA(ra_moe_cuda_combine(&sum, s));
             }},
        };
    }
};

void run_layer(const layer_case_t &c, stopwatch_t &watch)
{
    layer_t layer(c);
    auto steps = layer.steps();
    std::vector<contender_t> race_of;
    for (auto &step : steps)
        race_of.push_back({step.first, [&] { step.second(watch.stream); }, {}});
    race_of.push_back({"whole",
                       [&] {
                           for (auto &step : steps)
                               step.second(watch.stream);
                       },
                       {}});
    race(watch, race_of, 9);
    int tiles = 0;
    CUDA(cudaMemcpy(&tiles, layer.tile_count.data, 4, cudaMemcpyDeviceToHost));
    const double flops = 6.0 * c.rows * 9 * c.hidden * c.width;
    const double ms = median(race_of.back().ms);
    printf("%-22s %.3f ms, %.0f TFLOP/s, %d tiles:", c.name, ms, 1e-9 * flops / ms, tiles);
    for (size_t i = 0; i + 1 < race_of.size(); i++)
        printf(" %s %.3f", race_of[i].name.c_str(), median(race_of[i].ms));
    printf("\n");
    fflush(stdout);
}

/* ---- over ranks ---------------------------------------------------------------------------- */

constexpr int64_t RANK_ROWS = 32768;

struct world_t {
    ra_moe_shape_t shape;
    ra_moe_tensors_t tensors;
    bool split; /* experts over the ranks, else all on each */
};

ra_tensor_t matrix(uint16_t *data, int64_t out, int64_t in)
{
    const int64_t extent[2] = {out, in};
    return ra_tensor_view(data, RA_BF16, 2, extent);
}

ra_status_t time_rank(ra_comm_t *comm, void *arg)
{
    const world_t &world = *static_cast<world_t *>(arg);
    const int64_t hidden = world.shape.hidden;
    const int rank = ra_comm_rank(comm), ranks = world.split ? ra_comm_size(comm) : 1;
    int devices = 1;
    int32_t first, last;
    ra_device_t *device;
    ra_stream_t *stream;
    ra_moe_weights_t *weights;
    ra_moe_plan_t *plan;
    CUDA(cudaGetDeviceCount(&devices));
    RA(ra_device_open("cuda", rank % devices, nullptr, &device));
    RA(ra_stream_create(device, &stream));
    RA(ra_comm_attach(comm, stream));
    ra_moe_expert_range(world.shape.router.experts, ranks, world.split ? rank : 0, &first, &last);
    RA(ra_moe_weights_create(nullptr, &world.shape, &world.tensors, first, last, RA_BF16, stream,
                             &weights));
    RA(ra_moe_plan_create(&world.shape, 0, RA_BF16, device, world.split ? comm : nullptr, &plan));
    std::vector<double> ms;
    {
        device_t<bf16> x(RANK_ROWS * hidden);
        device_t<float> y(RANK_ROWS * hidden);
        fill(x, 1 + rank);
        CUDA(cudaMemset(y.data, 0, y.count * 4));
        CUDA(cudaDeviceSynchronize());
        ra_moe_args_t args = {};
        args.weights = weights;
        args.rows = RANK_ROWS;
        args.x = x.data;
        args.y = y.data;
        args.x_stride = args.y_stride = hidden;
        args.accumulate = true;
        for (int i = -2; i < 9; i++) {
            RA(ra_comm_barrier(comm));
            const int64_t begin = ra_clock_ns();
            RA(ra_moe_forward(plan, &args, stream));
            RA(ra_stream_sync(stream));
            RA(ra_comm_barrier(comm));
            if (i >= 0)
                ms.push_back((ra_clock_ns() - begin) * 1e-6);
        }
    }
    if (rank == 0) {
        printf("%d ranks, experts %s: %lld rows a rank in %.3f ms, %.1f million rows/s, plan %.0f "
               "MiB\n",
               ra_comm_size(comm), world.split ? "over ranks" : "on each", (long long)RANK_ROWS,
               median(ms), ra_comm_size(comm) * RANK_ROWS / median(ms) * 1e-3,
               ra_moe_plan_bytes(plan) / 1048576.0);
        fflush(stdout);
    }
    ra_moe_plan_destroy(plan);
    ra_moe_weights_destroy(weights);
    ra_stream_destroy(stream);
    ra_device_close(device);
    return RA_OK;
}

/* Ring-mini's layer; experts share eight experts' numbers, which changes no timing. */
void run_ranks(int ranks, const char *transport)
{
    constexpr int64_t H = 2048, W = 512;
    world_t world = {};
    world.shape.hidden = H;
    world.shape.expert_width = world.shape.shared_width = W;
    world.shape.router = {256, 8, 8, 4, true, 2.5f};
    std::vector<uint16_t> numbers(9 * 3 * W * H), router(256 * H);
    uint64_t state = 1;
    for (std::vector<uint16_t> *array : {&numbers, &router})
        for (uint16_t &n : *array) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            n = ra_bf16_from_f32((float)((int64_t)state >> 40) * 0x1p-23f * 0.04f);
        }
    std::vector<ra_tensor_t> gate, up, down;
    for (int e = 0; e < 257; e++) {
        uint16_t *at = numbers.data() + (e == 256 ? 8 : e % 8) * 3 * W * H;
        gate.push_back(matrix(at, W, H));
        up.push_back(matrix(at + W * H, W, H));
        down.push_back(matrix(at + 2 * W * H, H, W));
    }
    world.tensors.router = matrix(router.data(), 256, H);
    world.tensors.gate = gate.data();
    world.tensors.up = up.data();
    world.tensors.down = down.data();
    world.tensors.shared_gate = gate[256];
    world.tensors.shared_up = up[256];
    world.tensors.shared_down = down[256];
    for (int split = 0; split < 2; split++) {
        world.split = split;
        RA(ra_ranks_run(transport, ranks, time_rank, &world));
    }
}

} // namespace

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "gemm")) {
        run_gemm();
    } else if (!strcmp(mode, "layer")) {
        static const layer_case_t cases[] = {
            {"mini 32k", 32768, 2048, 512, 0.0f},   {"mini 32k skewed", 32768, 2048, 512, 0.5f},
            {"mini 8k", 8192, 2048, 512, 0.0f},     {"mini 16k", 16384, 2048, 512, 0.0f},
            {"mini 64k", 65536, 2048, 512, 0.0f},   {"mini 2k", 2048, 2048, 512, 0.0f},
            {"flash 16k", 16384, 4096, 1024, 0.0f},
        };
        stopwatch_t watch;
        for (const layer_case_t &c : cases)
            run_layer(c, watch);
    } else if (!strcmp(mode, "ranks") && argc > 2) {
        run_ranks(atoi(argv[2]), argc > 3 ? argv[3] : "peer");
    } else {
        fprintf(stderr, "usage: moe_cuda_perf gemm | layer | ranks N [TRANSPORT]\n");
        return 2;
    }
    return 0;
}
