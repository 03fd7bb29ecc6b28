/**
 * @file  model/file_io.h
 * @brief Whole files in, whole files out: bounded reads, and writes that a crash cannot halve.
 *
 * A written file appears under its name only when it is complete and on the disk: it is written
 * under a temporary name in the same directory, fsynced, renamed, and the directory is fsynced.
 */
#ifndef RA_MODEL_FILE_IO_H
#define RA_MODEL_FILE_IO_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum { RA_PATH_MAX = 4096 };

/** out = directory + "/" + name. @retval RA_ERR_USAGE the result is longer than a path may be. */
ra_status_t ra_path_join(const char *directory, const char *name, char out[RA_PATH_MAX]);

/**
 * Is @a name one path component of [A-Za-z0-9._-] that ends in @a suffix and is longer than it?
 * Names found inside files must pass before they are opened: no directories, no surprises.
 */
bool ra_file_name_plain(const char *name, const char *suffix);

/**
 * Read a regular file as a whole into memory of malloc(); one zero byte follows the contents.
 * @param max_bytes  Larger files are refused before anything is allocated.
 * @param bytes_p    Caller frees.
 * @retval RA_ERR_USAGE  nothing exists at @a path.
 * @retval RA_ERR_INPUT  not a regular file, not readable, larger than @a max_bytes, or it changed
 *                       size while being read.
 */
ra_status_t ra_file_read(const char *path, int64_t max_bytes, char **bytes_p, int64_t *length_p);

/** A file being written under a temporary name. All zero is "none". */
typedef struct ra_file_writer {
    int fd;
    char path[RA_PATH_MAX];
    char temporary[RA_PATH_MAX];
} ra_file_writer_t;

/** Create the temporary file beside @a path. @retval RA_ERR_OUTPUT with the system's reason. */
ra_status_t ra_file_writer_open(ra_file_writer_t *writer, const char *path);
/** Write @a length bytes at @a offset; any order, safe from several threads at once. */
ra_status_t ra_file_writer_put(ra_file_writer_t *writer, const void *bytes, int64_t length,
                               int64_t offset);
/** fsync, rename over the final name, fsync the directory. On failure the old file stays. */
ra_status_t ra_file_writer_commit(ra_file_writer_t *writer);
/** Drop the temporary file. Does nothing after a commit. */
void ra_file_writer_abort(ra_file_writer_t *writer);

/** The four steps above for one piece of memory. */
ra_status_t ra_file_write_atomic(const char *path, const void *bytes, int64_t length);

/** Create one directory (0777 less the umask); one that exists is fine. @retval RA_ERR_OUTPUT */
ra_status_t ra_directory_make(const char *path);

#endif
