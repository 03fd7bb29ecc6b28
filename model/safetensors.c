#include "model/safetensors.h"

#include "base/checked.h"
#include "model/json_check.h"
#include "model/mapped_file.h"
#include <stdlib.h>
#include <string.h>

struct ra_safetensors {
    ra_mapped_file_t *mapped; /* NULL when parsed from memory */
    char *path;
    const unsigned char *bytes;
    int64_t length;
    int64_t data_at; /* where the data begins */
    cJSON *header;   /* owns the names */
    const cJSON *metadata;
    ra_safetensors_entry_t *entries; /* by name */
    int64_t count;
};

/* Where a tensor lies, for the check that the data has neither holes nor overlaps. */
typedef struct extent {
    int64_t begin, end;
    const char *name;
} extent_t;

static ra_status_t refuse(const ra_safetensors_t *file, const char *tensor, const char *cause)
{
    return ra_fail(RA_ERR_INPUT, "safetensors", "%s: tensor \"%s\": %s", file->path, tensor, cause);
}

static ra_status_t parse_header(ra_safetensors_t *file)
{
    if (file->length < 8) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: %lld bytes; the length of the header alone takes 8", file->path,
                       (long long)file->length);
    }
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) {
        header_bytes = header_bytes << 8 | file->bytes[i];
    }
    if (header_bytes > RA_SAFETENSORS_MAX_HEADER) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: byte 0: a header of %llu bytes; at most %d are allowed", file->path,
                       (unsigned long long)header_bytes, RA_SAFETENSORS_MAX_HEADER);
    }
    if ((int64_t)header_bytes > file->length - 8) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: byte 0: a header of %llu bytes in a file of %lld: truncated?",
                       file->path, (unsigned long long)header_bytes, (long long)file->length);
    }
    file->data_at = 8 + (int64_t)header_bytes;

    static const ra_json_rules_t rules = {.max_depth = 8, .plain_integers = true};
    const char *text = (const char *)file->bytes + 8;
    size_t name_bytes = strlen(file->path) + sizeof(" (header)");
    char *name = malloc(name_bytes);
    if (name == NULL) {
        return ra_fail(RA_ERR_NOMEM, "safetensors", "%s: no memory to read it", file->path);
    }
    memcpy(name, file->path, strlen(file->path));
    memcpy(name + strlen(file->path), " (header)", sizeof(" (header)"));
    ra_status_t status =
        ra_json_parse_rules(name, text, (int64_t)header_bytes, &rules, &file->header);
    free(name);
    if (status == RA_OK && !cJSON_IsObject(file->header)) {
        status = ra_fail(RA_ERR_INPUT, "safetensors", "%s: byte 8: the header is not a JSON object",
                         file->path);
    }
    return status;
}

static ra_status_t check_metadata(const ra_safetensors_t *file)
{
    if (!cJSON_IsObject(file->metadata)) {
        return refuse(file, "__metadata__", "must be an object");
    }
    size_t total = 0;
    const cJSON *node;
    cJSON_ArrayForEach(node, file->metadata)
    {
        if (!cJSON_IsString(node)) {
            return ra_fail(RA_ERR_INPUT, "safetensors",
                           "%s: __metadata__: the value of \"%s\" is not a string", file->path,
                           node->string);
        }
        total += strlen(node->string) + strlen(node->valuestring);
    }
    if (total > RA_SAFETENSORS_MAX_METADATA) {
        return refuse(file, "__metadata__", "more than 1 MiB");
    }
    return RA_OK;
}

static ra_status_t check_name(const ra_safetensors_t *file, const char *name)
{
    size_t length = strlen(name);
    if (length == 0 || length > RA_SAFETENSORS_MAX_NAME) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: a tensor name of %zu bytes (\"%.40s\"); 1 to %d are allowed",
                       file->path, length, name, RA_SAFETENSORS_MAX_NAME);
    }
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)name[i];
        if (c < 0x20 || c == 0x7f) {
            return refuse(file, name, "a control byte in the name");
        }
    }
    return RA_OK;
}

/* The integer of a node already known to be plain digits, below 2^53. */
static bool node_integer(const cJSON *node, int64_t *value)
{
    if (!cJSON_IsNumber(node) || !(node->valuedouble < (double)RA_JSON_MAX_INT)) {
        return false;
    }
    *value = (int64_t)node->valuedouble;
    return true;
}

static ra_status_t read_shape(const ra_safetensors_t *file, const char *name, const cJSON *shape,
                              int32_t *rank, int64_t *extent, int64_t *count)
{
    if (!cJSON_IsArray(shape)) {
        return refuse(file, name, "\"shape\" must be an array of integers");
    }
    int64_t product = 1;
    int32_t used = 0;
    bool empty = false;
    const cJSON *node;
    cJSON_ArrayForEach(node, shape)
    {
        if (used == RA_TENSOR_MAX_RANK) {
            return refuse(file, name, "\"shape\" has more than 8 dimensions");
        }
        if (!node_integer(node, &extent[used])) {
            return refuse(file, name, "\"shape\" holds something else than integers below 2^53");
        }
        empty = empty || extent[used] == 0;
        /* the extents other than 0 must multiply, so that no later product overflows either */
        if (extent[used] != 0 && !ra_mul_ok(product, extent[used], &product)) {
            return refuse(file, name, "the product of \"shape\" overflows 63 bits");
        }
        used++;
    }
    *rank = used;
    *count = empty ? 0 : product;
    return RA_OK;
}

