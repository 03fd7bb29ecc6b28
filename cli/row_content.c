#include "cli/row_content.h"

#include "base/log.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include "model/npy.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

ra_file_kind_t ra_file_kind(const char *path)
{
    static const struct {
        const char *ending;
        ra_file_kind_t kind;
    } kinds[] = {{".jsonl", RA_FILE_JSONL}, {".ndjson", RA_FILE_JSONL}, {".json", RA_FILE_JSONL},
                 {".txt", RA_FILE_TEXT},    {".npy", RA_FILE_NPY},      {".bin", RA_FILE_BIN}};
    size_t length = strlen(path);
    for (size_t i = 0; i < RA_ARRAY_LEN(kinds); i++) {
        size_t ending = strlen(kinds[i].ending);
        if (length > ending && strcasecmp(path + length - ending, kinds[i].ending) == 0) {
            return kinds[i].kind;
        }
    }
    return RA_FILE_UNKNOWN;
}

bool ra_id_of_number(const cJSON *node, char out[32])
{
    double value = cJSON_IsNumber(node) ? node->valuedouble : NAN;
    if (!(fabs(value) <= (double)RA_JSON_MAX_INT) || value != floor(value)) {
        return false;
    }
    snprintf(out, 32, "%lld", (long long)value);
    return true;
}

/* Take over @a text of malloc(). */
static void take_text(ra_row_t *row, char *text, int64_t bytes)
{
    row->text = text;
    int64_t bad = ra_text_count(text, bytes, &row->counts);
    if (bad >= 0) {
        ra_row_fail(row, RA_ROW_BAD_UTF8, "invalid UTF-8 at byte %lld of the text", (long long)bad);
    } else if (bytes == 0) {
        ra_row_fail(row, RA_ROW_EMPTY_TEXT, "the text is empty");
    } else {
        row->digest = ra_digest_of(text, bytes);
    }
}

/* Take over @a tokens of malloc(). */
static void take_tokens(ra_row_t *row, int32_t *tokens, int64_t count)
{
    row->tokens = tokens;
    row->count = count;
    if (count == 0) {
        ra_row_fail(row, RA_ROW_NO_TOKENS, "there are no tokens");
        return;
    }
    row->digest = ra_digest_of(tokens, count * (int64_t)sizeof(*tokens));
}

static ra_status_t load_text(ra_row_t *row, const char *path, int64_t max_doc_bytes)
{
    char *text;
    int64_t bytes;
    RA_TRY(ra_file_read(path, max_doc_bytes, &text, &bytes));
    take_text(row, text, bytes);
    return RA_OK;
}

static ra_status_t load_tokens(ra_row_t *row, const char *path, int64_t max_doc_bytes)
{
    int32_t *tokens;
    int64_t count;
    RA_TRY(ra_tokens_read_file(path, max_doc_bytes, &tokens, &count));
    take_tokens(row, tokens, count);
    return RA_OK;
}

ra_status_t ra_row_load_file(ra_row_t *row, const char *path, int64_t max_doc_bytes)
{
    ra_file_kind_t kind = ra_file_kind(path);
    struct stat info;
    if (kind == RA_FILE_UNKNOWN || kind == RA_FILE_JSONL) {
        ra_row_fail(row, RA_ROW_BAD_FILE, "%.256s: a document is a .txt, .npy or .bin file", path);
        return RA_OK;
    }
    if (stat(path, &info) != 0) {
        ra_row_fail(row,
                    errno == ENOENT || errno == ENOTDIR ? RA_ROW_MISSING_FILE : RA_ROW_BAD_FILE,
                    "%.256s: %s", path, strerror(errno));
        return RA_OK;
    }
    if (info.st_size > max_doc_bytes) {
        ra_row_fail(row, RA_ROW_TOO_LONG, "%.256s: %lld bytes, over the %lld of --max-doc-bytes",
                    path, (long long)info.st_size, (long long)max_doc_bytes);
        return RA_OK;
    }
    ra_log_set_quiet(1);
    ra_status_t status = kind == RA_FILE_TEXT ? load_text(row, path, max_doc_bytes)
                                              : load_tokens(row, path, max_doc_bytes);
    ra_log_set_quiet(0);
    if (status == RA_ERR_NOMEM) {
        return ra_fail(status, "input", "%s", ra_last_error());
    }
    if (status != RA_OK) {
        ra_row_fail(row, RA_ROW_BAD_FILE, "%s", ra_last_error());
    }
    return RA_OK;
}

