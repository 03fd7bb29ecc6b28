/** @file tests/model/file_support.h  @brief Temporary files, and refusals with their messages. */
#ifndef RA_TESTS_MODEL_FILE_SUPPORT_H
#define RA_TESTS_MODEL_FILE_SUPPORT_H

#include "base/log.h"
#include "base/status.h"
#include "tests/test_support.h"

#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/** A directory of this test alone. */
typedef struct temp {
    char path[64];
} temp_t;

static inline temp_t temp_make(void)
{
    temp_t temp = {"/tmp/ra-test-XXXXXX"};
    assert_non_null(mkdtemp(temp.path));
    ra_log_set_quiet(1);
    return temp;
}

static inline int temp_remove_one(const char *path, const struct stat *info, int kind,
                                  struct FTW *walk)
{
    (void)info, (void)kind, (void)walk;
    return remove(path);
}

static inline void temp_remove(temp_t *temp)
{
    ra_log_set_quiet(0);
    nftw(temp->path, temp_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/** Path of a file of the directory; valid until the eighth next call. */
static inline const char *temp_path(const temp_t *temp, const char *name)
{
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", temp->path, name);
    return path;
}

static inline void temp_write(const temp_t *temp, const char *name, const void *bytes,
                              size_t length)
{
    FILE *file = fopen(temp_path(temp, name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, length, file), length);
    assert_int_equal(fclose(file), 0);
}

static inline void temp_write_text(const temp_t *temp, const char *name, const char *text)
{
    temp_write(temp, name, text, strlen(text));
}

static inline void temp_copy(const temp_t *temp, const char *name, const char *from)
{
    char block[65536];
    FILE *in = fopen(from, "rb"), *out = fopen(temp_path(temp, name), "wb");
    size_t n;
    assert_non_null(in);
    assert_non_null(out);
    while ((n = fread(block, 1, sizeof(block), in)) > 0) {
        assert_int_equal(fwrite(block, 1, n, out), n);
    }
    fclose(in);
    assert_int_equal(fclose(out), 0);
}

/** The status, and every given piece of the message (up to a NULL). */
static inline void refused(ra_status_t got, ra_status_t want, const char *const *pieces)
{
    if (got != want) {
        fail_msg("status %s, want %s (last message: %s)", ra_status_name(got), ra_status_name(want),
                 ra_last_error());
    }
    for (; *pieces != NULL; pieces++) {
        if (strstr(ra_last_error(), *pieces) == NULL) {
            fail_msg("the message lacks \"%s\": %s", *pieces, ra_last_error());
        }
    }
}

#define REFUSED(got, want, ...) refused(got, want, (const char *const[]){__VA_ARGS__, NULL})

static inline void accepted(ra_status_t got)
{
    if (got != RA_OK) {
        fail_msg("%s: %s", ra_status_name(got), ra_last_error());
    }
}

#endif
