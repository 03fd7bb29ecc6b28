/* Any bytes as a safetensors file: refused with a cause, or every view lies inside the bytes. */
#include "model/safetensors.h"
#include "tests/fuzz/fuzz_support.h"

static void touch(const ra_safetensors_entry_t *entry, const uint8_t *data, size_t size)
{
    const uint8_t *first = entry->view.data;
    if (first < data || entry->bytes < 0 || (size_t)(first - data) > size ||
        (size_t)entry->bytes > size - (size_t)(first - data)) {
        abort();
    }
    if (ra_tensor_count(&entry->view) * ra_dtype_bytes(entry->view.dtype) != entry->bytes) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ra_safetensors_t *file = NULL;
    fuzz_quiet();
    ra_status_t status = ra_safetensors_parse("fuzz.safetensors", data, (int64_t)size, &file);
    fuzz_check_refusal(status);
    if (status != RA_OK) {
        return 0;
    }
    for (int64_t i = 0; i < ra_safetensors_count(file); i++) {
        const ra_safetensors_entry_t *entry = ra_safetensors_at(file, i);
        touch(entry, data, size);
        if (ra_safetensors_find(file, entry->name) != entry) {
            abort();
        }
    }
    ra_safetensors_metadata(file, "format");
    ra_safetensors_close(file);
    return 0;
}
