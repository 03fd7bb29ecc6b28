#include "cli/job_dir.h"

#include "base/log.h"
#include "cli/job_resume.h"
#include "cli/json_write.h"
#include "model/file_io.h"
#include "model/npy.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct ra_job_dir {
    char path[RA_PATH_MAX];
    int lock_fd, scores_fd, errors_fd;
    int64_t stop_at_commit, commit_points; /* test hook: points passed so far */
    ra_job_done_t done;
};

/* A numbered place inside a commit where a test may pull the plug. */
static void commit_point(ra_job_dir_t *job)
{
    if (++job->commit_points == job->stop_at_commit) {
        raise(SIGKILL);
    }
}

static ra_status_t output_failed(const ra_job_dir_t *job, const char *name, const char *verb)
{
    return ra_fail(RA_ERR_OUTPUT, "output", "%s/%s cannot be %s: %s", job->path, name, verb,
                   strerror(errno));
}

/* A killed process holds its lock until the kernel has taken its memory apart, and who starts the
 * job again at once should not be told that it is in use. */
static int lock_within_seconds(int fd)
{
    enum { TRIES = 100 };
    const struct timespec pause = {.tv_nsec = 20000000};
    int failed = flock(fd, LOCK_EX | LOCK_NB);
    for (int i = 0; failed != 0 && errno == EWOULDBLOCK && i < TRIES; i++) {
        nanosleep(&pause, NULL);
        failed = flock(fd, LOCK_EX | LOCK_NB);
    }
    return failed;
}

static ra_status_t lock(ra_job_dir_t *job)
{
    char path[RA_PATH_MAX], holder[32] = "";
    RA_TRY(ra_path_join(job->path, ".lock", path));
    job->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (job->lock_fd < 0) {
        return output_failed(job, ".lock", "opened");
    }
    if (lock_within_seconds(job->lock_fd) != 0) {
        if (errno != EWOULDBLOCK) {
            return output_failed(job, ".lock", "locked");
        }
        ssize_t n = read(job->lock_fd, holder, sizeof(holder) - 1);
        holder[n > 0 ? n : 0] = '\0';
        holder[strcspn(holder, "\n")] = '\0';
        return ra_fail(RA_ERR_OUTPUT, "output", "%s is in use by process %s", job->path,
                       holder[0] != '\0' ? holder : "(unknown)");
    }
    int length = snprintf(holder, sizeof(holder), "%ld\n", (long)getpid());
    if (ftruncate(job->lock_fd, 0) != 0 ||
        pwrite(job->lock_fd, holder, (size_t)length, 0) != length) {
        return output_failed(job, ".lock", "written");
    }
    return RA_OK;
}

ra_status_t ra_job_dir_open(const char *path, int64_t stop_at_commit, ra_job_dir_t **job_p)
{
    if (strlen(path) + 64 >= RA_PATH_MAX) {
        return ra_fail(RA_ERR_OUTPUT, "output", "--out: a path of %zu bytes is too long",
                       strlen(path));
    }
    ra_job_dir_t *job = calloc(1, sizeof(*job));
    if (job == NULL) {
        return ra_fail(RA_ERR_NOMEM, "output", "cannot allocate the job of %s", path);
    }
    strcpy(job->path, path);
    job->lock_fd = job->scores_fd = job->errors_fd = -1;
    job->stop_at_commit = stop_at_commit;
    ra_status_t status = ra_directory_make(path);
    if (status == RA_OK) {
        status = lock(job);
    }
    if (status != RA_OK) {
        ra_job_dir_close(job);
        return status;
    }
    *job_p = job;
    return RA_OK;
}

void ra_job_dir_close(ra_job_dir_t *job)
{
    if (job == NULL) {
        return;
    }
    int fds[] = {job->scores_fd, job->errors_fd, job->lock_fd};
    for (size_t i = 0; i < RA_ARRAY_LEN(fds); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    ra_id_map_free(&job->done.ids);
    free(job);
}

static ra_status_t open_rows(ra_job_dir_t *job, const char *name, int flags, int *fd_p)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_path_join(job->path, name, path));
    *fd_p = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | flags, 0666);
    return *fd_p >= 0 ? RA_OK : output_failed(job, name, "opened");
}

