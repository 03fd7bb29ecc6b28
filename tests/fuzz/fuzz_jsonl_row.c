/* Any bytes as a row of a JSONL input: a document, or a cause; and what is written about it is JSON
 * that names the same id.
 */
#include "cli/error_policy.h"
#include "cli/row_content.h"
#include "cli/score_row.h"
#include "model/json_check.h"
#include "tests/fuzz/fuzz_support.h"
#include <stdio.h>

enum { ROW_MAX = 1 << 20 };

static void check_json(const char *line, size_t bytes, const char *id)
{
    cJSON *root = NULL;
    char number[32];
    if (ra_json_parse("written", line, (int64_t)bytes, &root) != RA_OK) {
        abort();
    }
    const cJSON *member = cJSON_GetObjectItemCaseSensitive(root, "id");
    const char *text = ra_id_of_number(member, number) ? number : member->valuestring;
    if (text == NULL || strcmp(text, id) != 0) {
        abort();
    }
    cJSON_Delete(root);
}

static void write_row(const ra_row_t *row)
{
    static const ra_row_policy_t policy = {
        .bos = "none", .model_digest = "xxh3:0", .ranks = 1, .attempt = 1};
    ra_score_t score = {.tokens = row->count, .bytes = -1};
    char *line = NULL;
    size_t bytes;
    FILE *out = open_memstream(&line, &bytes);
    if (out == NULL) {
        return;
    }
    if (row->error != RA_ROW_NONE) {
        ra_error_write_row(out, row, false);
    } else {
        ra_score_write_row(out, row, &score, &policy, NULL, 0);
    }
    fclose(out);
    check_json(line, bytes, row->id);
    free(line);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_quiet();
    char *copy = malloc(size + 1); /* rows come with a zero byte behind them */
    ra_row_t row = {.id = strdup("fuzz.jsonl:1"), .line = 1};
    if (copy == NULL || row.id == NULL) {
        abort();
    }
    memcpy(copy, data, size);
    copy[size] = '\0';
    if (ra_row_parse(&row, copy, (int64_t)size, "/nonexistent", ROW_MAX) != RA_OK) {
        abort();
    }
    bool good = row.error == RA_ROW_NONE;
    if (good != (row.message[0] == '\0') || good != (row.text != NULL || row.tokens != NULL) ||
        (row.tokens != NULL && row.count < 1)) {
        abort();
    }
    write_row(&row);
    ra_row_free(&row);
    free(copy);
    return 0;
}
