/* Ranks are threads of this process and transfers name host memory. */
#include "comm/thread_world.h"

static ra_status_t local_open(int size, ra_transport_t **ends_p);
static ra_status_t local_copy_open(int size, ra_transport_t **ends_p);
static ra_status_t local_order_open(int size, ra_transport_t **ends_p);

const ra_transport_ops_t ra_transport_local = {
    .name = "local",
    .doc = "ranks are threads of this process; blocks are handed over without copying",
    .lends = true,
    .open = local_open,
    RA_THREAD_SLOTS};

const ra_transport_ops_t ra_transport_local_copy = {
    .name = "local-copy",
    .doc = "as local, but every block is copied, as transports between processes must",
    .open = local_copy_open,
    RA_THREAD_SLOTS};

const ra_transport_ops_t ra_transport_local_order = {
    .name = "local-order",
    .doc =
        "as local-copy, groups one after another and without tags, as nccl: shows who would hang",
    .in_order = true,
    .open = local_order_open,
    RA_THREAD_SLOTS};

static ra_status_t local_open(int size, ra_transport_t **ends_p)
{
    static const ra_thread_row_t row = {.ops = &ra_transport_local};
    return ra_thread_world_open(&row, size, ends_p);
}

static ra_status_t local_copy_open(int size, ra_transport_t **ends_p)
{
    static const ra_thread_row_t row = {.ops = &ra_transport_local_copy};
    return ra_thread_world_open(&row, size, ends_p);
}

static ra_status_t local_order_open(int size, ra_transport_t **ends_p)
{
    static const ra_thread_row_t row = {.ops = &ra_transport_local_order};
    return ra_thread_world_open(&row, size, ends_p);
}
