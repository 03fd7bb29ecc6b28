#include "comm/ranks.h"
#include "comm/transport.h"

#include <stdio.h>
#include <string.h>

/* Every transport, in order of preference. */
static const ra_transport_ops_t *const transport_table[] = {
    &ra_transport_local, &ra_transport_local_copy, &ra_transport_local_order,
#if RA_HAVE_CUDA
    &ra_transport_peer,  &ra_transport_nccl,
#endif
};

ra_status_t ra_transport_find(const char *name, const ra_transport_ops_t **ops_p)
{
    if (strcmp(name, "auto") == 0) {
        *ops_p = transport_table[0];
        return RA_OK;
    }
    for (size_t i = 0; i < RA_ARRAY_LEN(transport_table); i++) {
        if (strcmp(name, transport_table[i]->name) == 0) {
            *ops_p = transport_table[i];
            return RA_OK;
        }
    }

    char names[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < RA_ARRAY_LEN(transport_table) && used < sizeof(names); i++) {
        used +=
            (size_t)snprintf(names + used, sizeof(names) - used, ", %s", transport_table[i]->name);
    }
    return ra_fail(RA_ERR_USAGE, "comm", "transport '%s' is not in this build; it has: auto%s",
                   name, names);
}

const char *ra_transport_choose(const char *name, ra_device_kind_t kind)
{
    if (strcmp(name, "auto") != 0 || kind == RA_DEVICE_CPU) {
        return name;
    }
    return ra_launch_size() == 1 ? "peer" : "nccl";
}

bool ra_transport_list(int index, const char **name_p, const char **doc_p)
{
    if (index < 0 || (size_t)index >= RA_ARRAY_LEN(transport_table)) {
        return false;
    }
    *name_p = transport_table[index]->name;
    *doc_p = transport_table[index]->doc;
    return true;
}
