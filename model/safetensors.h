/**
 * @file  model/safetensors.h
 * @brief Read one safetensors file: a mapped file, every claim of its header checked.
 *
 * Format: u64 N (little endian), N bytes of JSON {"name": {"dtype", "shape", "data_offsets":
 * [begin, end]}, ..., "__metadata__": {string: string}}, then the data, row-major and little
 * endian; offsets count from the end of the header. White space may surround the JSON.
 *
 * Refused: a file that does not hold its header; N above 8 MiB; anything json_check.h refuses, at
 * depth > 8; a number that is not a plain non-negative integer below 2^53; a dtype outside
 * base/dtype.h; more than 8 dimensions; products that overflow; a byte count that is not the
 * product; data that overlaps, leaves a hole or does not end with the file; names that are empty,
 * longer than 512 bytes or hold control bytes; more than 1,000,000 tensors; metadata that is not
 * strings or exceeds 1 MiB. An empty tensor needs a dimension of 0.
 *
 * A tensor's address need not be a multiple of its element size: check before reading it as such.
 */
#ifndef RA_MODEL_SAFETENSORS_H
#define RA_MODEL_SAFETENSORS_H

#include "base/status.h"
#include "base/tensor.h"
#include <stdint.h>

enum {
    RA_SAFETENSORS_MAX_HEADER = 8 << 20,
    RA_SAFETENSORS_MAX_TENSORS = 1000000,
    RA_SAFETENSORS_MAX_NAME = 512,
    RA_SAFETENSORS_MAX_METADATA = 1 << 20
};

typedef struct ra_safetensors ra_safetensors_t;

/** One tensor; name and data belong to the file. */
typedef struct ra_safetensors_entry {
    const char *name;
    ra_tensor_t view;
    int64_t bytes;
} ra_safetensors_entry_t;

/** @retval RA_ERR_USAGE nothing exists there.  @retval RA_ERR_INPUT file, tensor and cause. */
ra_status_t ra_safetensors_open(const char *path, ra_safetensors_t **file_p);
/** The same for an open descriptor, which it owns from now on, whatever it returns. */
ra_status_t ra_safetensors_adopt(int fd, const char *path, ra_safetensors_t **file_p);
/** The same for bytes in memory, which must outlive it. */
ra_status_t ra_safetensors_parse(const char *name, const void *bytes, int64_t length,
                                 ra_safetensors_t **file_p);
/** Accepts NULL. Every view dies with it. */
void ra_safetensors_close(ra_safetensors_t *file);

const char *ra_safetensors_path(const ra_safetensors_t *file);
/** Tensors in ascending order of their names. */
int64_t ra_safetensors_count(const ra_safetensors_t *file);
const ra_safetensors_entry_t *ra_safetensors_at(const ra_safetensors_t *file, int64_t index);
/** @return NULL when there is no tensor of that name. O(log n). */
const ra_safetensors_entry_t *ra_safetensors_find(const ra_safetensors_t *file, const char *name);
/** Value of a key of "__metadata__", NULL when absent. */
const char *ra_safetensors_metadata(const ra_safetensors_t *file, const char *key);

/** All bytes of the file, header included. */
const unsigned char *ra_safetensors_bytes(const ra_safetensors_t *file, int64_t *length);
/** ra_mapped_file_verify(). */
ra_status_t ra_safetensors_verify(const ra_safetensors_t *file);

#endif
