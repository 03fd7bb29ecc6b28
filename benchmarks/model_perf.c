/*
 * The whole model: score or prefill one document of --tokens tokens, sharded over --ranks ranks.
 *
 * Useful flops a token (2 a multiply-add): every weight matrix a token passes through (top-k
 * experts, the shared one, the router, the LM head), 4 D flops a visible key and query head in
 * softmax layers, and in linear layers 4 D^2 a head plus 4 D a visible key of its 64-token chunk
 * (32.5 on average). Norms, rotations and activations are not counted.
 *
 * predicted_mib, peak_mib: of a device, before and after the last pass (ra_session_stats_t).
 * exposed_pct: part of that pass in which a rank's computing stood still for transfers, of the rank
 * with the most. On the CPU that is waiting for the others' computing too: ranks share its cores.
 */
#include "base/clock.h"
#include "benchmarks/bench.h"
#include "model/file_io.h"
#include "model/model_config.h"
#include "model/session.h"
#include "model/tokenizer.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK = 64, CHECK_TOKENS = 2048 };

typedef struct work {
    ra_session_t *session;
    ra_sequence_t document;
    float next_logprob; /* of the likeliest next token, after a prefill */
} work_t;

static void fail(const char *what)
{
    fprintf(stderr, "model_perf: %s: %s\n", what, ra_last_error());
    exit(4);
}

/* Tokens of a model that may have no tokenizer: any will do for random weights. */
static int32_t *random_tokens(int64_t vocab, int64_t count)
{
    int32_t *tokens = bench_alloc(count * (int64_t)sizeof(*tokens));
    uint64_t state = 1;
    for (int64_t t = 0; t < count; t++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        tokens[t] = (int32_t)((state >> 33) % (uint64_t)vocab);
    }
    return tokens;
}

/* Text of the sample, tokenised and repeated to the length asked for. */
static int32_t *make_tokens(const char *model, const char *text_path, int64_t count)
{
    ra_tokenizer_t *tokenizer;
    char *text;
    int64_t bytes, have;
    int32_t *ids, *tokens = bench_alloc(count * (int64_t)sizeof(*tokens));

    if (ra_tokenizer_open(model, &tokenizer) != RA_OK ||
        ra_file_read(text_path, INT64_C(1) << 30, &text, &bytes) != RA_OK ||
        ra_tokenizer_encode(tokenizer, text, bytes, &ids, &have) != RA_OK) {
        fail("sample text");
    }
    for (int64_t t = 0; t < count; t++) {
        tokens[t] = ids[t % have];
    }
    free(ids);
    free(text);
    ra_tokenizer_close(tokenizer);
    return tokens;
}

/* Keys seen by the rows [0, n) of a causal layer with a window (0: none). */
static double visible_pairs(double n, double window)
{
    if (window == 0 || window >= n) {
        return n * (n + 1) / 2;
    }
    return window * (window + 1) / 2 + (n - window) * window;
}

/* @a scored  tokens that pass the LM head. */
static double useful_flops(const ra_model_config_t *config, int64_t tokens, int64_t scored)
{
    double n = (double)tokens, c = (double)config->hidden_size, d = (double)config->head_dim;
    double h = (double)config->heads;
    double flops = 2.0 * (double)scored * c * (double)config->vocab_size;

    for (int64_t l = 0; l < config->layers; l++) {
        const ra_layer_config_t *layer = &config->layer[l];
        double q_width = h * d, kv_width = (double)layer->kv_heads * d;
        flops += 2.0 * n * c * (2.0 * q_width + 2.0 * kv_width);
        if (layer->mixer == RA_MIXER_SOFTMAX) {
            flops += 4.0 * d * h * visible_pairs(n, (double)layer->window);
        } else {
            flops += 2.0 * n * c * q_width;
            flops += n * h * (4.0 * d * d + 4.0 * d * (CHUNK + 1) / 2.0);
        }
        if (layer->feed_forward == RA_FFN_DENSE) {
            flops += 6.0 * n * c * (double)config->intermediate_size;
        } else {
            double width =
                (double)config->experts_per_token * (double)config->moe_intermediate_size +
                (double)config->shared_intermediate_size;
            flops += 2.0 * n * c * (double)config->experts + 6.0 * n * c * width;
        }
    }
    return flops;
}

static void score(void *arg)
{
    work_t *work = arg;
    if (ra_session_score(work->session, &work->document, 1) != RA_OK ||
        work->document.status != RA_OK) {
        fail("score");
    }
}

static void prefill(void *arg)
{
    work_t *work = arg;
    ra_sequence_t document = work->document;
    int32_t id;
    float logprob;
    ra_prefill_result_t result = {.top_k = 1, .top_id = &id, .top_logprob = &logprob};
    document.logprob = NULL;
    if (ra_session_prefill(work->session, NULL, &document, NULL, "f32", "", &result) != RA_OK ||
        document.status != RA_OK) {
        fail("prefill");
    }
    work->next_logprob = logprob;
}

