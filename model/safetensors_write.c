#include "model/safetensors_write.h"

#include "base/checked.h"
#include "base/tensor.h"
#include "model/file_io.h"
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DATA_ALIGNMENT = 4096, NAME_MAX_BYTES = 512 };

typedef struct declared {
    char *name;
    ra_dtype_t dtype;
    int32_t rank;
    int64_t extent[RA_TENSOR_MAX_RANK];
    int64_t begin, bytes;
    _Atomic int64_t put; /* bytes written so far, by any thread */
} declared_t;

typedef struct text {
    char *bytes;
    size_t used, room;
} text_t;

struct ra_safetensors_writer {
    char *path;
    declared_t *tensors;
    int64_t count, room;
    text_t metadata; /* members of the object, without braces */
    bool begun;
    int64_t data_at, data_bytes;
    ra_file_writer_t file;
};

static ra_status_t no_memory(const ra_safetensors_writer_t *writer)
{
    return ra_fail(RA_ERR_NOMEM, "safetensors", "%s: no memory to write it", writer->path);
}

/* Append formatted text. @return false when memory is exhausted. */
static bool append(text_t *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool append(text_t *text, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int need = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (text->used + (size_t)need + 1 > text->room) {
        size_t room = 2 * (text->used + (size_t)need) + 256;
        char *bytes = realloc(text->bytes, room);
        if (bytes == NULL) {
            return false;
        }
        text->bytes = bytes;
        text->room = room;
    }
    va_start(args, format);
    vsnprintf(text->bytes + text->used, (size_t)need + 1, format, args);
    va_end(args);
    text->used += (size_t)need;
    return true;
}

static bool plain_text(const char *text, size_t least)
{
    size_t length = strlen(text);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c > 0x7e || c == '"' || c == '\\') {
            return false;
        }
    }
    return length >= least && length <= NAME_MAX_BYTES;
}

ra_status_t ra_safetensors_writer_create(const char *path, ra_safetensors_writer_t **writer_p)
{
    ra_safetensors_writer_t *writer = calloc(1, sizeof(*writer));
    char *path_copy = strdup(path);
    if (writer == NULL || path_copy == NULL) {
        free(writer);
        free(path_copy);
        return ra_fail(RA_ERR_NOMEM, "safetensors", "%s: no memory to write it", path);
    }
    writer->path = path_copy;
    writer->file.fd = -1;
    *writer_p = writer;
    return RA_OK;
}

void ra_safetensors_writer_destroy(ra_safetensors_writer_t *writer)
{
    if (writer == NULL) {
        return;
    }
    ra_file_writer_abort(&writer->file);
    for (int64_t i = 0; i < writer->count; i++) {
        free(writer->tensors[i].name);
    }
    free(writer->tensors);
    free(writer->metadata.bytes);
    free(writer->path);
    free(writer);
}

