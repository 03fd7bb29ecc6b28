/**
 * @file  model/session.h
 * @brief A model opened for work on a ring: score documents, prefill a prefix, continue one.
 *
 * A session owns the mapped weights, the thread pool, the kernel choices and the ranks. Every call
 * below shards its documents over `ranks` ranks, runs the forward pass once and returns results in
 * document order. The first call connects the ranks (their threads, streams and transport), which
 * stay connected; after a call that failed or was stopped, the next one connects them again. Calls
 * on one session come from one thread at a time; ra_session_stop() and ra_session_progress() from
 * any.
 */
#ifndef RA_MODEL_SESSION_H
#define RA_MODEL_SESSION_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

struct ra_model_config; /* model/model_config.h */
struct ra_kv_reader;    /* model/kv_file.h */

typedef struct ra_session ra_session_t;

/** All fields have the default that ra_session_options_default() writes. */
typedef struct ra_session_options {
    const char *model_dir; /**< Hugging Face directory */
    const char *device;    /**< "cpu", "cuda" */
    const char *dtype;     /**< of activations: "f32", "bf16"; "auto": bf16 on a GPU */
    bool random_weights;   /**< ignore the checkpoint, make weights from `seed` */
    uint64_t seed;
    const char *transport;      /**< "auto" or a row of the transport table */
    const char *gemm_kernel;    /**< "auto" or a row of the GEMM table */
    const char *softmax_kernel; /**< "auto" or a row of the softmax table */
    const char *linear_kernel;  /**< "auto" or a row of the linear table */
    const char *layout; /**< "zigzag", "contiguous"; NULL: zigzag, contiguous when reproducible */
    const char *decay_factor; /**< "A" or "B", specs of bailing_moe_linear */
    int ranks;                /**< >= 1 */
    int threads;  /**< compute threads of the process, >= 1; 0: cores in the affinity mask */
    int64_t tile; /**< tokens of a ring tile, >= 1 */
    bool expert_parallel;   /**< experts split over ranks instead of replicated */
    bool reproducible;      /**< same bits for every rank count */
    double timeout_s;       /**< longest wait for a peer; 0: the transport's own patience */
    const char *trace_file; /**< Chrome trace JSON, or NULL */
    int64_t memory_limit;   /**< most bytes that may be in use of a device; 0: what is free */
    bool measure_waits;     /**< for ra_session_stats_t.exposed; costs two events a wait on a GPU */
} ra_session_options_t;

void ra_session_options_default(ra_session_options_t *options);

/**
 * Open a model directory and prepare its weights.
 * @retval RA_ERR_USAGE  bad option, directory missing, explicit zigzag with reproducible
 * @retval RA_ERR_INPUT  the directory's files are rejected (message names file and cause)
 * @retval RA_ERR_UNSUPPORTED  no such device in this build or machine, or bf16 on the CPU
 * @retval RA_ERR_NOMEM
 */
ra_status_t ra_session_open(const ra_session_options_t *options, ra_session_t **session_p);
/** Accepts NULL. */
void ra_session_close(ra_session_t *session);
const struct ra_model_config *ra_session_config(const ra_session_t *session);
/** "xxh3:..." over config and weights. */
const char *ra_session_model_digest(const ra_session_t *session);
/** The options in force, defaults resolved. */
const ra_session_options_t *ra_session_options(const ra_session_t *session);

/**
 * int32s a token in the arrays of expert choices below: MoE layers x experts per token, layers
 * ascending; 0 for a model without experts.
 */
int64_t ra_session_routing_width(const ra_session_t *session);

