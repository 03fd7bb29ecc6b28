#include "model/checkpoint.h"

#include "base/log.h"
#include "model/file_io.h"
#include "model/json_check.h"
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { INDEX_MAX_BYTES = 256 << 20, SHARDS_MAX = 4000, WARNINGS_MAX = 5 };

static const char single_name[] = "model.safetensors";
static const char index_name[] = "model.safetensors.index.json";

typedef struct place {
    const ra_safetensors_entry_t *entry;
    int64_t shard;
} place_t;

struct ra_checkpoint {
    char *directory;
    char **shard_names; /* sorted */
    ra_safetensors_t **shards;
    int64_t shard_count;
    place_t *places; /* by tensor name */
    int64_t count;
};

/* One line of the weight map. */
typedef struct mapped {
    const char *tensor, *file;
} mapped_t;

/* Is the link `name` one of the Hugging Face cache, "../../blobs/<name>"? */
static bool cache_link(int directory, const char *name, char target[RA_PATH_MAX])
{
    static const char prefix[] = "../../blobs/";
    ssize_t length = readlinkat(directory, name, target, RA_PATH_MAX - 1);
    if (length <= 0) {
        return false;
    }
    target[length] = '\0';
    const char *blob = target + sizeof(prefix) - 1;
    return strncmp(target, prefix, sizeof(prefix) - 1) == 0 && blob[0] != '\0' && blob[0] != '.' &&
           ra_file_name_plain(blob, "");
}

static ra_status_t open_shard(const ra_checkpoint_t *checkpoint, int directory, const char *name,
                              ra_safetensors_t **shard_p)
{
    enum { FLAGS = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK };
    char path[RA_PATH_MAX];
    char target[RA_PATH_MAX];
    RA_TRY(ra_path_join(checkpoint->directory, name, path));
    int fd = openat(directory, name, FLAGS);
    if (fd < 0 && errno == ELOOP) {
        if (!cache_link(directory, name, target)) {
            return ra_fail(RA_ERR_INPUT, "checkpoint",
                           "%s: a symbolic link that is not of the form ../../blobs/<name>", path);
        }
        fd = openat(directory, target, FLAGS);
    }
    if (fd < 0) {
        return ra_fail(RA_ERR_INPUT, "checkpoint", "%s: cannot be opened: %s", path,
                       strerror(errno));
    }
    return ra_safetensors_adopt(fd, path, shard_p);
}

