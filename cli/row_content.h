/**
 * @file  cli/row_content.h
 * @brief What a row holds: its JSON object, or the file it names, as text or tokens.
 */
#ifndef RA_CLI_ROW_CONTENT_H
#define RA_CLI_ROW_CONTENT_H

#include "cli/input_rows.h"
#include <cjson/cJSON.h>

typedef enum ra_file_kind {
    RA_FILE_UNKNOWN = 0,
    RA_FILE_JSONL,
    RA_FILE_TEXT,
    RA_FILE_NPY,
    RA_FILE_BIN
} ra_file_kind_t;

/** By the ending of the name, in any case. */
ra_file_kind_t ra_file_kind(const char *path);

/** Text of an id that is an integer of at most 2^53. @return false when @a node is none. */
bool ra_id_of_number(const cJSON *node, char out[32]);

/**
 * Fill @a row from one JSON object. row->id holds the id of a row without one and is replaced.
 * @param folder  What a relative "path" starts from.
 * @retval RA_ERR_NOMEM  the only error: whatever is wrong with the bytes is row->error.
 */
ra_status_t ra_row_parse(ra_row_t *row, const char *json, int64_t bytes, const char *folder,
                         int64_t max_doc_bytes);

/** Fill @a row from a .txt, .npy or .bin file. @retval RA_ERR_NOMEM */
ra_status_t ra_row_load_file(ra_row_t *row, const char *path, int64_t max_doc_bytes);

#endif
