/*
 * Row-wise CUDA operations of a forward pass at Ring-mini-linear-2.0's sizes, and its LM head.
 *   row_ops_cuda_perf rows [R]   each operation: time, GB/s read and written, % of the card's copy
 *   row_ops_cuda_perf head       product and log-sum-exp of one tile of rows, several tile sizes
 * Medians of 15 after a warm-up. Buffers are larger than the L2 cache.
 */
#include "benchmarks/cuda_support.cuh"

extern "C" {
#include "base/device_cuda.h"
#include "base/gemm.h"
#include "model/layer_ops.h"
}
#include <functional>

namespace
{

constexpr int64_t HIDDEN = 2048, HEADS = 16, KV_HEADS = 4, DIM = 128, ROTARY = 64, GROUPS = 4,
                  DENSE = 5120, VOCABULARY = 157184;
constexpr int REPEATS = 15;

struct gpu_t {
    ra_device_t *device = nullptr;
    ra_stream_t *stream = nullptr;
    cudaEvent_t begin, end;
    double copy_rate = 0; /* bytes read and written a second */

    gpu_t()
    {
        RA(ra_device_open("cuda", 0, nullptr, &device));
        RA(ra_stream_create(device, &stream));
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
    }
    double seconds(const std::function<void()> &work)
    {
        std::vector<float> times;
        for (int i = -3; i < REPEATS; i++) {
            float ms;
            CUDA(cudaEventRecord(begin, ra_stream_cuda(stream)));
            work();
            CUDA(cudaEventRecord(end, ra_stream_cuda(stream)));
            CUDA(cudaEventSynchronize(end));
            CUDA(cudaEventElapsedTime(&ms, begin, end));
            if (i >= 0)
                times.push_back(ms);
        }
        return median(times) * 1e-3;
    }
    void report(const char *name, double bytes, const std::function<void()> &work)
    {
        const double s = seconds(work);
        printf("%-34s %8.1f us %7.0f GB/s %5.1f %% of copy\n", name, s * 1e6, bytes / s * 1e-9,
               100 * bytes / s / copy_rate);
    }
};

template <class T> struct normals_t : device_t<T> {
    explicit normals_t(size_t n, float spread = 1.0f) : device_t<T>(n)
    {
        /* pairs of bf16 normals are fp32 numbers of the same spread */
        fill_normal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16 *>(this->data),
                                   (int64_t)(n * sizeof(T) / 2), 7, spread);
        CUDA(cudaDeviceSynchronize());
    }
};

void measure_copy(gpu_t &gpu)
{
    const size_t bytes = (size_t)1 << 30;
    normals_t<float> from(bytes / 4), to(bytes / 4);
    const double s = gpu.seconds([&] {
        CUDA(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice,
                             ra_stream_cuda(gpu.stream)));
    });
    gpu.copy_rate = 2.0 * (double)bytes / s;
    printf("device copy of 1 GiB: %.0f GB/s read and written\n", gpu.copy_rate * 1e-9);
}

template <class T> ra_dtype_t type_of()
{
    return sizeof(T) == 2 ? RA_BF16 : RA_F32;
}

