#include "model/checkpoint.h"
#include "model/model_tensors.h"
#include "tests/model/file_support.h"

#define SHIPPED "configs/models/ring-tiny-linear"

/* A shard of one-byte tensors with the given names, up to a NULL. */
static void write_shard(const temp_t *temp, const char *name, const char *const *tensors)
{
    char header[1024] = "{";
    size_t used = 1;
    int count = 0;
    for (; tensors[count] != NULL; count++) {
        used += (size_t)sprintf(
            header + used, "%s\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
            count > 0 ? "," : "", tensors[count], count, count + 1);
    }
    header[used++] = '}';
    unsigned char bytes[2048] = {(unsigned char)used, (unsigned char)(used >> 8)};
    memcpy(bytes + 8, header, used);
    temp_write(temp, name, bytes, 8 + used + (size_t)count);
}

#define SHARD(temp, name, ...) write_shard(temp, name, (const char *const[]){__VA_ARGS__, NULL})

static const char index_name[] = "model.safetensors.index.json";

static ra_status_t open_closed(const temp_t *temp)
{
    ra_checkpoint_t *checkpoint = NULL;
    ra_status_t status = ra_checkpoint_open(temp->path, &checkpoint);
    ra_checkpoint_close(checkpoint);
    return status;
}

static void a_broken_index_is_refused_with_file_tensor_and_cause(void **state)
{
    static const struct {
        const char *index, *place, *cause;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "\"a\"", "\"/etc/passwd\" is not allowed"},
        {"{\"weight_map\":{\"a\":\"d/x.safetensors\"}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":\".safetensors\"}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":\"x y.safetensors\"}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":\"x.bin\"}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":1}}", "\"a\"", "not allowed"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}", "byte", "twice"},
        {"{\"weight_map\":{}}", "weight_map", "0 tensors"},
        {"{\"weight_map\":[]}", "weight_map", "object"},
        {"{}", "weight_map", "missing"},
        {"[]", "weight_map", "missing"},
        {"{\"weight_map\":", "byte", "ends"},
        {"{\"weight_map\":{\"a\":\"none.safetensors\"}}", "none.safetensors", "No such file"},
        {"{\"weight_map\":{\"a\":\"y.safetensors\",\"b\":\"y.safetensors\"}}", "\"a\"",
         "should be in y.safetensors but is in no file"},
        {"{\"weight_map\":{\"a\":\"y.safetensors\",\"b\":\"x.safetensors\"}}", "\"a\"",
         "should be in y.safetensors but is in x.safetensors"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"z\":\"y.safetensors\"}}", "\"z\"", "no file"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"twin.safetensors\"}}", "\"a\"",
         "there twice: in twin.safetensors and in x.safetensors"},
        {"{\"weight_map\":{\"a\":\"broken.safetensors\"}}", "broken.safetensors", "0 bytes"},
        {"{\"weight_map\":{\"a\":\"link.safetensors\"}}", "link.safetensors", "symbolic link"},
        {"{\"weight_map\":{\"a\":\"up.safetensors\"}}", "up.safetensors", "symbolic link"},
        {"{\"weight_map\":{\"a\":\"dir.safetensors\"}}", "dir.safetensors", "not a regular file"},
    };
    temp_t temp = temp_make();
    (void)state;
    SHARD(&temp, "x.safetensors", "a");
    SHARD(&temp, "y.safetensors", "b");
    SHARD(&temp, "twin.safetensors", "a", "b");
    temp_write(&temp, "broken.safetensors", "", 0);
    assert_int_equal(symlink("/etc/passwd", temp_path(&temp, "link.safetensors")), 0);
    assert_int_equal(symlink("../../blobs/../x", temp_path(&temp, "up.safetensors")), 0);
    assert_int_equal(mkdir(temp_path(&temp, "dir.safetensors"), 0700), 0);
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        temp_write_text(&temp, index_name, cases[i].index);
        REFUSED(open_closed(&temp), RA_ERR_INPUT, cases[i].place, cases[i].cause);
    }
    temp_remove(&temp);
}

