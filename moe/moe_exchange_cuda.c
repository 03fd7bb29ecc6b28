/*
 * moe/moe_exchange_cuda.c - one round of expert parallelism on CUDA devices.
 *
 * The device counts how many tokens and slots go to each rank; the host reads those counts and
 * tells the other ranks, and all further sizes are known. Tokens travel with their choices; their
 * weights stay at home. Order as in moe_exchange.c, so the bits are those of the replicated layer.
 */
#include "base/device_cuda.h"
#include "base/log.h"
#include "moe/exchange_cuda.h"
#include "moe/moe_cuda.h"
#include <stdlib.h>

enum { TAG_CHOICES = 1, TAG_TOKENS, TAG_RESULTS };

ra_status_t ra_moe_cuda_exchange_create(ra_moe_plan_t *plan)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    const size_t ranks = (size_t)plan->ranks;
    void *totals;
    RA_TRY(ra_device_alloc_host(plan->device, (int64_t)(2 * ranks * sizeof(int32_t)), &totals));
    cuda->host_totals = totals;
    cuda->counts = calloc((RA_MOE_CUDA_ROUNDS * ranks + 1) * 2 * ranks, sizeof(*cuda->counts));
    cuda->transfers = calloc(4 * ranks, sizeof(*cuda->transfers));
    plan->rank_rows = calloc(ranks, sizeof(*plan->rank_rows));
    if (cuda->counts == NULL || cuda->transfers == NULL || plan->rank_rows == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate tables of %d ranks", plan->ranks);
    }
    for (size_t i = 0; i < RA_MOE_CUDA_ROUNDS; i++) {
        cuda->round[i].table = cuda->counts + (i * ranks + 1) * 2 * ranks;
    }
    return RA_OK;
}

/* Tokens (what 0) or slots (what 1) that go from one rank to another. */
static int64_t going(const ra_moe_plan_t *plan, const struct ra_moe_cuda_round *round, int from,
                     int to, int what)
{
    return round->table[(from * 2 + what) * plan->ranks + to];
}

/* One kind of rows between all pairs: those of @a what counts, out of send, into receive. */
static int add_transfers(const ra_moe_plan_t *plan, const struct ra_moe_cuda_round *round,
                         uint32_t tag, int what, bool home_to_expert, void *send, void *receive,
                         int64_t row_bytes, ra_transfer_t *to)
{
    char *out = send, *in = receive;
    int count = 0, self = plan->rank;
    for (int p = 0; p < plan->ranks; p++) {
        int64_t there = going(plan, round, self, p, what), here = going(plan, round, p, self, what);
        int64_t leave = home_to_expert ? there : here, come = home_to_expert ? here : there;
        to[count++] = (ra_transfer_t){
            .kind = RA_RECV, .peer = p, .tag = tag, .data = in, .bytes = come * row_bytes};
        to[count++] = (ra_transfer_t){
            .kind = RA_SEND, .peer = p, .tag = tag, .data = out, .bytes = leave * row_bytes};
        in += come * row_bytes;
        out += leave * row_bytes;
    }
    return count;
}

static int64_t row_bytes_of(const ra_moe_plan_t *plan)
{
    return plan->shape.hidden * ra_dtype_bytes(plan->x_dtype);
}

static ra_moe_cuda_visits_t visits_of(const ra_moe_plan_t *plan, const int32_t *expert,
                                      int64_t rows, int rank_begin, int rank_count)
{
    return (ra_moe_cuda_visits_t){.expert = expert,
                                  .rows = rows,
                                  .top_k = plan->shape.router.top_k,
                                  .experts = plan->shape.router.experts,
                                  .ranks = plan->ranks,
                                  .rank_begin = rank_begin,
                                  .rank_count = rank_count,
                                  .tokens_before = plan->cuda->tokens_before,
                                  .slots_before = plan->cuda->slots_before,
                                  .totals = plan->cuda->totals};
}

