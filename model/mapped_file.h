/**
 * @file  model/mapped_file.h
 * @brief A file mapped for reading that may shrink without killing the process.
 *
 * Touching a page behind the new end of a mapped file that became shorter raises SIGBUS. Every
 * mapping makes sure of a handler (process-wide; other faults go to the one before it) that puts
 * zero pages there and marks the file as broken. Readers then see zeros; nobody may believe their
 * results before ra_mapped_file_verify() said that the file is as it was. A write to the file that
 * keeps its size is detected by its modification time.
 */
#ifndef RA_MODEL_MAPPED_FILE_H
#define RA_MODEL_MAPPED_FILE_H

#include "base/status.h"
#include <stdint.h>

typedef struct ra_mapped_file ra_mapped_file_t;

/**
 * Map a regular file.
 * @retval RA_ERR_USAGE nothing exists at @a path.  @retval RA_ERR_INPUT not a regular file, not
 * readable.  @retval RA_ERR_NOMEM it cannot be mapped, or too many files are.
 */
ra_status_t ra_mapped_file_open(const char *path, ra_mapped_file_t **file_p);
/** The same for an open descriptor, which it owns from now on, whatever it returns. */
ra_status_t ra_mapped_file_adopt(int fd, const char *path, ra_mapped_file_t **file_p);
/** Accepts NULL. */
void ra_mapped_file_close(ra_mapped_file_t *file);

/** First byte, page aligned; NULL for an empty file. */
const unsigned char *ra_mapped_file_bytes(const ra_mapped_file_t *file);
int64_t ra_mapped_file_length(const ra_mapped_file_t *file);

/** @retval RA_ERR_INPUT  the file was changed after it was mapped. */
ra_status_t ra_mapped_file_verify(const ra_mapped_file_t *file);

#endif
