#include "base/device.h"
#include "tests/test_support.h"
#include <stdbool.h>

static ra_device_memory_t look(ra_device_t *device)
{
    ra_device_memory_t memory;
    assert_int_equal(ra_device_memory(device, &memory), RA_OK);
    return memory;
}

static void *alloc(ra_device_t *device, int64_t bytes)
{
    void *memory = NULL;
    assert_int_equal(ra_device_alloc(device, bytes, &memory), RA_OK);
    assert_non_null(memory);
    return memory;
}

/* On a device and on one that only counts. */
static void check_counts(ra_device_t *device)
{
    void *a = alloc(device, 1000), *b = alloc(device, 0), *c = alloc(device, 24);
    assert_int_equal(look(device).live, 1024);
    assert_true(a != b && b != c && a != c);
    ra_device_free(device, a);
    assert_int_equal(look(device).live, 24);
    assert_int_equal(look(device).peak, 1024);
    a = alloc(device, 500);
    assert_int_equal(look(device).peak, 1024);
    ra_device_reset_peak(device);
    assert_int_equal(look(device).peak, 524);
    assert_int_equal(look(device).used, 524);
    ra_device_free(device, c);
    ra_device_free(device, b);
    ra_device_free(device, a);
    ra_device_free(device, NULL);
    assert_int_equal(look(device).live, 0);
    assert_int_equal(look(device).peak, 524);
}

static void a_device_counts_what_it_gave(void **state)
{
    (void)state;
    ra_device_t *device = NULL;
    void *many[1000];
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    check_counts(device);
    for (int i = 0; i < 1000; i++) {
        many[i] = alloc(device, i);
    }
    assert_int_equal(look(device).live, 999 * 500);
    for (int i = 0; i < 1000; i++) {
        ra_device_free(device, many[(i * 7) % 1000]);
    }
    assert_int_equal(look(device).live, 0);
    ra_device_close(device);
}

static void host_memory_is_not_counted(void **state)
{
    (void)state;
    ra_device_t *device = NULL, *counting = NULL;
    void *memory = NULL;
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    assert_int_equal(ra_device_open_counting(device, &counting), RA_OK);
    ra_device_t *const both[2] = {device, counting};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ra_device_alloc_host(both[i], 100, &memory), RA_OK);
        assert_int_equal(look(both[i]).peak, 0);
        ra_device_free_host(both[i], memory);
        ra_device_close(both[i]);
    }
}

/* A petabyte is counted as well as a byte, and nothing is touched. */
static void a_counting_device_has_no_memory(void **state)
{
    (void)state;
    ra_device_t *device = NULL, *counting = NULL;
    ra_stream_t *stream = NULL;
    char here[16] = "unchanged";
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    assert_int_equal(ra_device_open_counting(device, &counting), RA_OK);
    assert_int_equal(ra_device_kind(counting), ra_device_kind(device));
    assert_int_equal(ra_device_index(counting), ra_device_index(device));
    check_counts(counting);

    void *huge = alloc(counting, INT64_C(1) << 50);
    assert_int_equal(look(counting).live, INT64_C(1) << 50);
    assert_int_equal((uintptr_t)huge % 256, 0);
    assert_int_equal(ra_stream_create(counting, &stream), RA_OK);
    assert_int_equal(ra_stream_copy(stream, huge, here, sizeof(here)), RA_OK);
    assert_int_equal(ra_stream_copy(stream, here, huge, sizeof(here)), RA_OK);
    assert_int_equal(ra_stream_zero(stream, huge, INT64_C(1) << 50), RA_OK);
    assert_int_equal(ra_stream_sync(stream), RA_OK);
    assert_string_equal(here, "unchanged");
    ra_stream_destroy(stream);
    ra_device_free(counting, huge);
    assert_int_equal(look(device).peak, 0);
    ra_device_close(counting);
    ra_device_close(device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_counts_what_it_gave),
        cmocka_unit_test(host_memory_is_not_counted),
        cmocka_unit_test(a_counting_device_has_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
