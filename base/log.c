#include "base/log.h"

#include "base/status.h"
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 2048 };

static atomic_int log_max_level = RA_LOG_WARN;
static _Thread_local int thread_rank = -1;
static _Thread_local int thread_quiet;
static _Thread_local char thread_error[LINE_MAX_BYTES];

void ra_log_set_level(ra_log_level_t level)
{
    atomic_store(&log_max_level, (int)level);
}

static const char *const level_names[] = {"error", "warn", "info", "debug"};

int ra_log_level_parse(const char *text, ra_log_level_t *level)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(level_names); i++) {
        if (strcmp(text, level_names[i]) == 0) {
            *level = (ra_log_level_t)i;
            return 0;
        }
    }
    return -1;
}

void ra_log_set_rank(int rank)
{
    thread_rank = rank;
}

void ra_log_set_quiet(int on)
{
    thread_quiet = on;
}

/* Length of the valid UTF-8 sequence at text, 0 when it is not one or is a control character. */
static size_t printable_sequence(const unsigned char *text)
{
    static const struct {
        unsigned char mask, lead;
        size_t extra;
        uint32_t min;
    } forms[] = {{0x80, 0x00, 0, 0},
                 {0xe0, 0xc0, 1, 0x80},
                 {0xf0, 0xe0, 2, 0x800},
                 {0xf8, 0xf0, 3, 0x10000}};

    for (size_t f = 0; f < RA_ARRAY_LEN(forms); f++) {
        if ((text[0] & forms[f].mask) != forms[f].lead) {
            continue;
        }
        uint32_t code = text[0] & (unsigned char)~forms[f].mask;
        for (size_t i = 1; i <= forms[f].extra; i++) {
            if ((text[i] & 0xc0) != 0x80) {
                return 0;
            }
            code = (code << 6) | (text[i] & 0x3f);
        }
        int surrogate = code >= 0xd800 && code <= 0xdfff;
        int control = code < 0x20 || (code >= 0x7f && code <= 0x9f);
        /* bidirectional overrides can make a line lie about itself */
        int bidi = (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
        if (code < forms[f].min || code > 0x10ffff || surrogate || control || bidi) {
            return 0;
        }
        return forms[f].extra + 1;
    }
    return 0;
}

size_t ra_log_escape(const char *text, char *out, size_t out_size)
{
    const unsigned char *in = (const unsigned char *)text;
    size_t used = 0;

    if (out_size == 0) {
        return 0;
    }
    while (*in != '\0') {
        size_t n = printable_sequence(in);
        char escaped[8];
        const char *piece = (const char *)in;
        size_t piece_len = n;
        if (n == 0) {
            piece_len = (size_t)snprintf(escaped, sizeof(escaped), "\\x%02x", *in);
            piece = escaped;
            n = 1;
        }
        if (used + piece_len >= out_size) {
            break;
        }
        memcpy(out + used, piece, piece_len);
        used += piece_len;
        in += n;
    }
    out[used] = '\0';
    return used;
}

static void write_line(ra_log_level_t level, const char *subsystem, const char *message)
{
    char line[LINE_MAX_BYTES + 64];
    int n;

    if (thread_rank >= 0) {
        n = snprintf(line, sizeof(line), "ringattn %s [rank %d] %s: %s\n", level_names[level],
                     thread_rank, subsystem, message);
    } else {
        n = snprintf(line, sizeof(line), "ringattn %s %s: %s\n", level_names[level], subsystem,
                     message);
    }
    if (n > 0) {
        size_t bytes = (size_t)n < sizeof(line) ? (size_t)n : sizeof(line) - 1;
        line[bytes - 1] = '\n';
        ssize_t ignored = write(STDERR_FILENO, line, bytes);
        (void)ignored; /* nothing sensible is left to do when stderr is gone */
    }
}

void ra_log(ra_log_level_t level, const char *subsystem, const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&log_max_level, memory_order_relaxed)) {
        return;
    }

    char raw[LINE_MAX_BYTES], message[LINE_MAX_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof(raw), format, args);
    va_end(args);
    ra_log_escape(raw, message, sizeof(message));
    write_line(level, subsystem, message);
}

ra_status_t ra_fail(ra_status_t status, const char *subsystem, const char *format, ...)
{
    char raw[LINE_MAX_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof(raw), format, args);
    va_end(args);
    ra_log_escape(raw, thread_error, sizeof(thread_error));
    if (!thread_quiet) {
        write_line(RA_LOG_ERROR, subsystem, thread_error);
    }
    return status;
}

const char *ra_last_error(void)
{
    return thread_error;
}

void ra_last_error_set(const char *text)
{
    snprintf(thread_error, sizeof(thread_error), "%s", text);
}
