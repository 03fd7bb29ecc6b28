#include "model/safetensors.h"
#include "model/safetensors_write.h"
#include "tests/model/file_support.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* A file of `header` and `data_bytes` zero bytes; length_offset is added to the true header length.
 */
static unsigned char *build(const char *header, size_t data_bytes, int64_t length_offset,
                            size_t *length)
{
    size_t header_bytes = strlen(header);
    uint64_t claimed = (uint64_t)((int64_t)header_bytes + length_offset);
    unsigned char *bytes = calloc(1, 8 + header_bytes + data_bytes + 1);
    assert_non_null(bytes);
    for (int i = 0; i < 8; i++) {
        bytes[i] = (unsigned char)(claimed >> (8 * i));
    }
    memcpy(bytes + 8, header, header_bytes);
    *length = 8 + header_bytes + data_bytes;
    return bytes;
}

static ra_status_t open_built(const char *header, size_t data_bytes, int64_t length_offset)
{
    temp_t temp = temp_make();
    size_t length = 0;
    ra_safetensors_t *file = NULL;
    unsigned char *bytes = build(header, data_bytes, length_offset, &length);
    temp_write(&temp, "x.safetensors", bytes, length);
    ra_status_t status = ra_safetensors_open(temp_path(&temp, "x.safetensors"), &file);
    ra_safetensors_close(file);
    free(bytes);
    temp_remove(&temp);
    return status;
}

static const char good[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";

static void a_broken_header_is_refused_with_file_tensor_and_cause(void **state)
{
#define ONE(fields)     "{\"a\":{" fields "}}"
#define TENSOR(d, s, o) "\"dtype\":\"" d "\",\"shape\":" s ",\"data_offsets\":" o
    static const struct {
        const char *header;
        size_t data;
        const char *place, *cause;
    } cases[] = {
        {ONE(TENSOR("F32", "[2]", "[0,8]")), 7, "\"a\"", "do not lie in the 7 bytes"},
        {ONE(TENSOR("F32", "[2]", "[0,8]")), 9, "byte", "goes on for 1 bytes"},
        {ONE(TENSOR("F32", "[3]", "[0,8]")), 8, "\"a\"", "takes 12 bytes"},
        {ONE(TENSOR("F32", "[2]", "[8,0]")), 8, "\"a\"", "data_offsets [8, 0]"},
        {ONE(TENSOR("F32", "[2]", "[1,9]")), 9, "\"a\"", "leaves a hole"},
        {ONE(TENSOR("F33", "[2]", "[0,8]")), 8, "\"a\"", "dtype F33"},
        {ONE(TENSOR("C64", "[1]", "[0,8]")), 8, "\"a\"", "dtype C64"},
        {ONE(TENSOR("F32", "[4294967296,4294967296]", "[0,0]")), 0, "\"a\"", "overflow"},
        {ONE(TENSOR("F32", "[4611686018427387904]", "[0,0]")), 0, "\"a\"", "2^53"},
        {ONE(TENSOR("F64", "[4503599627370496,512]", "[0,0]")), 0, "\"a\"", "overflow"},
        {ONE(TENSOR("F32", "[0,4294967296,4294967296]", "[0,0]")), 0, "\"a\"", "overflow"},
        {ONE(TENSOR("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]")), 4, "\"a\"", "8 dimensions"},
        {ONE(TENSOR("F32", "2", "[0,8]")), 8, "\"a\"", "\"shape\""},
        {ONE(TENSOR("F32", "[\"2\"]", "[0,8]")), 8, "\"a\"", "\"shape\""},
        {ONE(TENSOR("F32", "[-2]", "[0,8]")), 8, "byte", "plain non-negative"},
        {ONE(TENSOR("F32", "[2.0]", "[0,8]")), 8, "byte", "plain non-negative"},
        {ONE(TENSOR("F32", "[2]", "[0,8,8]")), 8, "\"a\"", "\"data_offsets\""},
        {ONE(TENSOR("F32", "[2]", "[0]")), 8, "\"a\"", "\"data_offsets\""},
        {ONE(TENSOR("F32", "[2]", "[0,8]") ",\"more\":1"), 8, "\"a\"", "unknown key \"more\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[2]"), 8, "\"a\"", "\"data_offsets\" is missing"},
        {ONE("\"dtype\":4,\"shape\":[2],\"data_offsets\":[0,8]"), 8, "\"a\"", "not a string"},
        {"{\"a\":3}", 0, "\"a\"", "must be an object"},
        {"{\"\":{" TENSOR("U8", "[1]", "[0,1]") "}}", 1, "name", "0 bytes"},
        {"{\"a\\u0007\":{" TENSOR("U8", "[1]", "[0,1]") "}}", 1, "name", "control"},
        {"{\"a\":{" TENSOR("U8", "[1]", "[0,1]") "},\"a\":{" TENSOR("U8", "[1]", "[0,1]") "}}", 1,
         "byte", "twice"},
        {"{\"a\":{" TENSOR("U8", "[2]", "[0,2]") "},\"b\":{" TENSOR("U8", "[2]", "[1,3]") "}}", 3,
         "\"b\"", "overlaps"},
        {"{\"a\":{" TENSOR("U8", "[1]", "[0,1]") "},\"b\":{" TENSOR("U8", "[1]", "[2,3]") "}}", 3,
         "\"b\"", "leaves a hole"},
        {"{\"__metadata__\":{\"n\":1}}", 0, "__metadata__", "\"n\" is not a string"},
        {"{\"__metadata__\":[]}", 0, "__metadata__", "must be an object"},
        {"[]", 0, "byte 8", "not a JSON object"},
        {"\xef\xbb\xbf{}", 0, "byte 0", "not a JSON value"},
        {"", 0, "byte 0", "ends"},
        {"{\"a\":[[[[[[[[[]]]]]]]]]}", 0, "byte", "deeper than 8"},
    };
    (void)state;
    for (size_t i = 0; i < RA_ARRAY_LEN(cases); i++) {
        REFUSED(open_built(cases[i].header, cases[i].data, 0), RA_ERR_INPUT, "x.safetensors",
                cases[i].place, cases[i].cause);
    }
}

