/*
 * The first byte chooses.
 *   't'  the rest is a tokenizer.json; what opens encodes a text and decodes it again
 *   'p'  the rest is a split pattern, put into a small tokenizer
 *   'n'  the rest is encoded by a small tokenizer with a normalizer and every kind of added token
 *   else the rest is encoded by one whose ids give the text back exactly
 */
#include "model/tokenizer.h"
#include "tests/fuzz/fuzz_support.h"
#include <cjson/cJSON.h>
#include <stdio.h>

/* GPT-2's letters of the bytes of @a text (NULL: all 256), then what some merges give. */
static void add_bytes(cJSON *vocab, const char *text)
{
    int next = 0x100;
    for (int byte = 0; byte < 256; byte++) {
        int plain = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
        int letter = plain ? byte : next++;
        char key[3] = {(char)letter, '\0', '\0'};
        if (letter >= 0x80) {
            key[0] = (char)(0xc0 | letter >> 6);
            key[1] = (char)(0x80 | (letter & 0x3f));
        }
        if (text == NULL || (byte != 0 && strchr(text, byte) != NULL)) {
            cJSON_AddNumberToObject(vocab, key, byte);
        }
    }
    cJSON_AddNumberToObject(vocab, "ab", 256);
    cJSON_AddNumberToObject(vocab, "abab", 257);
    cJSON_AddNumberToObject(vocab, "\xc4\xa0\xc4\xa0", 258);
}

static const char pipeline[] =
    "{\"added_tokens\":%s,\"normalizer\":%s,\"pre_tokenizer\":{\"type\":\"Sequence\","
    "\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\"},\"behavior\":\"%s\"},"
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":%s,\"use_regex\":false}]},\"model\":{\"type\":"
    "\"BPE\",\"merges\":[\"ab ab\",\"a b\",\"\xc4\xa0 \xc4\xa0\"]}}";

static const char every_added_token[] =
    "[{\"id\":300,\"content\":\"<s>\",\"special\":true},"
    "{\"id\":301,\"content\":\"ab\\u00e9\",\"lstrip\":true,\"normalized\":true},"
    "{\"id\":302,\"content\":\"<s\",\"rstrip\":true,\"normalized\":false},"
    "{\"id\":303,\"content\":\"one\",\"single_word\":true,\"normalized\":false},"
    "{\"id\":304,\"content\":\"  \",\"lstrip\":true,\"rstrip\":true,\"normalized\":true}]";

static ra_tokenizer_t *open_small(const char *added, const char *normalizer, const char *behavior,
                                  const char *prefix, const char *pattern, const char *letters,
                                  ra_status_t *status)
{
    char text[4096];
    ra_tokenizer_t *tokenizer = NULL;
    snprintf(text, sizeof(text), pipeline, added, normalizer, behavior, prefix);
    cJSON *root = cJSON_Parse(text);
    cJSON *pre = cJSON_GetObjectItem(root, "pre_tokenizer");
    cJSON *split = cJSON_GetArrayItem(cJSON_GetObjectItem(pre, "pretokenizers"), 0);
    cJSON_ReplaceItemInObject(cJSON_GetObjectItem(split, "pattern"), "Regex",
                              cJSON_CreateString(pattern));
    add_bytes(cJSON_AddObjectToObject(cJSON_GetObjectItem(root, "model"), "vocab"), letters);
    char *json = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    *status = ra_tokenizer_open_memory("small.json", json, (int64_t)strlen(json), &tokenizer);
    cJSON_free(json);
    return tokenizer;
}

/* @param exact  whether the ids have to give the text back */
static void try_text(ra_tokenizer_t *tokenizer, const char *text, size_t size, int exact)
{
    int32_t *ids = NULL;
    char *back = NULL;
    int64_t count = 0, length = 0;
    ra_status_t status = ra_tokenizer_encode(tokenizer, text, (int64_t)size, &ids, &count);
    fuzz_check_refusal(status);
    if (status != RA_OK) {
        return;
    }
    if (ra_tokenizer_decode(tokenizer, ids, count, &back, &length) != RA_OK) {
        abort();
    }
    if (exact && ((size_t)length != size || memcmp(back, text, size) != 0)) {
        abort();
    }
    free(back);
    free(ids);
}

static void try_file(const uint8_t *data, size_t size)
{
    static const char text[] = "The 3 ab<s>abab  \n\r\n caf\xc3\xa9 e\xcc\x81 \xe6\x97\xa5 it's";
    ra_tokenizer_t *tokenizer = NULL;
    ra_status_t status =
        ra_tokenizer_open_memory("tokenizer.json", (const char *)data, (int64_t)size, &tokenizer);
    fuzz_check_refusal(status);
    if (status == RA_OK) {
        try_text(tokenizer, text, sizeof(text) - 1, 0);
    }
    ra_tokenizer_close(tokenizer);
}

static void try_pattern(const uint8_t *data, size_t size)
{
    static const char text[] = "a1 ab  \n x\xc3\xa9";
    char pattern[1024] = "";
    ra_status_t status;
    memcpy(pattern, data, size < sizeof(pattern) ? size : sizeof(pattern) - 1);
    ra_tokenizer_t *tokenizer =
        open_small("[]", "null", "Isolated", "false", pattern, text, &status);
    fuzz_check_refusal(status);
    if (status == RA_OK) {
        try_text(tokenizer, text, sizeof(text) - 1, 1);
    }
    ra_tokenizer_close(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char words[] = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
                                "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    static ra_tokenizer_t *plain, *rich;
    fuzz_quiet();
    if (plain == NULL) {
        ra_status_t status;
        plain = open_small("[{\"id\":300,\"content\":\"<s>\",\"special\":true}]", "null",
                           "Isolated", "false", words, NULL, &status);
        rich = open_small(every_added_token,
                          "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKD\"},"
                          "{\"type\":\"Lowercase\"},{\"type\":\"NFC\"}]}",
                          "MergedWithNext", "true", words, NULL, &status);
        if (plain == NULL || rich == NULL) {
            abort();
        }
    }
    if (size == 0) {
        return 0;
    }
    switch (data[0]) {
    case 't':
        try_file(data + 1, size - 1);
        break;
    case 'p':
        try_pattern(data + 1, size - 1);
        break;
    case 'n':
        try_text(rich, (const char *)data + 1, size - 1, 0);
        break;
    default:
        try_text(plain, (const char *)data + 1, size - 1, 1);
        break;
    }
    return 0;
}
