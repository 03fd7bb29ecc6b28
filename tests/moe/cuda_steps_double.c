/*
 * The launches of moe/experts_cuda.h and moe/exchange_cuda.h as loops over host memory, so that
 * what queues them (moe_cuda.c, moe_exchange_cuda.c) runs on the CPU device: rounds, buffers and
 * transfers are the GPU's own, and thread sanitisers see them.
 */
#include "tests/moe/cuda_steps_double.h"
#include "base/device_cuda.h"
#include "base/dtype.h"
#include "moe/exchange_cuda.h"
#include "moe/experts_cuda.h"
#include "moe/moe.h"
#include <math.h>
#include <string.h>

atomic_int cuda_double_products_left = -1;

struct CUstream_st *ra_stream_cuda(const ra_stream_t *stream)
{
    (void)stream;
    return NULL;
}

static double value_at(ra_dtype_t dtype, const void *from, int64_t i)
{
    return dtype == RA_F32 ? (double)((const float *)from)[i]
                           : (double)ra_bf16_to_f32(((const uint16_t *)from)[i]);
}

static void set_value(ra_dtype_t dtype, void *to, int64_t i, double value)
{
    if (dtype == RA_F32) {
        ((float *)to)[i] = (float)value;
    } else {
        ((uint16_t *)to)[i] = ra_bf16_from_f32((float)value);
    }
}

ra_status_t ra_moe_cuda_select(const ra_router_t *router, int64_t rows, const float *logits,
                               const float *bias, int32_t *expert_p, float *weight_p, float *gap_p,
                               struct CUstream_st *stream)
{
    (void)stream;
    ra_router_select(router, rows, logits, bias, expert_p, weight_p, gap_p);
    return RA_OK;
}

ra_status_t ra_moe_cuda_replay(const ra_router_t *router, const ra_router_replay_t *replay,
                               int64_t rows, const float *logits, int32_t *expert, float *weight,
                               struct CUstream_st *stream)
{
    (void)stream;
    if (replay->forced != NULL || replay->chosen != NULL) {
        ra_router_replay(router, replay, rows, logits, expert, weight);
    }
    return RA_OK;
}

/* ---- slots by expert ----------------------------------------------------------------------- */

int64_t ra_moe_cuda_sorted_rows(int64_t slots, int32_t experts)
{
    return slots + experts * RA_MOE_ROW_PAD;
}

int64_t ra_moe_cuda_tiles(int64_t slots, int32_t experts)
{
    return slots / RA_MOE_TILE_ROWS + experts;
}

int64_t ra_moe_cuda_sort_scratch(int64_t rows, int32_t experts)
{
    return rows + experts;
}

/* @return the row after the expert's last. */
static int64_t sort_expert(const ra_moe_cuda_sort_t *sort, int32_t expert, int64_t row)
{
    int64_t slots = sort->rows * sort->top_k;
    for (int64_t i = 0; i < slots; i++) {
        if (sort->expert[i] == expert) {
            sort->source[row] = (int32_t)(i / sort->top_k);
            sort->position[i] = (int32_t)row++;
        }
    }
    return row;
}

ra_status_t ra_moe_cuda_sort(const ra_moe_cuda_sort_t *sort, struct CUstream_st *stream)
{
    (void)stream;
    int64_t row = 0;
    *sort->tile_count = 0;
    for (int64_t i = 0; i < sort->rows * sort->top_k; i++) {
        sort->position[i] = -1;
    }
    for (int32_t e = sort->first; e < sort->last; e++) {
        int64_t begin = row;
        row = sort_expert(sort, e, row);
        for (int64_t at = begin; at < row; at += RA_MOE_TILE_ROWS) {
            int64_t count = row - at < RA_MOE_TILE_ROWS ? row - at : RA_MOE_TILE_ROWS;
            sort->tiles[(*sort->tile_count)++] =
                (ra_moe_tile_t){(int32_t)at, (int32_t)count, e - sort->first, 0};
        }
        for (; row % RA_MOE_ROW_PAD != 0; row++) {
            sort->source[row] = -1;
        }
    }
    return RA_OK;
}

/* ---- products ------------------------------------------------------------------------------ */

/* x[at] . W[g][column], W in `repeat` parts side by side. */
static double product(const ra_moe_cuda_gemm_t *call, int64_t at, int64_t group, int64_t column)
{
    int64_t repeat = call->repeat > 0 ? call->repeat : 1;
    int64_t columns = call->swiglu ? 2 * call->n : call->n;
    int64_t row = (group * columns + column) * repeat * call->k;
    double sum = 0;
    for (int64_t i = 0; i < repeat * call->k; i++) {
        sum += value_at(call->dtype, call->x, at * call->x_stride + i % call->k) *
               value_at(call->dtype, call->weight, row + i);
    }
    return sum;
}

static void product_row(const ra_moe_cuda_gemm_t *call, int64_t row, int64_t group)
{
    int64_t at = call->source != NULL ? call->source[row] : row;
    for (int64_t c = 0; c < call->n; c++) {
        double value = at < 0 ? 0 : product(call, at, group, c);
        if (call->swiglu && at >= 0) {
            value = value / (1 + exp(-value)) * product(call, at, group, call->n + c);
        }
        set_value(call->y_dtype, call->y, row * call->y_stride + c, value);
    }
}