static void a_directory_without_weights_is_a_usage_error(void **state)
{
    temp_t temp = temp_make();
    (void)state;
    REFUSED(open_closed(&temp), RA_ERR_USAGE, temp.path, "neither model.safetensors");
    temp_t gone = {"/tmp/ra-test-none"};
    REFUSED(open_closed(&gone), RA_ERR_USAGE, gone.path, "No such file");
    temp_remove(&temp);
}

static void tensors_outside_the_index_are_left_out(void **state)
{
    temp_t temp = temp_make();
    ra_checkpoint_t *checkpoint = NULL;
    (void)state;
    SHARD(&temp, "x.safetensors", "a", "extra", "c");
    SHARD(&temp, "y.safetensors", "b", "zz");
    temp_write_text(&temp, index_name,
                    "{\"metadata\":{\"total_size\":-5},\"weight_map\":{\"c\":\"x.safetensors\","
                    "\"b\":\"y.safetensors\",\"a\":\"x.safetensors\"}}");
    ra_log_set_level(RA_LOG_ERROR);
    accepted(ra_checkpoint_open(temp.path, &checkpoint));
    ra_log_set_level(RA_LOG_WARN);
    assert_int_equal(ra_checkpoint_count(checkpoint), 3);
    assert_int_equal(ra_checkpoint_find(checkpoint, "a"), 0);
    assert_int_equal(ra_checkpoint_find(checkpoint, "c"), 2);
    assert_int_equal(ra_checkpoint_find(checkpoint, "extra"), -1);
    assert_int_equal(ra_checkpoint_find(checkpoint, "zz"), -1);
    assert_non_null(strstr(ra_checkpoint_file_of(checkpoint, 1), "y.safetensors"));
    ra_checkpoint_close(checkpoint);
    temp_remove(&temp);
}

static void the_symbolic_links_of_the_hugging_face_cache_are_followed(void **state)
{
    temp_t temp = temp_make();
    temp_t snapshot;
    ra_checkpoint_t *checkpoint = NULL;
    (void)state;
    assert_int_equal(mkdir(temp_path(&temp, "blobs"), 0700), 0);
    assert_int_equal(mkdir(temp_path(&temp, "snapshots"), 0700), 0);
    assert_int_equal(mkdir(temp_path(&temp, "snapshots/rev"), 0700), 0);
    SHARD(&temp, "blobs/0123abcd", "a");
    snprintf(snapshot.path, sizeof(snapshot.path), "%.40s/snapshots/rev", temp.path);
    assert_int_equal(symlink("../../blobs/0123abcd", temp_path(&snapshot, "model.safetensors")), 0);
    accepted(ra_checkpoint_open(snapshot.path, &checkpoint));
    assert_int_equal(ra_checkpoint_count(checkpoint), 1);
    ra_checkpoint_close(checkpoint);

    /* a blob that is itself a link could lead anywhere */
    assert_int_equal(symlink("/etc/passwd", temp_path(&temp, "blobs/evil")), 0);
    assert_int_equal(unlink(temp_path(&snapshot, "model.safetensors")), 0);
    assert_int_equal(symlink("../../blobs/evil", temp_path(&snapshot, "model.safetensors")), 0);
    REFUSED(ra_checkpoint_open(snapshot.path, &checkpoint), RA_ERR_INPUT, "model.safetensors");
    temp_remove(&temp);
}

