#include "cli/model_choice.h"

#include "base/device.h"
#include "cli/launcher.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHIPPED "ring-tiny-linear"

static bool is_directory(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* <prefix>/bin/ringattn -> <prefix>/share/ringattn/models/<name> */
static bool find_installed(char out[RA_PATH_MAX])
{
    char self[RA_PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (length <= 0) {
        return false;
    }
    self[length] = '\0';
    for (int up = 0; up < 2; up++) {
        char *slash = strrchr(self, '/');
        if (slash == NULL) {
            return false;
        }
        *slash = '\0';
    }
    int written = snprintf(out, RA_PATH_MAX, "%s/share/ringattn/models/" SHIPPED, self);
    return written < RA_PATH_MAX && is_directory(out);
}

ra_status_t ra_model_choose(const ra_settings_t *settings, char out[RA_PATH_MAX])
{
    const char *given = ra_settings_text_or_null(settings, RA_SET_MODEL);
    if (given != NULL) {
        if (!is_directory(given)) {
            return ra_fail(RA_ERR_USAGE, "model", "--model %s: %s", given,
                           access(given, F_OK) == 0 ? "not a directory" : strerror(errno));
        }
        if (snprintf(out, RA_PATH_MAX, "%s", given) >= RA_PATH_MAX) {
            return ra_fail(RA_ERR_USAGE, "model", "--model: the path is too long");
        }
        return RA_OK;
    }
    if (find_installed(out)) {
        return RA_OK;
    }
    snprintf(out, RA_PATH_MAX, "%s", RA_SOURCE_DIR "/configs/models/" SHIPPED);
    if (is_directory(out)) {
        return RA_OK;
    }
    return ra_fail(RA_ERR_USAGE, "model",
                   "the shipped model " SHIPPED " is neither installed beside this program "
                   "(share/ringattn/models) nor in %s; name a model directory with --model",
                   RA_SOURCE_DIR "/configs/models");
}

ra_decay_factor_t ra_decay_factor_of(const ra_settings_t *settings)
{
    bool b = strcmp(ra_settings_text(settings, RA_SET_DECAY_FACTOR), "B") == 0;
    return b ? RA_DECAY_B : RA_DECAY_A;
}

ra_status_t ra_run_check(const ra_settings_t *settings)
{
    int count;
    RA_TRY(ra_launcher_check());
    return ra_device_count(ra_settings_text(settings, RA_SET_DEVICE), &count);
}

/* A seed is a whole number below 2^64. */
static ra_status_t read_seed(const char *text, uint64_t *seed_p)
{
    char *end = NULL;
    errno = 0;
    unsigned long long seed = strtoull(text, &end, 10);
    if (errno != 0 || *end != '\0' || text[0] < '0' || text[0] > '9') {
        return ra_fail(RA_ERR_USAGE, "model",
                       "--random-weights %s: a seed is a whole number from 0 to 2^64 - 1", text);
    }
    *seed_p = seed;
    return RA_OK;
}

ra_status_t ra_session_open_chosen(const ra_settings_t *settings, const char *model_dir,
                                   ra_session_t **session_p)
{
    const char *layout = ra_settings_text(settings, RA_SET_LAYOUT);
    const char *parallel = ra_settings_text(settings, RA_SET_EXPERT_PARALLEL);
    ra_session_options_t options;

    ra_session_options_default(&options);
    options.model_dir = model_dir;
    options.device = ra_settings_text(settings, RA_SET_DEVICE);
    options.dtype = ra_settings_text(settings, RA_SET_DTYPE);
    const char *seed = ra_settings_text_or_null(settings, RA_SET_RANDOM_WEIGHTS);
    if (seed != NULL) {
        RA_TRY(read_seed(seed, &options.seed));
        options.random_weights = true;
    }
    options.transport = ra_settings_text(settings, RA_SET_TRANSPORT);
    options.gemm_kernel = ra_settings_text(settings, RA_SET_GEMM_KERNEL);
    options.softmax_kernel = ra_settings_text(settings, RA_SET_SOFTMAX_KERNEL);
    options.linear_kernel = ra_settings_text(settings, RA_SET_LINEAR_KERNEL);
    options.layout = strcmp(layout, "auto") == 0 ? NULL : layout;
    options.decay_factor = ra_settings_text(settings, RA_SET_DECAY_FACTOR);
    options.ranks = (int)ra_settings_int(settings, RA_SET_RANKS);
    options.threads = (int)ra_settings_int(settings, RA_SET_THREADS);
    options.tile = ra_settings_int(settings, RA_SET_TILE);
    options.expert_parallel = strcmp(parallel, "on") == 0;
    options.reproducible = ra_settings_bool(settings, RA_SET_REPRODUCIBLE);
    options.memory_limit = ra_settings_int(settings, RA_SET_MEMORY_LIMIT);
    options.timeout_s = ra_settings_real(settings, RA_SET_TIMEOUT);
    options.trace_file = ra_settings_text_or_null(settings, RA_SET_TRACE);
    return ra_session_open(&options, session_p);
}
