/**
 * @file  cli/text_counts.h
 * @brief Bytes, characters and words of a text, so that any normaliser can be computed from a row.
 */
#ifndef RA_CLI_TEXT_COUNTS_H
#define RA_CLI_TEXT_COUNTS_H

#include <stdint.h>

typedef struct ra_text_counts {
    int64_t bytes;
    int64_t chars; /**< Unicode code points */
    int64_t words; /**< maximal runs of characters without the property White_Space */
} ra_text_counts_t;

/** @return -1, or the offset of the first byte that is not UTF-8 (counts are then untouched). */
int64_t ra_text_count(const char *utf8, int64_t bytes, ra_text_counts_t *counts);

#endif
