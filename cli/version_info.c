#include "cli/version_info.h"

#include "cli/ra_version.h" /* written into the build folder by cli/write_version.cmake */

const char *ra_version(void)
{
    return RA_VERSION;
}

const char *ra_version_commit(void)
{
    return RA_VERSION_COMMIT;
}

const char *ra_version_build(void)
{
    return RA_VERSION_BUILD;
}
