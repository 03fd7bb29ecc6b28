/**
 * @file  tests/cli/cli_support.h
 * @brief A temporary folder, small files in it, and runs of the command with their output.
 */
#ifndef RA_TESTS_CLI_CLI_SUPPORT_H
#define RA_TESTS_CLI_CLI_SUPPORT_H

#include "base/status.h"
#include "tests/test_support.h"
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEST_MODEL "configs/models/ring-tiny-linear"

/** The folder of the running test; made by test_folder_make(), the test's setup function. */
static char test_folder[256];

enum { TEST_PATHS_MAX = 8192 };
static char *test_path_kept[TEST_PATHS_MAX];
static int test_paths;

static inline int test_folder_make(void **state)
{
    (void)state;
    strcpy(test_folder, "/tmp/ra_cli_XXXXXX");
    return mkdtemp(test_folder) != NULL ? 0 : -1;
}

static inline int test_remove_entry(const char *path, const struct stat *info, int kind,
                                    struct FTW *where)
{
    (void)info, (void)kind, (void)where;
    return remove(path);
}

static inline int test_folder_remove(void **state)
{
    (void)state;
    while (test_paths > 0) {
        free(test_path_kept[--test_paths]);
    }
    return nftw(test_folder, test_remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

/** "<folder>/<name>"; lives until the folder is removed. */
static inline const char *test_path(const char *name)
{
    char path[1024];
    snprintf(path, sizeof(path), "%.255s/%.500s", test_folder, name);
    for (int i = 0; i < test_paths; i++) {
        if (strcmp(test_path_kept[i], path) == 0) {
            return test_path_kept[i];
        }
    }
    assert_true(test_paths < TEST_PATHS_MAX);
    test_path_kept[test_paths] = strdup(path);
    return test_path_kept[test_paths++];
}

static inline const char *test_write(const char *name, const void *bytes, size_t count)
{
    const char *path = test_path(name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
    return path;
}

static inline const char *test_write_text(const char *name, const char *text)
{
    return test_write(name, text, strlen(text));
}

/** Contents of a file with a zero byte behind; the caller frees. NULL when there is none. */
static inline char *test_read(const char *path, size_t *count)
{
    if (count != NULL) {
        *count = 0;
    }
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return NULL;
    }
    size_t used = 0, capacity = 4096;
    char *bytes = malloc(capacity + 1);
    while (bytes != NULL) {
        size_t n = fread(bytes + used, 1, capacity - used, file);
        used += n;
        if (n == 0) {
            break;
        }
        if (used == capacity) {
            capacity *= 2;
            bytes = realloc(bytes, capacity + 1);
        }
    }
    fclose(file);
    assert_non_null(bytes);
    bytes[used] = '\0';
    if (count != NULL) {
        *count = used;
    }
    return bytes;
}

static inline int test_count_lines(const char *text)
{
    int lines = 0;
    for (const char *at = text; (at = strchr(at, '\n')) != NULL; at++) {
        lines++;
    }
    return lines;
}

/** What a run of the command left. */
typedef struct run {
    int exit_code; /**< -1 when a signal ended it */
    int signal;
    char *out, *err;
} run_t;

/** How a run differs from a plain one; all zero is plain. */
typedef struct run_how {
    const char *stdout_path;      /**< instead of a captured file */
    void (*prepare)(void);        /**< called in the child */
    const char *const *variables; /**< {name, value, ..., NULL} */
} run_how_t;

static inline pid_t run_start(const char *binary, const char *const *argv, const run_how_t *how)
{
    const char *out = how->stdout_path != NULL ? how->stdout_path : test_path("run.out");
    const char *err = test_path("run.err");
    const char *full[64] = {binary};
    for (int i = 0; argv[i] != NULL; i++) {
        assert_true(i < 60);
        full[i + 1] = argv[i];
    }
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        int out_fd = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        int err_fd = open(err, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (out_fd < 0 || err_fd < 0 || dup2(out_fd, 1) < 0 || dup2(err_fd, 2) < 0) {
            _exit(99);
        }
        for (int i = 0; how->variables != NULL && how->variables[i] != NULL; i += 2) {
            setenv(how->variables[i], how->variables[i + 1], 1);
        }
        if (how->prepare != NULL) {
            how->prepare();
        }
        execv(binary, (char *const *)(uintptr_t)full);
        _exit(99);
    }
    assert_true(child > 0);
    return child;
}

static inline run_t run_finish(pid_t child)
{
    int status;
    run_t run = {.exit_code = -1};
    while (waitpid(child, &status, 0) < 0) {
        assert_int_equal(errno, EINTR);
    }
    if (WIFEXITED(status)) {
        run.exit_code = WEXITSTATUS(status);
    } else {
        run.signal = WTERMSIG(status);
    }
    run.out = test_read(test_path("run.out"), NULL);
    run.err = test_read(test_path("run.err"), NULL);
    return run;
}

static inline void run_free(run_t *run)
{
    free(run->out);
    free(run->err);
    *run = (run_t){0};
}

#endif
