#include "cli/input_rows.h"

#include "base/log.h"
#include "cli/json_write.h"
#include "cli/line_reader.h"
#include "cli/row_content.h"
#include "model/file_io.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct ra_rows {
    char path[RA_PATH_MAX];
    char folder[RA_PATH_MAX]; /* of the input, for relative "path" members */
    char name[RA_PATH_MAX];   /* escaped, so that it may stand in an id */
    ra_file_kind_t kind;
    int64_t max_doc_bytes;
    int64_t bytes_total;
    ra_id_map_t seen;
    int fd; /* of a JSONL file, else -1 */
    ra_line_reader_t reader;
    bool whole_file_given;
};

const char *ra_row_error_code(ra_row_error_t error)
{
    static const char *const codes[] = {
#define RA_ROW_ERROR_CODE(name, code) code,
        RA_ROW_ERROR_MAP(RA_ROW_ERROR_CODE)
#undef RA_ROW_ERROR_CODE
    };
    return codes[error];
}

static ra_status_t check_path(ra_rows_t *rows)
{
    struct stat info;
    if (stat(rows->path, &info) != 0) {
        return ra_fail(RA_ERR_USAGE, "input", "--in %s: %s", rows->path, strerror(errno));
    }
    if (S_ISDIR(info.st_mode)) {
        return ra_fail(RA_ERR_USAGE, "input", "--in %s is a directory; name a file", rows->path);
    }
    if (rows->kind == RA_FILE_UNKNOWN) {
        return ra_fail(RA_ERR_USAGE, "input",
                       "--in %s: unknown kind of file; known are .jsonl, .ndjson, .json, .txt, "
                       ".npy and .bin",
                       rows->path);
    }
    rows->bytes_total = S_ISREG(info.st_mode) ? info.st_size : 0;
    return RA_OK;
}

static ra_status_t open_lines(ra_rows_t *rows, bool from_stdin)
{
    rows->fd = from_stdin ? dup(STDIN_FILENO) : open(rows->path, O_RDONLY | O_CLOEXEC);
    if (rows->fd < 0) {
        return ra_fail(RA_ERR_INPUT, "input", "cannot open %s: %s", rows->path, strerror(errno));
    }
    return ra_line_reader_open(&rows->reader, rows->fd, rows->name, rows->max_doc_bytes);
}

ra_status_t ra_rows_open(const char *path, int64_t max_doc_bytes, ra_rows_t **rows_p)
{
    bool from_stdin = strcmp(path, "-") == 0;
    if (strlen(path) >= RA_PATH_MAX) {
        return ra_fail(RA_ERR_USAGE, "input", "--in: a path of %zu bytes is too long",
                       strlen(path));
    }
    ra_rows_t *rows = calloc(1, sizeof(*rows));
    if (rows == NULL) {
        return ra_fail(RA_ERR_NOMEM, "input", "cannot allocate the reader of %s", path);
    }
    const char *slash = strrchr(path, '/');
    const char *name = from_stdin ? "stdin" : slash != NULL ? slash + 1 : path;
    int folder_bytes = slash != NULL ? (int)(slash - path) : 0;
    snprintf(rows->path, sizeof(rows->path), "%s", path);
    snprintf(rows->folder, sizeof(rows->folder), "%.*s", folder_bytes, path);
    if (slash == NULL || folder_bytes == 0) {
        strcpy(rows->folder, slash == NULL ? "." : "/");
    }
    ra_log_escape(name, rows->name, sizeof(rows->name));
    rows->kind = from_stdin ? RA_FILE_JSONL : ra_file_kind(path);
    rows->max_doc_bytes = max_doc_bytes;
    rows->fd = -1;

    ra_status_t status = from_stdin ? RA_OK : check_path(rows);
    if (status == RA_OK && rows->kind == RA_FILE_JSONL) {
        status = open_lines(rows, from_stdin);
    }
    if (status != RA_OK) {
        ra_rows_close(rows);
        return status;
    }
    *rows_p = rows;
    return RA_OK;
}

void ra_rows_close(ra_rows_t *rows)
{
    if (rows == NULL) {
        return;
    }
    ra_line_reader_close(&rows->reader);
    if (rows->fd >= 0) {
        close(rows->fd);
    }
    ra_id_map_free(&rows->seen);
    free(rows);
}

