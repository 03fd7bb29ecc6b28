/**
 * @file  cli/json_write.h
 * @brief JSON text onto a stream: strings escaped, numbers that are never NaN or Infinity.
 */
#ifndef RA_CLI_JSON_WRITE_H
#define RA_CLI_JSON_WRITE_H

#include <stdint.h>
#include <stdio.h>

/** A quoted string, or null for NULL. Control bytes are escaped; @a text is valid UTF-8. */
void ra_json_write_string(FILE *out, const char *text);
/** %.17g, which reads back as the same double; null when it is not finite. */
void ra_json_write_number(FILE *out, double number);
/** An integer, or null when negative. */
void ra_json_write_count(FILE *out, int64_t count);

#endif