/** One document as token ids. tokens are borrowed and valid for the call. */
typedef struct ra_sequence {
    const int32_t *tokens; /**< [count], each in [0, vocab_size): checked by the call */
    int64_t count;         /**< >= 1; BOS included where the caller wants one */
    float *logprob;     /**< out [count - 1]: ln p(tokens[t+1] | tokens[0..t]); NULL: not wanted */
    float *routing_gap; /**< optional out [count - 1]: smallest margin of any expert choice of token
                           t */
    /** Routing replay, ra_session_score() only: optional [count, routing width], the experts to run
     * instead of those the routers choose, in any order within a layer, distinct. Weights are
     * computed as ever from this run's scores of the forced experts. Documents of a call may differ
     * in whether they have it. */
    const int32_t *forced_experts;
    /** Optional out [count, routing width], likewise: what the routers choose, ascending within a
     * layer; also where other experts are forced, so that flips show without their consequences.
     * Given as forced_experts to the same call again, the results are the same bits. */
    int32_t *chosen_experts;
    ra_status_t status; /**< out: RA_OK, RA_ERR_INPUT (token id, expert), RA_ERR_NONFINITE */
} ra_sequence_t;

/**
 * Score @a count documents packed into one forward pass. A document's result never depends on its
 * neighbours or their order. A document that fails alone gets its own status; the call is RA_OK.
 * @retval RA_ERR_STOPPED  ra_session_stop() was called; no result is valid
 * @retval RA_ERR_NOMEM    the pass takes more memory than a device has free, or
 * options.memory_limit leaves; known before it starts, said with numbers
 */
ra_status_t ra_session_score(ra_session_t *session, ra_sequence_t *documents, int64_t count);

/** What a prefill returns beside the cache it writes. */
typedef struct ra_prefill_result {
    int64_t tokens;        /**< all tokens of the prefix, continued part included */
    int64_t cached_tokens; /**< whole tiles in the cache */
    int32_t top_k;         /**< entries in the arrays */
    int32_t *top_id;       /**< caller's [top_k], most likely next token first */
    float *top_logprob;    /**< caller's [top_k] */
} ra_prefill_result_t;

/**
 * Run one document and write its key/value cache and linear states as ring-kv/1 to @a out_dir.
 * @param prefix    Cache of this model and tile to go on from (its tail tokens are prepended and
 *                  recomputed), or NULL.
 * @param document  New tokens, after the prefix. logprob, where not NULL, gets count entries with a
 *                  prefix (the first one is p(tokens[0] | prefix)), count - 1 without. routing_gap
 *                  is left as it is; expert choices are NULL.
 * @param out_dir   Directory to create (model/kv_file.h), or NULL to write nothing.
 * @param kv_dtype  "f32" or "bf16", of the cache's keys and values.
 * @param tokenizer_digest  Noted in the cache; "" when the tokens came without a tokenizer.
 * @param result    top_k and the arrays are given; top_k may become less: entries written.
 * @retval RA_ERR_USAGE      kv_dtype, expert choices, a prefix of another tile, or out_dir holds a
 *                           cache
 * @retval RA_ERR_INPUT      no token, or one outside the vocabulary
 * @retval RA_ERR_NONFINITE  a log-probability is not finite; no cache is left
 * @retval RA_ERR_OUTPUT     the cache cannot be written. Others as ra_session_score().
 */
ra_status_t ra_session_prefill(ra_session_t *session, const struct ra_kv_reader *prefix,
                               ra_sequence_t *document, const char *out_dir, const char *kv_dtype,
                               const char *tokenizer_digest, ra_prefill_result_t *result);

/** What the last call took. */
typedef struct ra_session_stats {
    /**
     * Bytes in use of a device, weights included: predicted before the pass began, and the most
     * that was. On a GPU of all its memory, as the driver says; on the CPU of the session's
     * buffers, not of the mapped checkpoint. Of several devices the one with the highest peak.
     */
    int64_t predicted_bytes, peak_bytes;
    /** Part of the pass, 0..1, in which a rank's computing stood still for transfers; of the rank
     * with the most. 0 without options.measure_waits. */
    double exposed;
} ra_session_stats_t;
/** Of the devices of this process. */
ra_session_stats_t ra_session_stats(const ra_session_t *session);

/** Make the running call return RA_ERR_STOPPED at its next layer. Async-signal safe. */
void ra_session_stop(ra_session_t *session);
/** Part of the running call that is done, 0..1. */
double ra_session_progress(const ra_session_t *session);

#endif