/* Causality makes the head of the document its own check: alone, on one rank of the CPU, by the
 * oracle kernels. */
static void check(bench_t *bench, ra_session_options_t options, const work_t *work)
{
    work_t head = {.document = work->document};
    if (head.document.count > CHECK_TOKENS) {
        head.document.count = CHECK_TOKENS;
    }
    int64_t n = head.document.count - 1;
    head.document.logprob = bench_alloc((n + 1) * (int64_t)sizeof(float));
    options.ranks = 1;
    options.expert_parallel = false;
    bool bf16 = strcmp(ra_session_options(work->session)->dtype, "bf16") == 0;
    options.softmax_kernel = options.linear_kernel = "ref";
    options.device = "cpu";
    options.dtype = options.transport = "auto";
    options.trace_file = NULL;
    if (ra_session_open(&options, &head.session) != RA_OK) {
        fail("check");
    }
    score(&head);
    double worst = 0, mean = 0;
    for (int64_t t = 0; t < n; t++) {
        double difference = fabs((double)head.document.logprob[t] - work->document.logprob[t]);
        worst = fmax(worst, difference);
        mean += difference / (double)n;
    }
    /* fp32 rounding, and now and then an expert choice that a rounding flips; in bf16 both are
     * 2^16 times likelier */
    if (!(mean <= (bf16 ? 5e-2 : 2e-5))) {
        bench_wrong(bench, "first %lld tokens: mean difference %g, worst %g", (long long)n, mean,
                    worst);
    }
    free(head.document.logprob);
    ra_session_close(head.session);
}

static void copy_file(const char *from, const char *to)
{
    char *bytes;
    int64_t count;
    FILE *file = fopen(to, "we");
    if (ra_file_read(from, INT64_C(1) << 36, &bytes, &count) != RA_OK || file == NULL ||
        fwrite(bytes, 1, (size_t)count, file) != (size_t)count || fclose(file) != 0) {
        fail(to);
    }
    free(bytes);
}

/* The model of @a dir with every softmax layer limited to a window, in a directory of its own. */
static char *windowed_model(const char *dir, int64_t window)
{
    char *copy = strdup("/tmp/model_perf_XXXXXX"), from[4096], to[4096];
    DIR *listing = opendir(dir);
    if (copy == NULL || mkdtemp(copy) == NULL || listing == NULL) {
        fail("temporary model");
    }
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        snprintf(from, sizeof(from), "%s/%s", dir, entry->d_name);
        snprintf(to, sizeof(to), "%s/%s", copy, entry->d_name);
        if (entry->d_name[0] != '.') {
            copy_file(from, to);
        }
    }
    closedir(listing);

    char *text, *printed;
    int64_t bytes;
    snprintf(to, sizeof(to), "%s/config.json", copy);
    if (ra_file_read(to, 1 << 20, &text, &bytes) != RA_OK) {
        fail(to);
    }
    cJSON *config = cJSON_ParseWithLength(text, (size_t)bytes);
    cJSON_AddNumberToObject(config, "sliding_window", (double)window);
    printed = cJSON_Print(config);
    FILE *file = fopen(to, "we");
    if (printed == NULL || file == NULL || fputs(printed, file) < 0 || fclose(file) != 0) {
        fail(to);
    }
    free(printed);
    free(text);
    cJSON_Delete(config);
    return copy;
}

static void remove_model(char *dir)
{
    char path[4096];
    DIR *listing = opendir(dir);
    for (struct dirent *entry; listing != NULL && (entry = readdir(listing)) != NULL;) {
        snprintf(path, sizeof(path), "%s/%s", dir, entry->d_name);
        if (entry->d_name[0] != '.') {
            unlink(path);
        }
    }
    if (listing != NULL) {
        closedir(listing);
    }
    rmdir(dir);
    free(dir);
}

