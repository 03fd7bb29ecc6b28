#include "base/cpu_isa.h"
#include "base/device.h"
#include "cli/command.h"
#include "cli/version_info.h"
#include "comm/ranks.h"

/* "local", or more separated by commas and spaces. */
static void print_list(bool (*list)(int index, const char **name_p, const char **doc_p),
                       const char *quote)
{
    const char *name, *doc;
    for (int i = 0; list(i, &name, &doc); i++) {
        printf("%s%s%s%s", i > 0 ? ", " : "", quote, name, quote);
    }
}

ra_status_t ra_cmd_version(const ra_settings_t *settings)
{
    if (ra_settings_bool(settings, RA_SET_JSON)) {
        printf("{\"version\":\"%s\",\"commit\":\"%s\",\"build\":\"%s\",\"compiler\":\"%s\","
               "\"cpu_isa\":\"%s\",\"devices\":[",
               ra_version(), ra_version_commit(), ra_version_build(), __VERSION__,
               ra_cpu_isa_name(ra_cpu_isa()));
        print_list(ra_device_list, "\"");
        printf("],\"transports\":[");
        print_list(ra_transport_list, "\"");
        printf("]}\n");
    } else {
        printf("ringattn %s (git %s, %s, compiler %s)\n", ra_version(), ra_version_commit(),
               ra_version_build(), __VERSION__);
        printf("devices: ");
        print_list(ra_device_list, "");
        printf("   cpu kernels: %s   transports: ", ra_cpu_isa_name(ra_cpu_isa()));
        print_list(ra_transport_list, "");
        printf("\n");
    }
    return ra_flush_stdout();
}
