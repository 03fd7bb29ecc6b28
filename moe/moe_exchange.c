/*
 * moe/moe_exchange.c - one round of expert parallelism.
 *
 * Everybody learns everybody's choices by one small all-gather, so all further counts are known
 * without asking. A token travels once to each rank that runs one of its experts (order: token);
 * results travel back unsummed (order: token, then ascending expert).
 */
#include "base/checked.h"
#include "moe/moe_plan.h"
#include <string.h>

/* A rank's experts, its tokens in this round and their choices. */
typedef struct side {
    int32_t first, last;
    const int32_t *expert; /* [rows, k] */
    int64_t rows;
} side_t;

static side_t side_of(const ra_moe_plan_t *plan, int rank, int64_t round)
{
    const int64_t tile = plan->tile_rows;
    int64_t left = ra_max_i64(plan->rank_rows[rank] - round * tile, 0);
    side_t side = {.expert = plan->all_experts + rank * tile * plan->shape.router.top_k,
                   .rows = ra_min_i64(left, tile)};
    ra_moe_expert_range(plan->shape.router.experts, plan->ranks, rank, &side.first, &side.last);
    return side;
}

/* Experts of one token that lie in [first, last). */
static int32_t count_in(const int32_t *expert, int32_t k, int32_t first, int32_t last)
{
    int32_t count = 0;
    for (int32_t j = 0; j < k; j++) {
        count += expert[j] >= first && expert[j] < last;
    }
    return count;
}

/* Tokens of `from` that visit [first, last), and their (token, expert) pairs. */
static void count_visits(const side_t *from, int32_t k, int32_t first, int32_t last,
                         int64_t *tokens_p, int64_t *slots_p)
{
    *tokens_p = *slots_p = 0;
    for (int64_t t = 0; t < from->rows; t++) {
        int32_t count = count_in(from->expert + t * k, k, first, last);
        *tokens_p += count > 0;
        *slots_p += count;
    }
}

static ra_status_t send_tokens(ra_moe_plan_t *plan, int64_t round, ra_moe_tokens_t home)
{
    const int64_t hidden = plan->shape.hidden, row_bytes = hidden * (int64_t)sizeof(float);
    const int32_t k = plan->shape.router.top_k;
    side_t mine = side_of(plan, plan->rank, round);
    int64_t sent = 0, received = 0;
    for (int p = 0; p < plan->ranks; p++) {
        side_t peer = side_of(plan, p, round);
        plan->send_offset[p] = sent * row_bytes;
        for (int64_t t = 0; t < mine.rows; t++) {
            if (count_in(mine.expert + t * k, k, peer.first, peer.last) > 0) {
                memcpy(plan->send + sent++ * hidden, home.x + t * home.x_stride, (size_t)row_bytes);
            }
        }
        plan->send_bytes[p] = sent * row_bytes - plan->send_offset[p];
        int64_t tokens, slots;
        count_visits(&peer, k, mine.first, mine.last, &tokens, &slots);
        plan->receive_offset[p] = received * row_bytes;
        plan->receive_bytes[p] = tokens * row_bytes;
        received += tokens;
    }
    return ra_comm_alltoallv(plan->comm, plan->send, plan->send_bytes, plan->send_offset,
                             plan->received, plan->receive_bytes, plan->receive_offset);
}

/* List what the received tokens want of my experts, in the order they came. */
static int64_t list_slots(ra_moe_plan_t *plan, int64_t round)
{
    const int32_t k = plan->shape.router.top_k;
    int64_t slots = 0;
    int32_t row = 0;
    for (int p = 0; p < plan->ranks; p++) {
        side_t peer = side_of(plan, p, round);
        for (int64_t t = 0; t < peer.rows; t++) {
            int64_t before = slots;
            for (int32_t j = 0; j < k; j++) {
                int32_t expert = peer.expert[t * k + j];
                if (expert >= plan->first && expert < plan->last) {
                    plan->slots[slots++] = (ra_moe_slot_t){.row = row, .expert = expert};
                }
            }
            row += slots > before;
        }
    }
    return slots;
}

/* Results from expert order back to the order of the slots; the sorted tokens are spent. */
static void unsort_rows(void *arg, int64_t begin, int64_t end)
{
    const ra_moe_plan_t *plan = arg;
    int64_t hidden = plan->shape.hidden;
    for (int64_t s = begin; s < end; s++) {
        memcpy(plan->sorted + s * hidden, plan->outputs + plan->position[s] * hidden,
               (size_t)hidden * sizeof(float));
    }
}

static ra_status_t return_results(ra_moe_plan_t *plan, int64_t round)
{
    const int64_t row_bytes = plan->shape.hidden * (int64_t)sizeof(float);
    const int32_t k = plan->shape.router.top_k;
    side_t mine = side_of(plan, plan->rank, round);
    int64_t sent = 0, received = 0;
    for (int p = 0; p < plan->ranks; p++) {
        side_t peer = side_of(plan, p, round);
        int64_t tokens, slots;
        count_visits(&peer, k, mine.first, mine.last, &tokens, &slots);
        plan->send_offset[p] = sent * row_bytes;
        plan->send_bytes[p] = slots * row_bytes;
        sent += slots;
        plan->receive_offset[p] = received * row_bytes;
        for (int64_t t = 0; t < mine.rows; t++) {
            for (int32_t j = 0; j < k; j++) {
                int32_t expert = mine.expert[t * k + j];
                if (expert >= peer.first && expert < peer.last) {
                    plan->result_at[t * k + j] = received++;
                }
            }
        }
        plan->receive_bytes[p] = received * row_bytes - plan->receive_offset[p];
    }
    return ra_comm_alltoallv(plan->comm, plan->sorted, plan->send_bytes, plan->send_offset,
                             plan->returned, plan->receive_bytes, plan->receive_offset);
}

ra_status_t ra_moe_exchange_round(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                  int64_t round, int64_t rows, ra_moe_tokens_t home,
                                  const float **results_p, ra_stream_t *stream)
{
    const int64_t choices = plan->tile_rows * plan->shape.router.top_k;
    /* Blocks are of one size; rows past a rank's end carry no token and are skipped by all. */
    for (int64_t i = rows * plan->shape.router.top_k; i < choices; i++) {
        plan->expert[i] = 0;
    }
    RA_TRY(ra_comm_allgather(plan->comm, plan->expert, choices * (int64_t)sizeof(*plan->expert),
                             plan->all_experts));
    RA_TRY(send_tokens(plan, round, home));
    int64_t slots = list_slots(plan, round);
    ra_moe_tokens_t visitors = {.x = plan->received, .x_stride = plan->shape.hidden};
    RA_TRY(ra_moe_run_experts(plan, weights, slots, visitors, rows, home, stream));
    ra_moe_for_rows(stream, slots, unsort_rows, plan);
    RA_TRY(return_results(plan, round));
    *results_p = plan->returned;
    return RA_OK;
}