static void the_shipped_model_opens_whole(void **state)
{
    ra_model_config_t *config = NULL;
    ra_model_weights_t *weights = NULL;
    const ra_layer_weights_t *layer = NULL;
    const char *digest = NULL, *again = NULL;
    (void)state;
    accepted(ra_model_config_load(SHIPPED, RA_DECAY_A, &config));
    accepted(ra_model_weights_open(SHIPPED, config, &weights));
    assert_int_equal(ra_model_parameters(weights), 13267600);
    assert_int_equal(ra_model_weight_bytes(weights), 26535488); /* total_size of its index */
    accepted(ra_model_weights_acquire(weights, 0, &layer));
    assert_int_equal(layer->qkv.extent[0], 3 * 4 * 64);
    assert_int_equal(layer->expert_count, 0);
    assert_non_null(layer->mlp.down.data);
    assert_non_null(layer->g_proj.data);
    assert_null(layer->router.data);
    ra_model_weights_release(weights, 0);
    accepted(ra_model_weights_acquire(weights, 9, &layer));
    assert_int_equal(layer->qkv.extent[0], (4 + 2 * 2) * 64);
    assert_int_equal(layer->expert_count, 16);
    assert_int_equal(layer->experts[15].down.extent[1], 64);
    assert_int_equal(layer->expert_bias.dtype, RA_F32);
    assert_null(layer->g_proj.data);
    ra_model_weights_release(weights, 9);
    REFUSED(ra_model_weights_acquire(weights, 10, &layer), RA_ERR_INVALID, "layer 10 of 10");
    accepted(ra_model_digest(weights, &digest));
    accepted(ra_model_digest(weights, &again));
    assert_ptr_equal(digest, again);
    assert_int_equal(strlen(digest), 37);
    assert_memory_equal(digest, "xxh3:", 5);
    accepted(ra_model_weights_verify(weights));
    ra_model_weights_destroy(weights);
    ra_model_config_destroy(config);
}

static ra_status_t open_weights(const temp_t *temp, char digest[40])
{
    ra_model_config_t *config = NULL;
    ra_model_weights_t *weights = NULL;
    ra_status_t status = ra_model_config_load(temp->path, RA_DECAY_A, &config);
    const char *text = "";
    if (status == RA_OK) {
        status = ra_model_weights_open(temp->path, config, &weights);
    }
    if (status == RA_OK) {
        status = ra_model_digest(weights, &text);
        snprintf(digest, 40, "%s", text);
    }
    ra_model_weights_destroy(weights);
    ra_model_config_destroy(config);
    return status;
}

/* The golden model with one edit of config.json and one, of equal length, of the header. */
static ra_status_t open_edited(const char *config_from, const char *config_to,
                               const char *header_from, const char *header_to, char digest[40])
{
    temp_t temp = temp_make();
    char config[4096] = "", edited[8192];
    static unsigned char weights[2 << 20];
    FILE *file = fopen("tests/goldens/ring_linear/config.json", "rb");
    assert_non_null(file);
    config[fread(config, 1, sizeof(config) - 1, file)] = '\0';
    fclose(file);
    file = fopen("tests/goldens/ring_linear/model.safetensors", "rb");
    assert_non_null(file);
    size_t length = fread(weights, 1, sizeof(weights), file);
    fclose(file);

    char *at = strstr(config, config_from);
    assert_non_null(at);
    snprintf(edited, sizeof(edited), "%.*s%s%s", (int)(at - config), config, config_to,
             at + strlen(config_from));
    temp_write_text(&temp, "config.json", edited);
    assert_int_equal(strlen(header_from), strlen(header_to));
    unsigned char *found = memmem(weights, length, header_from, strlen(header_from));
    assert_non_null(found);
    memcpy(found, header_to, strlen(header_to));
    temp_write(&temp, "model.safetensors", weights, length);
    ra_status_t status = open_weights(&temp, digest);
    temp_remove(&temp);
    return status;
}