static void a_wrong_header_length_is_refused(void **state)
{
    (void)state;
    REFUSED(open_built(good, 8, 1000), RA_ERR_INPUT, "byte 0", "truncated");
    REFUSED(open_built(good, 8, -1), RA_ERR_INPUT, "byte", "does not end");
    REFUSED(open_built(good, 8, 9), RA_ERR_INPUT, "x.safetensors", "truncated");
    REFUSED(open_built(good, 8, (int64_t)1 << 40), RA_ERR_INPUT, "byte 0", "at most 8388608");
    REFUSED(open_built(good, 8, INT64_MIN), RA_ERR_INPUT, "byte 0", "at most");
    REFUSED(open_built(good, 8, -(int64_t)strlen(good) - 1), RA_ERR_INPUT, "byte 0", "at most");
}

static void a_truncated_file_is_rejected_at_every_length(void **state)
{
    size_t length = 0;
    unsigned char *bytes = build(good, 8, 0, &length);
    (void)state;
    ra_log_set_quiet(1);
    for (size_t n = 0; n < length; n++) {
        /* a copy of exactly n bytes, so that a sanitizer sees a read behind them */
        unsigned char *part = malloc(n + (n == 0));
        ra_safetensors_t *file = NULL;
        memcpy(part, bytes, n);
        REFUSED(ra_safetensors_parse("cut", part, (int64_t)n, &file), RA_ERR_INPUT, "cut");
        free(part);
    }
    ra_log_set_quiet(0);
    free(bytes);
}

