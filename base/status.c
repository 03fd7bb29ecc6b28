#include "base/status.h"

static const struct {
    ra_status_t status;
    int exit_code;
    const char *name, *text;
} status_table[] = {
#define RA_STATUS_ROW(name, value, exit_code, text) {RA_##name, exit_code, #name, text},
    RA_STATUS_MAP(RA_STATUS_ROW)
#undef RA_STATUS_ROW
};

const char *ra_status_name(ra_status_t status)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(status_table); i++) {
        if (status_table[i].status == status) {
            return status_table[i].name;
        }
    }
    return "UNKNOWN";
}

const char *ra_status_text(ra_status_t status)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(status_table); i++) {
        if (status_table[i].status == status) {
            return status_table[i].text;
        }
    }
    return "unknown status";
}

int ra_status_exit_code(ra_status_t status)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(status_table); i++) {
        if (status_table[i].status == status) {
            return status_table[i].exit_code;
        }
    }
    return 1;
}
