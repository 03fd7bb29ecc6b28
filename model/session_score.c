#include "base/checked.h"
#include "model/session_routing.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A document with a token or an expert that the model lacks fails alone and takes no part in the
 * pass. */
static void check_document(const ra_session_t *session, ra_sequence_t *document, int64_t index)
{
    int64_t vocab = session->config->vocab_size;
    document->status = RA_OK;
    if (document->count < 1) {
        document->status = ra_fail(RA_ERR_INPUT, "score", "document %lld of the pack has no token",
                                   (long long)index);
    }
    for (int64_t t = 0; t < document->count && document->status == RA_OK; t++) {
        if (document->tokens[t] < 0 || document->tokens[t] >= vocab) {
            document->status = ra_fail(RA_ERR_INPUT, "score",
                                       "token %lld is %d; the model's vocabulary is [0, %lld)",
                                       (long long)t, document->tokens[t], (long long)vocab);
        }
    }
    if (document->status == RA_OK) {
        document->status = ra_routing_check(session, document);
    }
}

/* The documents' rows one after another, as the layout orders them. */
typedef struct ordered_rows {
    int32_t *token, *target;
    float *logprob, *gap;
    int32_t *forced, *chosen; /* NULL: no document wants it */
} ordered_rows_t;

static void free_ordered(ordered_rows_t *rows)
{
    free(rows->token);
    free(rows->target);
    free(rows->logprob);
    free(rows->gap);
    free(rows->forced);
    free(rows->chosen);
}

static ra_status_t order_rows(const ra_layout_t *layout, const ra_sequence_t *documents,
                              ordered_rows_t *rows)
{
    size_t n = (size_t)layout->total_rows + 1;
    *rows = (ordered_rows_t){.token = malloc(n * sizeof(int32_t)),
                             .target = malloc(n * sizeof(int32_t)),
                             .logprob = malloc(n * sizeof(float)),
                             .gap = malloc(n * sizeof(float))};
    if (rows->token == NULL || rows->target == NULL || rows->logprob == NULL || rows->gap == NULL) {
        free_ordered(rows);
        return ra_fail(RA_ERR_NOMEM, "score", "cannot allocate the results of %zu tokens", n);
    }
    for (int64_t d = 0; d < layout->document_count; d++) {
        int64_t count = layout->documents[d].count, row = layout->document_row[d];
        for (int64_t t = 0; t < count; t++) {
            rows->token[row + t] = documents[d].tokens[t];
            rows->target[row + t] = t + 1 < count ? documents[d].tokens[t + 1] : -1;
        }
    }
    return RA_OK;
}

/* The arrays of routing replay that some document wants, rows of documents without choices as -1.
 */
static ra_status_t order_routing(const ra_session_t *session, const ra_layout_t *layout,
                                 const ra_sequence_t *documents, ordered_rows_t *rows)
{
    const int64_t width = ra_session_routing_width(session);
    const size_t bytes = (size_t)(layout->total_rows * width) * sizeof(int32_t) + 1;
    bool forced = false, chosen = false;

    for (int64_t d = 0; d < layout->document_count; d++) {
        forced = forced || documents[d].forced_experts != NULL;
        chosen = chosen || documents[d].chosen_experts != NULL;
    }
    rows->forced = forced ? malloc(bytes) : NULL;
    rows->chosen = chosen ? malloc(bytes) : NULL;
    if ((forced && rows->forced == NULL) || (chosen && rows->chosen == NULL)) {
        return ra_fail(RA_ERR_NOMEM, "score", "cannot allocate %zu bytes of expert choices", bytes);
    }
    for (int64_t d = 0; d < layout->document_count && forced; d++) {
        if (layout->documents[d].count > 0) {
            ra_routing_order(session, &documents[d],
                             rows->forced + layout->document_row[d] * width);
        }
    }
    return RA_OK;
}

static void return_results(const ra_session_t *session, const ra_layout_t *layout,
                           const ordered_rows_t *rows, ra_sequence_t *documents)
{
    const int64_t width = ra_session_routing_width(session);
    for (int64_t d = 0; d < layout->document_count; d++) {
        if (documents[d].chosen_experts != NULL && layout->documents[d].count > 0) {
            memcpy(documents[d].chosen_experts, rows->chosen + layout->document_row[d] * width,
                   (size_t)(layout->documents[d].count * width) * sizeof(int32_t));
        }
        int64_t row = layout->document_row[d];
        for (int64_t t = 0; t + 1 < layout->documents[d].count; t++) {
            if (!isfinite(rows->logprob[row + t]) && documents[d].status == RA_OK) {
                documents[d].status =
                    ra_fail(RA_ERR_NONFINITE, "score",
                            "the log-probability of token %lld is not finite", (long long)t + 1);
            }
            if (documents[d].logprob != NULL) {
                documents[d].logprob[t] = rows->logprob[row + t];
            }
            if (documents[d].routing_gap != NULL) {
                documents[d].routing_gap[t] = rows->gap[row + t];
            }
        }
    }
}

static ra_status_t score_layout(ra_session_t *session, const ra_layout_t *layout,
                                ra_sequence_t *documents)
{
    ordered_rows_t rows;
    bool gaps = false;

    for (int64_t d = 0; d < layout->document_count; d++) {
        gaps = gaps || documents[d].routing_gap != NULL;
    }
    RA_TRY(order_rows(layout, documents, &rows));
    ra_status_t status = order_routing(session, layout, documents, &rows);
    ra_pass_t pass = {.session = session,
                      .layout = layout,
                      .token = rows.token,
                      .target = rows.target,
                      .logprob = rows.logprob,
                      .routing_gap = gaps ? rows.gap : NULL,
                      .forced = rows.forced,
                      .chosen = rows.chosen};
    if (status == RA_OK) {
        status = ra_pass_run(&pass);
    }
    if (status == RA_OK) {
        return_results(session, layout, &rows, documents);
    }
    free_ordered(&rows);
    return status;
}

ra_status_t ra_session_score(ra_session_t *session, ra_sequence_t *documents, int64_t count)
{
    ra_document_t *shape = calloc((size_t)ra_max_i64(count, 1), sizeof(*shape));
    ra_layout_t *layout = NULL;

    if (shape == NULL) {
        return ra_fail(RA_ERR_NOMEM, "score", "cannot allocate a pack of %lld documents",
                       (long long)count);
    }
    for (int64_t d = 0; d < count; d++) {
        check_document(session, &documents[d], d);
        shape[d].count = documents[d].status == RA_OK ? documents[d].count : 0;
    }
    ra_status_t status = ra_layout_create(shape, count, session->options.tile,
                                          session->options.ranks, session->layout_kind, &layout);
    free(shape);
    if (status == RA_OK && layout->total_rows > 0) {
        status = score_layout(session, layout, documents);
    }
    ra_layout_destroy(layout);
    return status;
}
