/**
 * @file  model/tokenizer_split.c
 * @brief Pre-tokenizer cuts by PCRE2, one step after another on each piece.
 *
 * A piece is matched by itself: lookarounds see nothing beyond its ends, as in `tokenizers`.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "base/log.h"
#include "model/split_pattern.h"
#include "model/tokenizer_parts.h"

#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/**
 * Backtracking allowed for a text of n bytes: PCRE2's own default and some for each byte, since
 * \s*[\r\n]+ and the like step back over a whole run of spaces.
 */
enum { MATCH_LIMIT = 10000000, MATCH_LIMIT_PER_BYTE = 16 };
enum { JIT_STACK_START = 32 << 10, JIT_STACK_MAX = 64 << 20 };

/** Where a step's pieces go, and the one held back until it is known whether it grows. */
typedef struct cutter {
    const ra_split_plan_t *plan;
    ra_split_work_t *work;
    int step;
    const char *text;
    ra_split_visit_t visit;
    void *context;
    size_t start, end; /* held back */
    bool holding;
    bool last_match; /* the last part was a match */
} cutter_t;

static ra_status_t run_step(const ra_split_plan_t *plan, ra_split_work_t *work, int step,
                            const char *text, size_t length, ra_split_visit_t visit, void *context);

static ra_status_t emit(const cutter_t *cutter, size_t start, size_t end)
{
    return start == end
               ? RA_OK
               : run_step(cutter->plan, cutter->work, cutter->step + 1, cutter->text + start,
                          end - start, cutter->visit, cutter->context);
}

static ra_status_t hold(cutter_t *cutter, size_t start, size_t end)
{
    if (cutter->holding) {
        RA_TRY(emit(cutter, cutter->start, cutter->end));
    }
    cutter->holding = true;
    cutter->start = start;
    cutter->end = end;
    return RA_OK;
}

/** The next part [start, end) of the text, a match or the text between two. */
static ra_status_t part(cutter_t *cutter, size_t start, size_t end, bool match)
{
    const ra_split_step_t *step = &cutter->plan->steps[cutter->step];
    bool last_match = cutter->last_match, grows = false;
    match = match != step->invert;
    cutter->last_match = match;
    switch (step->behavior) {
    case RA_SPLIT_ISOLATED:
        return emit(cutter, start, end);
    case RA_SPLIT_REMOVED:
        return match ? RA_OK : emit(cutter, start, end);
    case RA_SPLIT_MERGED_WITH_PREVIOUS:
        grows = match && !last_match;
        break;
    case RA_SPLIT_MERGED_WITH_NEXT:
        grows = !match && last_match;
        break;
    case RA_SPLIT_CONTIGUOUS:
        grows = match == last_match;
        break;
    }
    if (grows && cutter->holding) {
        cutter->end = end;
        return RA_OK;
    }
    return hold(cutter, start, end);
}

static ra_status_t match_error(const ra_split_plan_t *plan, int error, size_t length)
{
    PCRE2_UCHAR text[160] = "";
    if (error == PCRE2_ERROR_NOMEMORY) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory to split a text of %zu bytes", length);
    }
    pcre2_get_error_message(error, text, sizeof text);
    return ra_fail(RA_ERR_INPUT, "tokenizer",
                   "%s: the split pattern gave up on a piece of %zu bytes: %s", plan->name, length,
                   (const char *)text);
}

/** Matches as Oniguruma's find_iter() gives them: an empty match right after a match is skipped. */
static ra_status_t cut(const ra_split_plan_t *plan, ra_split_work_t *work, int step,
                       const char *text, size_t length, ra_split_visit_t visit, void *context)
{
    cutter_t cutter = {.plan = plan, .work = work, .step = step, .text = text, .visit = visit};
    cutter.context = context;
    size_t done = 0, from = 0, last_end = SIZE_MAX;
    while (from <= length) {
        int found = pcre2_match(plan->steps[step].code, (PCRE2_SPTR)text, length, from,
                                PCRE2_NO_UTF_CHECK, work->match[step], work->context);
        if (found == PCRE2_ERROR_NOMATCH) {
            break;
        }
        if (found < 0) {
            return match_error(plan, found, length);
        }
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(work->match[step]);
        size_t start = range[0], end = range[1];
        if (start < done || end < start) {
            return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: the split pattern matches backwards",
                           plan->name);
        }
        if (start == end && end == last_end) {
            for (from++; from < length && ((uint8_t)text[from] & 0xc0) == 0x80; from++) {
            }
            continue;
        }
        from = last_end = end;
        if (done != start) {
            RA_TRY(part(&cutter, done, start, false));
        }
        RA_TRY(part(&cutter, start, end, true));
        done = end;
    }
    if (done != length) {
        RA_TRY(part(&cutter, done, length, false));
    }
    return cutter.holding ? emit(&cutter, cutter.start, cutter.end) : RA_OK;
}

static ra_status_t prefix_space(ra_split_work_t *work, const char **text, size_t *length)
{
    if ((*text)[0] == ' ') {
        return RA_OK;
    }
    if (work->prefixed_capacity < *length + 1) {
        char *larger = realloc(work->prefixed, *length + *length / 4 + 64);
        if (larger == NULL) {
            return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for a text of %zu bytes", *length);
        }
        work->prefixed = larger;
        work->prefixed_capacity = *length + *length / 4 + 64;
    }
    work->prefixed[0] = ' ';
    memcpy(work->prefixed + 1, *text, *length);
    *text = work->prefixed;
    *length += 1;
    return RA_OK;
}

