#include "base/settings.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { VARIABLE_BYTES = 64 };

static const ra_setting_t table[RA_SETTING_COUNT] = {
#define RA_SETTING_ROW(name, ...) [RA_SET_##name] = {__VA_ARGS__},
    RA_SETTINGS_MAP(RA_SETTING_ROW)
#undef RA_SETTING_ROW
};

typedef struct value {
    char *text;
    char *place;
    ra_setting_origin_t origin;
    double number;   /* REAL and INT; a LIMIT's count or percentage */
    int64_t integer; /* INT, BOOL, a LIMIT's count */
    bool percent;
} value_t;

struct ra_settings {
    value_t value[RA_SETTING_COUNT];
};

const ra_setting_t *ra_setting(ra_setting_id_t id)
{
    return &table[id];
}

void ra_setting_variable(ra_setting_id_t id, char out[64])
{
    int used = snprintf(out, VARIABLE_BYTES, "RA_%s", table[id].key);
    for (int i = 3; i < used && i < VARIABLE_BYTES; i++) {
        out[i] = out[i] == '.' ? '_' : (char)toupper((unsigned char)out[i]);
    }
}

static bool parse_bool(const char *text, int64_t *value)
{
    static const char *const words[2][4] = {{"off", "false", "no", "0"},
                                            {"on", "true", "yes", "1"}};
    for (int truth = 0; truth < 2; truth++) {
        for (int i = 0; i < 4; i++) {
            if (strcmp(text, words[truth][i]) == 0) {
                *value = truth;
                return true;
            }
        }
    }
    return false;
}

static bool parse_int(const char *text, int64_t *value)
{
    static const struct {
        const char *suffix;
        int64_t factor;
    } suffixes[] = {{"", 1},
                    {"K", 1000},
                    {"M", 1000000},
                    {"G", 1000000000},
                    {"Ki", INT64_C(1) << 10},
                    {"Mi", INT64_C(1) << 20},
                    {"Gi", INT64_C(1) << 30}};
    char *end;
    if (!isdigit((unsigned char)text[0]) && text[0] != '-') {
        return false;
    }
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (errno != 0 || end == text) {
        return false;
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(suffixes); i++) {
        int64_t product;
        if (strcmp(end, suffixes[i].suffix) == 0) {
            if (__builtin_mul_overflow((int64_t)number, suffixes[i].factor, &product)) {
                return false;
            }
            *value = product;
            return true;
        }
    }
    return false;
}

static bool parse_real(const char *text, double *value)
{
    char *end;
    if (!isdigit((unsigned char)text[0]) && text[0] != '.' && text[0] != '-') {
        return false;
    }
    double number = strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(number)) {
        return false;
    }
    *value = number;
    return true;
}

static bool is_choice(const char *choices, const char *text)
{
    size_t length = strlen(text);
    for (const char *word = choices; word != NULL;) {
        const char *bar = strchr(word, '|');
        size_t word_length = bar != NULL ? (size_t)(bar - word) : strlen(word);
        if (word_length == length && strncmp(word, text, length) == 0) {
            return true;
        }
        word = bar != NULL ? bar + 1 : NULL;
    }
    return false;
}

static bool parse_limit(const char *text, value_t *value)
{
    char number[32];
    size_t length = strlen(text);
    if (length > 1 && length < sizeof(number) && text[length - 1] == '%') {
        memcpy(number, text, length - 1);
        number[length - 1] = '\0';
        value->percent = true;
        return parse_real(number, &value->number) && value->number >= 0 && value->number <= 100;
    }
    value->percent = false;
    return parse_int(text, &value->integer) && value->integer >= 0;
}

/* Check @a text and fill the numbers of @a value. Says what would have been right in @a want. */
static bool parse_value(const ra_setting_t *row, const char *text, value_t *value, char want[160])
{
    switch (row->type) {
    case RA_TYPE_TEXT:
        return true;
    case RA_TYPE_CHOICE:
        snprintf(want, 160, "one of %s", row->choices);
        return is_choice(row->choices, text);
    case RA_TYPE_BOOL:
        snprintf(want, 160, "on or off");
        return parse_bool(text, &value->integer);
    case RA_TYPE_INT:
        snprintf(want, 160, "an integer from %.0f to %.0f (K, M, G, Ki, Mi, Gi may follow)",
                 row->low, row->high);
        return parse_int(text, &value->integer) && (double)value->integer >= row->low &&
               (double)value->integer <= row->high;
    case RA_TYPE_REAL:
        snprintf(want, 160, "a number from %g to %g", row->low, row->high);
        return parse_real(text, &value->number) && value->number >= row->low &&
               value->number <= row->high;
    case RA_TYPE_LIMIT:
        snprintf(want, 160, "a count from 0 up, or a percentage from 0%% to 100%%");
        return parse_limit(text, value);
    }
    return false;
}

ra_status_t ra_settings_set(ra_settings_t *settings, ra_setting_id_t id, const char *text,
                            ra_setting_origin_t origin, const char *place)
{
    value_t *old = &settings->value[id];
    value_t fresh = {.origin = origin};
    char want[160];

    if (!parse_value(&table[id], text, &fresh, want)) {
        return ra_fail(RA_ERR_USAGE, "settings", "%s: '%s' is not a value of %s; it takes %s",
                       place, text, table[id].key, want);
    }
    if (old->text != NULL && origin < old->origin) {
        return RA_OK;
    }
    fresh.text = strdup(text);
    fresh.place = strdup(place);
    if (fresh.text == NULL || fresh.place == NULL) {
        free(fresh.text);
        free(fresh.place);
        return ra_fail(RA_ERR_NOMEM, "settings", "cannot keep the value of %s", table[id].key);
    }
    free(old->text);
    free(old->place);
    *old = fresh;
    return RA_OK;
}

ra_status_t ra_settings_create(ra_settings_t **settings_p)
{
    ra_settings_t *settings = calloc(1, sizeof(*settings));
    if (settings == NULL) {
        return ra_fail(RA_ERR_NOMEM, "settings", "cannot allocate the settings");
    }
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        ra_status_t status = ra_settings_set(settings, (ra_setting_id_t)id, table[id].fallback,
                                             RA_ORIGIN_DEFAULT, "default");
        if (status != RA_OK) {
            ra_settings_destroy(settings);
            return status;
        }
    }
    *settings_p = settings;
    return RA_OK;
}

void ra_settings_destroy(ra_settings_t *settings)
{
    if (settings == NULL) {
        return;
    }
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        free(settings->value[id].text);
        free(settings->value[id].place);
    }
    free(settings);
}

const char *ra_settings_text(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].text;
}

const char *ra_settings_text_or_null(const ra_settings_t *settings, ra_setting_id_t id)
{
    const char *text = settings->value[id].text;
    return text[0] != '\0' ? text : NULL;
}

bool ra_settings_bool(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].integer != 0;
}

int64_t ra_settings_int(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].integer;
}

double ra_settings_real(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].number;
}

bool ra_settings_limit(const ra_settings_t *settings, ra_setting_id_t id, double *percent,
                       int64_t *count)
{
    const value_t *value = &settings->value[id];
    if (value->percent) {
        *percent = value->number;
    } else {
        *count = value->integer;
    }
    return value->percent;
}

ra_setting_origin_t ra_settings_origin(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].origin;
}

const char *ra_settings_place(const ra_settings_t *settings, ra_setting_id_t id)
{
    return settings->value[id].place;
}
