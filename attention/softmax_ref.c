/*
 * The oracle of attention/softmax_block.h: every row alone, in double, two passes over its spans
 * (maximum, then sum), all mask features. Only the carried state is fp32.
 */
#include "attention/softmax_kernel.h"
#include <math.h>

static bool ref_fits(const ra_softmax_block_t *shape)
{
    return shape->dtype == RA_F32;
}

static bool visible(const ra_attention_mask_t *mask, const ra_softmax_block_t *block, int64_t row,
                    int32_t head, int64_t key)
{
    int64_t position = mask->key_pos[key];
    if (position < mask->row_lo[row] || position >= mask->row_hi[row]) {
        return false;
    }
    return mask->key_score == NULL || mask->key_score[head * block->keys + key] >=
                                          mask->row_threshold[head * block->rows + row];
}

static double score(const ra_softmax_block_t *block, int64_t row, int32_t head, int64_t key)
{
    int32_t kv_head = head / (block->heads / block->kv_heads);
    const float *q = (const float *)block->q + row * block->q_stride + head * block->head_dim;
    const float *k = (const float *)block->k + key * block->k_stride + kv_head * block->head_dim;
    double dot = 0.0;
    for (int32_t d = 0; d < block->head_dim; d++) {
        dot += (double)q[d] * k[d];
    }
    double bias = block->mask.key_bias != NULL ? block->mask.key_bias[key] : 0.0;
    return (double)block->scale * dot + bias;
}

static void fold_row(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                     const ra_row_group_t *group, int64_t row, int32_t head)
{
    int32_t dim = block->head_dim, kv_head = head / (block->heads / block->kv_heads);
    int64_t at = head * block->rows + row;
    float *o = state->o + row * state->o_stride + head * dim;
    const ra_key_span_t *spans = block->spans + group->span_begin;
    double m = state->m[at];

    for (int64_t s = 0; s < group->span_count; s++) {
        for (int64_t i = 0; i < spans[s].key_count; i++) {
            int64_t key = spans[s].key_begin + i;
            if (visible(&block->mask, block, row, head, key)) {
                m = fmax(m, score(block, row, head, key));
            }
        }
    }
    if (m == -INFINITY) {
        return;
    }
    double carry = exp((double)state->m[at] - m);
    double l = state->l[at] * carry;
    double sum[256];
    for (int32_t first = 0; first < dim; first += 256) {
        int32_t count = dim - first < 256 ? dim - first : 256;
        for (int32_t d = 0; d < count; d++) {
            sum[d] = o[first + d] * carry;
        }
        for (int64_t s = 0; s < group->span_count; s++) {
            for (int64_t i = 0; i < spans[s].key_count; i++) {
                int64_t key = spans[s].key_begin + i;
                if (!visible(&block->mask, block, row, head, key)) {
                    continue;
                }
                const float *v = (const float *)block->v + key * block->v_stride + kv_head * dim;
                double p = exp(score(block, row, head, key) - m);
                l += first == 0 ? p : 0.0;
                for (int32_t d = 0; d < count; d++) {
                    sum[d] += p * v[first + d];
                }
            }
        }
        for (int32_t d = 0; d < count; d++) {
            o[first + d] = (float)sum[d];
        }
    }
    state->m[at] = (float)m;
    state->l[at] = (float)l;
}

static ra_status_t ref_fold(const ra_softmax_block_t *block, const ra_softmax_state_t *state,
                            ra_stream_t *stream)
{
    (void)stream;
    for (int64_t g = 0; g < block->group_count; g++) {
        const ra_row_group_t *group = &block->groups[g];
        for (int64_t i = 0; i < group->row_count; i++) {
            for (int32_t head = 0; head < block->heads; head++) {
                fold_row(block, state, group, group->row_begin + i, head);
            }
        }
    }
    return RA_OK;
}

const ra_softmax_kernel_t ra_softmax_ref = {
    .name = "ref",
    .doc = "oracle in double, one row at a time",
    .device = RA_DEVICE_CPU,
    .fits = ref_fits,
    .fold = ref_fold,
};
