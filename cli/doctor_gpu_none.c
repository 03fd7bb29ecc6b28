#include "cli/doctor_gpu.h"

#include <stdio.h>

ra_status_t ra_probe_gpus(ra_gpu_report_t *report)
{
    *report = (ra_gpu_report_t){.built = false};
    snprintf(report->why, sizeof(report->why), "not in this build; configure with -DRA_CUDA=ON");
    return RA_OK;
}
