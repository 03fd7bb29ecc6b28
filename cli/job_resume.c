#include "cli/job_resume.h"

#include "base/log.h"
#include "cli/json_write.h"
#include "cli/line_reader.h"
#include "cli/row_content.h"
#include "cli/version_info.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { JOB_FILE_MAX = 1 << 20, ROW_MAX = 16 << 20, FACTS = 7 };

/* One thing that must agree for two jobs to be the same. */
typedef struct fact {
    const char *key;
    char value[128];
} fact_t;

static void list_facts(const ra_job_identity_t *identity, fact_t fact[FACTS])
{
    const char *tokenizer = identity->tokenizer_digest;
    int n = 0;
#define FACT(name, ...)                                                                            \
    fact[n].key = (name);                                                                          \
    snprintf(fact[n++].value, sizeof(fact[0].value), __VA_ARGS__)
    FACT("model", "%s", identity->model_digest);
    FACT("tokenizer", "%s", tokenizer != NULL ? tokenizer : "none");
    FACT("bos", "%s", identity->bos);
    FACT("token_logprobs", "%s", identity->token_logprobs);
    FACT("decay_factor", "%s", identity->decay_factor);
    FACT("reproducible", "%s", identity->reproducible ? "on" : "off");
    FACT("tile", "%lld", (long long)identity->tile);
#undef FACT
}

static void write_escaped(FILE *out, const char *path)
{
    char escaped[RA_PATH_MAX];
    ra_log_escape(path, escaped, sizeof(escaped));
    ra_json_write_string(out, escaped);
}

