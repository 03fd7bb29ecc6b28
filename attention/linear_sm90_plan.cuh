/**
 * @file  attention/linear_sm90_plan.cuh
 * @brief Host side of the Hopper linear attention kernel: segments cut into parts, the tables the
 *        kernels read, tensor maps. Internal to linear_sm90.cu.
 */
#ifndef RA_ATTENTION_LINEAR_SM90_PLAN_CUH
#define RA_ATTENTION_LINEAR_SM90_PLAN_CUH

#include "attention/linear_cuda.h"
#include "attention/linear_cuda_scratch.cuh"
#include "attention/linear_sm90_shared.cuh"
#include "base/tensor_map.cuh"
#include <algorithm>
#include <vector>

namespace ra_linear
{

/*
 * Rows of a part of a segment: the fewest parts whose units (a head of a part) fill 96 % of a whole
 * number of rounds over 132 processors, for every part costs its tail read twice and its states.
 * Fixed numbers, so that bits do not depend on the device.
 */
static inline int64_t part_rows_of(int64_t rows, int64_t heads, int64_t ctas)
{
    const int64_t slots = 132 * ctas;
    int64_t best = 1;
    double most = 0;
    for (int64_t round = 1; round <= 8 && most < 0.96; round++) {
        const int64_t parts = std::max<int64_t>(slots * round / heads, 1);
        const int64_t rounds = (parts * heads + slots - 1) / slots;
        const double filled = (double)(parts * heads) / (double)(rounds * slots);
        if (filled > most) {
            most = filled;
            best = parts;
        }
    }
    const int64_t part = ((rows + best - 1) / best + CHUNK - 1) / CHUNK * CHUNK;
    return std::max<int64_t>(part, 1024);
}

/* Tables on the device. */
struct tables_t {
    uint32_t *next; /* [2] counters */
    float *decay;
    int32_t *order;
    part_t *parts, *summaries;
    fold_t *folds;
};

/* What is to be done for one call. */
struct plan_t {
    std::vector<part_t> parts, summaries; /* with outputs; for the state alone */
    std::vector<fold_t> folds;
    int64_t rows_end = 0;

    /* Memory of the states between parts. */
    static int64_t slot_bytes(const ra_linear_args_t *args, bool state_only, int64_t part_rows)
    {
        const int64_t state = (int64_t)args->heads * args->key_dim * args->value_dim;
        int64_t count = 0;
        for (int64_t i = 0; i < args->segment_count; i++)
            count += slots_of(args, i, state_only, part_rows);
        return count * state * (int64_t)sizeof(float);
    }

    cudaError_t make(const ra_linear_args_t *args, bool state_only, int64_t part_rows,
                     scratch_t *slots)
    {
        const int64_t state = (int64_t)args->heads * args->key_dim * args->value_dim;
        const int64_t bytes = slot_bytes(args, state_only, part_rows);
        const bool given = args->scratch && args->scratch_bytes >= bytes;
        cudaError_t error = bytes > 0 && !given ? slots->take((size_t)bytes) : cudaSuccess;
        if (error != cudaSuccess)
            return error;
        float *at = static_cast<float *>(given ? args->scratch : slots->data);
        for (int64_t i = 0; i < args->segment_count; i++) {
            add(args, i, state_only, part_rows, at, state);
            at += slots_of(args, i, state_only, part_rows) * state;
        }
        auto longer = [](const part_t &a, const part_t &b) { return a.rows > b.rows; };
        std::stable_sort(parts.begin(), parts.end(), longer);
        std::stable_sort(summaries.begin(), summaries.end(), longer);
        return cudaSuccess;
    }

