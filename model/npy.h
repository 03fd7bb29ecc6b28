/**
 * @file  model/npy.h
 * @brief Token files in (.npy, .bin), one-dimensional .npy arrays out.
 *
 * .npy: NumPy format 1.0, 2.0 or 3.0, one dimension, little endian <u2 <u4 <i4 <i8, C order.
 * .bin: 256 little-endian int32 {magic, version, count, unused...}, then count ids: magic 20240520
 * version 1 holds u16, magic 20240801 version 7 holds u32 (the files of llm.c).
 *
 * A file that is shorter or longer than its header says is refused, so is an id that is negative or
 * does not fit int32. Every refusal is RA_ERR_INPUT and names the file, the place and the cause.
 */
#ifndef RA_MODEL_NPY_H
#define RA_MODEL_NPY_H

#include "base/status.h"
#include <stdint.h>

/**
 * Read a token file; the kind follows from its first bytes.
 * @param max_bytes  Larger files are refused before anything is allocated.
 * @param tokens_p   [*count_p], caller frees; never NULL on success.
 * @retval RA_ERR_USAGE nothing exists at @a path.
 */
ra_status_t ra_tokens_read_file(const char *path, int64_t max_bytes, int32_t **tokens_p,
                                int64_t *count_p);
/** The same for bytes in memory; @a name stands in messages. */
ra_status_t ra_tokens_parse(const char *name, const void *bytes, int64_t length, int32_t **tokens_p,
                            int64_t *count_p);

/** Write a one-dimensional array ("<f4", "<u4"), atomically (model/file_io.h).
 * @retval RA_ERR_OUTPUT with the reason. */
ra_status_t ra_npy_write_f32(const char *path, const float *values, int64_t count);
ra_status_t ra_npy_write_u32(const char *path, const uint32_t *values, int64_t count);

/** Read a one-dimensional "<f4" array. @param values_p [*count_p], caller frees. Errors as
 * ra_tokens_read_file(). */
ra_status_t ra_npy_read_f32(const char *path, int64_t max_bytes, float **values_p,
                            int64_t *count_p);

#endif
