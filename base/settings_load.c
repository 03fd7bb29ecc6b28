#include "base/settings.h"

#include "base/log.h"
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

enum { LINE_BYTES = 8192, WORD_BYTES = 64, VARIABLE_BYTES = 64 };

/* Levenshtein distance with two rows; words longer than the buffer are "far". */
static int edit_distance(const char *a, const char *b)
{
    int row[WORD_BYTES + 1];
    int n = (int)strlen(a), m = (int)strlen(b);
    if (n > WORD_BYTES || m > WORD_BYTES) {
        return WORD_BYTES;
    }
    for (int j = 0; j <= m; j++) {
        row[j] = j;
    }
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            int insert = row[j - 1] + 1;
            int drop = row[j] + 1;
            diagonal = row[j];
            int best = replace < insert ? replace : insert;
            row[j] = best < drop ? best : drop;
        }
    }
    return row[m];
}

const char *ra_nearest_word(const char *word, int count, const char *(*word_at)(int index))
{
    /* A third of the letters wrong is still a slip of the hand; more is another word. */
    int best = (int)strlen(word) / 3 + 2;
    const char *nearest = NULL;
    for (int i = 0; i < count; i++) {
        const char *candidate = word_at(i);
        if (candidate == NULL) {
            continue;
        }
        int distance = edit_distance(word, candidate);
        if (distance < best) {
            best = distance;
            nearest = candidate;
        }
    }
    return nearest;
}

static const char *flag_at(int index)
{
    return ra_setting((ra_setting_id_t)index)->flag;
}

static const char *key_at(int index)
{
    return ra_setting((ra_setting_id_t)index)->key;
}

static ra_status_t unknown(const char *what, const char *word, const char *place,
                           const char *(*word_at)(int index))
{
    const char *nearest = ra_nearest_word(word, RA_SETTING_COUNT, word_at);
    if (nearest != NULL) {
        return ra_fail(RA_ERR_USAGE, "settings", "%s: unknown %s '%s'; did you mean '%s'?", place,
                       what, word, nearest);
    }
    return ra_fail(RA_ERR_USAGE, "settings", "%s: unknown %s '%s'", place, what, word);
}

/* "--flag=value" -> its row; *value points behind the '=' or is NULL. */
static int find_flag(const char *argument, const char **value)
{
    const char *equals = strchr(argument, '=');
    size_t length = equals != NULL ? (size_t)(equals - argument) : strlen(argument);
    *value = equals != NULL ? equals + 1 : NULL;
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        const char *flag = ra_setting((ra_setting_id_t)id)->flag;
        if (flag != NULL && strlen(flag) == length && strncmp(flag, argument, length) == 0) {
            return id;
        }
    }
    return -1;
}

static ra_status_t load_flag(ra_settings_t *settings, int command, int argc, char *const *argv,
                             int *index)
{
    const char *argument = argv[*index];
    const char *value;
    if (argument[0] != '-' || argument[1] != '-') {
        return ra_fail(RA_ERR_USAGE, "settings",
                       "unexpected argument '%s'; every input is named by a flag", argument);
    }
    int id = find_flag(argument, &value);
    if (id < 0) {
        char word[WORD_BYTES + 1];
        snprintf(word, sizeof(word), "%.*s", (int)strcspn(argument, "="), argument);
        return unknown("flag", word, "command line", flag_at);
    }
    const ra_setting_t *row = ra_setting((ra_setting_id_t)id);
    if ((row->commands & command) == 0) {
        return ra_fail(RA_ERR_USAGE, "settings", "%s is not a flag of this command; see --help",
                       row->flag);
    }
    if (value == NULL && row->type == RA_TYPE_BOOL) {
        value = "on";
    } else if (value == NULL) {
        if (*index + 1 >= argc) {
            return ra_fail(RA_ERR_USAGE, "settings", "%s needs a value", row->flag);
        }
        value = argv[++*index];
    }
    return ra_settings_set(settings, (ra_setting_id_t)id, value, RA_ORIGIN_FLAG, row->flag);
}

ra_status_t ra_settings_load_flags(ra_settings_t *settings, int command, int argc,
                                   char *const *argv, bool *help_p)
{
    *help_p = false;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            *help_p = true;
            return RA_OK;
        }
    }
    for (int i = 0; i < argc; i++) {
        RA_TRY(load_flag(settings, command, argc, argv, &i));
    }
    return RA_OK;
}