/* Highest resident size of this process so far, MiB. */
static double peak_rss_mib(void)
{
    char line[256];
    double kib = 0;
    FILE *file = fopen("/proc/self/status", "re");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (sscanf(line, "VmHWM: %lf", &kib) == 1) {
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return kib / 1024.0;
}

static const bench_column_t columns[] = {
    {"mode", "%s"},           {"device", "%s"},          {"tokens", "%.0f"},
    {"ranks", "%.0f"},        {"layout", "%s"},          {"window", "%.0f"},
    {"seconds", "%.2f"},      {"tok_per_s", "%.0f"},     {"gflop_per_s", "%.1f"},
    {"pct_peak", "%.1f"},     {"cpu_s", "%.2f"},         {"pct_core", "%.1f"},
    {"peak_rss_mib", "%.0f"}, {"predicted_mib", "%.1f"}, {"peak_mib", "%.1f"},
    {"exposed_pct", "%.1f"},  {"nll_per_token", "%.6f"}};

static ra_session_options_t options_of(const bench_flag_t *flags, const char *model, int threads)
{
    ra_session_options_t options;
    ra_session_options_default(&options);
    options.model_dir = model;
    options.threads = threads;
    options.ranks = (int)bench_int(&flags[3]);
    options.reproducible = strcmp(flags[6].value, "on") == 0;
    options.layout = options.reproducible ? NULL : flags[4].value;
    options.expert_parallel = strcmp(flags[7].value, "on") == 0;
    options.trace_file = flags[8].value[0] != '\0' ? flags[8].value : NULL;
    options.device = flags[10].value;
    options.dtype = flags[11].value;
    options.transport = flags[12].value;
    options.random_weights = flags[13].value[0] != '\0';
    options.measure_waits = true;
    options.seed = options.random_weights ? (uint64_t)bench_int(&flags[13]) : 0;
    return options;
}

int main(int argc, char **argv)
{
    bench_flag_t flags[] = {
        {"--model", "configs/models/ring-tiny-linear", "model directory"},
        {"--text", "configs/samples/kjv-genesis.txt", "text, repeated"},
        {"--tokens", "32k", "length of the document"},
        {"--ranks", "1", "ranks, threads of this process"},
        {"--layout", "zigzag", "zigzag|contiguous"},
        {"--window", "0", "limit softmax layers to this many tokens; 0: full"},
        {"--reproducible", "off", "on|off"},
        {"--expert-parallel", "off", "on|off"},
        {"--trace", "", "write a Chrome trace to this file"},
        {"--mode", "score", "score every token, or prefill"},
        {"--device", "cpu", "cpu|cuda"},
        {"--dtype", "auto", "auto|f32|bf16, of activations"},
        {"--transport", "auto", "how ranks exchange bytes"},
        {"--random-weights", "", "a seed: weights and tokens are made from it"}};
    bench_t *bench = bench_open(argc, argv, "model_perf",
                                "score one document; useful flops as stated in the source", flags,
                                (int)RA_ARRAY_LEN(flags));
    int64_t tokens = bench_int(&flags[2]), window = bench_int(&flags[5]);
    char *model = window > 0 ? windowed_model(flags[0].value, window) : strdup(flags[0].value);
    bool scores = strcmp(flags[9].value, "score") == 0;
    ra_session_options_t options = options_of(flags, model, bench->threads);
    work_t work = {0};

    if (ra_session_open(&options, &work.session) != RA_OK) {
        fail("session");
    }
    const ra_model_config_t *config = ra_session_config(work.session);
    work.document.tokens = options.random_weights ? random_tokens(config->vocab_size, tokens)
                                                  : make_tokens(model, flags[1].value, tokens);
    work.document.count = tokens;
    work.document.logprob = bench_alloc(tokens * (int64_t)sizeof(float));
    bench_time_t time = bench_run(bench, scores ? score : prefill, &work);
    double rss = peak_rss_mib(), nll = 0;
    for (int64_t t = 0; t + 1 < tokens && scores; t++) {
        nll -= work.document.logprob[t];
    }
    ra_session_stats_t stats = ra_session_stats(work.session);
    double memory_error = (double)stats.peak_bytes / (double)stats.predicted_bytes - 1;
    if (bench->check && !(fabs(memory_error) <= 0.05)) {
        bench_wrong(bench, "peak memory is %+.1f %% off what was predicted", 100 * memory_error);
    }
    double flops = useful_flops(config, tokens, scores ? tokens : 1);
    if (bench->check && scores && !options.random_weights) {
        check(bench, options, &work);
    }
    bench_table(bench, "model", columns, (int)RA_ARRAY_LEN(columns));
    bench_row(bench, (bench_cell_t[]){
                         BENCH_TEXT(flags[9].value), BENCH_TEXT(flags[10].value),
                         BENCH_NUMBER(tokens), BENCH_NUMBER(options.ranks),
                         BENCH_TEXT(ra_session_options(work.session)->layout), BENCH_NUMBER(window),
                         BENCH_NUMBER(time.median), BENCH_NUMBER((double)tokens / time.median),
                         BENCH_NUMBER(flops / time.median * 1e-9),
                         BENCH_NUMBER(100.0 * flops / time.peak_flops), BENCH_NUMBER(time.cpu),
                         BENCH_NUMBER(100.0 * flops / time.core_flops), BENCH_NUMBER(rss),
                         BENCH_NUMBER((double)stats.predicted_bytes / 1048576.0),
                         BENCH_NUMBER((double)stats.peak_bytes / 1048576.0),
                         BENCH_NUMBER(100.0 * stats.exposed),
                         BENCH_NUMBER(scores ? nll / (double)(tokens - 1) : (double)NAN)});
    ra_session_close(work.session);
    free((void *)work.document.tokens);
    free(work.document.logprob);
    if (window > 0) {
        remove_model(model);
    } else {
        free(model);
    }
    return bench_close(bench);
}