ra_status_t ra_moe_cuda_exchange_pack(ra_moe_plan_t *plan, ra_moe_cuda_tokens_t home,
                                      const struct ra_moe_cuda_round *round, ra_stream_t *stream)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    ra_moe_cuda_visits_t visits = visits_of(plan, home.expert, home.rows, 0, plan->ranks);
    RA_TRY(ra_moe_cuda_visits(&visits, ra_stream_cuda(stream)));
    RA_TRY(ra_moe_cuda_pack(&visits, plan->x_dtype, home.x, plan->shape.hidden, home.x_stride,
                            round->lane->send, round->lane->send_expert, round->result_at,
                            ra_stream_cuda(stream)));
    RA_TRY(ra_stream_copy(stream, cuda->host_totals, cuda->totals,
                          2 * plan->ranks * (int64_t)sizeof(int32_t)));
    return ra_stream_mark(stream);
}

/* Everybody learns what goes from whom to whom. */
static ra_status_t share_counts(ra_moe_plan_t *plan, const struct ra_moe_cuda_round *round,
                                ra_stream_t *stream)
{
    const struct ra_moe_cuda_plan *cuda = plan->cuda;
    const int count = 2 * plan->ranks;
    RA_TRY(ra_stream_wait_mark(stream));
    for (int i = 0; i < count; i++) {
        cuda->counts[i] = cuda->host_totals[i];
    }
    return ra_comm_allgather(plan->comm, cuda->counts, count * (int64_t)sizeof(*cuda->counts),
                             round->table);
}

ra_status_t ra_moe_cuda_exchange_send(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round,
                                      ra_stream_t *stream)
{
    const struct ra_moe_cuda_plan *cuda = plan->cuda;
    const struct ra_moe_cuda_lane *lane = round->lane;
    const int64_t choice_bytes = plan->shape.router.top_k * (int64_t)sizeof(int32_t);
    RA_TRY(share_counts(plan, round, stream));
    int count = add_transfers(plan, round, TAG_CHOICES, 0, true, lane->send_expert,
                              lane->received_expert, choice_bytes, cuda->transfers);
    count += add_transfers(plan, round, TAG_TOKENS, 0, true, lane->send, lane->received,
                           row_bytes_of(plan), cuda->transfers + count);
    return ra_comm_post(plan->comm, cuda->transfers, count, &round->tokens);
}

static ra_status_t await(const ra_moe_plan_t *plan, ra_request_t **request)
{
    ra_status_t status = ra_comm_wait(*request, ra_comm_deadline(plan->comm));
    ra_request_free(*request);
    *request = NULL;
    return status;
}

ra_status_t ra_moe_cuda_exchange_run(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                     struct ra_moe_cuda_round *round, ra_stream_t *stream)
{
    const struct ra_moe_cuda_plan *cuda = plan->cuda;
    const struct ra_moe_cuda_lane *lane = round->lane;
    const int64_t hidden = plan->shape.hidden;
    ra_moe_cuda_tokens_t visitors = {
        .x = lane->received, .x_stride = hidden, .expert = lane->received_expert};
    for (int p = 0; p < plan->ranks; p++) {
        visitors.rows += going(plan, round, p, plan->rank, 0);
    }
    RA_TRY(await(plan, &round->tokens));
    RA_TRY(ra_moe_cuda_run_experts(plan, weights, visitors, stream));
    ra_moe_cuda_visits_t visits = visits_of(plan, visitors.expert, visitors.rows, plan->rank, 1);
    RA_TRY(ra_moe_cuda_visits(&visits, ra_stream_cuda(stream)));
    RA_TRY(ra_moe_cuda_unsort(&visits, plan->x_dtype, cuda->position, cuda->out, hidden, lane->back,
                              ra_stream_cuda(stream)));
    int count = add_transfers(plan, round, TAG_RESULTS, 1, false, lane->back, lane->returned,
                              row_bytes_of(plan), cuda->transfers);
    return ra_comm_post(plan->comm, cuda->transfers, count, &round->results);
}

ra_status_t ra_moe_cuda_exchange_end(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round)
{
    return await(plan, &round->results);
}