    cudaError_t place(const ra_linear_args_t *args, scratch_t *scratch, tables_t *tables) const
    {
        const size_t heads = (size_t)args->heads;
        const size_t sizes[6] = {2 * sizeof(uint32_t),
                                 heads * sizeof(float),
                                 heads * sizeof(int32_t),
                                 parts.size() * sizeof(part_t),
                                 summaries.size() * sizeof(part_t),
                                 folds.size() * sizeof(fold_t)};
        size_t at[6], bytes = 0;
        for (int i = 0; i < 6; i++) {
            at[i] = bytes;
            bytes += (sizes[i] + 15) / 16 * 16;
        }
        cudaError_t error = scratch->take(bytes);
        if (error != cudaSuccess)
            return error;
        std::vector<char> host(bytes);
        float *decay = reinterpret_cast<float *>(host.data() + at[1]);
        int32_t *order = reinterpret_cast<int32_t *>(host.data() + at[2]);
        for (size_t h = 0; h < heads; h++) {
            decay[h] = std::max(args->log_decay[h], -1e30f); /* 0 times it stays 0 */
            order[h] = (int32_t)h;
        }
        std::stable_sort(order, order + heads,
                         [&](int32_t a, int32_t b) { return decay[a] > decay[b]; });
        std::copy(parts.begin(), parts.end(), reinterpret_cast<part_t *>(host.data() + at[3]));
        std::copy(summaries.begin(), summaries.end(),
                  reinterpret_cast<part_t *>(host.data() + at[4]));
        std::copy(folds.begin(), folds.end(), reinterpret_cast<fold_t *>(host.data() + at[5]));
        char *device = static_cast<char *>(scratch->data);
        tables->next = reinterpret_cast<uint32_t *>(device + at[0]);
        tables->decay = reinterpret_cast<float *>(device + at[1]);
        tables->order = reinterpret_cast<int32_t *>(device + at[2]);
        tables->parts = reinterpret_cast<part_t *>(device + at[3]);
        tables->summaries = reinterpret_cast<part_t *>(device + at[4]);
        tables->folds = reinterpret_cast<fold_t *>(device + at[5]);
        return upload(device, host.data(), bytes, scratch->stream);
    }

  private:
    static int64_t part_rows(const ra_linear_args_t *args, int64_t index, int64_t asked)
    {
        return asked > 0 ? asked
                         : part_rows_of(args->segments[index].row_count, args->heads,
                                        args->key_dim == 64 ? 2 : 1);
    }

    /* A segment of one part needs none, nor does one whose end is all that is asked for and is not.
     */
    static int64_t slots_of(const ra_linear_args_t *args, int64_t index, bool state_only,
                            int64_t asked)
    {
        const ra_linear_segment_t &segment = args->segments[index];
        const int64_t part = part_rows(args, index, asked);
        const int64_t count = (segment.row_count + part - 1) / part;
        return count < 2 || (state_only && !segment.state_out) ? 0 : count;
    }

    void add(const ra_linear_args_t *args, int64_t index, bool state_only, int64_t asked,
             float *slots, int64_t state)
    {
        const ra_linear_segment_t &segment = args->segments[index];
        const int64_t rows = segment.row_count, part = part_rows(args, index, asked);
        const int64_t count = slots_of(args, index, state_only, asked);
        rows_end = std::max(rows_end, segment.row_begin + rows);
        if (state_only && !segment.state_out)
            return;
        if (rows == 0) {
            if (segment.state_out)
                folds.push_back({nullptr, segment.state_in, segment.state_out, 0, 0, 0, 0});
            return;
        }
        if (count == 0) {
            (state_only ? summaries : parts)
                .push_back({(int32_t)segment.row_begin, (int32_t)rows, 0, 0, segment.state_in,
                            segment.state_out});
            return;
        }
        folds.push_back({slots, segment.state_in, segment.state_out, (int32_t)count, (int32_t)part,
                         (int32_t)(rows - (count - 1) * part), 0});
        for (int64_t p = 0; p < count; p++) {
            const int32_t row = (int32_t)(segment.row_begin + p * part);
            const int32_t n = (int32_t)std::min(part, rows - p * part);
            float *slot = slots + p * state;
            if (p + 1 < count || segment.state_out)
                summaries.push_back({row, n, 1, 0, nullptr, slot});
            if (!state_only)
                parts.push_back({row, n, 0, 0, slot, nullptr});
        }
    }
};

/* ---- tensor maps --------------------------------------------------------------------------- */

struct maps_t {
    CUtensorMap q, k, v;
};

/* [rows, heads, head_dim] bf16; a copy moves a chunk of one head. */
static inline ra_status_t make_map(const void *base, int64_t rows, int64_t stride, int32_t heads,
                                   int32_t head_dim, CUtensorMap *map)
{
    return ra_tensor_map_heads("linear", base, rows, stride, heads, head_dim, CHUNK,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, map);
}

/* Without outputs q is not touched, and its map is k's. */
static inline ra_status_t make_maps(const ra_linear_args_t *args, bool state_only, int64_t rows,
                                    maps_t *maps)
{
    RA_TRY(make_map(args->k, rows, args->k_stride, args->heads, args->key_dim, &maps->k));
    RA_TRY(make_map(args->v, rows, args->v_stride, args->heads, args->value_dim, &maps->v));
    maps->q = maps->k;
    if (!state_only)
        RA_TRY(make_map(args->q, rows, args->q_stride, args->heads, args->key_dim, &maps->q));
    return RA_OK;
}

} // namespace ra_linear

#endif
