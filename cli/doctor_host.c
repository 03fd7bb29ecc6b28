#include "cli/doctor.h"

#include <gnu/libc-version.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

/* First line of a small file without its newline; false when it cannot be read. */
static bool read_line(const char *path, char *out, size_t size)
{
    FILE *file = fopen(path, "re");
    bool got = file != NULL && fgets(out, (int)size, file) != NULL;
    if (file != NULL) {
        fclose(file);
    }
    if (got) {
        out[strcspn(out, "\n")] = '\0';
    }
    return got;
}

/* The number behind "key" of /proc/meminfo, in bytes. */
static int64_t meminfo(const char *key)
{
    char line[256];
    int64_t bytes = -1;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file != NULL && bytes < 0 && fgets(line, sizeof(line), file) != NULL) {
        if (strncmp(line, key, strlen(key)) == 0) {
            bytes = strtoll(line + strlen(key), NULL, 10) * 1024;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return bytes;
}

static void read_cpu(char *out, size_t size)
{
    char line[512];
    snprintf(out, size, "unknown CPU");
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(out, size, "%.200s", colon + 2);
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

/* Limits of this process's control group: version 2, then version 1. */
static void read_cgroup(ra_host_t *host)
{
    static const char *const memory[] = {"/sys/fs/cgroup/memory.max",
                                         "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    char line[128];
    long long quota, period;
    host->cgroup_limit = -1;
    host->cgroup_cpus = -1;
    for (size_t i = 0; i < RA_ARRAY_LEN(memory) && host->cgroup_limit < 0; i++) {
        if (read_line(memory[i], line, sizeof(line)) && line[0] >= '0' && line[0] <= '9') {
            long long limit = strtoll(line, NULL, 10);
            host->cgroup_limit = limit < (1LL << 60) ? limit : -1;
        }
    }
    if (read_line("/sys/fs/cgroup/cpu.max", line, sizeof(line)) &&
        sscanf(line, "%lld %lld", &quota, &period) == 2 && period > 0) {
        host->cgroup_cpus = (double)quota / (double)period;
    }
}

static int64_t limit_of(__rlimit_resource_t which)
{
    struct rlimit limit;
    if (getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
        return -1;
    }
    return (int64_t)limit.rlim_cur;
}

void ra_host_look(ra_host_t *host)
{
    struct utsname names;
    cpu_set_t mask;
    memset(host, 0, sizeof(*host));
    if (uname(&names) == 0) {
        snprintf(host->name, sizeof(host->name), "%.200s", names.nodename);
        snprintf(host->kernel, sizeof(host->kernel), "%.100s", names.release);
    }
    snprintf(host->libc, sizeof(host->libc), "glibc %s", gnu_get_libc_version());
    read_cpu(host->cpu, sizeof(host->cpu));
    host->cores_online = (int)sysconf(_SC_NPROCESSORS_ONLN);
    host->cores_allowed =
        sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : host->cores_online;
    host->memory_bytes = meminfo("MemTotal:");
    host->memory_available = meminfo("MemAvailable:");
    read_cgroup(host);
    host->lockable_bytes = limit_of(RLIMIT_MEMLOCK);
    host->open_files = limit_of(RLIMIT_NOFILE);
}
