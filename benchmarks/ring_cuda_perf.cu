/*
 * ring_cuda_perf [TOKENS...]
 *
 * Causal bf16 softmax attention of one layer over all GPUs of the machine, sequence cut in zigzag:
 * each GPU holds its own keys and values first in a gathered buffer, copy engines bring the others'
 * in ring order and open a gate after each piece, and one launch of the Hopper kernel walks
 * everything as it arrives. The answer is compared with one GPU's over the whole sequence, and so
 * is the rate. One host thread a GPU; times are wall clock over all GPUs, medians.
 */
#include "attention/softmax_cuda.h"
#include "benchmarks/cuda_support.cuh"
#include <atomic>
#include <chrono>
#include <cmath>
#include <cudaTypedefs.h>
#include <thread>

namespace
{

typedef __nv_bfloat16 bf16;
const int HEADS = 32, KV_HEADS = 8, DIM = 128, PIECES = 4;
const uint32_t ALWAYS = 1u << 30;

__global__ void add_squares(const bf16 *got, const bf16 *want, int64_t n, double *sums)
{
    double error = 0.0, norm = 0.0;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        double w = __bfloat162float(want[i]), e = __bfloat162float(got[i]) - w;
        error += isnan(e) ? 1e30 : e * e;
        norm += w * w;
    }
    atomicAdd(&sums[0], error);
    atomicAdd(&sums[1], norm);
}

template <class T> T *allocate(int64_t count)
{
    T *data;
    CUDA(cudaMalloc(&data, count * sizeof(T)));
    return data;
}

/* Rows, keys and the list of one attention call, and what it needs on its GPU. */
struct layer_t {
    std::vector<int64_t> row_lo, row_hi, key_pos;
    std::vector<ra_row_group_t> groups;
    std::vector<ra_key_span_t> spans;
    ra_softmax_block_t block = {};
    ra_softmax_tiles_t *tiles = nullptr;
    ra_softmax_cuda_call_t call = {};
    bf16 *q, *k, *v, *out;

    /* The chunks of rows and of keys, by their number in the sequence. */
    layer_t(int64_t chunk, const std::vector<int> &rows, const std::vector<int> &keys)
    {
        for (int piece : rows) {
            groups.push_back({(int64_t)row_lo.size(), chunk, 0, (int64_t)keys.size()});
            for (int64_t i = 0; i < chunk; i++) {
                row_lo.push_back(0);
                row_hi.push_back(piece * chunk + i + 1);
            }
        }
        for (int piece : keys) {
            spans.push_back({(int64_t)key_pos.size(), chunk});
            for (int64_t i = 0; i < chunk; i++)
                key_pos.push_back(piece * chunk + i);
        }
        block.rows = (int64_t)row_lo.size();
        block.keys = (int64_t)key_pos.size();
        block.heads = HEADS;
        block.kv_heads = KV_HEADS;
        block.head_dim = DIM;
        block.scale = 1.0f / sqrtf((float)DIM);
        block.dtype = RA_BF16;
        block.q_stride = HEADS * DIM;
        block.k_stride = block.v_stride = KV_HEADS * DIM;
        block.mask.row_lo = row_lo.data();
        block.mask.row_hi = row_hi.data();
        block.mask.key_pos = key_pos.data();
        block.groups = groups.data();
        block.group_count = (int64_t)groups.size();
        block.spans = spans.data();
        int32_t bm, bn;
        RA(ra_softmax_sm90_tile(DIM, &bm, &bn));
        RA(ra_softmax_tiles_create(&block, bm, bn, 1, &tiles));
        q = allocate<bf16>(block.rows * HEADS * DIM);
        out = allocate<bf16>(block.rows * HEADS * DIM);
        k = allocate<bf16>(block.keys * KV_HEADS * DIM);
        v = allocate<bf16>(block.keys * KV_HEADS * DIM);
        block.q = q;
        block.k = k;
        block.v = v;
        const int64_t bytes = ra_softmax_tiles_layout(tiles)->bytes;
        call.tiles = allocate<unsigned char>(bytes);
        CUDA(cudaMemcpy(call.tiles, ra_softmax_tiles_data(tiles), bytes, cudaMemcpyHostToDevice));
        call.block = &block;
        call.layout = ra_softmax_tiles_layout(tiles);
        call.fresh = 1;
        call.out = out;
        call.out_dtype = RA_BF16;
        call.out_stride = HEADS * DIM;
    }
    ~layer_t()
    {
        for (void *memory : {(void *)q, (void *)k, (void *)v, (void *)out, call.tiles})
            cudaFree(memory);
        ra_softmax_tiles_destroy(tiles);
    }
};

