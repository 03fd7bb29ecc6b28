#include "cli/command.h"
#include "cli/score_job.h"

ra_status_t ra_cmd_score(const ra_settings_t *settings)
{
    return ra_score_job_run(settings);
}