static bool name_used(const ra_safetensors_writer_t *writer, const char *name)
{
    for (int64_t i = 0; i < writer->count; i++) {
        if (strcmp(writer->tensors[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

static ra_status_t grow(ra_safetensors_writer_t *writer)
{
    if (writer->count < writer->room) {
        return RA_OK;
    }
    int64_t room = 2 * writer->room + 16;
    declared_t *tensors = realloc(writer->tensors, (size_t)room * sizeof(*tensors));
    if (tensors == NULL) {
        return no_memory(writer);
    }
    writer->tensors = tensors;
    writer->room = room;
    return RA_OK;
}

ra_status_t ra_safetensors_writer_declare(ra_safetensors_writer_t *writer, const char *name,
                                          ra_dtype_t dtype, int32_t rank, const int64_t *extent,
                                          int64_t *index_p)
{
    bool fits = rank >= 0 && rank <= RA_TENSOR_MAX_RANK && !writer->begun;
    int64_t bytes = ra_dtype_bytes(dtype);
    int64_t end = 0;
    for (int32_t i = 0; fits && i < rank; i++) {
        fits = ra_mul_ok(bytes, extent[i], &bytes);
    }
    if (!fits || !ra_add_ok(writer->data_bytes, bytes, &end) || !plain_text(name, 1) ||
        name_used(writer, name)) {
        return ra_fail(RA_ERR_INVALID, "safetensors", "%s: tensor \"%s\" cannot be declared",
                       writer->path, name);
    }
    RA_TRY(grow(writer));
    declared_t *tensor = &writer->tensors[writer->count];
    memset(tensor, 0, sizeof(*tensor));
    tensor->name = strdup(name);
    if (tensor->name == NULL) {
        return no_memory(writer);
    }
    tensor->dtype = dtype;
    tensor->rank = rank;
    for (int32_t i = 0; i < rank; i++) {
        tensor->extent[i] = extent[i];
    }
    tensor->begin = writer->data_bytes;
    tensor->bytes = bytes;
    writer->data_bytes = end;
    *index_p = writer->count++;
    return RA_OK;
}

ra_status_t ra_safetensors_writer_metadata(ra_safetensors_writer_t *writer, const char *key,
                                           const char *value)
{
    if (writer->begun || !plain_text(key, 1) || !plain_text(value, 0)) {
        return ra_fail(RA_ERR_INVALID, "safetensors", "%s: metadata \"%s\" cannot be written",
                       writer->path, key);
    }
    const char *comma = writer->metadata.used > 0 ? "," : "";
    bool ok = append(&writer->metadata, "%s\"%s\":\"%s\"", comma, key, value);
    return ok ? RA_OK : no_memory(writer);
}

static bool append_tensor(text_t *header, const declared_t *tensor)
{
    bool ok = append(header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", header->used > 1 ? "," : "",
                     tensor->name, ra_dtype_name(tensor->dtype));
    for (int32_t i = 0; ok && i < tensor->rank; i++) {
        ok = append(header, "%s%lld", i > 0 ? "," : "", (long long)tensor->extent[i]);
    }
    return ok && append(header, "],\"data_offsets\":[%lld,%lld]}", (long long)tensor->begin,
                        (long long)(tensor->begin + tensor->bytes));
}

static bool build_header(const ra_safetensors_writer_t *writer, text_t *header)
{
    bool ok = append(header, "{");
    if (ok && writer->metadata.used > 0) {
        ok = append(header, "\"__metadata__\":{%s}", writer->metadata.bytes);
    }
    for (int64_t i = 0; ok && i < writer->count; i++) {
        ok = append_tensor(header, &writer->tensors[i]);
    }
    ok = ok && append(header, "}");
    size_t padding = (DATA_ALIGNMENT - (8 + header->used) % DATA_ALIGNMENT) % DATA_ALIGNMENT;
    return ok && append(header, "%*s", (int)padding, "");
}

ra_status_t ra_safetensors_writer_begin(ra_safetensors_writer_t *writer)
{
    if (writer->begun) {
        return ra_fail(RA_ERR_INVALID, "safetensors", "%s: begun twice", writer->path);
    }
    text_t header = {NULL, 0, 0};
    if (!build_header(writer, &header)) {
        free(header.bytes);
        return no_memory(writer);
    }
    unsigned char length[8];
    for (int i = 0; i < 8; i++) {
        length[i] = (unsigned char)((uint64_t)header.used >> (8 * i));
    }
    ra_status_t status;
    RA_TRY_GOTO(ra_file_writer_open(&writer->file, writer->path), done);
    writer->begun = true;
    writer->data_at = 8 + (int64_t)header.used;
    RA_TRY_GOTO(ra_file_writer_put(&writer->file, length, 8, 0), done);
    RA_TRY_GOTO(ra_file_writer_put(&writer->file, header.bytes, (int64_t)header.used, 8), done);
done:
    free(header.bytes);
    return status;
}

ra_status_t ra_safetensors_writer_put(ra_safetensors_writer_t *writer, int64_t index,
                                      int64_t offset, const void *bytes, int64_t length)
{
    if (!writer->begun || index < 0 || index >= writer->count || offset < 0 || length < 0 ||
        length > writer->tensors[index].bytes || offset > writer->tensors[index].bytes - length) {
        return ra_fail(RA_ERR_INVALID, "safetensors",
                       "%s: %lld bytes at %lld of tensor %lld do not fit", writer->path,
                       (long long)length, (long long)offset, (long long)index);
    }
    declared_t *tensor = &writer->tensors[index];
    RA_TRY(
        ra_file_writer_put(&writer->file, bytes, length, writer->data_at + tensor->begin + offset));
    atomic_fetch_add(&tensor->put, length);
    return RA_OK;
}

ra_status_t ra_safetensors_writer_commit(ra_safetensors_writer_t *writer)
{
    for (int64_t i = 0; i < writer->count; i++) {
        const declared_t *tensor = &writer->tensors[i];
        int64_t put = atomic_load(&tensor->put);
        if (!writer->begun || put != tensor->bytes) {
            return ra_fail(RA_ERR_INVALID, "safetensors",
                           "%s: tensor \"%s\": %lld of %lld bytes were written", writer->path,
                           tensor->name, (long long)put, (long long)tensor->bytes);
        }
    }
    return ra_file_writer_commit(&writer->file);
}

int64_t ra_safetensors_writer_bytes(const ra_safetensors_writer_t *writer)
{
    return writer->data_at + writer->data_bytes;
}