static void long_names_and_much_metadata_are_refused(void **state)
{
    char *header = malloc(3 << 20);
    (void)state;
    assert_non_null(header);
    for (int n = 512; n <= 513; n++) {
        sprintf(header, "{\"%0*d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", n, 7);
        ra_status_t status = open_built(header, 1, 0);
        if (n == 512) {
            accepted(status);
        } else {
            REFUSED(status, RA_ERR_INPUT, "513 bytes", "1 to 512");
        }
    }
    sprintf(header, "{\"__metadata__\":{\"k\":\"%0*d\"}}", 1 << 20, 7);
    REFUSED(open_built(header, 0, 0), RA_ERR_INPUT, "__metadata__", "1 MiB");
    free(header);
}

static void what_the_format_allows_is_read(void **state)
{
    static const char header[] =
        " {\"w\":{\"data_offsets\":[4,16],\"shape\":[2,3],\"dtype\":\"BF16\"},"
        "\"__metadata__\":{\"format\":\"pt\"},"
        "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
        "\"e\":{\"dtype\":\"U8\",\"shape\":[0,5],\"data_offsets\":[16,16]}}\n\t ";
    size_t length = 0;
    ra_safetensors_t *file = NULL;
    unsigned char *bytes = build(header, 16, 0, &length);
    (void)state;
    accepted(ra_safetensors_parse("good", bytes, (int64_t)length, &file));
    assert_int_equal(ra_safetensors_count(file), 3);
    assert_string_equal(ra_safetensors_at(file, 0)->name, "e");
    assert_string_equal(ra_safetensors_metadata(file, "format"), "pt");
    assert_null(ra_safetensors_metadata(file, "Format"));
    const ra_safetensors_entry_t *w = ra_safetensors_find(file, "w");
    assert_non_null(w);
    assert_int_equal(w->view.dtype, RA_BF16);
    assert_int_equal(w->view.rank, 2);
    assert_int_equal(w->view.extent[1], 3);
    assert_int_equal(w->view.stride[0], 3);
    assert_ptr_equal(w->view.data, bytes + length - 12);
    assert_int_equal(ra_tensor_count(&ra_safetensors_find(file, "s")->view), 1);
    assert_int_equal(ra_tensor_count(&ra_safetensors_find(file, "e")->view), 0);
    assert_null(ra_safetensors_find(file, "W"));
    ra_safetensors_close(file);
    free(bytes);
}

static void missing_files_and_directories_are_told_apart(void **state)
{
    temp_t temp = temp_make();
    ra_safetensors_t *file = NULL;
    (void)state;
    REFUSED(ra_safetensors_open(temp_path(&temp, "no"), &file), RA_ERR_USAGE, "No such file");
    REFUSED(ra_safetensors_open(temp.path, &file), RA_ERR_INPUT, "not a regular file");
    assert_int_equal(mkfifo(temp_path(&temp, "pipe"), 0600), 0);
    REFUSED(ra_safetensors_open(temp_path(&temp, "pipe"), &file), RA_ERR_INPUT, "regular file");
    temp_write(&temp, "empty", "", 0);
    REFUSED(ra_safetensors_open(temp_path(&temp, "empty"), &file), RA_ERR_INPUT, "0 bytes");
    temp_remove(&temp);
}

/* Truncating a mapped file must not kill the reader, and must be found out. */
static void a_file_that_shrinks_while_mapped_is_survived_and_reported(void **state)
{
    enum { DATA = 1 << 20 };
    temp_t temp = temp_make();
    size_t length = 0;
    ra_safetensors_t *file = NULL;
    char header[128];
    (void)state;
    sprintf(header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%d],\"data_offsets\":[0,%d]}}", DATA,
            DATA);
    unsigned char *bytes = build(header, DATA, 0, &length);
    memset(bytes + length - DATA, 0x5a, DATA);
    temp_write(&temp, "s.safetensors", bytes, length);
    free(bytes);
    accepted(ra_safetensors_open(temp_path(&temp, "s.safetensors"), &file));
    const unsigned char *data = ra_safetensors_find(file, "a")->view.data;
    assert_int_equal(data[0], 0x5a);
    assert_int_equal(truncate(temp_path(&temp, "s.safetensors"), 4096), 0);
    int sum = 0;
    for (int i = 0; i < DATA; i += 512) {
        sum += data[i];
    }
    assert_true(sum < DATA / 512 * 0x5a);
    REFUSED(ra_safetensors_verify(file), RA_ERR_INPUT, "s.safetensors", "shorter");
    ra_safetensors_close(file);
    temp_remove(&temp);
}

