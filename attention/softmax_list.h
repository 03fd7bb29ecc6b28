/**
 * @file  attention/softmax_list.h
 * @brief A mask made ready for a kernel of a GPU once, for as many folds as there are layers.
 *
 * ra_softmax_fold() cuts its groups and spans into tiles and copies the list to the device at each
 * call. Callers that fold the same rows over the same keys again and again make the list once; a
 * fold is then one launch, and may also start from a state that was never written, write the
 * finished output, and wait for keys on the way (softmax_cuda.h).
 */
#ifndef RA_ATTENTION_SOFTMAX_LIST_H
#define RA_ATTENTION_SOFTMAX_LIST_H

#include "attention/softmax_cuda.h"
#include <stdbool.h>

typedef struct ra_softmax_list ra_softmax_list_t;

/** Whether @a kernel folds by lists: those of GPUs do. */
bool ra_softmax_uses_lists(const ra_softmax_kernel_t *kernel);
/** Whether @a kernel can wait for keys that are still arriving (ready, epoch, gate_keys). */
bool ra_softmax_waits_for_keys(const ra_softmax_kernel_t *kernel);

/**
 * @param kernel  one that uses lists.
 * @param block   as for ra_softmax_tiles_create(), and head_dim.
 * @param merge   as there: false keeps ra_softmax_fold()'s promise about bits.
 * @param stream  the copy to the device is queued here; borrowed, outlives the list.
 * Errors of ra_softmax_tiles_create(); RA_ERR_NOMEM for host or device memory.
 */
ra_status_t ra_softmax_list_create(const ra_softmax_kernel_t *kernel,
                                   const ra_softmax_block_t *block, bool merge, ra_stream_t *stream,
                                   ra_softmax_list_t **list_p);
/** Accepts NULL. On a GPU waits for the device. */
void ra_softmax_list_destroy(ra_softmax_list_t *list);
/** Queue @a call on the list's stream; call->layout and call->tiles are the list's business, and of
 * the block only rows, keys, heads, sizes, scale, dtype, q, k and v matter. */
ra_status_t ra_softmax_list_fold(const ra_softmax_list_t *list, const ra_softmax_cuda_call_t *call);

#endif
