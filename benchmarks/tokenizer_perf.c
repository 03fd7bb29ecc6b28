/* model/tokenizer.h on English text and on three texts that are one piece each. */
#include "benchmarks/bench.h"
#include "model/file_io.h"
#include "model/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TEXT_BYTES = 20 << 20, PIECE_BYTES = 4 << 20 };

typedef struct timed {
    ra_tokenizer_t *tokenizer;
    const char *text;
    int64_t bytes;
    int32_t *ids;
    int64_t count;
    double cpu; /* seconds of this thread in the fastest call: what a shared machine leaves alone */
} timed_t;

static double thread_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void encode(void *arg)
{
    timed_t *timed = arg;
    free(timed->ids);
    timed->ids = NULL;
    double start = thread_seconds();
    if (ra_tokenizer_encode(timed->tokenizer, timed->text, timed->bytes, &timed->ids,
                            &timed->count) != RA_OK) {
        exit(4);
    }
    double cpu = thread_seconds() - start;
    timed->cpu = timed->cpu == 0 || cpu < timed->cpu ? cpu : timed->cpu;
}

static void check_back(bench_t *bench, const timed_t *timed, const char *name)
{
    char *back = NULL;
    int64_t length = 0;
    if (ra_tokenizer_decode(timed->tokenizer, timed->ids, timed->count, &back, &length) != RA_OK ||
        length != timed->bytes || memcmp(back, timed->text, (size_t)length) != 0) {
        bench_wrong(bench, "%s: decoding the ids does not give the text", name);
    }
    free(back);
}

static void measure(bench_t *bench, ra_tokenizer_t *tokenizer, const char *name, const char *text,
                    int64_t bytes, const char *what)
{
    timed_t timed = {.tokenizer = tokenizer, .text = text, .bytes = bytes};
    bench_time_t time = bench_run(bench, encode, &timed);
    if (bench->check) {
        check_back(bench, &timed, name);
    }
    bench_row(bench, (bench_cell_t[]){BENCH_TEXT(name), BENCH_TEXT(what), BENCH_NUMBER(bytes),
                                      BENCH_NUMBER(timed.count), BENCH_NUMBER(time.median),
                                      BENCH_NUMBER((double)bytes * 1e-6 / time.median),
                                      BENCH_NUMBER(timed.cpu)});
    free(timed.ids);
}

static char *repeat_file(const char *path, int64_t *bytes)
{
    char *once = NULL;
    int64_t length = 0;
    if (ra_file_read(path, 1 << 30, &once, &length) != RA_OK || length == 0) {
        exit(2);
    }
    int64_t times = TEXT_BYTES / length + 1;
    char *text = bench_alloc(times * length);
    for (int64_t i = 0; i < times; i++) {
        memcpy(text + i * length, once, (size_t)length);
    }
    free(once);
    *bytes = times * length;
    return text;
}

static const bench_column_t columns[] = {
    {"text", "%s"},      {"what", "%s"},       {"bytes", "%.0f"},      {"tokens", "%.0f"},
    {"seconds", "%.3f"}, {"mb_per_s", "%.1f"}, {"cpu_seconds", "%.3f"}};

int main(int argc, char **argv)
{
    bench_flag_t flags[] = {
        {"--model", "configs/models/ring-tiny-linear", "directory with the tokenizer.json"},
        {"--text", "configs/samples/kjv-genesis.txt", "text to repeat to 20 MiB"}};
    static const struct {
        const char *name;
        char letter;
    } pieces[] = {{"a", 'a'}, {"space", ' '}, {"!", '!'}};
    ra_tokenizer_t *tokenizer = NULL;
    bench_t *bench = bench_open(argc, argv, "tokenizer_perf",
                                "text to token ids on one thread; MB are 1e6 bytes of UTF-8", flags,
                                (int)RA_ARRAY_LEN(flags));
    if (ra_tokenizer_open(flags[0].value, &tokenizer) != RA_OK) {
        return 2;
    }
    bench_table(bench, "Tokenizer", columns, (int)RA_ARRAY_LEN(columns));
    int64_t bytes = 0;
    char *text = repeat_file(flags[1].value, &bytes);
    measure(bench, tokenizer, flags[1].value, text, bytes, "repeated");
    free(text);
    text = bench_alloc(PIECE_BYTES);
    for (size_t i = 0; i < RA_ARRAY_LEN(pieces); i++) {
        memset(text, pieces[i].letter, PIECE_BYTES);
        measure(bench, tokenizer, pieces[i].name, text, PIECE_BYTES, "one piece");
    }
    free(text);
    ra_tokenizer_close(tokenizer);
    return bench_close(bench);
}
