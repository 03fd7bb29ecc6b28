/* Any bytes as a token file: refused with a cause, or every id is a non-negative int32. */
#include "model/npy.h"
#include "tests/fuzz/fuzz_support.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int32_t *tokens = NULL;
    int64_t count = 0;
    fuzz_quiet();
    ra_status_t status = ra_tokens_parse("fuzz.npy", data, (int64_t)size, &tokens, &count);
    fuzz_check_refusal(status);
    for (int64_t i = 0; status == RA_OK && i < count; i++) {
        if (tokens[i] < 0) {
            abort();
        }
    }
    free(tokens);
    return 0;
}
