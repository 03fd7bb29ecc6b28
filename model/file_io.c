#include "model/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

ra_status_t ra_path_join(const char *directory, const char *name, char out[RA_PATH_MAX])
{
    size_t length = strlen(directory);
    const char *slash = length > 0 && directory[length - 1] == '/' ? "" : "/";
    int written = snprintf(out, RA_PATH_MAX, "%s%s%s", directory, slash, name);
    if (written < 0 || written >= RA_PATH_MAX) {
        return ra_fail(RA_ERR_USAGE, "file", "%s/%s: the path is longer than %d bytes", directory,
                       name, RA_PATH_MAX - 1);
    }
    return RA_OK;
}

bool ra_file_name_plain(const char *name, const char *suffix)
{
    size_t length = strlen(name), tail = strlen(suffix);
    if (length <= tail || length > 255 || strcmp(name + length - tail, suffix) != 0) {
        return false;
    }
    for (size_t i = 0; i < length; i++) {
        char c = name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (!letter && !(c >= '0' && c <= '9') && strchr("._-", c) == NULL) {
            return false;
        }
    }
    return true;
}

static ra_status_t open_regular(const char *path, int64_t max_bytes, int *fd_p, int64_t *size_p)
{
    /* O_NONBLOCK: opening a pipe must not wait for its writer before it is refused */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        ra_status_t status = errno == ENOENT || errno == ENOTDIR ? RA_ERR_USAGE : RA_ERR_INPUT;
        return ra_fail(status, "file", "%s: cannot be opened: %s", path, strerror(errno));
    }
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return ra_fail(RA_ERR_INPUT, "file", "%s: not a regular file", path);
    }
    if (info.st_size > max_bytes) {
        close(fd);
        return ra_fail(RA_ERR_INPUT, "file", "%s: %lld bytes, more than the %lld allowed here",
                       path, (long long)info.st_size, (long long)max_bytes);
    }
    *fd_p = fd;
    *size_p = info.st_size;
    return RA_OK;
}

ra_status_t ra_file_read(const char *path, int64_t max_bytes, char **bytes_p, int64_t *length_p)
{
    int fd = -1;
    int64_t size = 0;
    RA_TRY(open_regular(path, max_bytes, &fd, &size));

    char *bytes = malloc((size_t)size + 1);
    if (bytes == NULL) {
        close(fd);
        return ra_fail(RA_ERR_NOMEM, "file", "%s: no memory for its %lld bytes", path,
                       (long long)size);
    }
    int64_t have = 0;
    while (have < size) {
        ssize_t got = read(fd, bytes + have, (size_t)(size - have));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            const char *cause = got < 0 ? strerror(errno) : "it became shorter while being read";
            free(bytes);
            close(fd);
            return ra_fail(RA_ERR_INPUT, "file", "%s: byte %lld: cannot be read: %s", path,
                           (long long)have, cause);
        }
        have += got;
    }
    close(fd);
    bytes[size] = '\0';
    *bytes_p = bytes;
    *length_p = size;
    return RA_OK;
}

static ra_status_t output_failed(const char *path, const char *verb)
{
    return ra_fail(RA_ERR_OUTPUT, "file", "%s: cannot be %s: %s", path, verb, strerror(errno));
}

ra_status_t ra_file_writer_open(ra_file_writer_t *writer, const char *path)
{
    static atomic_uint serial;
    writer->fd = -1;
    writer->temporary[0] = '\0';
    int written = snprintf(writer->path, sizeof(writer->path), "%s", path);
    if (written < 0 || written >= (int)sizeof(writer->path)) {
        return ra_fail(RA_ERR_OUTPUT, "file", "%s: the path is too long", path);
    }
    do {
        char name[RA_PATH_MAX];
        written = snprintf(name, sizeof(name), "%s.tmp-%ld-%u", path, (long)getpid(),
                           atomic_fetch_add(&serial, 1));
        if (written < 0 || written >= (int)sizeof(name)) {
            return ra_fail(RA_ERR_OUTPUT, "file", "%s: the path is too long", path);
        }
        writer->fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        memcpy(writer->temporary, name, sizeof(name));
    } while (writer->fd < 0 && errno == EEXIST);
    if (writer->fd < 0) {
        writer->temporary[0] = '\0';
        return output_failed(path, "created");
    }
    return RA_OK;
}

ra_status_t ra_file_writer_put(ra_file_writer_t *writer, const void *bytes, int64_t length,
                               int64_t offset)
{
    int64_t done = 0;
    while (done < length) {
        ssize_t put = pwrite(writer->fd, (const char *)bytes + done, (size_t)(length - done),
                             (off_t)(offset + done));
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return output_failed(writer->path, "written");
        }
        done += put;
    }
    return RA_OK;
}

static ra_status_t sync_directory_of(const char *path)
{
    char directory[RA_PATH_MAX];
    snprintf(directory, sizeof(directory), "%s", path);
    char *slash = strrchr(directory, '/');
    if (slash == NULL) {
        snprintf(directory, sizeof(directory), ".");
    } else {
        slash[slash == directory ? 1 : 0] = '\0';
    }
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return output_failed(directory, "opened");
    }
    /* EINVAL: a file system that keeps no directory entries to sync */
    int failed = fsync(fd) != 0 && errno != EINVAL;
    ra_status_t status = failed ? output_failed(directory, "synced") : RA_OK;
    close(fd);
    return status;
}

ra_status_t ra_file_writer_commit(ra_file_writer_t *writer)
{
    ra_status_t status = RA_OK;
    if (fsync(writer->fd) != 0) {
        status = output_failed(writer->path, "synced");
    }
    int closed = close(writer->fd);
    writer->fd = -1;
    if (status == RA_OK && closed != 0) {
        status = output_failed(writer->path, "closed");
    }
    if (status == RA_OK && rename(writer->temporary, writer->path) != 0) {
        status = output_failed(writer->path, "renamed into place");
    }
    if (status != RA_OK) {
        unlink(writer->temporary);
        return status;
    }
    writer->temporary[0] = '\0';
    return sync_directory_of(writer->path);
}

void ra_file_writer_abort(ra_file_writer_t *writer)
{
    if (writer->temporary[0] == '\0') {
        return;
    }
    if (writer->fd >= 0) {
        close(writer->fd);
    }
    unlink(writer->temporary);
    writer->fd = -1;
    writer->temporary[0] = '\0';
}

ra_status_t ra_file_write_atomic(const char *path, const void *bytes, int64_t length)
{
    ra_file_writer_t writer;
    RA_TRY(ra_file_writer_open(&writer, path));
    ra_status_t status = ra_file_writer_put(&writer, bytes, length, 0);
    if (status != RA_OK) {
        ra_file_writer_abort(&writer);
        return status;
    }
    return ra_file_writer_commit(&writer);
}

ra_status_t ra_directory_make(const char *path)
{
    struct stat info;
    if (mkdir(path, 0777) == 0 || (errno == EEXIST && stat(path, &info) == 0)) {
        return RA_OK;
    }
    return output_failed(path, "created");
}
