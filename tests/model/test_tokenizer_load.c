/*
 * Mirrors model/tokenizer_load.c, tokenizer_model.c, tokenizer_split.c, tokenizer_normalize.c,
 * tokenizer_added.c and split_*.c. Oracle of the ids: the Hugging Face tokenizers library (0.23.3).
 */
#include "base/log.h"
#include "tests/model/tokenizer_support.h"

/** Every file of the corpus and what its message has to name. */
static const struct {
    const char *file, *cause;
} broken[] = {
    {"empty_file", "byte 0"},
    {"truncated", "byte"},
    {"trailing_bytes", "byte"},
    {"not_an_object", "object"},
    {"invalid_utf8", "UTF-8"},
    {"duplicate_key", "merges"},
    {"duplicate_token", "ab"},
    {"duplicate_token_escaped", "ab"},
    {"nul_in_token", "\\u0000"},
    {"deep_nesting", "deep"},
    {"deep_sequence", "deep"},
    {"wrong_version", "version"},
    {"no_model", "model"},
    {"model_is_text", "model"},
    {"unigram", "Unigram"},
    {"no_vocab", "vocab"},
    {"vocab_is_array", "vocab"},
    {"no_merges", "merges"},
    {"negative_id", "\"ab\""},
    {"fractional_id", "\"ab\""},
    {"huge_id", "\"ab\""},
    {"overflowing_id", "\"ab\""},
    {"text_id", "\"ab\""},
    {"shared_id", "both"},
    {"empty_token", "0 bytes"},
    {"long_token", "bytes"},
    {"merge_of_unknown", "merges[0]"},
    {"merge_into_unknown", "merges[0]"},
    {"merge_three_parts", "merges[0]"},
    {"merge_one_part", "merges[0]"},
    {"merge_of_nothing", "merges[0]"},
    {"merge_pair_of_three", "merges[1]"},
    {"merge_number", "merges[0]"},
    {"merges_is_object", "merges"},
    {"dropout", "dropout"},
    {"unk_token", "unk_token"},
    {"byte_fallback", "byte_fallback"},
    {"subword_prefix", "continuing_subword_prefix"},
    {"word_suffix", "end_of_word_suffix"},
    {"ignore_merges_number", "ignore_merges"},
    {"added_is_object", "added_tokens"},
    {"added_without_content", "content"},
    {"added_without_id", "id"},
    {"added_empty", "0 bytes"},
    {"added_negative_id", "id"},
    {"added_other_id", "\"a\""},
    {"added_taken_id", "both"},
    {"added_flag_text", "lstrip"},
    {"normalizer_unknown", "Replace"},
    {"normalizer_without_type", "type"},
    {"normalizer_list_missing", "normalizers"},
    {"normalizer_many", "normalizers"},
    {"no_pre_tokenizer", "pre_tokenizer"},
    {"metaspace", "Metaspace"},
    {"not_byte_level", "ByteLevel"},
    {"step_after_byte_level", "after"},
    {"pre_tokenizer_many", "steps"},
    {"split_behavior", "Sometimes"},
    {"split_without_pattern", "pattern"},
    {"split_two_patterns", "pattern"},
    {"pattern_unclosed_group", "group"},
    {"pattern_unclosed_class", "class"},
    {"pattern_repeat_nothing", "PCRE2"},
    {"pattern_verb", "group"},
    {"pattern_recursion", "group"},
    {"pattern_property", "property"},
    {"pattern_escape", "escape"},
    {"pattern_deep_classes", "deep"},
    {"pattern_deep_groups", "deep"},
    {"pattern_huge_repeat", "PCRE2"},
    {"pattern_reversed_range", "range"},
    {"pattern_inner_option", "option"},
    {"post_processor_bert", "BertProcessing"},
    {"decoder_wordpiece", "WordPiece"},
};