static ra_status_t parse_tokens(ra_row_t *row, const cJSON *array)
{
    int64_t count = 0, at = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, array)
    {
        count++;
    }
    int32_t *tokens = malloc((size_t)(count + 1) * sizeof(*tokens));
    if (tokens == NULL) {
        return ra_fail(RA_ERR_NOMEM, "input", "cannot hold %lld tokens", (long long)count);
    }
    cJSON_ArrayForEach(item, array)
    {
        double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (!(value >= 0 && value <= INT32_MAX) || value != (double)(int32_t)value) {
            free(tokens);
            ra_row_fail(row, RA_ROW_BAD_TOKEN, "token %lld is not an integer from 0 to %d",
                        (long long)at, INT32_MAX);
            return RA_OK;
        }
        tokens[at++] = (int32_t)value;
    }
    take_tokens(row, tokens, count);
    return RA_OK;
}

static ra_status_t parse_path(ra_row_t *row, const char *path, const char *folder,
                              int64_t max_doc_bytes)
{
    char joined[RA_PATH_MAX];
    int length = path[0] == '/' ? snprintf(joined, sizeof(joined), "%s", path)
                                : snprintf(joined, sizeof(joined), "%s/%s", folder, path);
    if (length >= (int)sizeof(joined)) {
        ra_row_fail(row, RA_ROW_MISSING_FILE, "a path of %d bytes is too long", length);
        return RA_OK;
    }
    return ra_row_load_file(row, joined, max_doc_bytes);
}

static ra_status_t parse_text(ra_row_t *row, const char *text)
{
    char *copy = strdup(text);
    if (copy == NULL) {
        return ra_fail(RA_ERR_NOMEM, "input", "cannot hold a text of %zu bytes", strlen(text));
    }
    take_text(row, copy, (int64_t)strlen(copy));
    return RA_OK;
}

static ra_status_t take_id(ra_row_t *row, const char *id, bool is_number)
{
    char *copy = strdup(id);
    if (copy == NULL) {
        return ra_fail(RA_ERR_NOMEM, "input", "cannot hold an id");
    }
    free(row->id);
    row->id = copy;
    row->id_is_number = is_number;
    return RA_OK;
}

static ra_status_t parse_id(ra_row_t *row, const cJSON *id)
{
    char number[32];
    if (id == NULL) {
        return RA_OK;
    }
    if (cJSON_IsString(id) && strlen(id->valuestring) <= RA_ID_MAX) {
        return take_id(row, id->valuestring, false);
    }
    if (ra_id_of_number(id, number)) {
        return take_id(row, number, true);
    }
    ra_row_fail(row, RA_ROW_BAD_ROW,
                "\"id\" is neither an integer nor a string of at most %d bytes", RA_ID_MAX);
    return RA_OK;
}

static ra_status_t parse_object(ra_row_t *row, const cJSON *object, const char *folder,
                                int64_t max_doc_bytes)
{
    if (!cJSON_IsObject(object)) {
        ra_row_fail(row, RA_ROW_BAD_ROW, "the row is not a JSON object");
        return RA_OK;
    }
    const cJSON *text = ra_json_member(object, "text");
    const cJSON *tokens = ra_json_member(object, "tokens");
    const cJSON *path = ra_json_member(object, "path");
    RA_TRY(parse_id(row, ra_json_member(object, "id")));
    if (row->error != RA_ROW_NONE) {
        return RA_OK;
    }
    if ((text != NULL) + (tokens != NULL) + (path != NULL) != 1) {
        ra_row_fail(row, RA_ROW_BAD_ROW,
                    "a row has exactly one of \"text\", \"tokens\" and \"path\"");
        return RA_OK;
    }
    if (cJSON_IsString(text)) {
        return parse_text(row, text->valuestring);
    }
    if (cJSON_IsArray(tokens)) {
        return parse_tokens(row, tokens);
    }
    if (cJSON_IsString(path)) {
        return parse_path(row, path->valuestring, folder, max_doc_bytes);
    }
    ra_row_fail(row, RA_ROW_BAD_ROW, "\"%s\" is not %s",
                text != NULL     ? "text"
                : tokens != NULL ? "tokens"
                                 : "path",
                tokens != NULL ? "an array" : "a string");
    return RA_OK;
}

ra_status_t ra_row_parse(ra_row_t *row, const char *json, int64_t bytes, const char *folder,
                         int64_t max_doc_bytes)
{
    ra_text_counts_t ignored;
    int64_t bad = ra_text_count(json, bytes, &ignored);
    if (bad >= 0) {
        ra_row_fail(row, RA_ROW_BAD_UTF8, "invalid UTF-8 at byte %lld of the row", (long long)bad);
        return RA_OK;
    }
    cJSON *root = NULL;
    ra_log_set_quiet(1);
    ra_status_t status = ra_json_parse("row", json, bytes, &root);
    ra_log_set_quiet(0);
    if (status == RA_ERR_NOMEM) {
        return ra_fail(status, "input", "%s", ra_last_error());
    }
    if (status != RA_OK) {
        ra_row_fail(row, RA_ROW_BAD_JSON, "%s", ra_last_error());
        return RA_OK;
    }
    status = parse_object(row, root, folder, max_doc_bytes);
    cJSON_Delete(root);
    return status;
}
