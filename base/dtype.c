#include "base/dtype.h"

static const struct {
    int64_t bytes;
    const char *name;
} dtype_table[] = {
#define RA_DTYPE_ROW(name, bytes, text) [RA_##name] = {bytes, text},
    RA_DTYPE_MAP(RA_DTYPE_ROW)
#undef RA_DTYPE_ROW
};

int64_t ra_dtype_bytes(ra_dtype_t dtype)
{
    return dtype_table[dtype].bytes;
}

const char *ra_dtype_name(ra_dtype_t dtype)
{
    return dtype_table[dtype].name;
}

int ra_dtype_parse(const char *name, ra_dtype_t *dtype)
{
    for (int i = 0; i < RA_DTYPE_COUNT; i++) {
        if (strcmp(name, dtype_table[i].name) == 0) {
            *dtype = (ra_dtype_t)i;
            return 0;
        }
    }
    return -1;
}