void fill_layer(layer_t &layer)
{
    const ra_softmax_block_t &block = layer.block;
    fill_normal<<<1024, 256>>>(layer.q, block.rows * HEADS * DIM, 1, 1.0f);
    fill_normal<<<1024, 256>>>(layer.k, block.keys * KV_HEADS * DIM, 2, 1.0f);
    fill_normal<<<1024, 256>>>(layer.v, block.keys * KV_HEADS * DIM, 3, 1.0f);
    CUDA(cudaDeviceSynchronize());
}

struct rank_t {
    layer_t *layer = nullptr;
    cudaStream_t compute, copy;
    cudaEvent_t start, done; /* timing of the kernel alone */
    uint32_t *ready;
};

/* Threads meet here; spinning keeps the GPUs' starts within a microsecond. */
struct meeting_t {
    std::atomic<int> arrived{0}, round{0};
    int members;
    explicit meeting_t(int n) : members(n)
    {
    }
    void wait()
    {
        const int mine = round.load();
        if (arrived.fetch_add(1) + 1 == members) {
            arrived = 0;
            round++;
        } else {
            while (round.load() == mine) {
            }
        }
    }
};

typedef CUresult (*write_value_t)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

write_value_t find_write_value()
{
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    CUDA(cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &entry, 12000, cudaEnableDefault,
                                          &result));
    return result == cudaDriverEntryPointSuccess ? (write_value_t)entry : nullptr;
}

