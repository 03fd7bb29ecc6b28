#include "base/log.h"
#include "base/status.h"
#include "tests/test_support.h"
#include <pthread.h>
#include <string.h>

static void every_code_has_a_name_a_text_and_its_documented_exit_code(void **state)
{
    (void)state;
    static const struct {
        ra_status_t status;
        const char *name;
        int exit_code;
    } documented[] = {
        {RA_OK, "OK", 0},
        {RA_ERR_INTERNAL, "ERR_INTERNAL", 1},
        {RA_ERR_USAGE, "ERR_USAGE", 2},
        {RA_ERR_UNSUPPORTED, "ERR_UNSUPPORTED", 2},
        {RA_ERR_PARTIAL, "ERR_PARTIAL", 3},
        {RA_ERR_INPUT, "ERR_INPUT", 4},
        {RA_ERR_NOMEM, "ERR_NOMEM", 5},
        {RA_ERR_PEER, "ERR_PEER", 6},
        {RA_ERR_TIMEOUT, "ERR_TIMEOUT", 6},
        {RA_ERR_INTEGRITY, "ERR_INTEGRITY", 7},
        {RA_ERR_NONFINITE, "ERR_NONFINITE", 7},
        {RA_ERR_OUTPUT, "ERR_OUTPUT", 8},
        {RA_ERR_STOPPED, "ERR_STOPPED", 75},
        {RA_ERR_INTERRUPTED, "ERR_INTERRUPTED", 130},
    };
    for (size_t i = 0; i < RA_ARRAY_LEN(documented); i++) {
        assert_string_equal(ra_status_name(documented[i].status), documented[i].name);
        assert_int_equal(ra_status_exit_code(documented[i].status), documented[i].exit_code);
        assert_true(strlen(ra_status_text(documented[i].status)) > 0);
    }
}

static void an_unknown_value_is_an_internal_error_not_a_crash(void **state)
{
    (void)state;
    ra_status_t bogus = (ra_status_t)-999;
    assert_string_equal(ra_status_name(bogus), "UNKNOWN");
    assert_int_equal(ra_status_exit_code(bogus), 1);
}

static void fail_returns_its_status_and_keeps_the_text(void **state)
{
    (void)state;
    ra_log_set_quiet(1);
    assert_int_equal(ra_fail(RA_ERR_INPUT, "test", "row %d of %s", 7, "a.jsonl"), RA_ERR_INPUT);
    assert_string_equal(ra_last_error(), "row 7 of a.jsonl");
    ra_last_error_set("adopted");
    assert_string_equal(ra_last_error(), "adopted");
}

static void *text_of_another_thread(void *arg)
{
    strcpy(arg, ra_last_error());
    return NULL;
}

static void the_text_belongs_to_its_thread(void **state)
{
    (void)state;
    char seen[64] = "untouched";
    pthread_t thread;
    ra_last_error_set("mine");
    assert_int_equal(pthread_create(&thread, NULL, text_of_another_thread, seen), 0);
    pthread_join(thread, NULL);
    assert_string_equal(seen, "");
    assert_string_equal(ra_last_error(), "mine");
}

static ra_status_t pass_on(ra_status_t status, int *reached)
{
    RA_TRY(status);
    *reached = 1;
    return RA_OK;
}

static void try_returns_errors_early(void **state)
{
    (void)state;
    int reached = 0;
    assert_int_equal(pass_on(RA_ERR_PEER, &reached), RA_ERR_PEER);
    assert_int_equal(reached, 0);
    assert_int_equal(pass_on(RA_OK, &reached), RA_OK);
    assert_int_equal(reached, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_has_a_name_a_text_and_its_documented_exit_code),
        cmocka_unit_test(an_unknown_value_is_an_internal_error_not_a_crash),
        cmocka_unit_test(fail_returns_its_status_and_keeps_the_text),
        cmocka_unit_test(the_text_belongs_to_its_thread),
        cmocka_unit_test(try_returns_errors_early),
    };
    return cmocka_run_group_tests_name("base.status", tests, NULL, NULL);
}
