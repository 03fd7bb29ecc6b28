#include "cli/score_row.h"

#include "base/checked.h"
#include "cli/json_write.h"
#include <math.h>
#include <string.h>

int ra_score_bucket(int64_t position)
{
    int bucket = 0;
    for (uint64_t end = 256; (uint64_t)position >= end && bucket < RA_SCORE_BUCKETS - 1; end *= 4) {
        bucket++;
    }
    return bucket;
}

void ra_score_bucket_range(int bucket, int64_t *from, int64_t *to)
{
    *from = bucket == 0 ? 0 : INT64_C(256) << (2 * (bucket - 1));
    *to = bucket >= RA_SCORE_BUCKETS - 1 ? INT64_MAX : INT64_C(256) << (2 * bucket);
}

bool ra_score_sum(const ra_row_t *row, const float *logprob, ra_score_t *score)
{
    ra_score_t sum = {.tokens = row->count, .bytes = row->text != NULL ? row->counts.bytes : -1};
    int64_t first = row->has_bos ? 0 : 1; /* position of the token that logprob[0] belongs to */
    sum.scored = row->count - first;
    for (int64_t i = 0; i < sum.scored; i++) {
        if (!isfinite(logprob[i])) {
            return false;
        }
        double nll = -(double)logprob[i];
        ra_bucket_sum_t *bucket = &sum.bucket[ra_score_bucket(i + first)];
        sum.nll += nll;
        bucket->nll += nll;
        bucket->scored++;
    }
    *score = sum;
    return true;
}

double ra_score_nll_per_token(const ra_score_t *score)
{
    return score->scored > 0 ? score->nll / (double)score->scored : NAN;
}

double ra_score_ppl(const ra_score_t *score)
{
    return exp(ra_score_nll_per_token(score));
}

double ra_score_bits_per_byte(const ra_score_t *score)
{
    bool defined = score->bytes > 0 && score->scored > 0;
    return defined ? score->nll / ((double)score->bytes * log(2.0)) : NAN;
}

void ra_score_write_positions(FILE *out, const ra_score_t *score)
{
    const char *separator = "";
    fputc('[', out);
    for (int i = 0; i < RA_SCORE_BUCKETS; i++) {
        const ra_bucket_sum_t *bucket = &score->bucket[i];
        int64_t from, to;
        if (bucket->scored == 0) {
            continue;
        }
        ra_score_bucket_range(i, &from, &to);
        fprintf(out, "%s{\"from\":%lld,\"to\":%lld,\"scored\":%lld,\"nll_per_token\":", separator,
                (long long)from, (long long)ra_min_i64(to, score->tokens),
                (long long)bucket->scored);
        ra_json_write_number(out, bucket->nll / (double)bucket->scored);
        fputc('}', out);
        separator = ",";
    }
    fputc(']', out);
}

static void write_sums(FILE *out, const ra_row_t *row, const ra_score_t *score)
{
    bool text = row->text != NULL;
    fputs(",\"nll\":", out);
    ra_json_write_number(out, score->nll);
    fputs(",\"nll_per_token\":", out);
    ra_json_write_number(out, ra_score_nll_per_token(score));
    fprintf(out, ",\"tokens\":%lld,\"scored\":%lld,\"bytes\":", (long long)score->tokens,
            (long long)score->scored);
    ra_json_write_count(out, text ? row->counts.bytes : -1);
    fputs(",\"chars\":", out);
    ra_json_write_count(out, text ? row->counts.chars : -1);
    fputs(",\"words\":", out);
    ra_json_write_count(out, text ? row->counts.words : -1);
    fputs(",\"ppl\":", out);
    ra_json_write_number(out, ra_score_ppl(score));
    fputs(",\"bits_per_byte\":", out);
    ra_json_write_number(out, ra_score_bits_per_byte(score));
    fputs(",\"by_position\":", out);
    ra_score_write_positions(out, score);
}

void ra_score_write_row(FILE *out, const ra_row_t *row, const ra_score_t *score,
                        const ra_row_policy_t *policy, const char *token_logprobs, double seconds)
{
    char digest[RA_DIGEST_HEX];
    ra_digest_hex(row->digest, digest);
    fputs("{\"id\":", out);
    ra_row_write_id(out, row);
    fputs(",\"ok\":true", out);
    write_sums(out, row, score);
    bool beyond = row->count + row->has_bos > policy->max_positions;
    fprintf(out, ",\"beyond_max_positions\":%s", beyond ? "true" : "false");
    fprintf(out,
            ",\"policy\":{\"bos\":\"%s\",\"window\":\"full\",\"dtype\":\"f32\","
            "\"reproducible\":%s}",
            policy->bos, policy->reproducible ? "true" : "false");
    fputs(",\"model\":", out);
    ra_json_write_string(out, policy->model_digest);
    fputs(",\"tokenizer\":", out);
    ra_json_write_string(out, row->text != NULL ? policy->tokenizer_digest : NULL);
    fprintf(out, ",\"document\":\"xxh3:%s\",\"token_logprobs\":", digest);
    ra_json_write_string(out, token_logprobs);
    fprintf(out, ",\"seconds\":%.6f,\"ranks\":%d,\"attempt\":%d,\"started\":\"%s\"}\n", seconds,
            policy->ranks, policy->attempt, policy->started);
}
