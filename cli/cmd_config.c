#include "cli/command.h"

#include "base/log.h"
#include "cli/json_write.h"

static const char *origin_name(ra_setting_origin_t origin)
{
    static const char *const names[] = {"default", "file", "environment", "flag"};
    return names[origin];
}

static void print_json(const ra_settings_t *settings)
{
    fputc('[', stdout);
    for (int i = 0; i < RA_SETTING_COUNT; i++) {
        ra_setting_id_t id = (ra_setting_id_t)i;
        const ra_setting_t *row = ra_setting(id);
        char value[4096], place[4096], variable[64];
        ra_log_escape(ra_settings_text(settings, id), value, sizeof(value));
        ra_log_escape(ra_settings_place(settings, id), place, sizeof(place));
        ra_setting_variable(id, variable);
        printf("%s\n{\"key\":\"%s\",\"value\":", i > 0 ? "," : "", row->key);
        ra_json_write_string(stdout, value);
        printf(",\"origin\":\"%s\",\"place\":", origin_name(ra_settings_origin(settings, id)));
        ra_json_write_string(stdout, place);
        fputs(",\"flag\":", stdout);
        ra_json_write_string(stdout, row->flag);
        printf(",\"variable\":\"%s\",\"scope\":\"%s\",\"doc\":", variable,
               row->level == RA_DEBUG ? "debug" : "system");
        ra_json_write_string(stdout, row->doc);
        fputc('}', stdout);
    }
    fputs("\n]\n", stdout);
}

static void print_text(const ra_settings_t *settings)
{
    for (int i = 0; i < RA_SETTING_COUNT; i++) {
        ra_setting_id_t id = (ra_setting_id_t)i;
        const ra_setting_t *row = ra_setting(id);
        char value[4096], place[4096], variable[64];
        ra_log_escape(ra_settings_text(settings, id), value, sizeof(value));
        ra_log_escape(ra_settings_place(settings, id), place, sizeof(place));
        ra_setting_variable(id, variable);
        printf("# %s\n# %s%s%s%s%s%s\n", row->doc, row->flag != NULL ? row->flag : "",
               row->flag != NULL ? ", " : "", variable, row->choices != NULL ? ", one of " : "",
               row->choices != NULL ? row->choices : "",
               row->level == RA_DEBUG ? "; for tests and investigations only" : "");
        printf("%s = %s    # from: %s\n\n", row->key, value[0] != '\0' ? value : "\"\"", place);
    }
}

ra_status_t ra_cmd_config(const ra_settings_t *settings)
{
    if (ra_settings_bool(settings, RA_SET_JSON)) {
        print_json(settings);
    } else {
        print_text(settings);
    }
    return ra_flush_stdout();
}
