#include "model/pass_memory.h"

#include "base/checked.h"
#include "base/log.h"
#include <stdlib.h>

static double mib(int64_t bytes)
{
    return (double)bytes / 1048576.0;
}

void ra_raise_to(atomic_llong *most, int64_t value)
{
    long long now = atomic_load(most);
    while (now < value && !atomic_compare_exchange_weak(most, &now, value)) {
    }
}

static void lower_to(atomic_llong *least, int64_t value)
{
    long long now = atomic_load(least);
    while (now > value && !atomic_compare_exchange_weak(least, &now, value)) {
    }
}

void ra_place_memory_reset(ra_place_memory_t *place, ra_device_t *device)
{
    atomic_llong *const sums[] = {&place->asked[0], &place->asked[1],  &place->used,
                                  &place->live,     &place->predicted, &place->peak};
    for (size_t i = 0; i < RA_ARRAY_LEN(sums); i++) {
        atomic_store(sums[i], 0);
    }
    atomic_store(&place->free, INT64_MAX);
    atomic_store(&place->told, false);
    ra_device_reset_peak(device);
}

/* Bytes that ranks may take. */
static int64_t room_of(ra_place_memory_t *place, int64_t limit)
{
    int64_t room = atomic_load(&place->free);
    return limit > 0 ? ra_min_i64(room, ra_max_i64(0, limit - atomic_load(&place->used))) : room;
}

static void tell(ra_place_memory_t *place, const ra_device_t *device)
{
    if (!atomic_exchange(&place->told, true)) {
        int64_t predicted = atomic_load(&place->predicted), used = atomic_load(&place->used);
        ra_log(RA_LOG_INFO, "session", "%s %d: %.1f MiB predicted, %.1f MiB of them in use before",
               ra_device_name(device), ra_device_index(device), mib(predicted), mib(used));
    }
}

static ra_status_t agree(ra_comm_t *comm, bool mine, bool *everybody)
{
    int size = ra_comm_size(comm);
    char here = mine, *all = calloc((size_t)size, 1);
    if (all == NULL) {
        return ra_fail(RA_ERR_NOMEM, "session", "cannot allocate answers of %d ranks", size);
    }
    ra_status_t status = ra_comm_allgather(comm, &here, 1, all);
    *everybody = true;
    for (int r = 0; r < size; r++) {
        *everybody = *everybody && all[r];
    }
    free(all);
    return status;
}

ra_status_t ra_place_memory_look(ra_place_memory_t *place, ra_device_t *device)
{
    ra_device_memory_t memory;
    RA_TRY(ra_device_memory(device, &memory));
    ra_raise_to(&place->used, memory.used);
    ra_raise_to(&place->live, memory.live);
    lower_to(&place->free, memory.free);
    return RA_OK;
}

ra_status_t ra_place_memory_ask(ra_place_memory_t *place, const ra_device_t *device,
                                ra_comm_t *comm, bool walk, int64_t bytes, int64_t limit,
                                bool *fits_p)
{
    atomic_fetch_add(&place->asked[walk], bytes);
    RA_TRY(ra_comm_barrier(comm)); /* all have asked and looked */
    int64_t asked = atomic_load(&place->asked[walk]);
    atomic_store(&place->predicted, atomic_load(&place->used) + asked);
    RA_TRY(agree(comm, asked <= room_of(place, limit), fits_p));
    if (*fits_p) {
        tell(place, device);
    }
    return RA_OK;
}

ra_status_t ra_place_memory_refuse(ra_place_memory_t *place, const ra_device_t *device,
                                   int64_t limit)
{
    int64_t predicted = atomic_load(&place->predicted), used = atomic_load(&place->used);
    if (predicted - used <= room_of(place, limit) || atomic_exchange(&place->told, true)) {
        return RA_ERR_PEER;
    }
    return ra_fail(RA_ERR_NOMEM, "session",
                   "%s %d: %.1f MiB asked for, %.1f MiB free beside %.1f MiB in use; use more "
                   "ranks, fewer tokens a pass, or --expert-parallel on",
                   ra_device_name(device), ra_device_index(device), mib(predicted - used),
                   mib(room_of(place, limit)), mib(used));
}

/* AddressSanitizer sees what is written beyond a block where each is an allocation of its own. */
#ifdef __SANITIZE_ADDRESS__
enum { RESERVES = 0 };
#else
enum { RESERVES = 1 };
#endif

void ra_place_memory_take(ra_place_memory_t *place, ra_device_t *device, bool walk)
{
    ra_device_reserve_begin(device, RESERVES ? atomic_load(&place->asked[walk]) : 0);
}

/* What was counted had its peak at any time, what was not only grows: code, pools of libraries. */
ra_status_t ra_place_memory_see(ra_place_memory_t *place, ra_device_t *device)
{
    ra_device_memory_t memory;
    RA_TRY(ra_device_memory(device, &memory));
    int64_t counted = atomic_load(&place->used) + memory.peak - atomic_load(&place->live);
    ra_raise_to(&place->peak, ra_max_i64(counted, memory.used));
    return RA_OK;
}
