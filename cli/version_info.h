/** @file cli/version_info.h  @brief What this build is: version, commit, build type. */
#ifndef RA_CLI_VERSION_INFO_H
#define RA_CLI_VERSION_INFO_H

/** "0.1.0" */
const char *ra_version(void);
/** Short git commit, "-dirty" behind it with local changes; "unknown" outside git. */
const char *ra_version_commit(void);
/** "Release", "RelWithDebInfo", ... and sanitizers. */
const char *ra_version_build(void);

#endif
