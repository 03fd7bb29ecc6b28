/*
 * Prefill: one pass over the tokens behind a cached prefix, keys, values and states into a new
 * cache.
 *
 * Rows of the pass are the prefix's tail ids (run again, they lie behind its last whole tile) and
 * the new tokens. The new cache is whole in itself: the prefix's own keys and values are copied
 * into it.
 */
#include "base/checked.h"
#include "model/kv_file.h"
#include "model/session_state.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct prefill {
    ra_session_t *session;
    const ra_kv_reader_t *reader; /* NULL without a prefix */
    ra_kv_writer_t *writer;       /* NULL when nothing is written */
    ra_layout_t *layout, *prefix; /* prefix NULL without cached tokens */
    int64_t cached;               /* tokens of the prefix's cache: first position of the pass */
    int64_t tail;                 /* ids of the prefix behind it */
    int64_t total;                /* cached + tail + new */
    int32_t *token;               /* [total] */
    int32_t *target;              /* [total - cached] */
    float *logprob;               /* [total - cached] */
    float *next;                  /* [vocab] */
} prefill_t;

static void free_prefill(prefill_t *p)
{
    ra_kv_writer_destroy(p->writer);
    ra_layout_destroy(p->layout);
    ra_layout_destroy(p->prefix);
    free(p->token);
    free(p->target);
    free(p->logprob);
    free(p->next);
}

/* [2][rows][width]: keys of all rows, then values. */
static int64_t kv_plane(const prefill_t *p, int64_t rows)
{
    return rows * p->session->config->kv_heads * p->session->config->head_dim;
}

static ra_status_t load_kv(void *arg, int rank, int64_t layer, float *kv)
{
    const prefill_t *p = arg;
    int64_t plane = kv_plane(p, p->prefix->rows[rank]);
    const ra_run_t *run = ra_layout_runs(p->prefix, rank);

    for (int64_t i = 0; i < ra_layout_run_count(p->prefix, rank); i++) {
        int64_t at = kv_plane(p, run[i].local);
        RA_TRY(ra_kv_reader_get(p->reader, layer, run[i].start, run[i].count, kv + at,
                                kv + plane + at));
        if (p->writer != NULL) {
            RA_TRY(ra_kv_writer_put(p->writer, layer, run[i].start, run[i].count, kv + at,
                                    kv + plane + at));
        }
    }
    return RA_OK;
}

static const float *initial_state(void *arg, int64_t layer)
{
    const prefill_t *p = arg;
    return p->reader != NULL ? ra_kv_reader_state(p->reader, layer) : NULL;
}

static ra_status_t save_kv(void *arg, int rank, int64_t layer, const float *kv)
{
    const prefill_t *p = arg;
    int64_t plane = kv_plane(p, p->layout->rows[rank]);
    const ra_run_t *run = ra_layout_runs(p->layout, rank);

    for (int64_t i = 0; i < ra_layout_run_count(p->layout, rank); i++) {
        int64_t at = kv_plane(p, run[i].local);
        RA_TRY(ra_kv_writer_put(p->writer, layer, run[i].start, run[i].count, kv + at,
                                kv + plane + at));
    }
    return RA_OK;
}

static ra_status_t save_state(void *arg, int64_t layer, const float *state)
{
    const prefill_t *p = arg;
    return ra_kv_writer_put_state(p->writer, layer, state);
}

/* Ids of the whole sequence, and what each row of the pass predicts. */
static ra_status_t collect_tokens(prefill_t *p, const ra_sequence_t *document)
{
    const int32_t *cached_ids = NULL, *tail_ids = NULL;
    p->cached = p->reader != NULL ? ra_kv_reader_tokens(p->reader, &cached_ids) : 0;
    p->tail = p->reader != NULL ? ra_kv_reader_tail(p->reader, &tail_ids) : 0;
    p->total = p->cached + p->tail + document->count;

    int64_t rows = p->total - p->cached, vocab = p->session->config->vocab_size;
    p->token = malloc((size_t)p->total * sizeof(*p->token));
    p->target = malloc((size_t)rows * sizeof(*p->target));
    p->logprob = malloc((size_t)rows * sizeof(*p->logprob));
    p->next = malloc((size_t)vocab * sizeof(*p->next));
    if (p->token == NULL || p->target == NULL || p->logprob == NULL || p->next == NULL) {
        return ra_fail(RA_ERR_NOMEM, "prefill", "cannot allocate %lld tokens", (long long)p->total);
    }
    for (int64_t t = 0; t < p->total; t++) {
        p->token[t] = t < p->cached             ? cached_ids[t]
                      : t < p->cached + p->tail ? tail_ids[t - p->cached]
                                                : document->tokens[t - p->cached - p->tail];
    }
    for (int64_t r = 0; r < rows; r++) {
        p->target[r] = p->cached + r + 1 < p->total ? p->token[p->cached + r + 1] : -1;
    }
    return RA_OK;
}

