/**
 * @file  base/status.h
 * @brief Status codes of every call, the process exit code each one maps to, and error reporting.
 *
 * 0 is success, positive is pending, negative is an error. The function that first knows the cause
 * reports it with ra_fail(): numbers and names, what to do. Everybody above only returns the
 * status. Library code never exits and user input never trips an assert.
 */
#ifndef RA_BASE_STATUS_H
#define RA_BASE_STATUS_H

#include <stddef.h>

/** X(name, value, process exit code, text). Exit codes follow sysexits where one exists. */
#define RA_STATUS_MAP(X)                                                                           \
    X(OK, 0, 0, "ok")                                                                              \
    X(INPROGRESS, 1, 1, "in progress")                                                             \
    X(ERR_INTERNAL, -1, 1, "internal error (a bug)")                                               \
    X(ERR_INVALID, -2, 1, "invalid argument inside the program (a bug)")                           \
    X(ERR_SHAPE, -3, 1, "shapes do not fit (a bug)")                                               \
    X(ERR_USAGE, -4, 2, "usage or configuration error")                                            \
    X(ERR_UNSUPPORTED, -5, 2, "not supported by this build or device")                             \
    X(ERR_PARTIAL, -6, 3, "finished, some rows failed")                                            \
    X(ERR_INPUT, -7, 4, "input rejected")                                                          \
    X(ERR_NOMEM, -8, 5, "does not fit in memory")                                                  \
    X(ERR_PEER, -9, 6, "a peer failed or is silent")                                               \
    X(ERR_TIMEOUT, -10, 6, "deadline passed")                                                      \
    X(ERR_CANCELED, -11, 6, "canceled")                                                            \
    X(ERR_DEVICE, -12, 6, "device failure")                                                        \
    X(ERR_INTEGRITY, -13, 7, "integrity failure")                                                  \
    X(ERR_NONFINITE, -14, 7, "non-finite result")                                                  \
    X(ERR_OUTPUT, -15, 8, "output cannot be written")                                              \
    X(ERR_STOPPED, -16, 75, "stopped on request, progress saved")                                  \
    X(ERR_INTERRUPTED, -17, 130, "interrupted")

#define RA_STATUS_ENUM(name, value, exit_code, text) RA_##name = (value),
typedef enum ra_status { RA_STATUS_MAP(RA_STATUS_ENUM) } ra_status_t;
#undef RA_STATUS_ENUM

/** Name of a status without the RA_ prefix, such as "ERR_INPUT"; never NULL. */
const char *ra_status_name(ra_status_t status);
/** One-line meaning of a status; never NULL. */
const char *ra_status_text(ra_status_t status);
/** Process exit code a command ends with when @a status reaches its top. */
int ra_status_exit_code(ra_status_t status);

/**
 * Report the exact cause of a failure and return @a status: logs one line at error level under
 * @a subsystem and keeps the text for ra_last_error() of this thread. Control bytes are escaped.
 */
ra_status_t ra_fail(ra_status_t status, const char *subsystem, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** Text of the last ra_fail() on this thread ("" when none). Valid until the next ra_fail(). */
const char *ra_last_error(void);
/** Replace this thread's last-error text (a coordinator adopting the text of a worker). */
void ra_last_error_set(const char *text);

/** Return early when @a expr is an error. For functions that hold nothing. */
#define RA_TRY(expr)                                                                               \
    do {                                                                                           \
        ra_status_t ra_try_status_ = (expr);                                                       \
        if (ra_try_status_ != RA_OK) {                                                             \
            return ra_try_status_;                                                                 \
        }                                                                                          \
    } while (0)

/** Jump to @a label with `status` set when @a expr is an error. For functions that must unwind. */
#define RA_TRY_GOTO(expr, label)                                                                   \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != RA_OK) {                                                                     \
            goto label;                                                                            \
        }                                                                                          \
    } while (0)

#define RA_ARRAY_LEN(array) (sizeof(array) / sizeof((array)[0]))

#endif
