#include "model/families.h"

#include <string.h>

static const ra_family_t *const families[] = {
    &ra_family_bailing_moe_linear,
};

const ra_family_t *ra_family_find(const char *model_type)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(families); i++) {
        if (strcmp(families[i]->model_type, model_type) == 0) {
            return families[i];
        }
    }
    return NULL;
}

const char *ra_family_names(void)
{
    static _Thread_local char names[1024];
    names[0] = '\0';
    for (size_t i = 0; i < RA_ARRAY_LEN(families); i++) {
        size_t used = strlen(names);
        const char *separator = i > 0 ? ", " : "";
        size_t need = strlen(separator) + strlen(families[i]->model_type);
        if (used + need >= sizeof(names)) {
            break;
        }
        strcat(names, separator);
        strcat(names, families[i]->model_type);
    }
    return names;
}