static ra_status_t check_input(const prefill_t *p, const ra_sequence_t *document)
{
    int64_t vocab = p->session->config->vocab_size;
    if (document->count < 1) {
        return ra_fail(RA_ERR_INPUT, "prefill", "no token to prefill");
    }
    if (document->forced_experts != NULL || document->chosen_experts != NULL) {
        return ra_fail(RA_ERR_USAGE, "prefill", "expert choices are given to and by scoring only");
    }
    for (int64_t t = 0; t < document->count; t++) {
        if (document->tokens[t] < 0 || document->tokens[t] >= vocab) {
            return ra_fail(RA_ERR_INPUT, "prefill",
                           "token %lld is %d; the model's vocabulary is [0, %lld)", (long long)t,
                           document->tokens[t], (long long)vocab);
        }
    }
    if (p->reader != NULL && ra_kv_reader_tile(p->reader) != p->session->options.tile) {
        return ra_fail(RA_ERR_USAGE, "prefill",
                       "the cache has tiles of %lld tokens, this run of %lld; use --tile %lld",
                       (long long)ra_kv_reader_tile(p->reader), (long long)p->session->options.tile,
                       (long long)ra_kv_reader_tile(p->reader));
    }
    return RA_OK;
}

static ra_status_t make_layouts(prefill_t *p)
{
    const ra_session_t *session = p->session;
    ra_document_t document = {.first = p->cached, .count = p->total - p->cached};
    RA_TRY(ra_layout_create(&document, 1, session->options.tile, session->options.ranks,
                            session->layout_kind, &p->layout));
    return p->cached > 0 ? ra_layout_create_prefix(p->layout, &p->prefix) : RA_OK;
}

/* Every run of both layouts becomes a shard of the new cache. */
static ra_status_t open_writer(prefill_t *p, const char *directory, ra_dtype_t dtype,
                               const char *tokenizer_digest)
{
    const ra_layout_t *const layouts[2] = {p->prefix, p->layout};
    int64_t count = 0, most = 0;
    for (int i = 0; i < 2; i++) {
        most += layouts[i] != NULL ? layouts[i]->rank_run_begin[layouts[i]->ranks] : 0;
    }
    ra_kv_range_t *ranges = malloc((size_t)ra_max_i64(most, 1) * sizeof(*ranges));
    if (ranges == NULL) {
        return ra_fail(RA_ERR_NOMEM, "prefill", "cannot allocate %lld ranges", (long long)most);
    }
    for (int i = 0; i < 2; i++) {
        int64_t runs = layouts[i] != NULL ? layouts[i]->rank_run_begin[layouts[i]->ranks] : 0;
        for (int64_t r = 0; r < runs; r++) {
            const ra_run_t *run = &layouts[i]->rank_runs[r];
            ranges[count++] = (ra_kv_range_t){.begin = run->start, .end = run->start + run->count};
        }
    }
    ra_kv_params_t params = {.config = p->session->config,
                             .model_digest = p->session->model_digest,
                             .tokenizer_digest = tokenizer_digest,
                             .tokens = p->token,
                             .token_count = p->total,
                             .tile = p->session->options.tile,
                             .dtype = dtype,
                             .ranges = ranges,
                             .range_count = count};
    ra_status_t status = ra_kv_writer_create(directory, &params, &p->writer);
    free(ranges);
    return status;
}

/* A result that is no number is an error: of the scored tokens, else of the next one. */
static ra_status_t check_finite(const prefill_t *p, bool scored)
{
    int64_t rows = scored ? p->total - p->cached - 1 : 0;
    for (int64_t r = 0; r < rows; r++) {
        if (!isfinite(p->logprob[r])) {
            return ra_fail(RA_ERR_NONFINITE, "prefill",
                           "the log-probability of token %lld is not finite",
                           (long long)(p->cached + r + 1));
        }
    }
    for (int64_t j = 0; j < p->session->config->vocab_size; j++) {
        if (isnan(p->next[j])) {
            return ra_fail(RA_ERR_NONFINITE, "prefill",
                           "the distribution of the next token is not finite");
        }
    }
    return RA_OK;
}

