#include "cli/progress.h"

#include "base/clock.h"
#include "cli/signals.h"
#include "model/session.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 200, TERMINAL_TICKS = 3, PLAIN_TICKS = 50 };

/* What the job has told; guarded by the mutex. */
typedef struct told {
    int64_t documents, failed;
    int64_t tokens_done, tokens_in_pass;
    int64_t bytes_skipped, bytes_done, bytes_in_pass;
} told_t;

struct ra_progress {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool stopping; /* guarded by the mutex */
    told_t told;
    bool shown, terminal, drawn;
    int64_t bytes_total;
    double start;
    const ra_session_t *session;
};

static void format_eta(double seconds, char out[32])
{
    long long s = seconds < 3.6e9 ? (long long)(seconds + 0.5) : 0;
    if (s >= 3600) {
        snprintf(out, 32, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(out, 32, "%lld:%02lld", s / 60, s % 60);
    }
}

static void show(ra_progress_t *progress, const told_t *told)
{
    char line[256], eta[32] = "?";
    double elapsed = ra_clock_s() - progress->start;
    double in_pass = told->tokens_in_pass > 0 ? ra_session_progress(progress->session) : 0;
    double tokens = (double)told->tokens_done + in_pass * (double)told->tokens_in_pass;
    double bytes = (double)told->bytes_done + in_pass * (double)told->bytes_in_pass;
    double total = (double)progress->bytes_total;
    double fresh = bytes - (double)told->bytes_skipped;

    if (total > 0 && fresh > 0) {
        format_eta(elapsed * (total - bytes) / fresh, eta);
    }
    int n = snprintf(line, sizeof(line), "%lld documents", (long long)told->documents);
    if (total > 0) {
        n += snprintf(line + n, sizeof(line) - (size_t)n, "  %5.1f%%", 100 * bytes / total);
    }
    n += snprintf(line + n, sizeof(line) - (size_t)n, "  %.0f tokens  %.0f tokens/s  eta %s",
                  tokens, elapsed > 0 ? tokens / elapsed : 0, eta);
    if (told->failed > 0) {
        snprintf(line + n, sizeof(line) - (size_t)n, "  %lld failed", (long long)told->failed);
    }
    fprintf(stderr, progress->terminal ? "\r\033[K%s" : "%s\n", line);
    fflush(stderr);
    progress->drawn = true;
}

static void *show_repeatedly(void *arg)
{
    ra_progress_t *progress = arg;
    int ticks = 0;
    pthread_mutex_lock(&progress->mutex);
    while (!progress->stopping) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += TICK_MS * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&progress->wake, &progress->mutex, &until);
        ra_signals_repeat();
        if (progress->shown && !progress->stopping &&
            ++ticks % (progress->terminal ? TERMINAL_TICKS : PLAIN_TICKS) == 0) {
            told_t told = progress->told;
            pthread_mutex_unlock(&progress->mutex);
            show(progress, &told);
            pthread_mutex_lock(&progress->mutex);
        }
    }
    pthread_mutex_unlock(&progress->mutex);
    return NULL;
}

ra_status_t ra_progress_start(bool shown, int64_t bytes_total, const ra_session_t *session,
                              ra_progress_t **progress_p)
{
    ra_progress_t *progress = calloc(1, sizeof(*progress));
    if (progress == NULL) {
        return ra_fail(RA_ERR_NOMEM, "progress", "cannot allocate the progress display");
    }
    progress->shown = shown;
    progress->terminal = isatty(STDERR_FILENO) != 0;
    progress->bytes_total = bytes_total;
    progress->session = session;
    progress->start = ra_clock_s();
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&progress->mutex, NULL);
    pthread_cond_init(&progress->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    if (pthread_create(&progress->thread, NULL, show_repeatedly, progress) != 0) {
        pthread_cond_destroy(&progress->wake);
        pthread_mutex_destroy(&progress->mutex);
        free(progress);
        return ra_fail(RA_ERR_NOMEM, "progress", "cannot start the progress thread");
    }
    *progress_p = progress;
    return RA_OK;
}

void ra_progress_stop(ra_progress_t *progress)
{
    if (progress == NULL) {
        return;
    }
    pthread_mutex_lock(&progress->mutex);
    progress->stopping = true;
    pthread_cond_signal(&progress->wake);
    pthread_mutex_unlock(&progress->mutex);
    pthread_join(progress->thread, NULL);
    if (progress->terminal && progress->drawn) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
    }
    pthread_cond_destroy(&progress->wake);
    pthread_mutex_destroy(&progress->mutex);
    free(progress);
}

void ra_progress_skip(ra_progress_t *progress, int64_t bytes)
{
    pthread_mutex_lock(&progress->mutex);
    progress->told.documents++;
    if (progress->told.tokens_done == 0 && progress->told.tokens_in_pass == 0) {
        progress->told.bytes_skipped = progress->told.bytes_done = bytes;
    }
    pthread_mutex_unlock(&progress->mutex);
}

void ra_progress_pass(ra_progress_t *progress, int64_t tokens, int64_t bytes)
{
    pthread_mutex_lock(&progress->mutex);
    progress->told.tokens_in_pass = tokens;
    progress->told.bytes_in_pass = bytes - progress->told.bytes_done;
    pthread_mutex_unlock(&progress->mutex);
}

void ra_progress_pass_done(ra_progress_t *progress, int64_t documents, int64_t failed)
{
    told_t *told = &progress->told;
    pthread_mutex_lock(&progress->mutex);
    told->documents = documents;
    told->failed = failed;
    told->tokens_done += told->tokens_in_pass;
    told->bytes_done += told->bytes_in_pass;
    told->tokens_in_pass = told->bytes_in_pass = 0;
    pthread_mutex_unlock(&progress->mutex);
}