static void weights_that_do_not_fit_the_config_are_refused(void **state)
{
    char d[40];
    (void)state;
    accepted(open_edited("{", "{", "{", "{", d));
    REFUSED(open_edited("{", "{", "lm_head.weight", "lm_head.weighs", d), RA_ERR_INPUT,
            "\"lm_head.weight\" of shape [512, 64] is missing");
    REFUSED(open_edited("\"vocab_size\": 512", "\"vocab_size\": 513", "{", "{", d), RA_ERR_INPUT,
            "model.safetensors", "\"model.word_embeddings.weight\"", "[512, 64]", "[513, 64]",
            "1 more problem");
    REFUSED(open_edited("\"num_experts\": 16", "\"num_experts\": 400", "{", "{", d), RA_ERR_INPUT,
            "num_experts 400", "4800 expert tensors");
    REFUSED(open_edited("\"layer_group_size\": 5", "\"layer_group_size\": 2", "{", "{", d),
            RA_ERR_INPUT, "model.layers.1.attention.query_key_value.weight", "[384, 64]",
            "[256, 64]");
    REFUSED(open_edited("{", "{", "\"dtype\":\"BF16\",\"shape\":[512,64]",
                        "\"dtype\":\"U16\",\"shape\":[ 512,64]", d),
            RA_ERR_INPUT, "\"lm_head.weight\"", "dtype is U16");
    REFUSED(open_edited("{", "{", "\"dtype\":\"BF16\",\"shape\":[512,64]",
                        "\"dtype\":\"F16\",\"shape\":[ 512,64]", d),
            RA_ERR_INPUT, "\"lm_head.weight\"", "dtype is F16; BF16 and F32");
    /* an unknown tensor is only a warning when nothing is missed */
    ra_log_set_level(RA_LOG_ERROR);
    accepted(open_edited("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true",
                         "lm_head.weight", "lm_head.weighs", d));
    ra_log_set_level(RA_LOG_WARN);
}

static void the_digest_changes_with_any_byte_and_the_order_of_nothing_else(void **state)
{
    char same[40], again[40], config[40], header[40];
    (void)state;
    accepted(open_edited("{", "{", "{", "{", same));
    accepted(open_edited("{", "{", "{", "{", again));
    accepted(open_edited("{", "{ ", "{", "{", config));
    accepted(open_edited("{", "{", "}} ", "}}\t", header));
    assert_string_equal(same, again);
    assert_string_not_equal(same, config);
    assert_string_not_equal(same, header);
}

/* A header whose length is not a multiple of 4 puts every tensor at an odd address. */
static void tensors_at_unaligned_addresses_are_copied(void **state)
{
    temp_t temp = temp_make();
    static unsigned char in[2 << 20], out[(2 << 20) + 1];
    ra_model_config_t *config = NULL;
    ra_model_weights_t *weights = NULL;
    const ra_layer_weights_t *layer = NULL;
    FILE *file = fopen("tests/goldens/ring_linear/model.safetensors", "rb");
    (void)state;
    assert_non_null(file);
    size_t length = fread(in, 1, sizeof(in), file);
    fclose(file);
    uint64_t header = in[0] | (uint64_t)in[1] << 8 | (uint64_t)in[2] << 16;
    memcpy(out, in, 8 + header);
    out[8 + header] = ' ';
    memcpy(out + 9 + header, in + 8 + header, length - 8 - header);
    out[0]++;
    assert_int_not_equal(out[0], 0);
    temp_write(&temp, "model.safetensors", out, length + 1);
    temp_copy(&temp, "config.json", "tests/goldens/ring_linear/config.json");
    accepted(ra_model_config_load(temp.path, RA_DECAY_A, &config));
    accepted(ra_model_weights_open(temp.path, config, &weights));
    accepted(ra_model_weights_acquire(weights, 1, &layer));
    assert_int_equal((uintptr_t)layer->expert_bias.data % 4, 0);
    assert_int_equal((uintptr_t)layer->qkv.data % 2, 0);
    ra_model_weights_release(weights, 1);
    ra_model_weights_destroy(weights);
    ra_model_config_destroy(config);
    temp_remove(&temp);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_broken_index_is_refused_with_file_tensor_and_cause),
        cmocka_unit_test(a_directory_without_weights_is_a_usage_error),
        cmocka_unit_test(tensors_outside_the_index_are_left_out),
        cmocka_unit_test(the_symbolic_links_of_the_hugging_face_cache_are_followed),
        cmocka_unit_test(the_shipped_model_opens_whole),
        cmocka_unit_test(weights_that_do_not_fit_the_config_are_refused),
        cmocka_unit_test(the_digest_changes_with_any_byte_and_the_order_of_nothing_else),
        cmocka_unit_test(tensors_at_unaligned_addresses_are_copied),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