static void a_file_written_to_while_mapped_is_reported(void **state)
{
    temp_t temp = temp_make();
    size_t length = 0;
    ra_safetensors_t *file = NULL;
    struct timespec times[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    unsigned char *bytes = build(good, 8, 0, &length);
    (void)state;
    temp_write(&temp, "w.safetensors", bytes, length);
    free(bytes);
    accepted(ra_safetensors_open(temp_path(&temp, "w.safetensors"), &file));
    accepted(ra_safetensors_verify(file));
    assert_int_equal(utimensat(AT_FDCWD, temp_path(&temp, "w.safetensors"), times, 0), 0);
    REFUSED(ra_safetensors_verify(file), RA_ERR_INPUT, "w.safetensors", "written to");
    ra_safetensors_close(file);
    temp_remove(&temp);
}

typedef struct put_job {
    ra_safetensors_writer_t *writer;
    int64_t index;
    const float *values;
    int first;
} put_job_t;

/* Every other block of 100 values, last block first. */
static void *put_blocks(void *arg)
{
    put_job_t *job = arg;
    for (int block = 8 + job->first; block >= 0; block -= 2) {
        accepted(ra_safetensors_writer_put(job->writer, job->index, 400 * block,
                                           job->values + 100 * block, 400));
    }
    return NULL;
}

static void what_threads_wrote_in_any_order_is_read_back(void **state)
{
    temp_t temp = temp_make();
    const char *path = temp_path(&temp, "out.safetensors");
    ra_safetensors_writer_t *writer = NULL;
    ra_safetensors_t *file = NULL;
    float values[1000];
    uint64_t seed = 3;
    int64_t shape[2] = {10, 100}, empty = 0, index = 0, second = 0, third = 0;
    (void)state;
    test_fill(values, 1000, &seed, -1, 1);
    accepted(ra_safetensors_writer_create(path, &writer));
    accepted(ra_safetensors_writer_metadata(writer, "format", "test"));
    accepted(ra_safetensors_writer_declare(writer, "big", RA_F32, 2, shape, &index));
    accepted(ra_safetensors_writer_declare(writer, "empty", RA_F32, 1, &empty, &second));
    accepted(ra_safetensors_writer_declare(writer, "byte", RA_U8, 0, NULL, &third));
    REFUSED(ra_safetensors_writer_declare(writer, "big", RA_F32, 0, NULL, &third), RA_ERR_INVALID,
            "\"big\"");
    accepted(ra_safetensors_writer_begin(writer));
    put_job_t jobs[2] = {{writer, index, values, 0}, {writer, index, values, 1}};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, put_blocks, &jobs[1]), 0);
    put_blocks(&jobs[0]);
    pthread_join(thread, NULL);
    REFUSED(ra_safetensors_writer_commit(writer), RA_ERR_INVALID, "\"byte\"", "0 of 1");
    assert_int_equal(access(path, F_OK), -1);
    accepted(ra_safetensors_writer_put(writer, 2, 0, "x", 1));
    REFUSED(ra_safetensors_writer_put(writer, 2, 1, "x", 1), RA_ERR_INVALID, "do not fit");
    accepted(ra_safetensors_writer_commit(writer));
    assert_int_equal(ra_safetensors_writer_bytes(writer), 4096 + 4001);
    ra_safetensors_writer_destroy(writer);

    accepted(ra_safetensors_open(path, &file));
    const ra_safetensors_entry_t *big = ra_safetensors_find(file, "big");
    assert_int_equal((uintptr_t)big->view.data % 4096, 0);
    assert_memory_equal(big->view.data, values, sizeof(values));
    assert_string_equal(ra_safetensors_metadata(file, "format"), "test");
    ra_safetensors_close(file);
    temp_remove(&temp);
}

