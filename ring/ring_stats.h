/**
 * @file  ring/ring_stats.h
 * @brief What a plan of this folder has spent since it was made.
 *
 * Times are the host's. On a GPU, where a call only queues work, they say nothing about the device:
 * ra_comm_waited() measures how long its stream stood still.
 */
#ifndef RA_RING_RING_STATS_H
#define RA_RING_RING_STATS_H

#include <stdint.h>

typedef struct ra_ring_stats {
    int64_t calls;
    int64_t total_ns;       /**< inside run(), this rank */
    int64_t wait_ns;        /**< of total_ns: waiting for transfers, nothing to compute (exposed) */
    int64_t received_bytes; /**< from other ranks, lent bytes included */
} ra_ring_stats_t;

#endif
