/**
 * @file  cli/row_tokens.h
 * @brief From a row to the token ids the model sees: tokenizer, vocabulary, BOS.
 */
#ifndef RA_CLI_ROW_TOKENS_H
#define RA_CLI_ROW_TOKENS_H

#include "cli/input_rows.h"
#include "model/model_config.h"
#include "model/tokenizer.h"

/** What every row of a job is prepared with. */
typedef struct ra_row_encoder {
    ra_tokenizer_t *tokenizer; /**< NULL: the model directory has none; text rows then fail */
    int64_t vocab_size;        /**< ids from here on are refused; 0: no limit */
    int32_t bos;               /**< put before each document; -1: nothing is */
} ra_row_encoder_t;

/**
 * Open the tokenizer of @a model_dir where there is one and look the BOS up where @a with_bos asks:
 * config.json first, then tokenizer_config.json.
 * @retval RA_ERR_USAGE  no BOS is given anywhere, or it is beyond vocab_size
 * @retval RA_ERR_INPUT  a broken tokenizer.json
 */
ra_status_t ra_row_encoder_open(ra_row_encoder_t *encoder, const char *model_dir,
                                const ra_model_config_t *config, bool with_bos);
void ra_row_encoder_close(ra_row_encoder_t *encoder);

/**
 * Replace a row's text by tokens, check every id, put the BOS first. A row that cannot be is
 * marked.
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_row_tokenize(ra_row_t *row, const ra_row_encoder_t *encoder);

#endif
