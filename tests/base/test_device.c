#include "base/device.h"
#include "tests/test_support.h"
#include <stdbool.h>
#include <string.h>

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
    assert_int_equal(look(device).live, 1024 + 256 + 256);
    assert_true(a != b && b != c && a != c);
    ra_device_free(device, a);
    assert_int_equal(look(device).live, 512);
    assert_int_equal(look(device).peak, 1536);
    a = alloc(device, 500);
    assert_int_equal(look(device).peak, 1536);
    ra_device_reset_peak(device);
    assert_int_equal(look(device).peak, 1024);
    assert_int_equal(look(device).used, 1024);
    ra_device_free(device, c);
    ra_device_free(device, b);
    ra_device_free(device, a);
    ra_device_free(device, NULL);
    assert_int_equal(look(device).live, 0);
    assert_int_equal(look(device).peak, 1024);
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
    /* 0 to 256 bytes take 256, 257 to 512 take 512, ... */
    assert_int_equal(look(device).live, (257 + 2 * 256 + 3 * 256 + 4 * 231) * 256);
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

static ra_device_t *open_cpu(void)
{
    ra_device_t *device = NULL;
    assert_int_equal(ra_device_open("cpu", 0, NULL, &device), RA_OK);
    return device;
}

static void a_reserve_serves_the_same_memory_again(void **state)
{
    (void)state;
    ra_device_t *device = open_cpu();
    void *first[3] = {0};
    for (int round = 0; round < 3; round++) {
        ra_device_reserve_begin(device, 1024 + 256 + 512);
        void *got[3] = {alloc(device, 1000), alloc(device, 0), alloc(device, 500)};
        for (int i = 0; i < 3; i++) {
            memset(got[i], 1, (size_t)(i == 0 ? 1000 : i == 1 ? 0 : 500));
            assert_true(round == 0 || got[i] == first[i]);
            first[i] = got[i];
        }
        assert_ptr_equal((char *)got[0] + 1024, got[1]);
        assert_ptr_equal((char *)got[1] + 256, got[2]);
        assert_int_equal(look(device).live, 1792);
        for (int i = 0; i < 3; i++) {
            ra_device_free(device, got[(i + round) % 3]);
        }
        assert_int_equal(look(device).live, 0);
        ra_device_reserve_end(device);
    }
    ra_device_close(device);
}

/* More than it has, before it begins, after its end, and what outlives it. */
static void a_reserve_serves_only_what_it_can(void **state)
{
    (void)state;
    ra_device_t *device = open_cpu();
    void *before = alloc(device, 256);
    ra_device_reserve_begin(device, 512);
    char *inside = alloc(device, 256), *large = alloc(device, 512);
    assert_true(large < inside || large >= inside + 512);
    ra_device_free(device, inside);
    char *kept = alloc(device, 512);
    assert_ptr_equal(kept, inside);
    ra_device_reserve_end(device);
    char *after = alloc(device, 1);
    assert_true(after < kept || after >= kept + 512);
    memset(kept, 1, 512);
    ra_device_reserve_begin(device, 4096); /* what is in use stays where it is */
    char *beside = alloc(device, 4096);
    assert_true(beside + 4096 <= kept || beside >= kept + 512);
    for (int i = 0; i < 512; i++) {
        assert_int_equal(kept[i], 1);
    }
    ra_device_free(device, kept);
    ra_device_reserve_end(device);
    ra_device_reserve_begin(device, 4096);
    char *low = alloc(device, 2048), *high = alloc(device, 2048);
    assert_ptr_equal(low + 2048, high);
    ra_device_reserve_end(device);
    void *const all[] = {before, large, after, beside, low, high};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        ra_device_free(device, all[i]);
    }
    assert_int_equal(look(device).live, 0);
    ra_device_close(device);
}

/* An allocation that fails is what is tested, and no reason to stop. */
__attribute__((visibility("default"))) const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}

/* No host has a petabyte. */
static void a_reserve_without_room_changes_nothing(void **state)
{
    (void)state;
    ra_device_t *device = open_cpu(), *counting = NULL;
    assert_int_equal(ra_device_open_counting(device, &counting), RA_OK);
    ra_device_t *const both[2] = {device, counting};
    for (int i = 0; i < 2; i++) {
        ra_device_reserve_begin(both[i], INT64_C(1) << 50);
        void *memory = alloc(both[i], 100);
        assert_int_equal(look(both[i]).live, 256);
        ra_device_free(both[i], memory);
        ra_device_reserve_end(both[i]);
        ra_device_close(both[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_counts_what_it_gave),
        cmocka_unit_test(host_memory_is_not_counted),
        cmocka_unit_test(a_counting_device_has_no_memory),
        cmocka_unit_test(a_reserve_serves_the_same_memory_again),
        cmocka_unit_test(a_reserve_serves_only_what_it_can),
        cmocka_unit_test(a_reserve_without_room_changes_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