template <class T> void time_norms(gpu_t &gpu, int64_t rows, const char *name)
{
    char text[64];
    const double act = sizeof(T);
    normals_t<float> x(rows * HIDDEN), weight(3 * HIDDEN), table(rows * ROTARY);
    normals_t<T> y(rows * 3 * HIDDEN), wide(rows * (HEADS + 2 * KV_HEADS) * DIM);
    normals_t<T> q(rows * HIDDEN), kv(rows * 2 * KV_HEADS * DIM);

    snprintf(text, sizeof(text), "rms norm -> %s", name);
    gpu.report(text, rows * HIDDEN * (4 + act), [&] {
        RA(ra_op_rms_norm(x.data, HIDDEN, rows, HIDDEN, weight.data, 1e-6, q.data, HIDDEN,
                          type_of<T>(), gpu.stream));
    });
    ra_op_heads_t linear[2] = {};
    for (int i = 0; i < 2; i++) {
        linear[i] = {y.data + i * HIDDEN,
                     y.data + i * HIDDEN,
                     3 * HIDDEN,
                     3 * HIDDEN,
                     HEADS,
                     weight.data,
                     true};
    }
    snprintf(text, sizeof(text), "q, k norm and rope in place %s", name);
    gpu.report(text, rows * (4 * HIDDEN * act + ROTARY * 4), [&] {
        RA(ra_op_head_norm_rope(linear, 2, rows, DIM, 1e-6, table.data, ROTARY, type_of<T>(),
                                gpu.stream));
    });
    const int64_t width = (HEADS + 2 * KV_HEADS) * DIM, kv_width = KV_HEADS * DIM;
    const ra_op_heads_t softmax[3] = {
        {wide.data, q.data, width, HIDDEN, HEADS, weight.data, true},
        {wide.data + HIDDEN, kv.data, width, kv_width, KV_HEADS, weight.data, true},
        {wide.data + HIDDEN + kv_width, kv.data + rows * kv_width, width, kv_width, KV_HEADS,
         nullptr, false}};
    snprintf(text, sizeof(text), "q, k norm and rope, v copy %s", name);
    gpu.report(text, rows * (2 * width * act + ROTARY * 4), [&] {
        RA(ra_op_head_norm_rope(softmax, 3, rows, DIM, 1e-6, table.data, ROTARY, type_of<T>(),
                                gpu.stream));
    });
    snprintf(text, sizeof(text), "group norm and gate %s", name);
    gpu.report(text, rows * HIDDEN * 3 * act, [&] {
        RA(ra_op_group_norm_gate(y.data + 2 * HIDDEN, 3 * HIDDEN, rows, HIDDEN, GROUPS, weight.data,
                                 1e-6, q.data, HIDDEN, type_of<T>(), gpu.stream));
    });
}

template <class T> void time_elements(gpu_t &gpu, int64_t rows, const char *name)
{
    char text[64];
    normals_t<T> wide(rows * 2 * DENSE), kv(rows * 1024);
    normals_t<float> out(rows * 1024);
    snprintf(text, sizeof(text), "silu(gate) up %s", name);
    gpu.report(text, rows * DENSE * 3.0 * sizeof(T), [&] {
        RA(ra_op_silu_mul(wide.data, 2 * DENSE, wide.data + DENSE, 2 * DENSE, rows, DENSE,
                          type_of<T>(), gpu.stream));
    });
    snprintf(text, sizeof(text), "copy rows %s -> f32", name);
    gpu.report(text, rows * 1024.0 * (4 + sizeof(T)), [&] {
        RA(ra_op_copy_rows(kv.data, 1024, type_of<T>(), rows, 1024, out.data, 1024, RA_F32,
                           gpu.stream));
    });
}

void time_embedding(gpu_t &gpu, int64_t rows)
{
    normals_t<__nv_bfloat16> table(VOCABULARY * HIDDEN);
    normals_t<float> x(rows * HIDDEN), rope(rows * ROTARY);
    device_t<int32_t> tokens(rows);
    device_t<int64_t> positions(rows);
    std::vector<int32_t> token(rows);
    std::vector<int64_t> position(rows);
    double inv_freq[ROTARY / 2];
    for (int64_t r = 0; r < rows; r++) {
        token[r] = (int32_t)((uint64_t)r * 2654435761u % VOCABULARY);
        position[r] = r;
    }
    for (int i = 0; i < ROTARY / 2; i++) {
        inv_freq[i] = 1.0 / (1 + 1000 * i);
    }
    tokens.put(token.data());
    positions.put(position.data());
    const int64_t extent[2] = {VOCABULARY, HIDDEN};
    const ra_tensor_t view = ra_tensor_view(table.data, RA_BF16, 2, extent);
    gpu.report("embedding bf16 -> f32", rows * HIDDEN * 6.0,
               [&] { RA(ra_op_embed(&view, tokens.data, rows, x.data, HIDDEN, gpu.stream)); });
    gpu.report("rotary table", rows * (ROTARY * 4.0 + 8), [&] {
        RA(ra_op_rope_table(positions.data, rows, inv_freq, ROTARY, 1.0, rope.data, gpu.stream));
    });
}

void time_fold(gpu_t &gpu, int64_t rows, int64_t columns)
{
    char text[64];
    normals_t<float> logits(rows * columns), parts(3 * rows), out(rows);
    device_t<int32_t> target(rows);
    CUDA(cudaMemset(target.data, 0, rows * 4));
    float *m = parts.data, *l = m + rows, *picked = l + rows;
    snprintf(text, sizeof(text), "log-sum-exp %lld x %lld", (long long)rows, (long long)columns);
    RA(ra_op_lse_reset(m, l, picked, rows, gpu.stream));
    gpu.report(text, (double)rows * columns * 4, [&] {
        RA(ra_op_lse_fold(logits.data, columns, rows, columns, 0, target.data, m, l, picked,
                          gpu.stream));
    });
    gpu.report("log-probabilities", rows * 20.0, [&] {
        RA(ra_op_log_prob(picked, target.data, m, l, 1, rows, out.data, gpu.stream));
    });
}

