/*
 * The packed kernel for one instruction set.
 *
 * Weights lie in panels [in][RA_TILE_COLS]. A bf16 panel is widened, DEPTH_BLOCK steps of k at a
 * time, into scratch that stays in the cache while all rows of the piece pass over it; with few
 * rows the widening happens in registers instead and the weights are read once. Both give the same
 * bits: widening is exact, and both add up the same blocks of DEPTH_BLOCK steps, each one ascending
 * chain over k (base/gemm_tile.h).
 */
#include "base/checked.h"
#include "base/gemm_kernels.h"
#include "base/gemm_tile.h"

enum {
    DEPTH_BLOCK = 256,
    FEW_ROWS = 12, /* up to two register blocks; beyond, widening once is cheaper */
};

static void packed_pack(const ra_gemm_weight_t *weight, void *packed)
{
    const uint16_t *source16 = weight->source;
    const float *source = weight->source;
    uint16_t *to16 = packed;
    float *to = packed;
    for (int64_t out = 0; out < weight->out; out += RA_TILE_COLS) {
        for (int64_t k = 0; k < weight->in; k++) {
            for (int64_t j = 0; j < RA_TILE_COLS; j++) {
                int64_t from = (out + j) * weight->in + k;
                bool inside = out + j < weight->out;
                if (weight->dtype == RA_BF16) {
                    *to16++ = inside ? source16[from] : 0;
                } else {
                    *to++ = inside ? source[from] : 0.0f;
                }
            }
        }
    }
}

static void widen(const uint16_t *from, int64_t count, float *to)
{
    for (int64_t i = 0; i < count; i += RA_VF_WIDTH) {
        vf_store(to + i, vf_load_bf16(from + i));
    }
}

/* One panel of at most RA_TILE_COLS outputs, all depth. */
static void run_panel(const ra_gemm_piece_t *piece, int64_t out, float *wide)
{
    const ra_gemm_job_t *job = piece->job;
    const ra_gemm_weight_t *weight = job->weight;
    int64_t in = weight->in, panel_at = out / RA_TILE_COLS * in * RA_TILE_COLS;
    bool bf16 = weight->dtype == RA_BF16, few = piece->row_count <= FEW_ROWS;
    ra_tile_t tile = {
        .rows = piece->row_count,
        .cols = ra_min_i64(RA_TILE_COLS, piece->out_begin + piece->out_count - out),
        .a_row = job->x_stride,
        .b_step = RA_TILE_COLS,
        .c = (float *)job->y + piece->row_begin * job->y_stride + out,
        .c_row = job->y_stride,
        .accumulate = piece->accumulate,
    };
    int64_t k = 0;
    do {
        const uint16_t *b16 = (const uint16_t *)weight->packed + panel_at + k * RA_TILE_COLS;
        tile.depth = ra_min_i64(DEPTH_BLOCK, in - k);
        tile.a = (const float *)job->x + piece->row_begin * job->x_stride + k;
        if (bf16 && few) {
            tile.b = b16;
            ra_tile_bf16(&tile);
        } else {
            tile.b = (const float *)weight->packed + panel_at + k * RA_TILE_COLS;
            if (bf16) {
                widen(b16, tile.depth * RA_TILE_COLS, wide);
                tile.b = wide;
            }
            ra_tile_f32(&tile);
        }
        tile.accumulate = true;
        k += DEPTH_BLOCK;
    } while (k < in);
}

static ra_status_t packed_run(const ra_gemm_piece_t *piece)
{
    float *wide = ra_scratch(0, DEPTH_BLOCK * RA_TILE_COLS * (int64_t)sizeof(*wide));
    if (wide == NULL) {
        return RA_ERR_NOMEM;
    }
    for (int64_t i = 0; i < piece->out_count; i += RA_TILE_COLS) {
        run_panel(piece, piece->out_begin + i, wide);
    }
    return RA_OK;
}

const ra_gemm_packed_ops_t RA_ISA_FN(ra_gemm_packed_ops) = {
    .panel = RA_TILE_COLS,
    .pack = packed_pack,
    .run = packed_run,
};
