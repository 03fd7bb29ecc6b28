/**
 * @file  base/settings.h
 * @brief Every knob of the program: one table, one precedence, and where each value came from.
 *
 * A setting has a key ("ring.ranks"), mostly a flag ("--ranks"), and an environment variable formed
 * from its key ("RA_RING_RANKS"). Precedence: flag > environment > configuration file > default.
 * Values are checked against their type and range when they are set, so the getters cannot fail.
 * The table (settings_table.h) is the only place where a knob is declared, and settings.c the only
 * file that reads the environment. Settings hold no secrets: `ringattn config` prints them all.
 *
 * A configuration file has one `key = value` a line; `#` starts a comment at the start of a line or
 * after white space; a value may be put in double quotes to keep its spaces and `#`.
 */
#ifndef RA_BASE_SETTINGS_H
#define RA_BASE_SETTINGS_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef enum ra_setting_type {
    RA_TYPE_TEXT,   /**< any text; the name of a file, for instance */
    RA_TYPE_CHOICE, /**< one of the words in `choices`, separated by '|' */
    RA_TYPE_BOOL,   /**< a flag without a value; on|off, true|false, yes|no, 1|0 elsewhere */
    RA_TYPE_INT,    /**< integer in [low, high]; suffixes Ki, Mi, Gi and K, M, G are understood */
    RA_TYPE_REAL,   /**< number in [low, high] */
    RA_TYPE_LIMIT   /**< an integer >= 0, or a percentage "p%" in [0, 100] */
} ra_setting_type_t;

typedef enum ra_setting_origin {
    RA_ORIGIN_DEFAULT = 0,
    RA_ORIGIN_FILE,
    RA_ORIGIN_ENVIRONMENT,
    RA_ORIGIN_FLAG
} ra_setting_origin_t;

/** Commands that read a setting; a flag is refused by the others. */
enum {
    RA_FOR_SCORE = 1 << 0,
    RA_FOR_PREFILL = 1 << 1,
    RA_FOR_TOKENIZE = 1 << 2,
    RA_FOR_VALIDATE = 1 << 3,
    RA_FOR_DOCTOR = 1 << 4,
    RA_FOR_CONFIG = 1 << 5,
    RA_FOR_VERSION = 1 << 6,
    RA_FOR_MODEL = RA_FOR_SCORE | RA_FOR_PREFILL,
    RA_FOR_ALL = (1 << 7) - 1
};

/** Settings of scope "debug" are for tests and investigations and must not stay in scripts. */
typedef enum ra_setting_level { RA_SYSTEM = 0, RA_DEBUG } ra_setting_level_t;

/** One row of the table. */
typedef struct ra_setting {
    const char *key;
    const char *flag; /**< with its dashes, or NULL: file and environment only */
    ra_setting_type_t type;
    const char *fallback;
    double low, high;    /**< INT and REAL */
    const char *choices; /**< CHOICE */
    const char *unit;    /**< shown after the flag: "N", "FILE", "seconds" */
    int commands;        /**< RA_FOR_* */
    ra_setting_level_t level;
    const char *doc;
} ra_setting_t;

#include "base/settings_table.h"

/** Names of the settings: RA_SET_RANKS and so on, in table order. */
#define RA_SETTING_ENUM(name, ...) RA_SET_##name,
typedef enum ra_setting_id { RA_SETTINGS_MAP(RA_SETTING_ENUM) RA_SETTING_COUNT } ra_setting_id_t;
#undef RA_SETTING_ENUM

const ra_setting_t *ra_setting(ra_setting_id_t id);

typedef struct ra_settings ra_settings_t;

/** All values at their defaults. @retval RA_ERR_NOMEM */
ra_status_t ra_settings_create(ra_settings_t **settings_p);
/** Accepts NULL. */
void ra_settings_destroy(ra_settings_t *settings);

/**
 * Fill from a command line, then the file it (or RA_CONFIG) names, then the environment; a value is
 * never replaced by one of lower precedence, so the order of loading does not matter.
 * @param command   One RA_FOR_* bit; flags of other commands are refused.
 * @param argv      Arguments after the command's name. "--flag value" and "--flag=value".
 * @param help_p    Set when "--help" or "-h" is among them; the rest is then not checked.
 * @retval RA_ERR_USAGE  Unknown flag (with the nearest one as a suggestion), missing or bad value,
 *                       an argument that is no flag, a bad file.
 */
ra_status_t ra_settings_load(ra_settings_t *settings, int command, int argc, char *const *argv,
                             bool *help_p);

/** The three parts of ra_settings_load(). */
ra_status_t ra_settings_load_flags(ra_settings_t *settings, int command, int argc,
                                   char *const *argv, bool *help_p);
ra_status_t ra_settings_load_file(ra_settings_t *settings, const char *path);
/** Variables RA_* that name no setting only get a warning: the prefix may be another program's. */
ra_status_t ra_settings_load_environment(ra_settings_t *settings);

/**
 * Set one value. @param place  For messages and listings: "--ranks", "RA_RING_RANKS", "run.conf:3".
 * @retval RA_ERR_USAGE  Not a value of the setting's type or range.
 */
ra_status_t ra_settings_set(ra_settings_t *settings, ra_setting_id_t id, const char *value,
                            ra_setting_origin_t origin, const char *place);

/** The value as written; belongs to @a settings. Every type has one. */
const char *ra_settings_text(const ra_settings_t *settings, ra_setting_id_t id);
/** The text, or NULL when it is empty. */
const char *ra_settings_text_or_null(const ra_settings_t *settings, ra_setting_id_t id);
bool ra_settings_bool(const ra_settings_t *settings, ra_setting_id_t id);
int64_t ra_settings_int(const ra_settings_t *settings, ra_setting_id_t id);
double ra_settings_real(const ra_settings_t *settings, ra_setting_id_t id);
/** LIMIT: true and *percent, or false and *count. */
bool ra_settings_limit(const ra_settings_t *settings, ra_setting_id_t id, double *percent,
                       int64_t *count);

ra_setting_origin_t ra_settings_origin(const ra_settings_t *settings, ra_setting_id_t id);
/** "default", or the flag, variable or file:line the value came from. */
const char *ra_settings_place(const ra_settings_t *settings, ra_setting_id_t id);

/** Name of the environment variable of a setting, such as "RA_RING_RANKS". */
void ra_setting_variable(ra_setting_id_t id, char out[64]);
/** Print the flags of @a command with value, default and doc (the body of --help). */
void ra_settings_help(FILE *out, int command);

/**
 * Nearest of @a count words to @a word by edit distance, or NULL when none is near.
 * @param word_at  Gives word number @a index (NULL entries are passed over).
 */
const char *ra_nearest_word(const char *word, int count, const char *(*word_at)(int index));

/** A variable of the environment that is not ours (launchers, terminals); NULL when unset. */
const char *ra_environment(const char *name);

#endif