static void every_broken_file_is_rejected_with_its_name_and_cause(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    for (size_t i = 0; i < RA_ARRAY_LEN(broken); i++) {
        char path[256];
        ra_tokenizer_t *tokenizer = NULL;
        snprintf(path, sizeof(path), "tests/corpus/tokenizer/%s.json", broken[i].file);
        ra_status_t status = ra_tokenizer_open_file(path, &tokenizer);
        const char *text = ra_last_error();
        if (status != RA_ERR_INPUT || strstr(text, path) == NULL ||
            strstr(text, broken[i].cause) == NULL) {
            fail_msg("%s: %s: \"%s\" does not name the file and \"%s\"", broken[i].file,
                     ra_status_name(status), text, broken[i].cause);
        }
        assert_null(tokenizer);
    }
    ra_log_set_quiet(0);
}

/* The corpus is broken by one change each: the file they start from is sound. */
static void the_sound_file_of_the_corpus_opens(void **state)
{
    (void)state;
    ra_tokenizer_t *tokenizer = NULL;
    int32_t *ids = NULL;
    int64_t count = 0;
    assert_int_equal(ra_tokenizer_open_file("tests/corpus/tokenizer/sound.json", &tokenizer),
                     RA_OK);
    assert_int_equal(ra_tokenizer_encode(tokenizer, "ab ba<s>a", 9, &ids, &count), RA_OK);
    assert_int_equal(count, 6);
    assert_memory_equal(ids, ((int32_t[]){2, 3, 1, 0, 4, 0}), 6 * sizeof(int32_t));
    free(ids);
    ra_log_set_quiet(1);
    ids = NULL;
    assert_int_equal(ra_tokenizer_encode(tokenizer, "abc", 3, &ids, &count), RA_ERR_INPUT);
    assert_non_null(strstr(ra_last_error(), "0x63"));
    assert_null(ids);
    ra_log_set_quiet(0);
    ra_tokenizer_close(tokenizer);
}

/** A tokenizer.json of the goldens' vocabulary and one case's pipeline. */
static ra_tokenizer_t *open_case(const cJSON *goldens, const cJSON *golden)
{
    static const char *const parts[] = {"added_tokens", "normalizer", "pre_tokenizer"};
    ra_tokenizer_t *tokenizer = NULL;
    cJSON *root = cJSON_CreateObject();
    cJSON *model = cJSON_AddObjectToObject(root, "model");
    cJSON_AddStringToObject(model, "type", "BPE");
    cJSON_AddItemReferenceToObject(model, "vocab", cJSON_GetObjectItem(goldens, "vocab"));
    cJSON_AddItemReferenceToObject(model, "merges", cJSON_GetObjectItem(goldens, "merges"));
    cJSON_AddItemReferenceToObject(model, "ignore_merges",
                                   cJSON_GetObjectItem(golden, "ignore_merges"));
    for (size_t i = 0; i < RA_ARRAY_LEN(parts); i++) {
        cJSON_AddItemReferenceToObject(root, parts[i], cJSON_GetObjectItem(golden, parts[i]));
    }
    char *json = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    assert_int_equal(ra_tokenizer_open_memory(cJSON_GetObjectItem(golden, "name")->valuestring,
                                              json, (int64_t)strlen(json), &tokenizer),
                     RA_OK);
    cJSON_free(json);
    return tokenizer;
}

static void every_pipeline_gives_the_ids_of_tokenizers(void **state)
{
    (void)state;
    cJSON *goldens = read_goldens("tests/goldens/tokenizer_pipelines.json");
    const cJSON *golden, *item;
    int count = 0;
    cJSON_ArrayForEach(golden, ra_json_member(goldens, "cases"))
    {
        ra_tokenizer_t *tokenizer = open_case(goldens, golden);
        cJSON_ArrayForEach(item, ra_json_member(golden, "texts"))
        {
            cJSON *text = cJSON_GetObjectItem(item, "text");
            int64_t length = golden_text(text);
            assert_encodes(tokenizer, text->valuestring, length, ra_json_member(item, "ids"),
                           ra_json_member(golden, "name")->valuestring);
            count++;
        }
        ra_tokenizer_close(tokenizer);
    }
    assert_int_equal(count, 24 * 8);
    cJSON_Delete(goldens);
}