static void a_writer_given_up_leaves_nothing_and_keeps_the_old_file(void **state)
{
    temp_t temp = temp_make();
    const char *path = temp_path(&temp, "old.safetensors");
    ra_safetensors_writer_t *writer = NULL;
    struct stat info;
    (void)state;
    temp_write_text(&temp, "old.safetensors", "old");
    accepted(ra_safetensors_writer_create(path, &writer));
    accepted(ra_safetensors_writer_begin(writer));
    ra_safetensors_writer_destroy(writer);
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_size, 3);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(temp.path), 0); /* so nothing else is there */
    ra_log_set_quiet(0);
}

static void an_unwritable_place_is_an_output_error_with_its_reason(void **state)
{
    ra_safetensors_writer_t *writer = NULL;
    (void)state;
    ra_log_set_quiet(1);
    accepted(ra_safetensors_writer_create("/nonexistent-directory/x.safetensors", &writer));
    REFUSED(ra_safetensors_writer_begin(writer), RA_ERR_OUTPUT, "x.safetensors", "No such file");
    ra_safetensors_writer_destroy(writer);
    ra_log_set_quiet(0);
}

/* A limit on file size stands for a disk that is full. */
static void a_full_disk_is_an_output_error_and_leaves_no_file(void **state)
{
    temp_t temp = temp_make();
    const char *path = temp_path(&temp, "full.safetensors");
    ra_safetensors_writer_t *writer = NULL;
    int64_t extent = 1 << 20, index = 0;
    static unsigned char block[1 << 20];
    (void)state;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct rlimit limit = {8192, 8192};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        ra_status_t status = ra_safetensors_writer_create(path, &writer);
        status = status == RA_OK
                     ? ra_safetensors_writer_declare(writer, "a", RA_U8, 1, &extent, &index)
                     : status;
        status = status == RA_OK ? ra_safetensors_writer_begin(writer) : status;
        status = status == RA_OK ? ra_safetensors_writer_put(writer, 0, 0, block, extent) : status;
        bool named = strstr(ra_last_error(), "File too large") != NULL;
        ra_safetensors_writer_destroy(writer);
        _exit(status == RA_ERR_OUTPUT && named ? 0 : 1);
    }
    int result = 0;
    assert_int_equal(waitpid(child, &result, 0), child);
    assert_true(WIFEXITED(result) && WEXITSTATUS(result) == 0);
    assert_int_equal(rmdir(temp.path), 0);
    ra_log_set_quiet(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_broken_header_is_refused_with_file_tensor_and_cause),
        cmocka_unit_test(a_wrong_header_length_is_refused),
        cmocka_unit_test(a_truncated_file_is_rejected_at_every_length),
        cmocka_unit_test(long_names_and_much_metadata_are_refused),
        cmocka_unit_test(what_the_format_allows_is_read),
        cmocka_unit_test(missing_files_and_directories_are_told_apart),
        cmocka_unit_test(a_file_that_shrinks_while_mapped_is_survived_and_reported),
        cmocka_unit_test(a_file_written_to_while_mapped_is_reported),
        cmocka_unit_test(what_threads_wrote_in_any_order_is_read_back),
        cmocka_unit_test(a_writer_given_up_leaves_nothing_and_keeps_the_old_file),
        cmocka_unit_test(an_unwritable_place_is_an_output_error_with_its_reason),
        cmocka_unit_test(a_full_disk_is_an_output_error_and_leaves_no_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
