/** @file tests/fuzz/fuzz_support.h  @brief What every fuzz target needs. */
#ifndef RA_TESTS_FUZZ_SUPPORT_H
#define RA_TESTS_FUZZ_SUPPORT_H

#include "base/log.h"
#include "base/status.h"
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/** Messages are built and kept, not printed. */
static inline void fuzz_quiet(void)
{
    ra_log_set_level(RA_LOG_ERROR);
    ra_log_set_quiet(1);
}

/** A refusal must say why, and be one that bad input may cause. */
static inline void fuzz_check_refusal(ra_status_t status)
{
    if (status == RA_OK) {
        return;
    }
    if (status != RA_ERR_INPUT && status != RA_ERR_USAGE && status != RA_ERR_INTEGRITY) {
        abort();
    }
    if (strlen(ra_last_error()) < 10) {
        abort();
    }
}

#endif