static int compare_names(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static int compare_mapped(const void *left, const void *right)
{
    return strcmp(((const mapped_t *)left)->tensor, ((const mapped_t *)right)->tensor);
}

static int compare_places(const void *left, const void *right)
{
    const place_t *a = left, *b = right;
    int order = strcmp(a->entry->name, b->entry->name);
    return order != 0 ? order : (a->shard > b->shard) - (a->shard < b->shard);
}

static ra_status_t no_memory(const ra_checkpoint_t *checkpoint)
{
    return ra_fail(RA_ERR_NOMEM, "checkpoint", "%s: no memory to open it", checkpoint->directory);
}

static ra_status_t read_weight_map(const char *path, const cJSON *root, mapped_t **lines_p,
                                   int64_t *count_p)
{
    const cJSON *map = ra_json_member(root, "weight_map");
    RA_TRY(ra_json_expect_object(path, "weight_map", map));
    int64_t count = cJSON_GetArraySize(map);
    if (count < 1 || count > RA_SAFETENSORS_MAX_TENSORS) {
        return ra_fail(RA_ERR_INPUT, "checkpoint",
                       "%s: weight_map names %lld tensors; 1 to %d are allowed", path,
                       (long long)count, RA_SAFETENSORS_MAX_TENSORS);
    }
    mapped_t *lines = malloc((size_t)count * sizeof(*lines));
    if (lines == NULL) {
        return ra_fail(RA_ERR_NOMEM, "checkpoint", "%s: no memory for it", path);
    }
    int64_t used = 0;
    const cJSON *node;
    cJSON_ArrayForEach(node, map)
    {
        if (!cJSON_IsString(node) || !ra_file_name_plain(node->valuestring, ".safetensors")) {
            const char *value = cJSON_IsString(node) ? node->valuestring : "(not a string)";
            free(lines);
            return ra_fail(RA_ERR_INPUT, "checkpoint",
                           "%s: weight_map: tensor \"%s\": file \"%s\" is not allowed; a name "
                           "matches [A-Za-z0-9._-]+.safetensors, without directories",
                           path, node->string, value);
        }
        lines[used++] = (mapped_t){node->string, node->valuestring};
    }
    qsort(lines, (size_t)used, sizeof(*lines), compare_mapped);
    *lines_p = lines;
    *count_p = used;
    return RA_OK;
}

/* Distinct file names of the weight map, sorted, copied into the checkpoint. */
static ra_status_t collect_shard_names(ra_checkpoint_t *checkpoint, const char *path,
                                       const mapped_t *lines, int64_t count)
{
    const char **names = malloc((size_t)count * sizeof(*names));
    if (names == NULL) {
        return no_memory(checkpoint);
    }
    for (int64_t i = 0; i < count; i++) {
        names[i] = lines[i].file;
    }
    qsort(names, (size_t)count, sizeof(*names), compare_names);
    int64_t distinct = 0;
    for (int64_t i = 0; i < count; i++) {
        if (distinct == 0 || strcmp(names[distinct - 1], names[i]) != 0) {
            names[distinct++] = names[i];
        }
    }
    ra_status_t status = RA_OK;
    checkpoint->shard_names = calloc((size_t)distinct, sizeof(*checkpoint->shard_names));
    checkpoint->shards = calloc((size_t)distinct, sizeof(*checkpoint->shards));
    if (distinct > SHARDS_MAX) {
        status = ra_fail(RA_ERR_INPUT, "checkpoint", "%s: %lld files; at most %d are allowed", path,
                         (long long)distinct, SHARDS_MAX);
    } else if (checkpoint->shard_names == NULL || checkpoint->shards == NULL) {
        status = no_memory(checkpoint);
    }
    for (int64_t i = 0; status == RA_OK && i < distinct; i++) {
        checkpoint->shard_names[i] = strdup(names[i]);
        checkpoint->shard_count = i + 1;
        if (checkpoint->shard_names[i] == NULL) {
            status = no_memory(checkpoint);
        }
    }
    free(names);
    return status;
}

/* Every tensor of every shard, by name. */
static ra_status_t collect_places(ra_checkpoint_t *checkpoint)
{
    int64_t total = 0;
    for (int64_t s = 0; s < checkpoint->shard_count; s++) {
        total += ra_safetensors_count(checkpoint->shards[s]);
    }
    checkpoint->places = malloc(((size_t)total + 1) * sizeof(*checkpoint->places));
    if (checkpoint->places == NULL) {
        return no_memory(checkpoint);
    }
    for (int64_t s = 0; s < checkpoint->shard_count; s++) {
        for (int64_t i = 0; i < ra_safetensors_count(checkpoint->shards[s]); i++) {
            checkpoint->places[checkpoint->count++] =
                (place_t){ra_safetensors_at(checkpoint->shards[s], i), s};
        }
    }
    qsort(checkpoint->places, (size_t)checkpoint->count, sizeof(*checkpoint->places),
          compare_places);
    for (int64_t i = 1; i < checkpoint->count; i++) {
        const place_t *a = &checkpoint->places[i - 1], *b = &checkpoint->places[i];
        if (strcmp(a->entry->name, b->entry->name) == 0) {
            return ra_fail(RA_ERR_INPUT, "checkpoint",
                           "%s: tensor \"%s\" is there twice: in %s and in %s",
                           checkpoint->directory, a->entry->name, checkpoint->shard_names[a->shard],
                           checkpoint->shard_names[b->shard]);
        }
    }
    return RA_OK;
}

/* Match the sorted weight map with the sorted tensors; keep those that are mapped. */
static ra_status_t match_weight_map(ra_checkpoint_t *checkpoint, const char *path,
                                    const mapped_t *lines, int64_t count)
{
    int64_t kept = 0, seen = 0, extra = 0;
    for (int64_t i = 0; i < count; i++) {
        int order = -1;
        for (; seen < checkpoint->count; seen++) {
            order = strcmp(checkpoint->places[seen].entry->name, lines[i].tensor);
            if (order >= 0) {
                break;
            }
            order = -1;
            if (extra++ < WARNINGS_MAX) {
                ra_log(RA_LOG_WARN, "checkpoint", "%s: tensor \"%s\" is not in the weight_map",
                       ra_safetensors_path(checkpoint->shards[checkpoint->places[seen].shard]),
                       checkpoint->places[seen].entry->name);
            }
        }
        const char *holder =
            order == 0 ? checkpoint->shard_names[checkpoint->places[seen].shard] : "no file";
        if (strcmp(holder, lines[i].file) != 0) {
            return ra_fail(RA_ERR_INPUT, "checkpoint",
                           "%s: weight_map: tensor \"%s\" should be in %s but is in %s", path,
                           lines[i].tensor, lines[i].file, holder);
        }
        checkpoint->places[kept++] = checkpoint->places[seen++];
    }
    extra += checkpoint->count - seen;
    checkpoint->count = kept;
    if (extra > 0) {
        ra_log(RA_LOG_WARN, "checkpoint", "%s: the files hold %lld tensors it does not name", path,
               (long long)extra);
    }
    return RA_OK;
}

static ra_status_t open_shards(ra_checkpoint_t *checkpoint, int directory)
{
    for (int64_t s = 0; s < checkpoint->shard_count; s++) {
        RA_TRY(
            open_shard(checkpoint, directory, checkpoint->shard_names[s], &checkpoint->shards[s]));
    }
    return collect_places(checkpoint);
}

static ra_status_t open_indexed(ra_checkpoint_t *checkpoint, int directory, const char *path)
{
    cJSON *root = NULL;
    mapped_t *lines = NULL;
    int64_t count = 0;
    ra_status_t status;
    RA_TRY_GOTO(ra_json_read_file(path, INDEX_MAX_BYTES, &root), done);
    RA_TRY_GOTO(read_weight_map(path, root, &lines, &count), done);
    RA_TRY_GOTO(collect_shard_names(checkpoint, path, lines, count), done);
    RA_TRY_GOTO(open_shards(checkpoint, directory), done);
    RA_TRY_GOTO(match_weight_map(checkpoint, path, lines, count), done);
done:
    free(lines);
    cJSON_Delete(root);
    return status;
}

static ra_status_t open_single(ra_checkpoint_t *checkpoint, int directory)
{
    checkpoint->shard_names = calloc(1, sizeof(*checkpoint->shard_names));
    checkpoint->shards = calloc(1, sizeof(*checkpoint->shards));
    char *name = strdup(single_name);
    if (checkpoint->shard_names == NULL || checkpoint->shards == NULL || name == NULL) {
        free(name);
        return no_memory(checkpoint);
    }
    checkpoint->shard_names[0] = name;
    checkpoint->shard_count = 1;
    return open_shards(checkpoint, directory);
}

static bool there(int directory, const char *name)
{
    struct stat info;
    return fstatat(directory, name, &info, AT_SYMLINK_NOFOLLOW) == 0;
}

static ra_status_t open_files(ra_checkpoint_t *checkpoint, int directory)
{
    char index_path[RA_PATH_MAX];
    RA_TRY(ra_path_join(checkpoint->directory, index_name, index_path));
    if (there(directory, single_name)) {
        return open_single(checkpoint, directory);
    }
    if (there(directory, index_name)) {
        return open_indexed(checkpoint, directory, index_path);
    }
    return ra_fail(RA_ERR_USAGE, "checkpoint", "%s: holds neither %s nor %s", checkpoint->directory,
                   single_name, index_name);
}

ra_status_t ra_checkpoint_open(const char *model_dir, ra_checkpoint_t **checkpoint_p)
{
    int directory = open(model_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) {
        return ra_fail(RA_ERR_USAGE, "checkpoint", "%s: cannot be opened as a directory: %s",
                       model_dir, strerror(errno));
    }
    ra_checkpoint_t *checkpoint = calloc(1, sizeof(*checkpoint));
    char *copy = strdup(model_dir);
    if (checkpoint == NULL || copy == NULL) {
        free(checkpoint);
        free(copy);
        close(directory);
        return ra_fail(RA_ERR_NOMEM, "checkpoint", "%s: no memory to open it", model_dir);
    }
    checkpoint->directory = copy;
    ra_status_t status = open_files(checkpoint, directory);
    close(directory);
    if (status != RA_OK) {
        ra_checkpoint_close(checkpoint);
        return status;
    }
    *checkpoint_p = checkpoint;
    return RA_OK;
}

void ra_checkpoint_close(ra_checkpoint_t *checkpoint)
{
    if (checkpoint == NULL) {
        return;
    }
    for (int64_t s = 0; s < checkpoint->shard_count; s++) {
        ra_safetensors_close(checkpoint->shards[s]);
        free(checkpoint->shard_names[s]);
    }
    free(checkpoint->shards);
    free(checkpoint->shard_names);
    free(checkpoint->places);
    free(checkpoint->directory);
    free(checkpoint);
}

int64_t ra_checkpoint_count(const ra_checkpoint_t *checkpoint)
{
    return checkpoint->count;
}

const ra_safetensors_entry_t *ra_checkpoint_at(const ra_checkpoint_t *checkpoint, int64_t index)
{
    return checkpoint->places[index].entry;
}

int64_t ra_checkpoint_find(const ra_checkpoint_t *checkpoint, const char *name)
{
    int64_t low = 0, high = checkpoint->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(checkpoint->places[middle].entry->name, name);
        if (order == 0) {
            return middle;
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return -1;
}

const char *ra_checkpoint_file_of(const ra_checkpoint_t *checkpoint, int64_t index)
{
    return ra_safetensors_path(checkpoint->shards[checkpoint->places[index].shard]);
}

int64_t ra_checkpoint_shards(const ra_checkpoint_t *checkpoint)
{
    return checkpoint->shard_count;
}

const ra_safetensors_t *ra_checkpoint_shard(const ra_checkpoint_t *checkpoint, int64_t index)
{
    return checkpoint->shards[index];
}

ra_status_t ra_checkpoint_verify(const ra_checkpoint_t *checkpoint)
{
    for (int64_t s = 0; s < checkpoint->shard_count; s++) {
        RA_TRY(ra_safetensors_verify(checkpoint->shards[s]));
    }
    return RA_OK;
}