/* One tile of rows against one block of the vocabulary, then the same for all blocks scaled to
 * 131,072 tokens. */
void time_head(gpu_t &gpu, const char *kernel_name, int64_t rows, int64_t columns)
{
    const ra_gemm_kernel_t *kernel;
    ra_gemm_weight_t *weight;
    normals_t<__nv_bfloat16> x(rows * HIDDEN), w(columns * HIDDEN, 0.02f);
    normals_t<float> parts(3 * rows);
    device_t<float> logits(rows * columns);
    device_t<int32_t> target(rows);
    CUDA(cudaMemset(target.data, 0, rows * 4));
    std::vector<__nv_bfloat16> host = w.get();
    const int64_t extent[2] = {columns, HIDDEN};
    const ra_tensor_t view = ra_tensor_view(host.data(), RA_BF16, 2, extent);
    RA(ra_gemm_select(kernel_name, RA_DEVICE_CUDA, false, &kernel));
    RA(ra_gemm_weight_create(kernel, &view, RA_BF16, gpu.stream, &weight));
    RA(ra_stream_sync(gpu.stream));
    float *m = parts.data, *l = m + rows, *picked = l + rows;
    RA(ra_op_lse_reset(m, l, picked, rows, gpu.stream));
    ra_gemm_job_t job = {};
    job.weight = weight;
    job.x = x.data;
    job.x_stride = HIDDEN;
    job.rows = rows;
    job.y = logits.data;
    job.y_stride = columns;
    job.x_dtype = RA_BF16;
    job.y_dtype = RA_F32;
    const auto product = [&] { RA(ra_gemm(&job, 1, false, gpu.stream)); };
    const auto fold = [&] {
        RA(ra_op_lse_fold(logits.data, columns, rows, columns, 0, target.data, m, l, picked,
                          gpu.stream));
    };
    const int blocks = 4; /* long enough to reach the clock of a whole head */
    const double gemm = gpu.seconds([&] {
        for (int i = 0; i < blocks; i++)
            product();
    }) / blocks;
    const double both = gpu.seconds([&] {
        for (int i = 0; i < blocks; i++) {
            product();
            fold();
        }
    }) / blocks;
    const double fused = gpu.seconds([&] {
        for (int i = 0; i < blocks; i++)
            RA(ra_op_head_fold(&job, 0, target.data, m, l, picked, gpu.stream));
    }) / blocks;
    const double flops = 2.0 * rows * columns * HIDDEN;
    const double whole = 131072.0 / rows * VOCABULARY / columns * 1e3;
    printf("%-16s %6lld x %6lld: product %7.1f us %4.0f TFLOP/s, with fold %7.1f us %4.0f TFLOP/s, "
           "131,072 tokens %5.1f ms; in one kernel %7.1f us %4.0f TFLOP/s, %5.1f ms\n",
           kernel_name, (long long)rows, (long long)columns, gemm * 1e6, flops / gemm * 1e-12,
           both * 1e6, flops / both * 1e-12, both * whole, fused * 1e6, flops / fused * 1e-12,
           fused * whole);
    ra_gemm_weight_destroy(weight);
}

} // namespace

int main(int argc, char **argv)
{
    const bool head = argc > 1 && argv[1][0] == 'h';
    const int64_t rows = argc > 2 ? atoll(argv[2]) : 32768;
    gpu_t gpu;
    cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    printf("%s\n", properties.name);
    if (head) {
        for (int64_t tile : {2048, 4096, 8192}) {
            for (int64_t block : {8192, 16384, 16896, 33792}) {
                time_head(gpu, "cublaslt", tile, block);
            }
        }
        return 0;
    }
    measure_copy(gpu);
    time_embedding(gpu, rows);
    time_norms<__nv_bfloat16>(gpu, rows, "bf16");
    time_norms<float>(gpu, rows, "f32");
    time_elements<__nv_bfloat16>(gpu, rows, "bf16");
    time_elements<float>(gpu, rows, "f32");
    time_fold(gpu, 4096, 16896);
    time_fold(gpu, 8192, 16384);
    return 0;
}
