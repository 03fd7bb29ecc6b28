#include "cli/error_policy.h"

#include "base/log.h"
#include "cli/json_write.h"
#include <string.h>

void ra_error_policy_init(ra_error_policy_t *policy, const ra_settings_t *settings)
{
    *policy = (ra_error_policy_t){0};
    policy->stop = strcmp(ra_settings_text(settings, RA_SET_ON_ERROR), "stop") == 0;
    policy->by_percent =
        ra_settings_limit(settings, RA_SET_MAX_ERRORS, &policy->percent, &policy->count);
}

static bool is_beyond(const ra_error_policy_t *policy)
{
    if (!policy->by_percent) {
        return policy->rows_failed > policy->count;
    }
    return policy->rows_read >= RA_PERCENT_FROM_ROWS &&
           100.0 * (double)policy->rows_failed > policy->percent * (double)policy->rows_read;
}

ra_status_t ra_error_policy_failed(ra_error_policy_t *policy, const ra_rows_t *rows,
                                   const ra_row_t *row)
{
    char place[700];
    ra_row_place(rows, row, place, sizeof(place));
    policy->rows_failed++;
    if (ra_rows_is_whole_file(rows)) {
        ra_status_t status = row->error == RA_ROW_NONFINITE ? RA_ERR_NONFINITE : RA_ERR_INPUT;
        return ra_fail(status, "input", "%s: %s (%s)", place, row->message,
                       ra_row_error_code(row->error));
    }
    ra_log(RA_LOG_WARN, "input", "%s: %s (%s)", place, row->message, ra_row_error_code(row->error));
    if (policy->stop) {
        return ra_fail(RA_ERR_INPUT, "input", "stopping at the first bad row (--on-error stop)");
    }
    if (is_beyond(policy)) {
        return ra_fail(RA_ERR_INPUT, "input",
                       "%lld of %lld rows failed, more than --max-errors allows",
                       (long long)policy->rows_failed, (long long)policy->rows_read);
    }
    return RA_OK;
}

ra_status_t ra_error_policy_result(const ra_error_policy_t *policy)
{
    if (policy->rows_failed == 0) {
        return RA_OK;
    }
    ra_log(RA_LOG_WARN, "input", "%lld of %lld rows failed", (long long)policy->rows_failed,
           (long long)policy->rows_read);
    return RA_ERR_PARTIAL;
}

void ra_error_write_row(FILE *out, const ra_row_t *row, bool stopped)
{
    fputs("{\"id\":", out);
    ra_row_write_id(out, row);
    fprintf(out,
            ",\"line\":%lld,\"offset\":%lld,\"code\":\"%s\",\"message\":", (long long)row->line,
            (long long)row->offset, ra_row_error_code(row->error));
    ra_json_write_string(out, row->message);
    fprintf(out, ",\"action\":\"%s\"}\n", stopped ? "stopped" : "skipped");
}
