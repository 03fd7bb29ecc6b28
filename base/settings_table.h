/**
 * @file  base/settings_table.h
 * @brief The rows of the settings table. Included by base/settings.h only.
 *
 * X(NAME, key, flag, type, default, low, high, choices, unit, commands, level, doc)
 */
#ifndef RA_BASE_SETTINGS_TABLE_H
#define RA_BASE_SETTINGS_TABLE_H

/* clang-format off */
#define RA_SETTINGS_MAP(X)                                                                         \
    X(MODEL, "model.dir", "--model", RA_TYPE_TEXT, "", 0, 0, NULL, "DIR",                          \
      RA_FOR_MODEL | RA_FOR_TOKENIZE | RA_FOR_VALIDATE, RA_SYSTEM,                                 \
      "Hugging Face model directory; empty: the model shipped with ringattn")                      \
    X(INPUT, "input", "--in", RA_TYPE_TEXT, "", 0, 0, NULL, "FILE",                                \
      RA_FOR_MODEL | RA_FOR_TOKENIZE | RA_FOR_VALIDATE, RA_SYSTEM,                                 \
      "documents: .jsonl rows, one .txt, or tokens in .npy or .bin; - reads rows from stdin")      \
    X(OUTPUT, "output", "--out", RA_TYPE_TEXT, "", 0, 0, NULL, "DIR", RA_FOR_MODEL, RA_SYSTEM,     \
      "directory for results; the same command again goes on with it")                             \
    X(RANKS, "ring.ranks", "--ranks", RA_TYPE_INT, "1", 1, 4096, NULL, "N", RA_FOR_MODEL,          \
      RA_SYSTEM, "ranks of the ring that share each document")                                     \
    X(THREADS, "threads", "--threads", RA_TYPE_INT, "0", 0, 4096, NULL, "N",                       \
      RA_FOR_MODEL | RA_FOR_DOCTOR, RA_SYSTEM,                                                     \
      "compute threads of the process; 0: the cores in its affinity mask")                         \
    X(LAYOUT, "ring.layout", "--layout", RA_TYPE_CHOICE, "auto", 0, 0, "auto|zigzag|contiguous",   \
      "KIND", RA_FOR_MODEL, RA_SYSTEM,                                                             \
      "who owns which tokens; auto: zigzag, contiguous with --reproducible")                       \
    X(TILE, "ring.tile", "--tile", RA_TYPE_INT, "256", 1, 1048576, NULL, "N", RA_FOR_MODEL,        \
      RA_SYSTEM, "tokens of a tile, the unit that documents are cut into")                         \
    X(EXPERT_PARALLEL, "moe.expert_parallel", "--expert-parallel", RA_TYPE_CHOICE, "off", 0, 0,    \
      "off|on", NULL, RA_FOR_MODEL, RA_SYSTEM, "split experts over ranks instead of sharing them") \
    X(DEVICE, "device", "--device", RA_TYPE_CHOICE, "cpu", 0, 0, "cpu|cuda", NULL, RA_FOR_MODEL,   \
      RA_SYSTEM, "where kernels run")                                                              \
    X(MEMORY_LIMIT, "device.memory_limit", "--memory-limit", RA_TYPE_INT, "0", 0, 1e15, NULL,      \
      "BYTES", RA_FOR_MODEL, RA_SYSTEM,                                                            \
      "most bytes in use of a device, such as 20Gi: a pass that takes more is refused; 0: what is free") \
    X(DTYPE, "dtype", "--dtype", RA_TYPE_CHOICE, "auto", 0, 0, "auto|f32|bf16", NULL,              \
      RA_FOR_MODEL, RA_SYSTEM,                                                                     \
      "number format of activations; auto: bf16 on cuda, f32 on the cpu")                          \
    X(RANDOM_WEIGHTS, "model.random_weights", "--random-weights", RA_TYPE_TEXT, "", 0, 0, NULL,    \
      "SEED", RA_FOR_MODEL, RA_SYSTEM,                                                             \
      "make weights from SEED instead of reading them: runs any config.json")                      \
    X(TRANSPORT, "comm.transport", "--transport", RA_TYPE_TEXT, "auto", 0, 0, NULL, "NAME",        \
      RA_FOR_MODEL | RA_FOR_DOCTOR, RA_SYSTEM, "how ranks exchange bytes; doctor lists the rows")  \
    X(TIMEOUT, "comm.timeout", "--timeout", RA_TYPE_REAL, "0", 0, 1e6, NULL, "SECONDS",            \
      RA_FOR_MODEL | RA_FOR_DOCTOR, RA_SYSTEM, "longest wait for another rank; 0: the transport's own patience")                    \
    X(BOS, "score.bos", "--bos", RA_TYPE_CHOICE, "none", 0, 0, "none|once", NULL, RA_FOR_MODEL,    \
      RA_SYSTEM, "put the model's BOS token before each document, so that its first token counts") \
    X(TOKEN_LOGPROBS, "score.token_logprobs", "--token-logprobs", RA_TYPE_CHOICE, "none", 0, 0,    \
      "none|npy", NULL, RA_FOR_MODEL, RA_SYSTEM,                                                   \
      "also write the log-probability of every scored token (needs --out)")                        \
    X(REPRODUCIBLE, "reproducible", "--reproducible", RA_TYPE_BOOL, "off", 0, 0, NULL, NULL,       \
      RA_FOR_MODEL, RA_SYSTEM, "the same bits for every number of ranks (slower)")                 \
    X(PACK_TOKENS, "score.pack_tokens", "--pack-tokens", RA_TYPE_INT, "16384", 1, 1e12, NULL, "N", \
      RA_FOR_SCORE, RA_SYSTEM, "score short documents together, up to this many tokens a pass")    \
    X(ON_ERROR, "score.on_error", "--on-error", RA_TYPE_CHOICE, "skip", 0, 0, "skip|stop", NULL,   \
      RA_FOR_SCORE | RA_FOR_TOKENIZE | RA_FOR_VALIDATE, RA_SYSTEM,                                 \
      "what a bad row does to the rest of the job")                                                \
    X(MAX_ERRORS, "score.max_errors", "--max-errors", RA_TYPE_LIMIT, "1%", 0, 0, NULL, "N|p%",     \
      RA_FOR_SCORE | RA_FOR_TOKENIZE | RA_FOR_VALIDATE, RA_SYSTEM,                                 \
      "more bad rows than this end the job with exit code 4; a percentage is of the rows read so " \
      "far and counts from the 100th row on")                                                      \
    X(MAX_DOC_BYTES, "input.max_doc_bytes", "--max-doc-bytes", RA_TYPE_INT, "256Mi", 1,            \
      1099511627776.0, NULL, "BYTES", RA_FOR_MODEL | RA_FOR_TOKENIZE | RA_FOR_VALIDATE, RA_SYSTEM, \
      "longest row or file of one document")                                                       \
    X(CONTINUE, "prefill.continue", "--continue", RA_TYPE_TEXT, "", 0, 0, NULL, "DIR",             \
      RA_FOR_PREFILL, RA_SYSTEM, "go on from the cache that an earlier prefill wrote")             \
    X(KV_DTYPE, "prefill.kv_dtype", "--kv-dtype", RA_TYPE_CHOICE, "f32", 0, 0, "f32|bf16", NULL,   \
      RA_FOR_PREFILL, RA_SYSTEM, "number format of keys and values in the cache")                  \
    X(TOP_K, "prefill.top_k", "--top-k", RA_TYPE_INT, "10", 1, 4096, NULL, "N", RA_FOR_PREFILL,    \
      RA_SYSTEM, "most likely next tokens to print")                                               \
    X(DECAY_FACTOR, "model.decay_factor", "--decay-factor", RA_TYPE_CHOICE, "A", 0, 0, "A|B",      \
      NULL, RA_FOR_MODEL | RA_FOR_VALIDATE, RA_SYSTEM,                                             \
      "layer factor of the linear decay: A as trained and served, B as in the Hugging Face remote " \
      "code, one layer later")                                                                                \
    X(JSON, "json", "--json", RA_TYPE_BOOL, "off", 0, 0, NULL, NULL, RA_FOR_ALL, RA_SYSTEM,        \
      "print results as JSON")                                                                     \
    X(CONFIG, "config", "--config", RA_TYPE_TEXT, "", 0, 0, NULL, "FILE", RA_FOR_ALL, RA_SYSTEM,   \
      "read settings from FILE: one key = value a line")                                           \
    X(LOG_LEVEL, "log.level", "--log-level", RA_TYPE_CHOICE, "warn", 0, 0,                         \
      "error|warn|info|debug", NULL, RA_FOR_ALL, RA_SYSTEM, "how much is said on stderr")          \
    X(PROGRESS, "progress", "--progress", RA_TYPE_CHOICE, "auto", 0, 0, "auto|off", NULL,          \
      RA_FOR_SCORE, RA_SYSTEM, "progress on stderr: one line on a terminal, else one per 10 s")    \
    X(TRACE, "trace.file", "--trace", RA_TYPE_TEXT, "", 0, 0, NULL, "FILE", RA_FOR_MODEL,          \
      RA_SYSTEM, "write a Chrome trace of the run")                                          \
    X(CPU_ISA, "cpu.isa", "--cpu-isa", RA_TYPE_CHOICE, "auto", 0, 0, "auto|generic|avx2|avx512",   \
      NULL, RA_FOR_MODEL | RA_FOR_DOCTOR, RA_DEBUG, "use a lower instruction set than the best")   \
    X(GEMM_KERNEL, "gemm.kernel", "--gemm-kernel", RA_TYPE_TEXT, "auto", 0, 0, NULL, "NAME",       \
      RA_FOR_MODEL, RA_DEBUG, "row of the matrix product table")                                   \
    X(SOFTMAX_KERNEL, "softmax.kernel", "--softmax-kernel", RA_TYPE_TEXT, "auto", 0, 0, NULL,      \
      "NAME", RA_FOR_MODEL, RA_DEBUG, "row of the softmax attention table")                        \
    X(LINEAR_KERNEL, "linear.kernel", "--linear-kernel", RA_TYPE_TEXT, "auto", 0, 0, NULL, "NAME", \
      RA_FOR_MODEL, RA_DEBUG, "row of the linear attention table")                                 \
    X(STOP_AT_COMMIT, "debug.stop_at_commit", NULL, RA_TYPE_INT, "0", 0, 1e15, NULL, "N",          \
      RA_FOR_SCORE, RA_DEBUG, "kill the process at the N-th point inside commits; 0: never")
/* clang-format on */

#endif
