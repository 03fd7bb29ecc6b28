#include "model/mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAPPINGS_MAX = 4096 };

/* Written under `lock`, read by the signal handler without it: end is 0 while a slot is free, and
 * set last (release) so that a handler that sees it sees the start too. */
typedef struct mapping {
    atomic_uintptr_t start, end;
    atomic_int broken;
} mapping_t;

struct ra_mapped_file {
    unsigned char *bytes;
    int64_t length;
    int fd;
    mapping_t *mapping; /* NULL for an empty file */
    struct timespec modified;
    char path[];
};

static mapping_t mappings[MAPPINGS_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous_action;
static uintptr_t page_bytes;

/* Async-signal-safe: atomics and one mmap system call. */
static bool repair(uintptr_t address)
{
    for (int i = 0; i < MAPPINGS_MAX; i++) {
        uintptr_t end = atomic_load_explicit(&mappings[i].end, memory_order_acquire);
        uintptr_t start = atomic_load_explicit(&mappings[i].start, memory_order_relaxed);
        if (end == 0 || address < start || address >= end) {
            continue;
        }
        atomic_store(&mappings[i].broken, 1);
        uintptr_t page = address / page_bytes * page_bytes;
        void *fixed = mmap((void *)page, end - page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        return fixed != MAP_FAILED;
    }
    return false;
}

static void on_bus_error(int signal_number, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    if (!repair((uintptr_t)info->si_addr)) {
        if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
            previous_action.sa_sigaction(signal_number, info, context);
        } else {
            /* returning faults again, now into what was installed before */
            sigaction(SIGBUS, &previous_action, NULL);
        }
    }
    errno = saved_errno;
}

/* At every mapping: a library loaded since may have replaced the handler. */
static ra_status_t install_handler(void)
{
    struct sigaction current;
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    sigemptyset(&action.sa_mask);
    int failed = sigaction(SIGBUS, NULL, &current);
    bool ours = (current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_bus_error;
    if (!failed && !ours) {
        previous_action = current;
        failed = sigaction(SIGBUS, &action, NULL);
    }
    if (failed) {
        return ra_fail(RA_ERR_INTERNAL, "file", "cannot install a SIGBUS handler: %s",
                       strerror(errno));
    }
    return RA_OK;
}

static ra_status_t register_mapping(ra_mapped_file_t *file)
{
    ra_status_t status = RA_ERR_NOMEM;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAPPINGS_MAX && file->mapping == NULL; i++) {
        if (atomic_load(&mappings[i].end) == 0) {
            file->mapping = &mappings[i];
        }
    }
    if (file->mapping != NULL) {
        status = install_handler();
    } else {
        ra_fail(status, "file", "%s: more than %d files are mapped", file->path, MAPPINGS_MAX);
    }
    if (status == RA_OK) {
        uintptr_t start = (uintptr_t)file->bytes;
        uintptr_t pages = ((uintptr_t)file->length + page_bytes - 1) / page_bytes;
        atomic_store(&file->mapping->broken, 0);
        atomic_store_explicit(&file->mapping->start, start, memory_order_relaxed);
        atomic_store_explicit(&file->mapping->end, start + pages * page_bytes,
                              memory_order_release);
    } else {
        file->mapping = NULL;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

static ra_status_t map_bytes(ra_mapped_file_t *file)
{
    if (file->length == 0) {
        return RA_OK;
    }
    void *bytes = mmap(NULL, (size_t)file->length, PROT_READ, MAP_PRIVATE, file->fd, 0);
    if (bytes == MAP_FAILED) {
        return ra_fail(RA_ERR_NOMEM, "file", "%s: its %lld bytes cannot be mapped: %s", file->path,
                       (long long)file->length, strerror(errno));
    }
    file->bytes = bytes;
    return register_mapping(file);
}

ra_status_t ra_mapped_file_adopt(int fd, const char *path, ra_mapped_file_t **file_p)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return ra_fail(RA_ERR_INPUT, "file", "%s: not a regular file", path);
    }
    size_t path_bytes = strlen(path) + 1;
    ra_mapped_file_t *file = calloc(1, sizeof(*file) + path_bytes);
    if (file == NULL) {
        close(fd);
        return ra_fail(RA_ERR_NOMEM, "file", "%s: no memory to open it", path);
    }
    file->fd = fd;
    file->length = info.st_size;
    file->modified = info.st_mtim;
    memcpy(file->path, path, path_bytes);
    ra_status_t status = map_bytes(file);
    if (status != RA_OK) {
        ra_mapped_file_close(file);
        return status;
    }
    *file_p = file;
    return RA_OK;
}

ra_status_t ra_mapped_file_open(const char *path, ra_mapped_file_t **file_p)
{
    /* O_NONBLOCK: opening a pipe must not wait for its writer before it is refused */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        ra_status_t status = errno == ENOENT || errno == ENOTDIR ? RA_ERR_USAGE : RA_ERR_INPUT;
        return ra_fail(status, "file", "%s: cannot be opened: %s", path, strerror(errno));
    }
    return ra_mapped_file_adopt(fd, path, file_p);
}

void ra_mapped_file_close(ra_mapped_file_t *file)
{
    if (file == NULL) {
        return;
    }
    if (file->mapping != NULL) {
        atomic_store(&file->mapping->end, 0);
    }
    if (file->bytes != NULL) {
        munmap(file->bytes, (size_t)file->length);
    }
    close(file->fd);
    free(file);
}

const unsigned char *ra_mapped_file_bytes(const ra_mapped_file_t *file)
{
    return file->bytes;
}

int64_t ra_mapped_file_length(const ra_mapped_file_t *file)
{
    return file->length;
}

ra_status_t ra_mapped_file_verify(const ra_mapped_file_t *file)
{
    struct stat info;
    bool broken = file->mapping != NULL && atomic_load(&file->mapping->broken) != 0;
    if (fstat(file->fd, &info) != 0 || broken || info.st_size != file->length) {
        return ra_fail(RA_ERR_INPUT, "file",
                       "%s: became shorter or longer while in use (it had "
                       "%lld bytes)",
                       file->path, (long long)file->length);
    }
    if (info.st_mtim.tv_sec != file->modified.tv_sec ||
        info.st_mtim.tv_nsec != file->modified.tv_nsec) {
        return ra_fail(RA_ERR_INPUT, "file", "%s: was written to while in use", file->path);
    }
    return RA_OK;
}