static ra_status_t run_step(const ra_split_plan_t *plan, ra_split_work_t *work, int step,
                            const char *text, size_t length, ra_split_visit_t visit, void *context)
{
    if (step < plan->count && plan->steps[step].code == NULL) {
        RA_TRY(prefix_space(work, &text, &length));
        step++;
    }
    return step == plan->count ? visit(context, text, length)
                               : cut(plan, work, step, text, length, visit, context);
}

ra_status_t ra_split_run(const ra_split_plan_t *plan, ra_split_work_t *work, const char *text,
                         size_t length, ra_split_visit_t visit, void *context)
{
    uint64_t limit = MATCH_LIMIT + (uint64_t)MATCH_LIMIT_PER_BYTE * length;
    pcre2_set_match_limit(work->context, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    return length == 0 ? RA_OK : run_step(plan, work, 0, text, length, visit, context);
}

/** @param shown  The pattern as the file has it. */
static ra_status_t compile(const ra_split_plan_t *plan, const char *key, const char *shown,
                           const char *pattern, uint32_t options, pcre2_code **code_p)
{
    int error = 0;
    PCRE2_SIZE offset = 0;
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (context == NULL) {
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory to compile a split pattern");
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_bsr(context, PCRE2_BSR_UNICODE);
    pcre2_code *code =
        pcre2_compile((PCRE2_SPTR)pattern, strlen(pattern), options, &error, &offset, context);
    pcre2_compile_context_free(context);
    if (code == NULL) {
        PCRE2_UCHAR text[160] = "";
        pcre2_get_error_message(error, text, sizeof text);
        return ra_fail(error == PCRE2_ERROR_NOMEMORY ? RA_ERR_NOMEM : RA_ERR_INPUT, "tokenizer",
                       "%s: %s: PCRE2 does not compile \"%.60s\": %s", plan->name, key, shown,
                       (const char *)text);
    }
    int jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
    if (jit != 0) {
        ra_log(RA_LOG_DEBUG, "tokenizer", "split pattern runs without JIT (PCRE2 error %d)", jit);
    }
    *code_p = code;
    return RA_OK;
}

ra_status_t ra_split_plan_add(ra_split_plan_t *plan, const char *key, const char *pattern,
                              bool literal, ra_split_behavior_t behavior, bool invert)
{
    ra_split_step_t *step = &plan->steps[plan->count];
    pcre2_code *code = NULL;
    size_t length = strlen(pattern);
    if (length > RA_TOKENIZER_MAX_PATTERN) {
        return ra_fail(RA_ERR_INPUT, "tokenizer", "%s: %s: a pattern of %zu bytes is more than %d",
                       plan->name, key, length, RA_TOKENIZER_MAX_PATTERN);
    }
    if (literal) {
        RA_TRY(compile(plan, key, pattern, pattern, PCRE2_UTF | PCRE2_LITERAL, &code));
    } else {
        char name[512], *translated;
        snprintf(name, sizeof name, "%s: %s", plan->name, key);
        RA_TRY(ra_split_pattern_translate(name, pattern, length, &translated));
        ra_status_t status =
            compile(plan, key, pattern, translated, RA_SPLIT_COMPILE_OPTIONS, &code);
        free(translated);
        RA_TRY(status);
    }
    *step = (ra_split_step_t){.code = code, .behavior = behavior, .invert = invert};
    plan->count++;
    return RA_OK;
}

ra_status_t ra_split_plan_add_prefix(ra_split_plan_t *plan)
{
    plan->steps[plan->count++] = (ra_split_step_t){0};
    return RA_OK;
}

void ra_split_plan_release(ra_split_plan_t *plan)
{
    for (int i = 0; i < plan->count; i++) {
        pcre2_code_free(plan->steps[i].code);
    }
    free(plan->name);
    *plan = (ra_split_plan_t){0};
}

ra_status_t ra_split_work_init(ra_split_work_t *work, const ra_split_plan_t *plan)
{
    work->context = pcre2_match_context_create(NULL);
    work->stack = pcre2_jit_stack_create(JIT_STACK_START, JIT_STACK_MAX, NULL);
    bool complete = work->context != NULL;
    for (int i = 0; i < plan->count; i++) {
        if (plan->steps[i].code != NULL) {
            work->match[i] = pcre2_match_data_create(1, NULL);
            complete = complete && work->match[i] != NULL;
        }
    }
    if (!complete) {
        ra_split_work_release(work);
        return ra_fail(RA_ERR_NOMEM, "tokenizer", "no memory for the match state");
    }
    /* Without JIT support there is no stack, and none is needed. */
    pcre2_jit_stack_assign(work->context, NULL, work->stack);
    return RA_OK;
}

void ra_split_work_release(ra_split_work_t *work)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(work->match); i++) {
        pcre2_match_data_free(work->match[i]);
    }
    pcre2_match_context_free(work->context);
    pcre2_jit_stack_free(work->stack);
    free(work->prefixed);
    *work = (ra_split_work_t){0};
}
