/** @file ring/ring_tags.h  @brief Message tags of this folder; order per (peer, tag) does the rest.
 */
#ifndef RA_RING_RING_TAGS_H
#define RA_RING_RING_TAGS_H

enum {
    RA_TAG_RING_BLOCK = 0x100, /**< key/value blocks going round */
    RA_TAG_RING_PREFIX,        /**< cached blocks from their owners */
    RA_TAG_RING_HALO,
    RA_TAG_RING_STATE,
    RA_TAG_RING_GATHER,
    RA_TAG_RING_KEYS /**< keys and values from their owners */
};

#endif