static ra_status_t note(const char *path, const fact_t fact[FACTS], const char *model_dir,
                        const char *input)
{
    char *json = NULL, created[32];
    size_t bytes = 0;
    time_t now = time(NULL);
    struct tm utc;
    strftime(created, sizeof(created), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    FILE *out = open_memstream(&json, &bytes);
    if (out == NULL) {
        return ra_fail(RA_ERR_NOMEM, "output", "cannot compose %s", path);
    }
    fprintf(out, "{\"format\":\"ringattn-job/1\",\"created\":\"%s\",\"version\":\"%s\"", created,
            ra_version());
    for (int i = 0; i < FACTS; i++) {
        fprintf(out, ",\"%s\":", fact[i].key);
        ra_json_write_string(out, fact[i].value);
    }
    fputs(",\"model_dir\":", out);
    write_escaped(out, model_dir);
    fputs(",\"input\":", out);
    write_escaped(out, input);
    fputs("}\n", out);
    ra_status_t status = fclose(out) == 0
                             ? ra_file_write_atomic(path, json, (int64_t)bytes)
                             : ra_fail(RA_ERR_NOMEM, "output", "cannot compose %s", path);
    free(json);
    return status;
}

static ra_status_t compare(const char *path, const cJSON *root, const fact_t fact[FACTS])
{
    const cJSON *format = cJSON_IsObject(root) ? ra_json_member(root, "format") : NULL;
    if (!cJSON_IsString(format) || strncmp(format->valuestring, "ringattn-job/", 13) != 0) {
        return ra_fail(RA_ERR_INTEGRITY, "output", "%s is not a ringattn job", path);
    }
    if (strcmp(format->valuestring, "ringattn-job/1") != 0) {
        return ra_fail(RA_ERR_USAGE, "output", "%s: this program does not know format %s", path,
                       format->valuestring);
    }
    for (int i = 0; i < FACTS; i++) {
        const cJSON *member = ra_json_member(root, fact[i].key);
        if (!cJSON_IsString(member)) {
            return ra_fail(RA_ERR_INTEGRITY, "output", "%s is broken: it has no %s", path,
                           fact[i].key);
        }
        if (strcmp(member->valuestring, fact[i].value) != 0) {
            return ra_fail(RA_ERR_USAGE, "output",
                           "%s holds another job: its %s is %s, this one's is %s; choose another "
                           "--out",
                           path, fact[i].key, member->valuestring, fact[i].value);
        }
    }
    return RA_OK;
}

static ra_status_t read_and_compare(const char *path, const fact_t fact[FACTS])
{
    cJSON *root = NULL;
    ra_log_set_quiet(1);
    ra_status_t status = ra_json_read_file(path, JOB_FILE_MAX, &root);
    ra_log_set_quiet(0);
    if (status == RA_ERR_NOMEM) {
        return ra_fail(status, "output", "%s", ra_last_error());
    }
    if (status != RA_OK) {
        return ra_fail(RA_ERR_INTEGRITY, "output", "%s is broken: %s", path, ra_last_error());
    }
    status = compare(path, root, fact);
    cJSON_Delete(root);
    return status;
}

ra_status_t ra_job_note_or_compare(const char *dir, const ra_job_identity_t *identity,
                                   const char *model_dir, const char *input)
{
    char job_path[RA_PATH_MAX], scores_path[RA_PATH_MAX];
    fact_t fact[FACTS];
    struct stat info;
    RA_TRY(ra_path_join(dir, "job.json", job_path));
    RA_TRY(ra_path_join(dir, "scores.jsonl", scores_path));
    list_facts(identity, fact);
    if (lstat(job_path, &info) == 0) {
        return read_and_compare(job_path, fact);
    }
    if (errno != ENOENT) {
        return ra_fail(RA_ERR_OUTPUT, "output", "%s: %s", job_path, strerror(errno));
    }
    if (stat(scores_path, &info) == 0 && info.st_size > 0) {
        return ra_fail(RA_ERR_INTEGRITY, "output",
                       "%s has results but no job.json to say what they are", dir);
    }
    return note(job_path, fact, model_dir, input);
}

ra_status_t ra_job_remove_temporaries(const char *dir)
{
    DIR *listing = opendir(dir);
    if (listing == NULL) {
        return ra_fail(RA_ERR_OUTPUT, "output", "%s cannot be listed: %s", dir, strerror(errno));
    }
    ra_status_t status = RA_OK;
    for (struct dirent *entry = readdir(listing); entry != NULL; entry = readdir(listing)) {
        /* the names of ra_file_writer_open() */
        if (strstr(entry->d_name, ".npy.tmp-") == NULL &&
            strstr(entry->d_name, ".json.tmp-") == NULL) {
            continue;
        }
        if (unlinkat(dirfd(listing), entry->d_name, 0) != 0) {
            status = ra_fail(RA_ERR_OUTPUT, "output", "%s/%s cannot be removed: %s", dir,
                             entry->d_name, strerror(errno));
        }
    }
    closedir(listing);
    return status;
}

static ra_status_t broken_row(const char *dir, int64_t line, const char *why)
{
    return ra_fail(RA_ERR_INTEGRITY, "output", "%s/scores.jsonl:%lld is broken: %s", dir,
                   (long long)line, why);
}

static ra_status_t check_token_file(const char *dir, int64_t line, const cJSON *row)
{
    char path[RA_PATH_MAX];
    const cJSON *name = ra_json_member(row, "token_logprobs");
    if (!cJSON_IsString(name)) {
        return broken_row(dir, line, "it names no token_logprobs");
    }
    RA_TRY(ra_path_join(dir, name->valuestring, path));
    return access(path, F_OK) == 0 ? RA_OK : broken_row(dir, line, "its token file is missing");
}

static ra_status_t read_row(const char *dir, int64_t line, const cJSON *row, ra_job_done_t *done,
                            ra_summary_t *summary)
{
    const cJSON *id = ra_json_member(row, "id");
    const cJSON *document = ra_json_member(row, "document");
    ra_score_t score = {.bytes = -1};
    ra_digest_t digest;
    int64_t attempt;
    bool fresh;
    char number[32];
    bool is_number = ra_id_of_number(id, number);

    if (!cJSON_IsObject(row) || (!cJSON_IsString(id) && !is_number) || !cJSON_IsString(document) ||
        strncmp(document->valuestring, "xxh3:", 5) != 0 ||
        !ra_digest_parse(document->valuestring + 5, &digest)) {
        return broken_row(dir, line, "it has no id or no digest of its document");
    }
    ra_log_set_quiet(1);
    bool bad = ra_json_double("row", row, "nll", -1e300, 1e300, &score.nll) != RA_OK ||
               ra_json_int("row", row, "tokens", 0, RA_JSON_MAX_INT, &score.tokens) != RA_OK ||
               ra_json_int("row", row, "scored", 0, RA_JSON_MAX_INT, &score.scored) != RA_OK ||
               ra_json_int_or("row", row, "bytes", 0, RA_JSON_MAX_INT, -1, &score.bytes) != RA_OK ||
               ra_json_int("row", row, "attempt", 1, INT32_MAX, &attempt) != RA_OK;
    ra_log_set_quiet(0);
    if (bad) {
        return broken_row(dir, line, ra_last_error());
    }
    RA_TRY(ra_id_map_add(&done->ids, is_number ? number : id->valuestring, digest, &fresh));
    if (!fresh) {
        return broken_row(dir, line, "its id occurred before");
    }
    done->count++;
    done->last_attempt = attempt > done->last_attempt ? (int)attempt : done->last_attempt;
    return ra_summary_add(summary, &score);
}

static ra_status_t read_line(const char *dir, const ra_line_reader_t *reader, bool with_tokens,
                             ra_job_done_t *done, ra_summary_t *summary)
{
    cJSON *row = NULL;
    if (reader->too_long) {
        return broken_row(dir, reader->number, "it is too long");
    }
    ra_log_set_quiet(1);
    ra_status_t status = ra_json_parse("row", reader->line, reader->length, &row);
    ra_log_set_quiet(0);
    if (status == RA_ERR_NOMEM) {
        return ra_fail(status, "output", "%s", ra_last_error());
    }
    if (status != RA_OK) {
        return broken_row(dir, reader->number, ra_last_error());
    }
    status = read_row(dir, reader->number, row, done, summary);
    if (status == RA_OK && with_tokens) {
        status = check_token_file(dir, reader->number, row);
    }
    cJSON_Delete(row);
    return status;
}

ra_status_t ra_job_read_done(const char *dir, int scores_fd, bool with_tokens, ra_job_done_t *done,
                             ra_summary_t *summary)
{
    ra_line_reader_t reader;
    bool end = false;
    ra_status_t status = ra_line_reader_open(&reader, scores_fd, "scores.jsonl", ROW_MAX);
    while (status == RA_OK) {
        status = ra_line_reader_next(&reader, &end);
        if (status != RA_OK || end) {
            break;
        }
        if (!reader.terminated) {
            ra_log(RA_LOG_WARN, "output",
                   "%s/scores.jsonl: dropping a torn last line of %lld bytes", dir,
                   (long long)reader.length);
            if (ftruncate(scores_fd, reader.offset) != 0 || fsync(scores_fd) != 0) {
                status = ra_fail(RA_ERR_OUTPUT, "output", "%s/scores.jsonl cannot be cut: %s", dir,
                                 strerror(errno));
            }
            break;
        }
        status = read_line(dir, &reader, with_tokens, done, summary);
    }
    ra_line_reader_close(&reader);
    return status;
}
