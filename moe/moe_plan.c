#include "moe/moe_plan.h"

#include "base/checked.h"
#include "base/log.h"
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_TILE_ROWS = 512, BUFFER_ALIGN = 64 };

void ra_moe_expert_range(int32_t experts, int ranks, int rank, int32_t *first_p, int32_t *last_p)
{
    *first_p = (int32_t)((int64_t)experts * rank / ranks);
    *last_p = (int32_t)((int64_t)experts * (rank + 1) / ranks);
}

/* One buffer of a plan: [rows, cols] elements. */
typedef struct buffer {
    size_t member; /* offset of its pointer in the plan */
    int64_t rows, cols;
    size_t element;
} buffer_t;

/* Lays buffers out one after another; with plan->memory, also points the members into it. */
static bool lay_out(ra_moe_plan_t *plan, const buffer_t *buffers, size_t count)
{
    plan->bytes = 0;
    for (size_t i = 0; i < count; i++) {
        int64_t bytes;
        if (!ra_mul_ok(buffers[i].rows, buffers[i].cols, &bytes) ||
            !ra_mul_ok(bytes, (int64_t)buffers[i].element, &bytes) ||
            !ra_add_ok(bytes, BUFFER_ALIGN - 1, &bytes)) {
            return false;
        }
        bytes -= bytes % BUFFER_ALIGN;
        if (plan->memory != NULL) {
            void *address = (char *)plan->memory + plan->bytes;
            memcpy((char *)plan + buffers[i].member, &address, sizeof(address));
        }
        if (!ra_add_ok(plan->bytes, bytes, &plan->bytes)) {
            return false;
        }
    }
    return true;
}

#define MEMBER(name) offsetof(ra_moe_plan_t, name)

static ra_status_t allocate(ra_moe_plan_t *plan)
{
    const ra_moe_shape_t *shape = &plan->shape;
    const int64_t tile = plan->tile_rows, k = shape->router.top_k, experts = shape->router.experts;
    const int64_t slots = plan->max_slots, hidden = shape->hidden, width = shape->expert_width;
    const int64_t ranks = plan->comm != NULL ? plan->ranks : 0; /* 0: no exchange buffers */
    const int64_t mine = plan->comm != NULL ? tile : 0;
    const buffer_t buffers[] = {
        {MEMBER(logits), tile, experts, sizeof(float)},
        {MEMBER(expert), tile, k, sizeof(int32_t)},
        {MEMBER(weight), tile, k, sizeof(float)},
        {MEMBER(result_at), tile, k, sizeof(int64_t)},
        {MEMBER(shared_inner), tile, shape->shared_width, sizeof(float)},
        {MEMBER(shared_up), tile, shape->shared_width, sizeof(float)},
        {MEMBER(shared), tile, hidden, sizeof(float)},
        {MEMBER(slots), slots, 1, sizeof(ra_moe_slot_t)},
        {MEMBER(position), slots, 1, sizeof(int64_t)},
        {MEMBER(begin), experts + 1, 1, sizeof(int64_t)},
        {MEMBER(sorted), slots, hidden, sizeof(float)},
        {MEMBER(inner), slots, width, sizeof(float)},
        {MEMBER(up), slots, width, sizeof(float)},
        {MEMBER(outputs), slots, hidden, sizeof(float)},
        {MEMBER(jobs), experts + 1, 2, sizeof(ra_gemm_job_t)},
        {MEMBER(rank_rows), ranks, 1, sizeof(int64_t)},
        {MEMBER(all_experts), ranks * tile, k, sizeof(int32_t)},
        {MEMBER(send), mine * ra_min_i64(plan->ranks, k), hidden, sizeof(float)},
        {MEMBER(received), ranks * tile, hidden, sizeof(float)},
        {MEMBER(returned), mine * k, hidden, sizeof(float)},
        {MEMBER(send_bytes), ranks, 1, sizeof(int64_t)},
        {MEMBER(send_offset), ranks, 1, sizeof(int64_t)},
        {MEMBER(receive_bytes), ranks, 1, sizeof(int64_t)},
        {MEMBER(receive_offset), ranks, 1, sizeof(int64_t)},
    };
    if (!lay_out(plan, buffers, RA_ARRAY_LEN(buffers))) {
        return ra_fail(RA_ERR_NOMEM, "moe", "buffers of %" PRId64 " rows do not fit in 63 bits",
                       tile);
    }
    RA_TRY(ra_device_alloc(plan->device, plan->bytes, &plan->memory));
    lay_out(plan, buffers, RA_ARRAY_LEN(buffers));
    return RA_OK;
}

ra_status_t ra_moe_plan_create(const ra_moe_shape_t *shape, int64_t tile_rows, ra_device_t *device,
                               ra_comm_t *comm, ra_moe_plan_t **plan_p)
{
    RA_TRY(ra_router_check(&shape->router));
    if (shape->hidden < 1 || shape->expert_width < 1 || shape->shared_width < 0 || tile_rows < 0 ||
        tile_rows > INT32_MAX) {
        return ra_fail(RA_ERR_SHAPE, "moe",
                       "hidden %" PRId64 ", expert width %" PRId64 ", shared width %" PRId64
                       ", tile of %" PRId64 " rows",
                       shape->hidden, shape->expert_width, shape->shared_width, tile_rows);
    }
    if (ra_device_kind(device) != RA_DEVICE_CPU) {
        return ra_fail(RA_ERR_UNSUPPORTED, "moe", "experts run on the cpu, not on device '%s'",
                       ra_device_name(device));
    }
    ra_moe_plan_t *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return ra_fail(RA_ERR_NOMEM, "moe", "cannot allocate a plan");
    }
    bool exchanges = comm != NULL && ra_comm_size(comm) > 1;
    plan->shape = *shape;
    plan->device = device;
    plan->comm = exchanges ? comm : NULL;
    plan->ranks = exchanges ? ra_comm_size(comm) : 1;
    plan->rank = exchanges ? ra_comm_rank(comm) : 0;
    ra_moe_expert_range(shape->router.experts, plan->ranks, plan->rank, &plan->first, &plan->last);

    /* All rows of a round may choose the experts of one rank. */
    int64_t in_flight = tile_rows > 0 ? tile_rows : DEFAULT_TILE_ROWS;
    plan->tile_rows = ra_max_i64(in_flight / plan->ranks, 1);
    plan->max_slots =
        plan->tile_rows * plan->ranks * ra_min_i64(shape->router.top_k, plan->last - plan->first);
    ra_status_t status = allocate(plan);
    if (status != RA_OK) {
        ra_moe_plan_destroy(plan);
        return status;
    }
    *plan_p = plan;
    return RA_OK;
}

void ra_moe_plan_destroy(ra_moe_plan_t *plan)
{
    if (plan != NULL) {
        ra_device_free(plan->device, plan->memory);
        free(plan);
    }
}

int64_t ra_moe_plan_bytes(const ra_moe_plan_t *plan)
{
    return plan->bytes;
}
