#include "cli/json_write.h"

#include <math.h>

void ra_json_write_string(FILE *out, const char *text)
{
    if (text == NULL) {
        fputs("null", out);
        return;
    }
    fputc('"', out);
    for (const unsigned char *at = (const unsigned char *)text; *at != '\0'; at++) {
        if (*at == '"' || *at == '\\') {
            fprintf(out, "\\%c", *at);
        } else if (*at == '\n') {
            fputs("\\n", out);
        } else if (*at == '\t') {
            fputs("\\t", out);
        } else if (*at < 0x20 || *at == 0x7f) {
            fprintf(out, "\\u%04x", *at);
        } else {
            fputc(*at, out);
        }
    }
    fputc('"', out);
}

void ra_json_write_number(FILE *out, double number)
{
    if (isfinite(number)) {
        fprintf(out, "%.17g", number);
    } else {
        fputs("null", out);
    }
}

void ra_json_write_count(FILE *out, int64_t count)
{
    if (count >= 0) {
        fprintf(out, "%lld", (long long)count);
    } else {
        fputs("null", out);
    }
}
