#include "cli/line_reader.h"

#include "base/checked.h"
#include "cli/signals.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK_BYTES = 256 << 10 };

ra_status_t ra_line_reader_open(ra_line_reader_t *reader, int fd, const char *name,
                                int64_t max_bytes)
{
    *reader = (ra_line_reader_t){.fd = fd, .name = name, .max_bytes = max_bytes};
    reader->chunk = malloc(CHUNK_BYTES);
    return reader->chunk != NULL ? RA_OK
                                 : ra_fail(RA_ERR_NOMEM, "input", "cannot allocate a read buffer");
}

void ra_line_reader_close(ra_line_reader_t *reader)
{
    free(reader->chunk);
    free(reader->line);
    reader->chunk = reader->line = NULL;
}

static ra_status_t refill(ra_line_reader_t *reader)
{
    for (;;) {
        ssize_t n = read(reader->fd, reader->chunk, CHUNK_BYTES);
        if (n >= 0) {
            reader->chunk_used = n;
            reader->chunk_at = 0;
            return RA_OK;
        }
        if (errno != EINTR) {
            return ra_fail(RA_ERR_INPUT, "input", "cannot read %s at byte %lld: %s", reader->name,
                           (long long)reader->bytes_read, strerror(errno));
        }
        RA_TRY(ra_signals_status());
    }
}

static ra_status_t append(ra_line_reader_t *reader, const char *bytes, int64_t count)
{
    int64_t room = reader->max_bytes - reader->length;
    if (count > room) {
        reader->too_long = true;
        count = room;
    }
    if (reader->length + count + 1 > reader->capacity) {
        int64_t capacity = ra_max_i64(reader->length + count + 1, reader->capacity * 2);
        char *line = realloc(reader->line, (size_t)capacity);
        if (line == NULL) {
            return ra_fail(RA_ERR_NOMEM, "input", "%s:%lld: cannot hold a line of %lld bytes",
                           reader->name, (long long)reader->number, (long long)capacity);
        }
        reader->line = line;
        reader->capacity = capacity;
    }
    memcpy(reader->line + reader->length, bytes, (size_t)count);
    reader->length += count;
    reader->line[reader->length] = '\0';
    return RA_OK;
}

ra_status_t ra_line_reader_next(ra_line_reader_t *reader, bool *end_p)
{
    reader->number++;
    reader->offset = reader->bytes_read;
    reader->length = 0;
    reader->too_long = reader->terminated = false;
    RA_TRY(append(reader, "", 0));
    while (!reader->terminated) {
        if (reader->chunk_at == reader->chunk_used) {
            RA_TRY(refill(reader));
            if (reader->chunk_used == 0) {
                break;
            }
        }
        const char *start = reader->chunk + reader->chunk_at;
        int64_t left = reader->chunk_used - reader->chunk_at;
        const char *newline = memchr(start, '\n', (size_t)left);
        int64_t count = newline != NULL ? newline - start : left;
        RA_TRY(append(reader, start, count));
        reader->terminated = newline != NULL;
        count += reader->terminated;
        reader->chunk_at += count;
        reader->bytes_read += count;
    }
    *end_p = reader->bytes_read == reader->offset;
    return RA_OK;
}
