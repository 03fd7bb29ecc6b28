/**
 * @file  cli/input_rows.h
 * @brief Documents of an input, whatever the kind of file; a bad row fails alone.
 *
 *   .jsonl .ndjson .json, or "-" for stdin: one JSON object a line,
 *       {"id", "text"}, {"id", "tokens": [...]} or {"id", "path"}: a .txt, .npy or .bin file,
 *       relative to the folder of the JSONL file; other keys are ignored
 *   .txt: one document, UTF-8
 *   .npy .bin: one document of token ids (model/npy.h)
 *
 * An id is a string, or an integer, which is kept as one. A missing id becomes "<file>:<line>", the
 * file without its folder; the id of a whole file is its name. An id that occurred before fails the
 * later row, also when the earlier row failed. Blank lines are no rows. Memory: one document at a
 * time.
 */
#ifndef RA_CLI_INPUT_ROWS_H
#define RA_CLI_INPUT_ROWS_H

#include "base/status.h"
#include "cli/id_map.h"
#include "cli/text_counts.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { RA_ID_MAX = 64 << 10 }; /**< bytes of an id; longer ones are a bad_row */

/** X(name, code in errors.jsonl): why a row failed. */
#define RA_ROW_ERROR_MAP(X)                                                                        \
    X(NONE, "")                                                                                    \
    X(BAD_JSON, "bad_json") /* not one JSON value, duplicate keys, NUL, too deep */                \
    X(BAD_UTF8, "bad_utf8") /* of the row or of the text file it names */                          \
    X(BAD_ROW, "bad_row")   /* not an object, not exactly one of text, tokens, path */             \
    X(DUPLICATE_ID, "duplicate_id")                                                                \
    X(EMPTY_TEXT, "empty_text")                                                                    \
    X(NO_TOKENS, "no_tokens")       /* "tokens": [], an array of length 0, a text of no tokens */  \
    X(BAD_TOKEN, "bad_token")       /* not an integer, negative, not below vocab_size */           \
    X(TOO_LONG, "too_long")         /* over input.max_doc_bytes */                                 \
    X(MISSING_FILE, "missing_file") /* nothing exists at "path" */                                 \
    X(BAD_FILE, "bad_file")         /* unreadable, unknown kind, broken .npy or .bin */            \
    X(NOT_TOKENIZED, "not_tokenized") /* the tokenizer refused the text, or the model has none */  \
    X(CHANGED, "changed")             /* scored before under this id with other contents */        \
    X(NONFINITE, "nonfinite")         /* the model gave a result that is not a number */

#define RA_ROW_ERROR_ENUM(name, code) RA_ROW_##name,
typedef enum ra_row_error { RA_ROW_ERROR_MAP(RA_ROW_ERROR_ENUM) } ra_row_error_t;
#undef RA_ROW_ERROR_ENUM

const char *ra_row_error_code(ra_row_error_t error);

typedef struct ra_row {
    char *id;
    bool id_is_number; /**< written without quotes, as it came */
    int64_t line;      /**< 1-based line of a JSONL file, 0 for a whole file */
    int64_t offset;    /**< of the row's first byte in the input */
    ra_row_error_t error;
    char message[512]; /**< why, when error is not NONE */

    char *text; /**< the document as text, or NULL; a zero byte follows */
    ra_text_counts_t counts;
    int32_t *tokens; /**< token input, or once tokenized; ra_row_tokenize() may put a BOS first */
    int64_t count;   /**< own tokens, a BOS not counted */
    bool has_bos;
    ra_digest_t digest; /**< of the text's bytes, or of the tokens as given */
} ra_row_t;

typedef struct ra_rows ra_rows_t;

/**
 * @param path  As on the command line.
 * @retval RA_ERR_USAGE  nothing exists there, or a kind of file that is not known
 * @retval RA_ERR_INPUT  it cannot be read
 */
ra_status_t ra_rows_open(const char *path, int64_t max_doc_bytes, ra_rows_t **rows_p);
/** Accepts NULL. */
void ra_rows_close(ra_rows_t *rows);

/**
 * The next row into @a row, which ra_row_free() releases. A bad row is RA_OK with row->error set.
 * @param end_p  Set when there is no further row.
 * @retval RA_ERR_INPUT  the input cannot be read any further
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_rows_next(ra_rows_t *rows, ra_row_t *row, bool *end_p);
void ra_row_free(ra_row_t *row);

/** Mark a row as failed; its text and tokens are released. */
void ra_row_fail(ra_row_t *row, ra_row_error_t error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/** The id as JSON. */
void ra_row_write_id(FILE *out, const ra_row_t *row);
/** "docs.jsonl:12 (id \"x\")" for messages. */
void ra_row_place(const ra_rows_t *rows, const ra_row_t *row, char *out, size_t out_size);

/** Name of the input without its folder. */
const char *ra_rows_name(const ra_rows_t *rows);
/** The input is one document, whose failure is the failure of the job. */
bool ra_rows_is_whole_file(const ra_rows_t *rows);
/** Bytes read so far, and of the whole input (0 when unknown). */
int64_t ra_rows_bytes_read(const ra_rows_t *rows);
int64_t ra_rows_bytes_total(const ra_rows_t *rows);

#endif