/* @param scored  The log-probabilities of the tokens themselves are wanted too. */
static ra_status_t run_pass(prefill_t *p, bool scored)
{
    bool writing = p->writer != NULL;
    ra_forward_cache_t cache = {.arg = p,
                                .load_kv = p->prefix != NULL ? load_kv : NULL,
                                .initial_state = p->reader != NULL ? initial_state : NULL,
                                .save_kv = writing ? save_kv : NULL,
                                .save_state = writing ? save_state : NULL};
    ra_pass_t pass = {.session = p->session,
                      .layout = p->layout,
                      .prefix = p->prefix,
                      .cache = &cache,
                      .token = p->token + p->cached,
                      .target = scored ? p->target : NULL,
                      .logprob = p->logprob,
                      .next_logprob = p->next};
    RA_TRY(ra_pass_run(&pass));
    RA_TRY(check_finite(p, scored));
    if (p->reader != NULL) {
        RA_TRY(ra_kv_reader_verify(p->reader));
    }
    if (writing) {
        RA_TRY(ra_kv_writer_put_next(p->writer, p->next));
        return ra_kv_writer_commit(p->writer);
    }
    return RA_OK;
}

/* With a prefix the first new token is predicted by the tail's last row, or by the stored
 * distribution. */
static void return_logprobs(const prefill_t *p, ra_sequence_t *document)
{
    if (document->logprob == NULL) {
        return;
    }
    int64_t out = 0;
    if (p->cached > 0 && p->tail == 0) {
        document->logprob[out++] = ra_kv_reader_next(p->reader)[document->tokens[0]];
    }
    for (int64_t r = ra_max_i64(0, p->tail - 1); r + 1 < p->total - p->cached; r++) {
        document->logprob[out++] = p->logprob[r];
    }
}

/* The top_k largest entries, ties to the lower id: k passes of selection, since k is small. */
static void return_top(const prefill_t *p, ra_prefill_result_t *result)
{
    int64_t vocab = p->session->config->vocab_size;
    float bound = INFINITY;
    int64_t bound_id = -1;

    for (int32_t k = 0; k < result->top_k; k++) {
        int64_t best = -1;
        for (int64_t j = 0; j < vocab; j++) {
            bool open = p->next[j] < bound || (p->next[j] == bound && j > bound_id);
            if (open && (best < 0 || p->next[j] > p->next[best])) {
                best = j;
            }
        }
        if (best < 0) {
            result->top_k = k;
            return;
        }
        result->top_id[k] = (int32_t)best;
        result->top_logprob[k] = bound = p->next[best];
        bound_id = best;
    }
}

ra_status_t ra_session_prefill(ra_session_t *session, const ra_kv_reader_t *prefix,
                               ra_sequence_t *document, const char *out_dir, const char *kv_dtype,
                               const char *tokenizer_digest, ra_prefill_result_t *result)
{
    prefill_t p = {.session = session, .reader = prefix};
    bool bf16 = strcmp(kv_dtype, "bf16") == 0;
    ra_status_t status;

    if (!bf16 && strcmp(kv_dtype, "f32") != 0) {
        return ra_fail(RA_ERR_USAGE, "prefill", "kv dtype '%s' is unknown; use f32 or bf16",
                       kv_dtype);
    }
    RA_TRY(check_input(&p, document));
    RA_TRY_GOTO(collect_tokens(&p, document), out);
    RA_TRY_GOTO(make_layouts(&p), out);
    if (out_dir != NULL) {
        ra_dtype_t dtype = bf16 ? RA_BF16 : RA_F32;
        RA_TRY_GOTO(open_writer(&p, out_dir, dtype, tokenizer_digest), out);
    }
    RA_TRY_GOTO(run_pass(&p, document->logprob != NULL), out);
    return_logprobs(&p, document);
    return_top(&p, result);
    result->tokens = p.total;
    result->cached_tokens = p.total / session->options.tile * session->options.tile;
    document->status = RA_OK;
out:
    free_prefill(&p);
    return status;
}
