#include "cli/score_summary.h"

#include "cli/json_write.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

ra_status_t ra_summary_add(ra_summary_t *summary, const ra_score_t *score)
{
    if (score->scored > 0) {
        if (summary->ppl_count == summary->ppl_capacity) {
            int64_t capacity = summary->ppl_capacity * 2 + 64;
            double *ppl = realloc(summary->ppl, (size_t)capacity * sizeof(*ppl));
            if (ppl == NULL) {
                return ra_fail(RA_ERR_NOMEM, "score", "cannot hold the ppl of %lld documents",
                               (long long)capacity);
            }
            summary->ppl = ppl;
            summary->ppl_capacity = capacity;
        }
        summary->ppl[summary->ppl_count++] = ra_score_ppl(score);
    }
    summary->documents++;
    summary->tokens += score->tokens;
    summary->scored += score->scored;
    summary->nll += score->nll;
    if (score->bytes >= 0) {
        summary->text_bytes += score->bytes;
        summary->text_scored += score->scored;
        summary->text_nll += score->nll;
    }
    return RA_OK;
}

void ra_summary_free(ra_summary_t *summary)
{
    free(summary->ppl);
    *summary = (ra_summary_t){0};
}

double ra_summary_token_ppl(const ra_summary_t *summary)
{
    return summary->scored > 0 ? exp(summary->nll / (double)summary->scored) : NAN;
}

double ra_summary_mean_ppl(const ra_summary_t *summary)
{
    double sum = 0;
    for (int64_t i = 0; i < summary->ppl_count; i++) {
        sum += summary->ppl[i];
    }
    return summary->ppl_count > 0 ? sum / (double)summary->ppl_count : NAN;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double ra_summary_median_ppl(const ra_summary_t *summary)
{
    int64_t n = summary->ppl_count;
    double *sorted = n > 0 ? malloc((size_t)n * sizeof(*sorted)) : NULL;
    if (sorted == NULL) {
        return NAN;
    }
    memcpy(sorted, summary->ppl, (size_t)n * sizeof(*sorted));
    qsort(sorted, (size_t)n, sizeof(*sorted), ascending);
    double median = n % 2 == 1 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
    free(sorted);
    return median;
}

double ra_summary_bits_per_byte(const ra_summary_t *summary)
{
    bool defined = summary->text_bytes > 0 && summary->text_scored > 0;
    return defined ? summary->text_nll / ((double)summary->text_bytes * log(2.0)) : NAN;
}

void ra_summary_write_json(FILE *out, const ra_summary_t *summary)
{
    fprintf(out, "{\"documents\":%lld,\"failed\":%lld,\"tokens\":%lld,\"scored\":%lld,\"nll\":",
            (long long)summary->documents, (long long)summary->failed, (long long)summary->tokens,
            (long long)summary->scored);
    ra_json_write_number(out, summary->nll);
    fputs(",\"token_ppl\":", out);
    ra_json_write_number(out, ra_summary_token_ppl(summary));
    fputs(",\"mean_document_ppl\":", out);
    ra_json_write_number(out, ra_summary_mean_ppl(summary));
    fputs(",\"median_document_ppl\":", out);
    ra_json_write_number(out, ra_summary_median_ppl(summary));
    fputs(",\"bits_per_byte\":", out);
    ra_json_write_number(out, ra_summary_bits_per_byte(summary));
    fprintf(out, ",\"seconds\":%.3f,\"tokens_per_second\":", summary->seconds);
    ra_json_write_number(out, summary->seconds > 0 ? (double)summary->tokens_now / summary->seconds
                                                   : NAN);
    fputs("}\n", out);
}

void ra_summary_write_text(FILE *out, const ra_summary_t *summary)
{
    fprintf(out, "%lld documents, %lld failed, %lld tokens, %lld scored\n",
            (long long)summary->documents, (long long)summary->failed, (long long)summary->tokens,
            (long long)summary->scored);
    if (summary->scored > 0) {
        fprintf(out, "ppl %.4f (weighted by tokens), mean %.4f, median %.4f (over documents)",
                ra_summary_token_ppl(summary), ra_summary_mean_ppl(summary),
                ra_summary_median_ppl(summary));
        if (summary->text_bytes > 0) {
            fprintf(out, ", %.4f bits per byte", ra_summary_bits_per_byte(summary));
        }
        fputc('\n', out);
    }
    if (summary->tokens_now > 0 && summary->seconds > 0) {
        fprintf(out, "%lld tokens in %.1f s: %.0f tokens/s\n", (long long)summary->tokens_now,
                summary->seconds, (double)summary->tokens_now / summary->seconds);
    }
}