static ra_status_t read_offsets(const ra_safetensors_t *file, const char *name,
                                const cJSON *offsets, int64_t *begin, int64_t *end)
{
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !node_integer(offsets->child, begin) || !node_integer(offsets->child->next, end)) {
        return refuse(file, name, "\"data_offsets\" must be two integers below 2^53");
    }
    int64_t room = file->length - file->data_at;
    if (*begin > *end || *end > room) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: tensor \"%s\": data_offsets [%lld, %lld] do not lie in the %lld bytes "
                       "of data: truncated?",
                       file->path, name, (long long)*begin, (long long)*end, (long long)room);
    }
    return RA_OK;
}

static ra_status_t find_fields(const ra_safetensors_t *file, const cJSON *node,
                               const cJSON *fields[3])
{
    static const char *const keys[3] = {"dtype", "shape", "data_offsets"};
    if (!cJSON_IsObject(node)) {
        return refuse(file, node->string, "must be an object");
    }
    const cJSON *child;
    cJSON_ArrayForEach(child, node)
    {
        int k = 0;
        while (k < 3 && strcmp(child->string, keys[k]) != 0) {
            k++;
        }
        if (k == 3) {
            return ra_fail(RA_ERR_INPUT, "safetensors", "%s: tensor \"%s\": unknown key \"%s\"",
                           file->path, node->string, child->string);
        }
        fields[k] = child;
    }
    for (int k = 0; k < 3; k++) {
        if (fields[k] == NULL) {
            return ra_fail(RA_ERR_INPUT, "safetensors", "%s: tensor \"%s\": key \"%s\" is missing",
                           file->path, node->string, keys[k]);
        }
    }
    return RA_OK;
}

static ra_status_t read_entry(const ra_safetensors_t *file, const cJSON *node,
                              ra_safetensors_entry_t *entry, extent_t *place)
{
    const char *name = node->string;
    const cJSON *fields[3] = {NULL, NULL, NULL};
    RA_TRY(check_name(file, name));
    RA_TRY(find_fields(file, node, fields));

    ra_dtype_t dtype = RA_U8;
    if (!cJSON_IsString(fields[0]) || ra_dtype_parse(fields[0]->valuestring, &dtype) != 0) {
        const char *text = cJSON_IsString(fields[0]) ? fields[0]->valuestring : "(not a string)";
        return ra_fail(RA_ERR_INPUT, "safetensors", "%s: tensor \"%s\": dtype %s is not supported",
                       file->path, name, text);
    }
    int32_t rank = 0;
    int64_t extent[RA_TENSOR_MAX_RANK] = {0};
    int64_t count = 0, bytes = 0, begin = 0, end = 0;
    RA_TRY(read_shape(file, name, fields[1], &rank, extent, &count));
    RA_TRY(read_offsets(file, name, fields[2], &begin, &end));
    if (!ra_mul_ok(count, ra_dtype_bytes(dtype), &bytes)) {
        return refuse(file, name, "the number of bytes overflows 63 bits");
    }
    if (bytes != end - begin) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: tensor \"%s\": its shape takes %lld bytes, its data_offsets [%lld, "
                       "%lld] hold %lld",
                       file->path, name, (long long)bytes, (long long)begin, (long long)end,
                       (long long)(end - begin));
    }
    unsigned char *data = (unsigned char *)file->bytes + file->data_at + begin;
    entry->name = name;
    entry->view = ra_tensor_view(data, dtype, rank, extent);
    entry->bytes = bytes;
    *place = (extent_t){begin, end, name};
    return RA_OK;
}

static int compare_extents(const void *left, const void *right)
{
    const extent_t *a = left, *b = right;
    if (a->begin != b->begin) {
        return a->begin < b->begin ? -1 : 1;
    }
    return a->end < b->end ? -1 : a->end > b->end;
}

static int compare_entries(const void *left, const void *right)
{
    const ra_safetensors_entry_t *a = left, *b = right;
    return strcmp(a->name, b->name);
}

static ra_status_t check_cover(const ra_safetensors_t *file, extent_t *places)
{
    int64_t at = 0;
    qsort(places, (size_t)file->count, sizeof(*places), compare_extents);
    for (int64_t i = 0; i < file->count; i++) {
        if (places[i].begin != at) {
            const char *cause = places[i].begin < at ? "overlaps the one before" : "leaves a hole";
            return ra_fail(RA_ERR_INPUT, "safetensors",
                           "%s: tensor \"%s\": begins at data byte %lld, expected %lld: it %s",
                           file->path, places[i].name, (long long)places[i].begin, (long long)at,
                           cause);
        }
        at = places[i].end;
    }
    int64_t room = file->length - file->data_at;
    if (at != room) {
        return ra_fail(RA_ERR_INPUT, "safetensors",
                       "%s: byte %lld: the tensors end here, the file goes on for %lld bytes",
                       file->path, (long long)(file->data_at + at), (long long)(room - at));
    }
    return RA_OK;
}

