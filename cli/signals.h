/**
 * @file  cli/signals.h
 * @brief Requests to stop: SIGTERM and SIGUSR1 (exit 75, progress saved), SIGINT (exit 130).
 *
 * The first request stops the pass that is running; what is committed stays. A second SIGINT ends
 * the process at once. SIGPIPE is ignored: a closed pipe is seen as a failed write.
 */
#ifndef RA_CLI_SIGNALS_H
#define RA_CLI_SIGNALS_H

#include "base/status.h"

struct ra_session; /* model/session.h */

/** Install the handlers. Once, before any thread starts. */
void ra_signals_install(void);
/** The session a request stops from now on; NULL: none. */
void ra_signals_watch(struct ra_session *session);
/** RA_OK, or RA_ERR_STOPPED or RA_ERR_INTERRUPTED once a request came. Any thread. */
ra_status_t ra_signals_status(void);
/** Stop the watched session again if a request came: one that fell between two passes. */
void ra_signals_repeat(void);

#endif
