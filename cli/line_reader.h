/**
 * @file  cli/line_reader.h
 * @brief Lines of a stream with number, offset and a limit on their length.
 */
#ifndef RA_CLI_LINE_READER_H
#define RA_CLI_LINE_READER_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_line_reader {
    int fd;           /**< borrowed */
    const char *name; /**< borrowed, for messages */
    int64_t max_bytes;
    char *chunk;
    int64_t chunk_used, chunk_at;
    int64_t bytes_read; /**< of all lines so far */

    char *line; /**< the current line without its newline; a zero byte follows */
    int64_t length;
    int64_t capacity;
    int64_t number;  /**< 1-based */
    int64_t offset;  /**< of its first byte */
    bool too_long;   /**< longer than max_bytes: only its start is in `line` */
    bool terminated; /**< a newline followed */
} ra_line_reader_t;

/** @retval RA_ERR_NOMEM */
ra_status_t ra_line_reader_open(ra_line_reader_t *reader, int fd, const char *name,
                                int64_t max_bytes);
void ra_line_reader_close(ra_line_reader_t *reader);
/**
 * Read the next line. *end_p is set when nothing is left.
 * @retval RA_ERR_INPUT  read failed.  @retval RA_ERR_STOPPED, RA_ERR_INTERRUPTED  by a signal
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_line_reader_next(ra_line_reader_t *reader, bool *end_p);

#endif
