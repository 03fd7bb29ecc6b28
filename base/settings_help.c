#include "base/settings.h"

#include <string.h>

/* Print @a text from column @a indent on, broken at spaces before column 90. */
static void print_wrapped(FILE *out, const char *text, int indent)
{
    enum { WIDTH = 90 };
    int column = indent;
    while (*text != '\0') {
        int word = (int)strcspn(text, " ");
        if (column > indent && column + 1 + word > WIDTH) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            fputc(' ', out);
            column++;
        }
        fprintf(out, "%.*s", word, text);
        column += word;
        text += word;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

static void help_level(FILE *out, int command, ra_setting_level_t level)
{
    enum { INDENT = 28 };
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        const ra_setting_t *row = ra_setting((ra_setting_id_t)id);
        char head[160], doc[512];
        if (row->flag == NULL || row->level != level || (row->commands & command) == 0) {
            continue;
        }
        const char *operand = row->unit != NULL ? row->unit : row->choices;
        int used = snprintf(head, sizeof(head), "  %s%s%s", row->flag, operand != NULL ? " " : "",
                            operand != NULL ? operand : "");
        fprintf(out, "%-*s", INDENT, head);
        if (used >= INDENT) {
            fprintf(out, "\n%*s", INDENT, "");
        }
        bool plain = row->type == RA_TYPE_BOOL || row->fallback[0] == '\0';
        const char *choices = row->unit != NULL && row->choices != NULL ? row->choices : NULL;
        snprintf(doc, sizeof(doc), "%s%s%s%s%s%s%s", row->doc, choices != NULL ? " (" : "",
                 choices != NULL ? choices : "", choices != NULL ? ")" : "", plain ? "" : " [",
                 plain ? "" : row->fallback, plain ? "" : "]");
        print_wrapped(out, doc, INDENT);
    }
}

void ra_settings_help(FILE *out, int command)
{
    help_level(out, command, RA_SYSTEM);
    fprintf(out, "  %-26s%s\n", "--help", "print this");
    bool debug = false;
    for (int id = 0; id < RA_SETTING_COUNT; id++) {
        const ra_setting_t *row = ra_setting((ra_setting_id_t)id);
        debug |= row->level == RA_DEBUG && (row->commands & command) != 0;
    }
    if (debug) {
        fprintf(out, "\nfor tests and investigations, not for scripts:\n");
        help_level(out, command, RA_DEBUG);
    }
}