/* Cut white space, the comment and one pair of quotes off a value; in place. */
static char *trim_value(char *text)
{
    while (isspace((unsigned char)*text)) {
        text++;
    }
    if (*text == '"') {
        char *end = strchr(text + 1, '"');
        if (end == NULL) {
            return NULL;
        }
        char *rest = end + 1 + strspn(end + 1, " \t\r\n");
        if (*rest != '\0' && *rest != '#') {
            return NULL;
        }
        *end = '\0';
        return text + 1;
    }
    for (char *at = text; *at != '\0'; at++) {
        if (*at == '#' && (at == text || isspace((unsigned char)at[-1]))) {
            *at = '\0';
            break;
        }
    }
    size_t length = strlen(text);
    while (length > 0 && isspace((unsigned char)text[length - 1])) {
        text[--length] = '\0';
    }
    return text;
}

static ra_status_t load_line(ra_settings_t *settings, char *line, const char *place)
{
    char *key = line + strspn(line, " \t\r\n");
    if (*key == '\0' || *key == '#') {
        return RA_OK;
    }
    char *equals = strchr(key, '=');
    if (equals == NULL) {
        return ra_fail(RA_ERR_USAGE, "settings", "%s: no '=' in this line; write key = value",
                       place);
    }
    *equals = '\0';
    key[strcspn(key, " \t")] = '\0';
    char *value = trim_value(equals + 1);
    if (value == NULL) {
        return ra_fail(RA_ERR_USAGE, "settings", "%s: unbalanced quotes in the value of %s", place,
                       key);
    }
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        if (strcmp(key_at(id), key) == 0) {
            return ra_settings_set(settings, (ra_setting_id_t)id, value, RA_ORIGIN_FILE, place);
        }
    }
    return unknown("key", key, place, key_at);
}

ra_status_t ra_settings_load_file(ra_settings_t *settings, const char *path)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return ra_fail(RA_ERR_USAGE, "settings", "cannot open configuration file %s: %s", path,
                       strerror(errno));
    }
    char line[LINE_BYTES], place[LINE_BYTES];
    ra_status_t status = RA_OK;
    for (int number = 1; status == RA_OK && fgets(line, sizeof(line), file) != NULL; number++) {
        snprintf(place, sizeof(place), "%.4000s:%d", path, number);
        if (strchr(line, '\n') == NULL && !feof(file)) {
            status = ra_fail(RA_ERR_USAGE, "settings", "%s: line longer than %d bytes", place,
                             LINE_BYTES - 2);
            break;
        }
        status = load_line(settings, line, place);
    }
    if (status == RA_OK && ferror(file)) {
        status = ra_fail(RA_ERR_USAGE, "settings", "cannot read configuration file %s: %s", path,
                         strerror(errno));
    }
    fclose(file);
    return status;
}

/* Names of the variables, made once a search: ra_nearest_word() keeps a pointer to the best. */
static _Thread_local char variable_name[RA_SETTING_COUNT][VARIABLE_BYTES];

static const char *variable_at(int index)
{
    ra_setting_variable((ra_setting_id_t)index, variable_name[index]);
    return variable_name[index];
}

static void warn_unknown_variable(const char *entry)
{
    char word[WORD_BYTES + 1];
    snprintf(word, sizeof(word), "%.*s", (int)strcspn(entry, "="), entry);
    const char *nearest = ra_nearest_word(word, RA_SETTING_COUNT, variable_at);
    ra_log(RA_LOG_WARN, "settings", "the environment variable %s names no setting%s%s%s", word,
           nearest != NULL ? "; did you mean " : "", nearest != NULL ? nearest : "",
           nearest != NULL ? "?" : "");
}

ra_status_t ra_settings_load_environment(ra_settings_t *settings)
{
    for (char **entry = environ; entry != NULL && *entry != NULL; entry++) {
        const char *equals = strchr(*entry, '=');
        if (strncmp(*entry, "RA_", 3) != 0 || equals == NULL) {
            continue;
        }
        bool known = false;
        for (int id = 0; id < RA_SETTING_COUNT && !known; id++) {
            char name[VARIABLE_BYTES];
            ra_setting_variable((ra_setting_id_t)id, name);
            known = strlen(name) == (size_t)(equals - *entry) &&
                    strncmp(name, *entry, strlen(name)) == 0;
            if (known) {
                RA_TRY(ra_settings_set(settings, (ra_setting_id_t)id, equals + 1,
                                       RA_ORIGIN_ENVIRONMENT, name));
            }
        }
        if (!known) {
            warn_unknown_variable(*entry);
        }
    }
    return RA_OK;
}

ra_status_t ra_settings_load(ra_settings_t *settings, int command, int argc, char *const *argv,
                             bool *help_p)
{
    RA_TRY(ra_settings_load_flags(settings, command, argc, argv, help_p));
    if (*help_p) {
        return RA_OK;
    }
    RA_TRY(ra_settings_load_environment(settings));
    const char *file = ra_settings_text_or_null(settings, RA_SET_CONFIG);
    return file != NULL ? ra_settings_load_file(settings, file) : RA_OK;
}

const char *ra_environment(const char *name)
{
    return getenv(name);
}
