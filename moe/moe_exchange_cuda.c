/*
 * moe/moe_exchange_cuda.c - one round of expert parallelism on CUDA devices.
 *
 * The device counts how many tokens and slots go to each rank; the host reads those counts (the one
 * wait of a round) and tells the other ranks, and all further sizes are known. Tokens travel with
 * their choices; their weights stay at home. Results travel while the next round runs. Order as in
 * moe_exchange.c, so the bits are those of the replicated layer.
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
    cuda->table = calloc((ranks + 1) * 2 * ranks, sizeof(*cuda->table));
    cuda->transfers = calloc(4 * ranks, sizeof(*cuda->transfers));
    plan->rank_rows = calloc(ranks, sizeof(*plan->rank_rows));
    if (cuda->table == NULL || cuda->transfers == NULL || plan->rank_rows == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate tables of %d ranks", plan->ranks);
    }
    return RA_OK;
}

/* Tokens (what 0) or slots (what 1) that go from one rank to another this round. */
static int64_t going(const ra_moe_plan_t *plan, int from, int to, int what)
{
    return plan->cuda->table[(from * 2 + what) * plan->ranks + to];
}

/* Everybody learns what goes from whom to whom. */
static ra_status_t share_counts(ra_moe_plan_t *plan, ra_stream_t *stream)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    const int counts = 2 * plan->ranks;
    int64_t *mine = cuda->table + (int64_t)plan->ranks * counts;
    RA_TRY(
        ra_stream_copy(stream, cuda->host_totals, cuda->totals, counts * (int64_t)sizeof(int32_t)));
    RA_TRY(ra_stream_sync(stream));
    for (int i = 0; i < counts; i++) {
        mine[i] = cuda->host_totals[i];
    }
    return ra_comm_allgather(plan->comm, mine, counts * (int64_t)sizeof(*mine), cuda->table);
}

/* One kind of rows between all pairs: those of @a what counts, out of send, into receive. */
static int add_transfers(const ra_moe_plan_t *plan, uint32_t tag, int what, bool home_to_expert,
                         char *send, char *receive, int64_t row_bytes, ra_transfer_t *to)
{
    int count = 0;
    for (int p = 0; p < plan->ranks; p++) {
        int64_t out =
            home_to_expert ? going(plan, plan->rank, p, what) : going(plan, p, plan->rank, what);
        int64_t in =
            home_to_expert ? going(plan, p, plan->rank, what) : going(plan, plan->rank, p, what);
        to[count++] = (ra_transfer_t){
            .kind = RA_RECV, .peer = p, .tag = tag, .data = receive, .bytes = in * row_bytes};
        to[count++] = (ra_transfer_t){
            .kind = RA_SEND, .peer = p, .tag = tag, .data = send, .bytes = out * row_bytes};
        receive += in * row_bytes;
        send += out * row_bytes;
    }
    return count;
}

/* Tokens and their choices leave and arrive; the shared expert runs beside them. */
static ra_status_t send_tokens(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                               ra_moe_cuda_tokens_t home, void *shared, int64_t row_bytes,
                               ra_stream_t *stream)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    const int64_t choice_bytes = plan->shape.router.top_k * (int64_t)sizeof(int32_t);
    ra_request_t *request = NULL;
    int count = add_transfers(plan, TAG_CHOICES, 0, true, (char *)cuda->send_expert,
                              (char *)cuda->received_expert, choice_bytes, cuda->transfers);
    count += add_transfers(plan, TAG_TOKENS, 0, true, cuda->send, cuda->received, row_bytes,
                           cuda->transfers + count);
    RA_TRY(ra_comm_post(plan->comm, cuda->transfers, count, &request));
    ra_status_t status =
        ra_moe_cuda_run_shared(plan, weights, home.x, home.x_stride, home.rows, shared, stream);
    if (status == RA_OK) {
        status = ra_comm_wait(request, ra_comm_deadline(plan->comm));
    }
    ra_request_free(request);
    return status;
}

static ra_status_t return_results(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round,
                                  int64_t row_bytes)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    int count = add_transfers(plan, TAG_RESULTS, 1, false, round->back, round->returned, row_bytes,
                              cuda->transfers);
    return ra_comm_post(plan->comm, cuda->transfers, count, &round->request);
}

ra_status_t ra_moe_cuda_exchange_end(ra_moe_plan_t *plan, struct ra_moe_cuda_round *round)
{
    ra_status_t status = ra_comm_wait(round->request, ra_comm_deadline(plan->comm));
    ra_request_free(round->request);
    round->request = NULL;
    return status;
}

ra_status_t ra_moe_cuda_exchange_begin(ra_moe_plan_t *plan, const ra_moe_weights_t *weights,
                                       ra_moe_cuda_tokens_t home, struct ra_moe_cuda_round *round,
                                       ra_stream_t *stream)
{
    struct ra_moe_cuda_plan *cuda = plan->cuda;
    const int64_t hidden = plan->shape.hidden;
    const int64_t row_bytes = hidden * (plan->x_dtype == RA_F32 ? 4 : 2);
    ra_moe_cuda_visits_t visits = {.expert = home.expert,
                                   .rows = home.rows,
                                   .top_k = plan->shape.router.top_k,
                                   .experts = plan->shape.router.experts,
                                   .ranks = plan->ranks,
                                   .rank_begin = 0,
                                   .rank_count = plan->ranks,
                                   .tokens_before = cuda->tokens_before,
                                   .slots_before = cuda->slots_before,
                                   .totals = cuda->totals};
    RA_TRY(ra_moe_cuda_visits(&visits, ra_stream_cuda(stream)));
    RA_TRY(ra_moe_cuda_pack(&visits, plan->x_dtype, home.x, hidden, home.x_stride, cuda->send,
                            cuda->send_expert, round->result_at, ra_stream_cuda(stream)));
    RA_TRY(share_counts(plan, stream));
    RA_TRY(send_tokens(plan, weights, home, round->shared, row_bytes, stream));

    ra_moe_cuda_tokens_t visitors = {
        .x = cuda->received, .x_stride = hidden, .expert = cuda->received_expert};
    for (int p = 0; p < plan->ranks; p++) {
        visitors.rows += going(plan, p, plan->rank, 0);
    }
    RA_TRY(ra_moe_cuda_run_experts(plan, weights, visitors, stream));
    visits.expert = visitors.expert;
    visits.rows = visitors.rows;
    visits.rank_begin = plan->rank;
    visits.rank_count = 1;
    RA_TRY(ra_moe_cuda_visits(&visits, ra_stream_cuda(stream)));
    RA_TRY(ra_moe_cuda_unsort(&visits, plan->x_dtype, cuda->position, cuda->out, hidden,
                              round->back, ra_stream_cuda(stream)));
    return return_results(plan, round, row_bytes);
}