static ra_status_t read_entries(ra_safetensors_t *file)
{
    int64_t count = 0;
    const cJSON *node;
    cJSON_ArrayForEach(node, file->header)
    {
        count++;
    }
    if (count > RA_SAFETENSORS_MAX_TENSORS) {
        return ra_fail(RA_ERR_INPUT, "safetensors", "%s: %lld tensors; at most %d are allowed",
                       file->path, (long long)count, RA_SAFETENSORS_MAX_TENSORS);
    }
    file->entries = calloc((size_t)count + 1, sizeof(*file->entries));
    extent_t *places = calloc((size_t)count + 1, sizeof(*places));
    ra_status_t status = RA_OK;
    if (file->entries == NULL || places == NULL) {
        status = ra_fail(RA_ERR_NOMEM, "safetensors", "%s: no memory for %lld tensors", file->path,
                         (long long)count);
        goto done;
    }
    cJSON_ArrayForEach(node, file->header)
    {
        if (strcmp(node->string, "__metadata__") == 0) {
            file->metadata = node;
            RA_TRY_GOTO(check_metadata(file), done);
            continue;
        }
        RA_TRY_GOTO(read_entry(file, node, &file->entries[file->count], &places[file->count]),
                    done);
        file->count++;
    }
    RA_TRY_GOTO(check_cover(file, places), done);
    qsort(file->entries, (size_t)file->count, sizeof(*file->entries), compare_entries);
done:
    free(places);
    return status;
}

static ra_status_t parse(ra_mapped_file_t *mapped, const char *path, const unsigned char *bytes,
                         int64_t length, ra_safetensors_t **file_p)
{
    ra_safetensors_t *file = calloc(1, sizeof(*file));
    char *path_copy = strdup(path);
    if (file == NULL || path_copy == NULL) {
        free(file);
        free(path_copy);
        ra_mapped_file_close(mapped);
        return ra_fail(RA_ERR_NOMEM, "safetensors", "%s: no memory to open it", path);
    }
    file->mapped = mapped;
    file->path = path_copy;
    file->bytes = bytes;
    file->length = length;
    ra_status_t status;
    RA_TRY_GOTO(parse_header(file), failed);
    RA_TRY_GOTO(read_entries(file), failed);
    RA_TRY_GOTO(ra_safetensors_verify(file), failed);
    *file_p = file;
    return RA_OK;
failed:
    ra_safetensors_close(file);
    return status;
}

ra_status_t ra_safetensors_open(const char *path, ra_safetensors_t **file_p)
{
    ra_mapped_file_t *mapped = NULL;
    RA_TRY(ra_mapped_file_open(path, &mapped));
    return parse(mapped, path, ra_mapped_file_bytes(mapped), ra_mapped_file_length(mapped), file_p);
}

ra_status_t ra_safetensors_adopt(int fd, const char *path, ra_safetensors_t **file_p)
{
    ra_mapped_file_t *mapped = NULL;
    RA_TRY(ra_mapped_file_adopt(fd, path, &mapped));
    return parse(mapped, path, ra_mapped_file_bytes(mapped), ra_mapped_file_length(mapped), file_p);
}

ra_status_t ra_safetensors_parse(const char *name, const void *bytes, int64_t length,
                                 ra_safetensors_t **file_p)
{
    return parse(NULL, name, bytes, length, file_p);
}

void ra_safetensors_close(ra_safetensors_t *file)
{
    if (file == NULL) {
        return;
    }
    cJSON_Delete(file->header);
    ra_mapped_file_close(file->mapped);
    free(file->entries);
    free(file->path);
    free(file);
}

const char *ra_safetensors_path(const ra_safetensors_t *file)
{
    return file->path;
}

int64_t ra_safetensors_count(const ra_safetensors_t *file)
{
    return file->count;
}

const ra_safetensors_entry_t *ra_safetensors_at(const ra_safetensors_t *file, int64_t index)
{
    return &file->entries[index];
}

const ra_safetensors_entry_t *ra_safetensors_find(const ra_safetensors_t *file, const char *name)
{
    ra_safetensors_entry_t wanted = {.name = name};
    return bsearch(&wanted, file->entries, (size_t)file->count, sizeof(*file->entries),
                   compare_entries);
}

const char *ra_safetensors_metadata(const ra_safetensors_t *file, const char *key)
{
    const cJSON *node = cJSON_GetObjectItemCaseSensitive(file->metadata, key);
    return node != NULL ? node->valuestring : NULL;
}

const unsigned char *ra_safetensors_bytes(const ra_safetensors_t *file, int64_t *length)
{
    *length = file->length;
    return file->bytes;
}

ra_status_t ra_safetensors_verify(const ra_safetensors_t *file)
{
    return file->mapped != NULL ? ra_mapped_file_verify(file->mapped) : RA_OK;
}
