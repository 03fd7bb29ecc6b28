/**
 * @file  benchmarks/softmax_cuda_cases.cuh
 * @brief Attention problems by name: positions, masks, groups and spans, on the host.
 */
#ifndef RA_BENCHMARKS_SOFTMAX_CUDA_CASES_CUH
#define RA_BENCHMARKS_SOFTMAX_CUDA_CASES_CUH

#include "attention/softmax_cuda.h"
#include <algorithm>
#include <random>
#include <string>
#include <vector>

struct case_t {
    std::string name;
    int64_t rows = 0, keys = 0;
    int heads = 4, kv_heads = 2, head_dim = 128;
    double scale = 0.0; /* 0: 1 / sqrt(head_dim) */
    float spread = 1.0f;
    std::vector<int64_t> row_lo, row_hi, key_pos;
    std::vector<ra_row_group_t> groups;
    std::vector<ra_key_span_t> spans;
    std::vector<float> key_score, row_threshold,
        key_bias; /* [heads, keys], [heads, rows], [keys] */
};

static inline void positions(case_t &c, int64_t first = 0, int64_t stride = 1)
{
    c.key_pos.resize(c.keys);
    for (int64_t j = 0; j < c.keys; j++)
        c.key_pos[j] = first + j * stride;
}

static inline void one_group(case_t &c)
{
    c.spans = {{0, c.keys}};
    c.groups = {{0, c.rows, 0, 1}};
}

static inline case_t causal(int64_t n, int head_dim, int64_t window = INT64_MAX / 2)
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

static inline case_t full(int64_t rows, int64_t keys, int head_dim)
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

static inline case_t packed(int64_t n, int head_dim, uint32_t seed, bool one_span)
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
static inline case_t zigzag(int64_t chunk, int head_dim)
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
static inline case_t striped(int64_t n, int head_dim)
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

static inline case_t by_tiles(int64_t n, int64_t tile, int head_dim)
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

/* Dynamic masks and biases over causal attention; about a third of the keys pass. */
static inline case_t scored(int64_t n, int head_dim)
{
    case_t c = causal(n, head_dim);
    c.name = "scores, thresholds, biases";
    std::mt19937 random(3);
    for (int64_t i = 0; i < c.heads * n; i++)
        c.key_score.push_back((float)(random() % 97));
    for (int64_t i = 0; i < c.heads * n; i++)
        c.row_threshold.push_back(random() % 50 == 0 ? 1000.0f : 66.0f);
    for (int64_t i = 0; i < n; i++)
        c.key_bias.push_back((float)(random() % 100) * 0.02f - 1.0f);
    return c;
}

#endif