static void drop_content(ra_row_t *row)
{
    free(row->text);
    free(row->tokens);
    row->text = NULL;
    row->tokens = NULL;
    row->count = 0;
}

void ra_row_free(ra_row_t *row)
{
    drop_content(row);
    free(row->id);
    *row = (ra_row_t){0};
}

void ra_row_fail(ra_row_t *row, ra_row_error_t error, const char *format, ...)
{
    char raw[sizeof(row->message)];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof(raw), format, args);
    va_end(args);
    ra_log_escape(raw, row->message, sizeof(row->message));
    row->error = error;
    drop_content(row);
}

void ra_row_place(const ra_rows_t *rows, const ra_row_t *row, char *out, size_t out_size)
{
    if (row->line > 0) {
        snprintf(out, out_size, "%.256s:%lld (id \"%.256s\")", rows->name, (long long)row->line,
                 row->id);
    } else {
        snprintf(out, out_size, "%.512s", rows->path);
    }
}

void ra_row_write_id(FILE *out, const ra_row_t *row)
{
    if (row->id_is_number) {
        fputs(row->id, out);
    } else {
        ra_json_write_string(out, row->id);
    }
}

static bool is_blank(const char *line)
{
    return line[strspn(line, " \t\r")] == '\0';
}

static ra_status_t name_row(const ra_rows_t *rows, ra_row_t *row)
{
    int printed = row->line > 0 ? asprintf(&row->id, "%s:%lld", rows->name, (long long)row->line)
                                : asprintf(&row->id, "%s", rows->name);
    if (printed < 0) {
        row->id = NULL;
        return ra_fail(RA_ERR_NOMEM, "input", "cannot name a row");
    }
    return RA_OK;
}

static ra_status_t next_line_row(ra_rows_t *rows, ra_row_t *row, bool *end_p)
{
    ra_line_reader_t *reader = &rows->reader;
    const char *line;
    int64_t length;
    do {
        RA_TRY(ra_line_reader_next(reader, end_p));
        if (*end_p) {
            return RA_OK;
        }
        line = reader->line;
        length = reader->length;
        if (reader->number == 1 && strncmp(line, "\xef\xbb\xbf", 3) == 0) {
            line += 3; /* a byte order mark, which some editors put first */
            length -= 3;
        }
    } while ((int64_t)strlen(line) == length && is_blank(line));

    row->line = reader->number;
    row->offset = reader->offset;
    RA_TRY(name_row(rows, row));
    if (reader->too_long) {
        ra_row_fail(row, RA_ROW_TOO_LONG, "line longer than the %lld bytes of --max-doc-bytes",
                    (long long)rows->max_doc_bytes);
    } else {
        RA_TRY(ra_row_parse(row, line, length, rows->folder, rows->max_doc_bytes));
    }
    bool fresh;
    RA_TRY(ra_id_map_add(&rows->seen, row->id, row->digest, &fresh));
    if (!fresh && row->error == RA_ROW_NONE) {
        ra_row_fail(row, RA_ROW_DUPLICATE_ID, "an earlier row has the same id");
    }
    return RA_OK;
}

ra_status_t ra_rows_next(ra_rows_t *rows, ra_row_t *row, bool *end_p)
{
    *row = (ra_row_t){0};
    *end_p = false;
    ra_status_t status;
    if (rows->kind == RA_FILE_JSONL) {
        status = next_line_row(rows, row, end_p);
    } else if (rows->whole_file_given) {
        *end_p = true;
        return RA_OK;
    } else {
        rows->whole_file_given = true;
        status = name_row(rows, row);
        if (status == RA_OK) {
            status = ra_row_load_file(row, rows->path, rows->max_doc_bytes);
        }
    }
    if (status != RA_OK) {
        ra_row_free(row);
    }
    return status;
}

const char *ra_rows_name(const ra_rows_t *rows)
{
    return rows->name;
}

bool ra_rows_is_whole_file(const ra_rows_t *rows)
{
    return rows->kind != RA_FILE_JSONL;
}

int64_t ra_rows_bytes_read(const ra_rows_t *rows)
{
    if (rows->kind == RA_FILE_JSONL) {
        return rows->reader.bytes_read;
    }
    return rows->whole_file_given ? rows->bytes_total : 0;
}

int64_t ra_rows_bytes_total(const ra_rows_t *rows)
{
    return rows->bytes_total;
}
