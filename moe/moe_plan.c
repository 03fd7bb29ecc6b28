/* moe/moe_plan.c - a plan's buffers on the CPU, one allocation. */
#include "moe/moe_plan.h"
#include "base/checked.h"
#include "base/log.h"
#include <inttypes.h>
#include <stddef.h>
#include <string.h>

enum { BUFFER_ALIGN = 256 };

ra_status_t ra_moe_lay_out(void *owner, const ra_moe_buffer_t *buffers, size_t count, void *memory,
                           int64_t *bytes_p)
{
    int64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        int64_t bytes;
        if (!ra_mul_ok(buffers[i].rows, buffers[i].cols, &bytes) ||
            !ra_mul_ok(bytes, buffers[i].element, &bytes) ||
            !ra_add_ok(bytes, BUFFER_ALIGN - 1, &bytes)) {
            return ra_fail(RA_ERR_NOMEM, "moe",
                           "a buffer of %" PRId64 " rows does not fit in 63 bits", buffers[i].rows);
        }
        bytes -= bytes % BUFFER_ALIGN;
        if (memory != NULL) {
            void *address = (char *)memory + total;
            memcpy((char *)owner + buffers[i].member, &address, sizeof(address));
        }
        if (!ra_add_ok(total, bytes, &total)) {
            return ra_fail(RA_ERR_NOMEM, "moe", "buffers do not fit in 63 bits");
        }
    }
    *bytes_p = total;
    return RA_OK;
}

#define MEMBER(name) offsetof(ra_moe_plan_t, name)

ra_status_t ra_moe_cpu_allocate(ra_moe_plan_t *plan)
{
    const ra_moe_shape_t *shape = &plan->shape;
    const int64_t tile = plan->tile_rows, k = shape->router.top_k, experts = shape->router.experts;
    const int64_t slots = plan->max_slots, hidden = shape->hidden, width = shape->expert_width;
    const int64_t ranks = plan->comm != NULL ? plan->ranks : 0; /* 0: no exchange buffers */
    const int64_t mine = plan->comm != NULL ? tile : 0;
    const ra_moe_buffer_t buffers[] = {
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
    RA_TRY(ra_moe_lay_out(plan, buffers, RA_ARRAY_LEN(buffers), NULL, &plan->bytes));
    RA_TRY(ra_device_alloc(plan->device, plan->bytes, &plan->memory));
    return ra_moe_lay_out(plan, buffers, RA_ARRAY_LEN(buffers), plan->memory, &plan->bytes);
}

void ra_moe_cpu_free(ra_moe_plan_t *plan)
{
    ra_device_free(plan->device, plan->memory);
}
