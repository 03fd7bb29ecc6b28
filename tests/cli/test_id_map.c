#include "cli/id_map.h"
#include "tests/test_support.h"
#include <string.h>

static void every_id_is_found_with_its_value_after_growth(void **state)
{
    (void)state;
    enum { COUNT = 5000 };
    ra_id_map_t map = {0};
    char id[32];
    bool fresh;
    assert_false(ra_id_map_find(&map, "0", NULL));
    for (int i = 0; i < COUNT; i++) {
        snprintf(id, sizeof(id), "doc-%d", i);
        ra_digest_t value = {.low = (uint64_t)i, .high = 7};
        assert_int_equal(ra_id_map_add(&map, id, value, &fresh), RA_OK);
        assert_true(fresh);
    }
    for (int i = 0; i < COUNT; i++) {
        ra_digest_t value = {0};
        snprintf(id, sizeof(id), "doc-%d", i);
        assert_true(ra_id_map_find(&map, id, &value));
        assert_int_equal(value.low, i);
        assert_int_equal(value.high, 7);
        assert_int_equal(ra_id_map_add(&map, id, (ra_digest_t){0}, &fresh), RA_OK);
        assert_false(fresh);
    }
    assert_int_equal(map.count, COUNT);
    assert_false(ra_id_map_find(&map, "doc-5000", NULL));
    assert_false(ra_id_map_find(&map, "", NULL));
    ra_id_map_free(&map);
}

static void digests_are_xxh3_128_in_hex(void **state)
{
    (void)state;
    char hex[RA_DIGEST_HEX];
    ra_digest_t back;
    /* the published XXH3-128 of no bytes with seed 0 */
    ra_digest_hex(ra_digest_of("", 0), hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    assert_true(ra_digest_parse(hex, &back));
    ra_digest_t want = ra_digest_of("", 0);
    assert_memory_equal(&back, &want, sizeof(want));
    assert_false(ra_digest_parse("99aa", &back));
    assert_false(ra_digest_parse("99aa06d3014798d86001c324468d497g", &back));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_id_is_found_with_its_value_after_growth),
        cmocka_unit_test(digests_are_xxh3_128_in_hex),
    };
    return cmocka_run_group_tests_name("cli.id_map", tests, NULL, NULL);
}