/* Make new names in the directory survive a crash. */
static ra_status_t sync_directory(ra_job_dir_t *job)
{
    int fd = open(job->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int failed = fd < 0 || fsync(fd) != 0;
    ra_status_t status = failed ? output_failed(job, ".", "synced") : RA_OK;
    if (fd >= 0) {
        close(fd);
    }
    return status;
}

ra_status_t ra_job_dir_begin(ra_job_dir_t *job, const ra_job_identity_t *identity,
                             const char *model_dir, const char *input, ra_summary_t *summary)
{
    char path[RA_PATH_MAX];
    bool with_tokens = strcmp(identity->token_logprobs, "none") != 0;

    RA_TRY(ra_job_note_or_compare(job->path, identity, model_dir, input));
    RA_TRY(ra_job_remove_temporaries(job->path));
    if (with_tokens) {
        RA_TRY(ra_path_join(job->path, "tok", path));
        RA_TRY(ra_directory_make(path));
        RA_TRY(ra_job_remove_temporaries(path));
    }
    RA_TRY(open_rows(job, "scores.jsonl", 0, &job->scores_fd));
    RA_TRY(open_rows(job, "errors.jsonl", O_TRUNC, &job->errors_fd));
    RA_TRY(sync_directory(job));
    RA_TRY(ra_job_read_done(job->path, job->scores_fd, with_tokens, &job->done, summary));
    if (job->done.count > 0) {
        ra_log(RA_LOG_INFO, "output", "%s: %lld documents are done, going on (attempt %d)",
               job->path, (long long)job->done.count, ra_job_dir_attempt(job));
    }
    return RA_OK;
}

int ra_job_dir_attempt(const ra_job_dir_t *job)
{
    return job->done.last_attempt + 1;
}

bool ra_job_dir_has(const ra_job_dir_t *job, const char *id, ra_digest_t *document_p)
{
    return ra_id_map_find(&job->done.ids, id, document_p);
}

void ra_job_dir_token_file(const char *id, char out[64])
{
    char hex[RA_DIGEST_HEX];
    ra_digest_hex(ra_digest_of(id, (int64_t)strlen(id)), hex);
    snprintf(out, 64, "tok/%s.npy", hex);
}

/* One write() of the whole line. A line that fails half way is cut off again. */
static ra_status_t append_line(ra_job_dir_t *job, int fd, const char *name, const char *line,
                               int64_t bytes)
{
    struct stat before;
    if (fstat(fd, &before) != 0) {
        return output_failed(job, name, "examined");
    }
    for (int64_t done = 0; done < bytes;) {
        ssize_t n = write(fd, line + done, (size_t)(bytes - done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            ra_status_t status = output_failed(job, name, "written");
            if (ftruncate(fd, before.st_size) != 0) {
                ra_log(RA_LOG_WARN, "output", "%s/%s ends in a torn line; the next start drops it",
                       job->path, name);
            }
            return status;
        }
        done += n;
    }
    return RA_OK;
}

/* The commit point in the middle of a row leaves what a crash inside write() would. */
static void torn_row_point(ra_job_dir_t *job, const char *line, int64_t bytes)
{
    if (job->commit_points + 1 == job->stop_at_commit) {
        ssize_t ignored = write(job->scores_fd, line, (size_t)bytes / 2);
        (void)ignored;
    }
    commit_point(job);
}

ra_status_t ra_job_dir_commit(ra_job_dir_t *job, const char *id, const float *logprob,
                              int64_t count, const char *line, int64_t bytes)
{
    commit_point(job);
    if (logprob != NULL) {
        char name[64], path[RA_PATH_MAX];
        ra_job_dir_token_file(id, name);
        RA_TRY(ra_path_join(job->path, name, path));
        RA_TRY(ra_npy_write_f32(path, logprob, count));
    }
    commit_point(job);
    torn_row_point(job, line, bytes);
    RA_TRY(append_line(job, job->scores_fd, "scores.jsonl", line, bytes));
    commit_point(job);
    return RA_OK;
}

ra_status_t ra_job_dir_commit_error(ra_job_dir_t *job, const char *line, int64_t bytes)
{
    return append_line(job, job->errors_fd, "errors.jsonl", line, bytes);
}

ra_status_t ra_job_dir_sync(ra_job_dir_t *job)
{
    if (fdatasync(job->scores_fd) != 0) {
        return output_failed(job, "scores.jsonl", "synced");
    }
    if (fdatasync(job->errors_fd) != 0) {
        return output_failed(job, "errors.jsonl", "synced");
    }
    commit_point(job);
    return RA_OK;
}

ra_status_t ra_job_dir_write_summary(ra_job_dir_t *job, const char *json, int64_t bytes)
{
    char path[RA_PATH_MAX];
    RA_TRY(ra_path_join(job->path, "summary.json", path));
    return ra_file_write_atomic(path, json, bytes);
}
