#include "cli/signals.h"

#include "model/session.h"
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

static atomic_int request; /* 0, or the first signal that asked to stop */
static _Atomic(ra_session_t *) watched;

static void on_request(int signal_number)
{
    int none = 0;
    atomic_compare_exchange_strong(&request, &none, signal_number);
    ra_signals_repeat();
}

void ra_signals_install(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    sigemptyset(&action.sa_mask);
    action.sa_handler = on_request;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    action.sa_flags = SA_RESETHAND;
    sigaction(SIGINT, &action, NULL);
    action.sa_flags = 0;
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, NULL);
    sigaction(SIGXFSZ, &action, NULL); /* a file-size limit is a failed write, too */
}

void ra_signals_watch(ra_session_t *session)
{
    atomic_store(&watched, session);
}

ra_status_t ra_signals_status(void)
{
    int signal_number = atomic_load(&request);
    if (signal_number == 0) {
        return RA_OK;
    }
    return signal_number == SIGINT ? RA_ERR_INTERRUPTED : RA_ERR_STOPPED;
}

void ra_signals_repeat(void)
{
    ra_session_t *session = atomic_load(&watched);
    if (atomic_load(&request) != 0 && session != NULL) {
        ra_session_stop(session);
    }
}