double seconds()
{
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

/* Pull the others' keys and values, the nearest rank's first, a gate after every piece. */
void queue_copies(std::vector<rank_t> &ranks, int me, uint32_t epoch, write_value_t write_value)
{
    const int size = (int)ranks.size();
    const int64_t own = ranks[me].layer->block.rows, piece = own / PIECES;
    for (int hop = 1; hop < size; hop++) {
        const int from = (me - hop + size) % size;
        for (int i = 0; i < PIECES; i++) {
            const int64_t begin = i * piece * KV_HEADS * DIM;
            const int64_t to = hop * own * KV_HEADS * DIM + begin;
            const size_t bytes = piece * KV_HEADS * DIM * sizeof(bf16);
            CUDA(cudaMemcpyPeerAsync(ranks[me].layer->k + to, me, ranks[from].layer->k + begin,
                                     from, bytes, ranks[me].copy));
            CUDA(cudaMemcpyPeerAsync(ranks[me].layer->v + to, me, ranks[from].layer->v + begin,
                                     from, bytes, ranks[me].copy));
            uint32_t *gate = ranks[me].ready + hop * PIECES + i;
            if (write_value(ranks[me].copy, (CUdeviceptr)gate, epoch, 0) != CUDA_SUCCESS) {
                fprintf(stderr, "cuStreamWriteValue32 failed\n");
                exit(6);
            }
        }
    }
}

/* @return seconds of one layer on all GPUs; kernel_ms of the slowest GPU's kernel. */
double run_ring(std::vector<rank_t> &ranks, int repeats, bool arrive, double *kernel_ms)
{
    static uint32_t epoch = 0;
    const int size = (int)ranks.size();
    const write_value_t write_value = find_write_value();
    meeting_t meeting(size);
    std::vector<double> times, kernels(size);
    const uint32_t first = epoch;
    auto body = [&](int me) {
        CUDA(cudaSetDevice(me));
        std::vector<double> kernel;
        for (int i = 0; i < repeats + 1; i++) {
            rank_t &rank = ranks[me];
            const uint32_t now = arrive ? first + i + 1 : first;
            CUDA(cudaDeviceSynchronize());
            meeting.wait();
            const double begin = seconds();
            rank.layer->call.ready = rank.ready;
            rank.layer->call.epoch = now;
            rank.layer->call.gate_keys = rank.layer->block.rows / PIECES;
            CUDA(cudaEventRecord(rank.start, rank.compute));
            RA(ra_softmax_sm90_launch(&rank.layer->call, rank.compute));
            CUDA(cudaEventRecord(rank.done, rank.compute));
            /* After the kernel, which has its own keys to begin with and waits at the gates. */
            if (arrive)
                queue_copies(ranks, me, now, write_value);
            CUDA(cudaDeviceSynchronize());
            meeting.wait();
            float ms;
            CUDA(cudaEventElapsedTime(&ms, rank.start, rank.done));
            kernel.push_back(ms);
            if (me == 0 && i > 0)
                times.push_back(seconds() - begin);
        }
        kernels[me] = median(kernel);
    };
    std::vector<std::thread> threads;
    for (int me = 0; me < size; me++)
        threads.emplace_back(body, me);
    for (std::thread &thread : threads)
        thread.join();
    if (arrive)
        epoch += repeats + 1;
    *kernel_ms = *std::max_element(kernels.begin(), kernels.end());
    return times.empty() ? 0.0 : median(times);
}

/* Seconds of one GPU alone over the whole sequence, by the same clock. */
double run_one(layer_t &layer, int device, cudaStream_t stream, int repeats)
{
    std::vector<double> times;
    CUDA(cudaSetDevice(device));
    for (int i = 0; i < repeats + 1; i++) {
        CUDA(cudaDeviceSynchronize());
        const double begin = seconds();
        RA(ra_softmax_sm90_launch(&layer.call, stream));
        CUDA(cudaDeviceSynchronize());
        if (i > 0)
            times.push_back(seconds() - begin);
    }
    return median(times);
}

void copy_chunk(bf16 *to, int to_device, const bf16 *from, int64_t chunk, int64_t to_piece,
                int64_t from_piece, int64_t width)
{
    CUDA(cudaMemcpyPeer(to + to_piece * chunk * width, to_device, from + from_piece * chunk * width,
                        0, chunk * width * sizeof(bf16)));
}

/* Rank's chunks of the sequence, then the chunks of the ranks before it in ring order. */
std::vector<int> chunks_of(int rank, int size, bool others)
{
    std::vector<int> chunks;
    for (int hop = 0; hop < (others ? size : 1); hop++) {
        const int owner = (rank - hop + size) % size;
        chunks.push_back(owner);
        chunks.push_back(2 * size - 1 - owner);
    }
    return chunks;
}

/* run_one() on a GPU of its own inputs. */
double run_alone(int64_t chunk, const std::vector<int> &everything, int device, cudaStream_t stream,
                 int repeats)
{
    CUDA(cudaSetDevice(device));
    layer_t layer(chunk, everything, everything);
    fill_layer(layer);
    return run_one(layer, device, stream, repeats);
}

/* Relative L2 distance of a rank's rows from the same rows of the whole sequence's answer. */
double difference(const rank_t &rank, int device, const layer_t &whole, int64_t chunk,
                  const std::vector<int> &own)
{
    CUDA(cudaSetDevice(device));
    double *sums = allocate<double>(2), host[2];
    bf16 *want = allocate<bf16>(chunk * HEADS * DIM);
    CUDA(cudaMemset(sums, 0, sizeof(host)));
    for (int i = 0; i < 2; i++) {
        copy_chunk(want, device, whole.out, chunk, 0, own[i], HEADS * DIM);
        add_squares<<<512, 256>>>(rank.layer->out + i * chunk * HEADS * DIM, want,
                                  chunk * HEADS * DIM, sums);
    }
    CUDA(cudaMemcpy(host, sums, sizeof(host), cudaMemcpyDeviceToHost));
    CUDA(cudaFree(sums));
    CUDA(cudaFree(want));
    return sqrt(host[0] / host[1]);
}

void measure(int size, int64_t tokens, bool compare)
{
    const int64_t chunk = tokens / (2 * size);
    const double flop = 2.0 * tokens * tokens * DIM * HEADS;
    /* About a second each: the clock follows the power drawn over a good part of one. */
    const int repeats = (int)std::min(400.0, std::max(1.0, 5e14 * size / flop));
    std::vector<int> everything;
    for (int i = 0; i < 2 * size; i++)
        everything.push_back(i);
    CUDA(cudaSetDevice(0));
    layer_t whole(chunk, everything, everything);
    fill_layer(whole);
    std::vector<rank_t> ranks(size);
    for (int me = 0; me < size; me++) {
        CUDA(cudaSetDevice(me));
        rank_t &rank = ranks[me];
        const std::vector<int> own = chunks_of(me, size, false);
        rank.layer = new layer_t(chunk, own, chunks_of(me, size, true));
        for (int i = 0; i < 2; i++) {
            copy_chunk(rank.layer->q, me, whole.q, chunk, i, own[i], HEADS * DIM);
            copy_chunk(rank.layer->k, me, whole.k, chunk, i, own[i], KV_HEADS * DIM);
            copy_chunk(rank.layer->v, me, whole.v, chunk, i, own[i], KV_HEADS * DIM);
        }
        const int64_t others = (rank.layer->block.keys - 2 * chunk) * KV_HEADS * DIM;
        CUDA(cudaMemset(rank.layer->k + 2 * chunk * KV_HEADS * DIM, 0xFF, others * 2));
        CUDA(cudaMemset(rank.layer->v + 2 * chunk * KV_HEADS * DIM, 0xFF, others * 2));
        CUDA(cudaMemset(rank.layer->out, 0xFF, rank.layer->block.rows * HEADS * DIM * 2));
        CUDA(cudaStreamCreateWithFlags(&rank.compute, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&rank.copy, cudaStreamNonBlocking));
        CUDA(cudaEventCreate(&rank.start));
        CUDA(cudaEventCreate(&rank.done));
        rank.ready = allocate<uint32_t>(size * PIECES);
        std::vector<uint32_t> gates(size * PIECES, 0);
        std::fill(gates.begin(), gates.begin() + PIECES, ALWAYS);
        CUDA(cudaMemcpy(rank.ready, gates.data(), gates.size() * 4, cudaMemcpyHostToDevice));
        CUDA(cudaDeviceSynchronize());
    }
    double kernel_ms, there_ms, worst = 0.0;
    if (compare)
        run_one(whole, 0, ranks[0].compute, 1); /* the answer to compare with */
    run_ring(ranks, 0, true, &kernel_ms);       /* into poisoned buffers */
    for (int me = 0; compare && me < size; me++)
        worst =
            std::max(worst, difference(ranks[me], me, whole, chunk, chunks_of(me, size, false)));
    const double ring = run_ring(ranks, repeats, true, &kernel_ms);
    std::vector<double> one;
    for (int me = 0; compare && me < size; me++)
        one.push_back(run_alone(chunk, everything, me, ranks[me].compute, repeats));
    const double ring2 = run_ring(ranks, repeats, true, &kernel_ms);
    const double there = run_ring(ranks, repeats, false, &there_ms);
    const double best = std::min(ring, ring2);
    auto rate = [&](double t) { return flop / t / size * 1e-12; };
    printf("ring gpus %d tokens %-8lld %9.3f ms %6.1f TFLOP/s a GPU (again %6.1f; kernel alone "
           "%6.1f; keys there already %6.1f)",
           size, (long long)tokens, best * 1e3, rate(ring), rate(ring2), rate(kernel_ms * 1e-3),
           rate(there));
    if (compare) {
        const double slowest = flop / *std::max_element(one.begin(), one.end()) * 1e-12;
        printf(", each GPU alone");
        for (double t : one)
            printf(" %.1f", flop / t * 1e-12);
        printf(", ratio to the slowest %.3f, difference %.1e%s", rate(best) / slowest, worst,
               worst < 3e-3 ? "" : " WRONG");
    }
    printf("\n");
    fflush(stdout);
    for (int me = 0; me < size; me++) {
        CUDA(cudaSetDevice(me));
        delete ranks[me].layer;
        CUDA(cudaFree(ranks[me].ready));
        CUDA(cudaStreamDestroy(ranks[me].compute));
        CUDA(cudaStreamDestroy(ranks[me].copy));
    }
    CUDA(cudaSetDevice(0));
}

/* What the links carry when nothing else runs: every GPU pulls from the one before it. */
void measure_links(int size)
{
    const int64_t bytes = 256 << 20;
    std::vector<char *> from(size), to(size);
    std::vector<cudaStream_t> streams(size);
    for (int me = 0; me < size; me++) {
        CUDA(cudaSetDevice(me));
        from[me] = allocate<char>(bytes);
        to[me] = allocate<char>(bytes);
        CUDA(cudaStreamCreateWithFlags(&streams[me], cudaStreamNonBlocking));
    }
    double best = 1e9;
    for (int i = 0; i < 4; i++) {
        const double begin = seconds();
        for (int me = 0; me < size; me++) {
            CUDA(cudaSetDevice(me));
            CUDA(cudaMemcpyPeerAsync(to[me], me, from[(me + size - 1) % size],
                                     (me + size - 1) % size, bytes, streams[me]));
        }
        for (int me = 0; me < size; me++) {
            CUDA(cudaSetDevice(me));
            CUDA(cudaStreamSynchronize(streams[me]));
        }
        best = std::min(best, seconds() - begin);
    }
    int access = 0;
    CUDA(cudaDeviceCanAccessPeer(&access, 0, size - 1));
    printf("links: peer access %d, %.0f GB/s into each GPU, both directions busy\n", access,
           bytes / best * 1e-9);
    for (int me = 0; me < size; me++) {
        CUDA(cudaSetDevice(me));
        CUDA(cudaFree(from[me]));
        CUDA(cudaFree(to[me]));
    }
    CUDA(cudaSetDevice(0));
}

} // namespace

int main(int argc, char **argv)
{
    int size = 0;
    CUDA(cudaGetDeviceCount(&size));
    if (size < 2) {
        fprintf(stderr, "ring_cuda_perf needs two GPUs, this machine has %d\n", size);
        return 2;
    }
    for (int a = 0; a < size; a++) {
        CUDA(cudaSetDevice(a));
        CUDA(cudaFree(nullptr));
        for (int b = 0; b < size; b++) {
            int access = 0;
            if (a != b && cudaDeviceCanAccessPeer(&access, a, b) == cudaSuccess && access)
                CUDA(cudaDeviceEnablePeerAccess(b, 0));
        }
    }
    measure_links(size);
    for (int i = 1; i < argc; i++) {
        const int64_t tokens = atoll(argv[i]);
        measure(size, tokens, tokens <= 131072);
    }
    return 0;
}
