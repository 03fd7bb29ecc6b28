/**
 * @file  model/pass_memory.h
 * @brief Internal to model/: what a pass takes of each device: predicted, held against what is
 * free, and seen afterwards.
 *
 * Every rank first makes its plan on a counting device (base/device.h), so that sizes are written
 * once, where the memory is taken. Predicted is the sum over the ranks of a device, and what is in
 * use of it when the pass begins: weights and streams, on a GPU also its context, libraries and
 * other programs. What a GPU takes beside that is code loaded at a kernel's first launch.
 */
#ifndef RA_MODEL_PASS_MEMORY_H
#define RA_MODEL_PASS_MEMORY_H

#include "base/device.h"
#include "comm/comm.h"
#include <stdatomic.h>

/** One device of a session during a pass. Zero to start with. */
typedef struct ra_place_memory {
    atomic_llong asked[2];   /**< by its ranks; of plans that gather keys, and that do not */
    atomic_llong used, live; /**< most before anything was allocated (ra_device_memory_t) */
    atomic_llong free;       /**< least then */
    atomic_llong predicted;  /**< of used, at the end */
    atomic_llong peak;       /**< of used, of what was seen */
    atomic_bool told;        /**< a line about it has been logged */
} ra_place_memory_t;

/** Before the ranks start. */
void ra_place_memory_reset(ra_place_memory_t *place, ra_device_t *device);

/** A rank has all that it keeps between passes, and nothing of this one: before it asks. */
ra_status_t ra_place_memory_look(ra_place_memory_t *place, ra_device_t *device);
/**
 * Collective: each rank asks for @a bytes of its device, before it allocates anything.
 * @param walk    which of the two plans.
 * @param limit   most bytes of a device that may be in use; 0: what is free.
 * @param fits_p  whether all ranks' devices have room.
 */
ra_status_t ra_place_memory_ask(ra_place_memory_t *place, const ra_device_t *device,
                                ra_comm_t *comm, bool walk, int64_t bytes, int64_t limit,
                                bool *fits_p);
/** Why no plan fits. @return RA_ERR_NOMEM; RA_ERR_PEER where it is another rank's device. */
ra_status_t ra_place_memory_refuse(ra_place_memory_t *place, const ra_device_t *device,
                                   int64_t limit);
/**
 * Before a rank takes what it asked for. All ranks' parts come from one reserve of the device,
 * which is there for the next pass again: new memory costs milliseconds a pass, calls of the driver
 * on a GPU, pages on the CPU. ra_device_reserve_end() when the rank has freed all it took.
 */
void ra_place_memory_take(ra_place_memory_t *place, ra_device_t *device, bool walk);
/** A rank has run, and still has all it took. */
ra_status_t ra_place_memory_see(ra_place_memory_t *place, ra_device_t *device);

/** *most = max(*most, value), from any thread. */
void ra_raise_to(atomic_llong *most, int64_t value);

#endif
