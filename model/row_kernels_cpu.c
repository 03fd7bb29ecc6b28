/*
 * Bodies of model/layer_ops.h, compiled once for each instruction set.
 *
 * One row at a time, vectors along the channels; sums run in RA_VF_WIDTH lanes and one fixed
 * horizontal order, so a row's bits do not depend on its place. Channel counts that are no multiple
 * of the width end in a partial vector.
 */
#include "model/row_kernels.h"

#include "base/checked.h"
#include "base/simd.h"
#include <math.h>

enum { W = RA_VF_WIDTH };

static int lanes_left(int64_t n, int64_t i)
{
    return (int)ra_min_i64(W, n - i);
}

static float inverse_rms(const float *x, int64_t n, float eps)
{
    vf sum = vf_zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf a = vf_load(x + i);
        sum = vf_fma(a, a, sum);
    }
    if (i < n) {
        vf a = vf_load_n(x + i, lanes_left(n, i));
        sum = vf_fma(a, a, sum);
    }
    return 1.0f / sqrtf(vf_hsum(sum) / (float)n + eps);
}

/* y = x * factor * weight (weight NULL: ones) */
static void scale_row(const float *x, float factor, const float *weight, int64_t n, float *y)
{
    vf f = vf_set1(factor);
    for (int64_t i = 0; i < n; i += W) {
        int left = lanes_left(n, i);
        if (left == W) {
            vf a = vf_mul(vf_load(x + i), f);
            vf_store(y + i, weight == NULL ? a : vf_mul(a, vf_load(weight + i)));
        } else {
            vf a = vf_mul(vf_load_n(x + i, left), f);
            vf_store_n(y + i, weight == NULL ? a : vf_mul(a, vf_load_n(weight + i, left)), left);
        }
    }
}

static void rms_norm(const ra_rms_norm_args_t *args, int64_t begin, int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const float *x = args->x + r * args->x_stride;
        float factor = inverse_rms(x, args->channels, args->eps);
        scale_row(x, factor, args->weight, args->channels, (float *)args->y + r * args->y_stride);
    }
}

/* Rotate pairs (i, i + half) of one head in place. */
static void rotate(float *y, const float *cosine, const float *sine, int64_t half)
{
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf a = vf_load(y + i), b = vf_load(y + half + i);
        vf c = vf_load(cosine + i), s = vf_load(sine + i);
        vf_store(y + i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(y + half + i, vf_fma(b, c, vf_mul(a, s)));
    }
    for (; i < half; i++) {
        float a = y[i], b = y[half + i];
        y[i] = a * cosine[i] - b * sine[i];
        y[half + i] = b * cosine[i] + a * sine[i];
    }
}

static void head_rope(const ra_head_rope_args_t *args, int64_t begin, int64_t end)
{
    int64_t n = args->head_dim, half = args->rotary_dim / 2;
    for (int64_t r = begin; r < end; r++) {
        const float *cosine = args->table + r * args->rotary_dim;
        for (int p = 0; p < args->count; p++) {
            const ra_op_heads_t *part = &args->parts[p];
            for (int64_t h = 0; h < part->heads; h++) {
                const float *x = (const float *)part->x + r * part->x_stride + h * n;
                float *y = (float *)part->y + r * part->y_stride + h * n;
                float factor = part->weight == NULL ? 1.0f : inverse_rms(x, n, args->eps);
                scale_row(x, factor, part->weight, n, y);
                rotate(y, cosine, cosine + half, part->rotate ? half : 0);
            }
        }
    }
}

static vf sigmoid(vf x)
{
    vf one = vf_set1(1.0f);
    return vf_div(one, vf_add(one, vf_exp(vf_sub(vf_zero(), x))));
}

static void group_gate(const ra_group_gate_args_t *args, int64_t begin, int64_t end)
{
    int64_t n = args->channels / args->groups;
    for (int64_t r = begin; r < end; r++) {
        for (int64_t g = 0; g < args->groups; g++) {
            float *o = (float *)args->o + r * args->o_stride + g * n;
            const float *gate = (const float *)args->gate + r * args->gate_stride + g * n;
            scale_row(o, inverse_rms(o, n, args->eps), args->weight + g * n, n, o);
            for (int64_t i = 0; i < n; i += W) {
                int left = lanes_left(n, i);
                vf s = sigmoid(left == W ? vf_load(gate + i) : vf_load_n(gate + i, left));
                if (left == W) {
                    vf_store(o + i, vf_mul(vf_load(o + i), s));
                } else {
                    vf_store_n(o + i, vf_mul(vf_load_n(o + i, left), s), left);
                }
            }
        }
    }
}

static float row_max(const float *z, int64_t n)
{
    vf m = vf_set1(-INFINITY);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        m = vf_max(m, vf_load(z + i));
    }
    float best = vf_hmax(m);
    for (; i < n; i++) {
        best = z[i] > best ? z[i] : best;
    }
    return best;
}

static float sum_exp(const float *z, int64_t n, float shift)
{
    vf sum = vf_zero(), s = vf_set1(shift);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        sum = vf_add(sum, vf_exp(vf_sub(vf_load(z + i), s)));
    }
    float total = vf_hsum(sum);
    for (; i < n; i++) {
        total += expf(z[i] - shift);
    }
    return total;
}

static void lse_fold(const ra_lse_fold_args_t *args, int64_t begin, int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const float *z = args->logits + r * args->stride;
        int64_t target = args->target == NULL ? -1 : args->target[r] - args->first;
        if (target >= 0 && target < args->columns) {
            args->picked[r] = z[target];
        }
        float best = row_max(z, args->columns);
        if (best > args->m[r]) {
            args->l[r] *= expf(args->m[r] - best); /* e^-inf = 0 at the first block */
            args->m[r] = best;
        }
        args->l[r] += sum_exp(z, args->columns, args->m[r]);
    }
}

const ra_row_kernels_t RA_ISA_FN(ra_row_kernels) = {
    .rms_norm = rms_norm, .head_rope = head_rope, .group_gate = group_gate, .lse_fold = lse_fold};
