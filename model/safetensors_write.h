/**
 * @file  model/safetensors_write.h
 * @brief Write one safetensors file: declare the tensors, begin, put the data in any order, commit.
 *
 * The data lies in the order of declaration without holes and begins at a multiple of 4096 bytes
 * (spaces pad the header), so that a first tensor of whole pages can be read directly. The file
 * appears under its name at commit, complete and on the disk, or not at all (model/file_io.h).
 *
 * Declare tensors of wider elements first where an aligned address matters to readers.
 */
#ifndef RA_MODEL_SAFETENSORS_WRITE_H
#define RA_MODEL_SAFETENSORS_WRITE_H

#include "base/dtype.h"
#include "base/status.h"
#include <stdint.h>

typedef struct ra_safetensors_writer ra_safetensors_writer_t;

/** @param path  Final name; copied. @retval RA_ERR_NOMEM */
ra_status_t ra_safetensors_writer_create(const char *path, ra_safetensors_writer_t **writer_p);
/** Accepts NULL. Without a commit nothing is left on the disk. */
void ra_safetensors_writer_destroy(ra_safetensors_writer_t *writer);

/**
 * Declare a tensor.
 * @param name     1 to 512 printable ASCII characters without '"' and '\'; used once.
 * @param index_p  Number of the tensor for ra_safetensors_writer_put(): 0, 1, 2, ...
 * @retval RA_ERR_INVALID  the name, rank or extents are not allowed, or it has begun.
 */
ra_status_t ra_safetensors_writer_declare(ra_safetensors_writer_t *writer, const char *name,
                                          ra_dtype_t dtype, int32_t rank, const int64_t *extent,
                                          int64_t *index_p);
/** Add a pair to "__metadata__"; the same characters are allowed as in names. */
ra_status_t ra_safetensors_writer_metadata(ra_safetensors_writer_t *writer, const char *key,
                                           const char *value);

/** Create the temporary file and write the header. @retval RA_ERR_OUTPUT with the reason. */
ra_status_t ra_safetensors_writer_begin(ra_safetensors_writer_t *writer);
/**
 * Write @a length bytes at byte @a offset of a tensor. Any order, each byte once; safe from several
 * threads at once. @retval RA_ERR_OUTPUT with the reason.
 */
ra_status_t ra_safetensors_writer_put(ra_safetensors_writer_t *writer, int64_t index,
                                      int64_t offset, const void *bytes, int64_t length);
/**
 * Finish. @retval RA_ERR_INVALID fewer or more bytes were put than declared.
 * @retval RA_ERR_OUTPUT with the reason; no file is left.
 */
ra_status_t ra_safetensors_writer_commit(ra_safetensors_writer_t *writer);

/** Size of the file, known after begin. */
int64_t ra_safetensors_writer_bytes(const ra_safetensors_writer_t *writer);

#endif