/** The pipeline of ByteLevel after one Split; the vocabulary is every byte, no merges. */
static ra_status_t open_pattern(const char *pattern, ra_tokenizer_t **tokenizer)
{
    cJSON *root = cJSON_CreateObject(), *pre = cJSON_AddObjectToObject(root, "pre_tokenizer");
    cJSON *list, *split = cJSON_CreateObject(), *bytes = cJSON_CreateObject();
    cJSON_AddStringToObject(pre, "type", "Sequence");
    list = cJSON_AddArrayToObject(pre, "pretokenizers");
    cJSON_AddItemToArray(list, split);
    cJSON_AddStringToObject(split, "type", "Split");
    cJSON_AddStringToObject(cJSON_AddObjectToObject(split, "pattern"), "Regex", pattern);
    cJSON_AddStringToObject(split, "behavior", "Isolated");
    cJSON_AddItemToArray(list, bytes);
    cJSON_AddStringToObject(bytes, "type", "ByteLevel");
    cJSON_AddFalseToObject(bytes, "add_prefix_space");
    cJSON_AddFalseToObject(bytes, "use_regex");
    cJSON *model = cJSON_AddObjectToObject(root, "model");
    cJSON *vocab = cJSON_AddObjectToObject(model, "vocab");
    cJSON_AddNumberToObject(vocab, "a", 0);
    cJSON_AddNumberToObject(vocab, "aa", 1);
    cJSON_AddNumberToObject(vocab, "b", 2);
    cJSON *merges = cJSON_AddArrayToObject(model, "merges");
    cJSON_AddItemToArray(merges, cJSON_CreateString("a a"));
    char *json = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    ra_status_t status =
        ra_tokenizer_open_memory("pattern.json", json, (int64_t)strlen(json), tokenizer);
    cJSON_free(json);
    return status;
}

/* (a+)+$ before a b backtracks exponentially: an error, never another split. */
static void a_pattern_that_gives_up_is_an_error(void **state)
{
    (void)state;
    static const char text[] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab";
    ra_tokenizer_t *tokenizer = NULL;
    int32_t *ids = NULL;
    int64_t count = 0;
    assert_int_equal(open_pattern("(a|aa)+(?!b)(?:x|$)", &tokenizer), RA_OK);
    ra_log_set_quiet(1);
    assert_int_equal(ra_tokenizer_encode(tokenizer, text, sizeof(text) - 1, &ids, &count),
                     RA_ERR_INPUT);
    assert_non_null(strstr(ra_last_error(), "gave up"));
    assert_null(ids);
    ra_log_set_quiet(0);
    ra_tokenizer_close(tokenizer);
}

static void an_empty_match_does_not_loop(void **state)
{
    (void)state;
    static const char *const patterns[] = {"", "(?=a)", "a*?", "\\b", "^", "$", "(?:)|a"};
    for (size_t i = 0; i < RA_ARRAY_LEN(patterns); i++) {
        ra_tokenizer_t *tokenizer = NULL;
        assert_int_equal(open_pattern(patterns[i], &tokenizer), RA_OK);
        assert_round_trip(tokenizer, "aaabaaa", 7);
        ra_tokenizer_close(tokenizer);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_broken_file_is_rejected_with_its_name_and_cause),
        cmocka_unit_test(the_sound_file_of_the_corpus_opens),
        cmocka_unit_test(every_pipeline_gives_the_ids_of_tokenizers),
        cmocka_unit_test(a_pattern_that_gives_up_is_an_error),
        cmocka_unit_test(an_empty_match_does_not_loop),
    };
    return cmocka_run_group_tests_name("tokenizer_load", tests, NULL, NULL);
}
