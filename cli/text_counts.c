#include "cli/text_counts.h"

#include <stdbool.h>
#include <utf8proc.h>

/* Unicode property White_Space: 25 code points, unchanged since Unicode 6.3. */
static bool is_white_space(int32_t code)
{
    return (code >= 0x09 && code <= 0x0d) || code == 0x20 || code == 0x85 || code == 0xa0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
           code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

int64_t ra_text_count(const char *utf8, int64_t bytes, ra_text_counts_t *counts)
{
    ra_text_counts_t sum = {.bytes = bytes};
    bool in_word = false;
    for (int64_t at = 0; at < bytes;) {
        utf8proc_int32_t code = (unsigned char)utf8[at];
        utf8proc_ssize_t length = 1;
        if (code >= 0x80) {
            length = utf8proc_iterate((const utf8proc_uint8_t *)utf8 + at, bytes - at, &code);
            if (length <= 0 || code < 0) {
                return at;
            }
        }
        bool space = is_white_space(code);
        sum.words += !space && !in_word;
        in_word = !space;
        sum.chars++;
        at += length;
    }
    *counts = sum;
    return -1;
}
