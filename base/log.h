/**
 * @file  base/log.h
 * @brief Log lines on stderr: level, rank, subsystem, message. Results never go through here.
 *
 * A line is formatted whole and written with one write(), so lines of ranks never mix. Bytes below
 * 0x20, 0x7f and invalid UTF-8 are escaped as \xNN: text from input files cannot drive a terminal.
 */
#ifndef RA_BASE_LOG_H
#define RA_BASE_LOG_H

#include <stddef.h>

typedef enum ra_log_level {
    RA_LOG_ERROR = 0,
    RA_LOG_WARN,
    RA_LOG_INFO,
    RA_LOG_DEBUG
} ra_log_level_t;

/** Lines above this level are dropped. Default RA_LOG_WARN. Set once at start. */
void ra_log_set_level(ra_log_level_t level);
/** Parse "error", "warn", "info", "debug". @return 0, or -1 when unknown. */
int ra_log_level_parse(const char *text, ra_log_level_t *level);

/** Rank shown in this thread's lines; -1 (the default) shows none. */
void ra_log_set_rank(int rank);
/** While on, error lines of this thread are kept for ra_last_error() but not printed. */
void ra_log_set_quiet(int on);

void ra_log(ra_log_level_t level, const char *subsystem, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/**
 * Escape @a text for a terminal or a log line into @a out (always terminated, truncated to fit).
 * @return Length of the escaped text.
 */
size_t ra_log_escape(const char *text, char *out, size_t out_size);

#endif
