/**
 * @file  model/checkpoint.h
 * @brief The tensors of a model directory: model.safetensors, or shards behind an index.
 *
 * model.safetensors.index.json maps every tensor to the file that holds it. A file name must match
 * [A-Za-z0-9._-]+\.safetensors and be a regular file of that directory, or a symbolic link of the
 * form ../../blobs/<name> (the Hugging Face cache: snapshots point to blobs of the same
 * repository). Every mapped tensor must be in its file, and in no other; tensors of the files that
 * the index does not name are not part of the checkpoint, and reported as a warning.
 */
#ifndef RA_MODEL_CHECKPOINT_H
#define RA_MODEL_CHECKPOINT_H

#include "base/status.h"
#include "model/safetensors.h"
#include <stdint.h>

typedef struct ra_checkpoint ra_checkpoint_t;

/**
 * @retval RA_ERR_USAGE  @a model_dir does not exist, or holds neither file.
 * @retval RA_ERR_INPUT  refused; the message names file, tensor and cause.
 */
ra_status_t ra_checkpoint_open(const char *model_dir, ra_checkpoint_t **checkpoint_p);
/** Accepts NULL. Every view dies with it. */
void ra_checkpoint_close(ra_checkpoint_t *checkpoint);

/** Tensors in ascending order of their names. */
int64_t ra_checkpoint_count(const ra_checkpoint_t *checkpoint);
const ra_safetensors_entry_t *ra_checkpoint_at(const ra_checkpoint_t *checkpoint, int64_t index);
/** Index of a tensor, -1 when there is none of that name. O(log n). */
int64_t ra_checkpoint_find(const ra_checkpoint_t *checkpoint, const char *name);
/** Path of the file that holds a tensor, for messages. */
const char *ra_checkpoint_file_of(const ra_checkpoint_t *checkpoint, int64_t index);

/** Files in ascending order of their names. */
int64_t ra_checkpoint_shards(const ra_checkpoint_t *checkpoint);
const ra_safetensors_t *ra_checkpoint_shard(const ra_checkpoint_t *checkpoint, int64_t index);

/** @retval RA_ERR_INPUT  a file changed after it was opened (model/mapped_file.h). */
ra_status_t ra_checkpoint_verify(const ra_checkpoint_t *checkpoint);

#endif