ra_status_t ra_moe_cuda_gemm(const ra_moe_cuda_gemm_t *call, struct CUstream_st *stream)
{
    (void)stream;
    if (atomic_load(&cuda_double_products_left) >= 0 &&
        atomic_fetch_sub(&cuda_double_products_left, 1) == 0) {
        return ra_fail(RA_ERR_DEVICE, "moe", "a product failed");
    }
    for (int64_t r = 0; call->tiles == NULL && r < call->x_rows; r++) {
        product_row(call, r, 0);
    }
    for (int32_t t = 0; call->tiles != NULL && t < *call->tile_count; t++) {
        const ra_moe_tile_t *tile = &call->tiles[t];
        for (int64_t r = tile->row; r < tile->row + tile->rows; r++) {
            product_row(call, r, tile->group);
        }
    }
    return RA_OK;
}

ra_status_t ra_moe_cuda_combine(const ra_moe_cuda_combine_t *call, struct CUstream_st *stream)
{
    (void)stream;
    for (int64_t i = 0; i < call->rows * call->hidden; i++) {
        int64_t t = i / call->hidden, d = i % call->hidden;
        float sum = 0;
        for (int32_t j = 0; j < call->top_k; j++) {
            int64_t slot = t * call->top_k + j;
            float out =
                (float)value_at(call->dtype, call->out, call->position[slot] * call->hidden + d);
            sum = fmaf(call->weight[slot], out, sum);
        }
        sum += call->shared != NULL ? (float)value_at(call->dtype, call->shared, i) : 0;
        float *y = call->y + t * call->y_stride + d;
        *y = call->accumulate ? *y + sum : sum;
    }
    return RA_OK;
}

/* ---- exchange ------------------------------------------------------------------------------ */

ra_status_t ra_moe_cuda_visits(const ra_moe_cuda_visits_t *visits, struct CUstream_st *stream)
{
    (void)stream;
    for (int32_t p = 0; p < visits->rank_count; p++) {
        int32_t first, last, tokens = 0, slots = 0;
        ra_moe_expert_range(visits->experts, visits->ranks, visits->rank_begin + p, &first, &last);
        for (int64_t t = 0; t < visits->rows; t++) {
            int32_t here = 0;
            for (int32_t j = 0; j < visits->top_k; j++) {
                int32_t e = visits->expert[t * visits->top_k + j];
                here += e >= first && e < last;
            }
            visits->tokens_before[p * visits->rows + t] = tokens;
            visits->slots_before[p * visits->rows + t] = slots;
            tokens += here > 0;
            slots += here;
        }
        visits->totals[p] = tokens;
        visits->totals[visits->rank_count + p] = slots;
    }
    return RA_OK;
}

static int64_t bytes_of(ra_dtype_t dtype, int64_t count)
{
    return count * ra_dtype_bytes(dtype);
}

ra_status_t ra_moe_cuda_pack(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype, const void *x,
                             int64_t hidden, int64_t x_stride, void *send, int32_t *send_expert,
                             int32_t *result_at, struct CUstream_st *stream)
{
    (void)stream;
    int32_t k = visits->top_k, tokens = 0, slots = 0; /* of the ranks before */
    for (int32_t p = 0; p < visits->ranks; p++) {
        int32_t first, last;
        ra_moe_expert_range(visits->experts, visits->ranks, p, &first, &last);
        for (int64_t t = 0; t < visits->rows; t++) {
            int32_t result = slots + visits->slots_before[p * visits->rows + t], before = result;
            for (int32_t j = 0; j < k; j++) {
                int32_t e = visits->expert[t * k + j];
                if (e >= first && e < last) {
                    result_at[t * k + j] = result++;
                }
            }
            if (result > before) {
                int64_t row = tokens + visits->tokens_before[p * visits->rows + t];
                memcpy((char *)send + bytes_of(dtype, row * hidden),
                       (const char *)x + bytes_of(dtype, t * x_stride),
                       (size_t)bytes_of(dtype, hidden));
                memcpy(send_expert + row * k, visits->expert + t * k, (size_t)k * sizeof(int32_t));
            }
        }
        tokens += visits->totals[p];
        slots += visits->totals[visits->ranks + p];
    }
    return RA_OK;
}

ra_status_t ra_moe_cuda_unsort(const ra_moe_cuda_visits_t *visits, ra_dtype_t dtype,
                               const int32_t *position, const void *out, int64_t hidden, void *back,
                               struct CUstream_st *stream)
{
    (void)stream;
    int64_t to = 0;
    for (int64_t i = 0; i < visits->rows * visits->top_k; i++) {
        if (position[i] >= 0) {
            memcpy((char *)back + bytes_of(dtype, to++ * hidden),
                   (const char *)out + bytes_of(dtype, position[i] * hidden),
                   (size_t)bytes_of(dtype, hidden));
        }
    }
    return RA_OK;
}
