/**
 * @file  model/split_pattern.h
 * @brief Split patterns of tokenizer.json: from the dialect of Oniguruma to that of PCRE2.
 *
 * `tokenizers` compiles patterns with Oniguruma (Ruby syntax). The same bytes can mean something
 * else to PCRE2, which would split text silently in other places; so a pattern is rewritten, and
 * what has no exact equivalent is refused. Differences handled:
 *
 *   \s \S    Unicode White_Space; PCRE2 adds U+180E
 *   \w \b    Alphabetic, marks, decimal digits, connectors; PCRE2 10.42: letters, numbers and "_"
 *   \h \v    hexadecimal digit, vertical tab; PCRE2: kinds of white space
 *   [a[bc]&&[^d]]   nested classes and intersections; PCRE2: plain characters
 *   [[:alpha:]] and the other POSIX names   by Unicode property
 *   \p{Han}  the Script property; PCRE2: Script_Extensions
 *   (?m)     dot matches newline. ^ and $ match at every line in both (PCRE2_MULTILINE)
 *   {n,m}+   repeats the repeat, {n}? makes it optional, {,m} starts at 0; PCRE2: possessive, lazy,
 *            plain text
 *
 * Known to remain: case-insensitive matches of one character with several (such as U+00DF with
 * "ss") that Oniguruma makes and PCRE2 does not; grapheme clusters (\X) and properties follow the
 * Unicode version of PCRE2.
 */
#ifndef RA_MODEL_SPLIT_PATTERN_H
#define RA_MODEL_SPLIT_PATTERN_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

/** PCRE2 class fragments, to be put between [ and ]. */
#define RA_CLASS_SPACE "\\p{Z}\\x09-\\x0d\\x{85}"
#define RA_CLASS_WORD  "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"

/** Compile options the translated pattern is meant for. */
#define RA_SPLIT_COMPILE_OPTIONS (PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C)

/**
 * Translate @a length bytes of valid UTF-8.
 * @param name    What to call the pattern in messages (file and key).
 * @param pcre_p  Caller frees; zero-terminated.
 * @retval RA_ERR_INPUT  not translatable; the message names the offset and the construct
 */
ra_status_t ra_split_pattern_translate(const char *name, const char *pattern, size_t length,
                                       char **pcre_p);

/**
 * The inside of a PCRE2 class for a POSIX name ("alpha") or for a property of Oniguruma that is
 * no script ("letter": lower case, separators left out). NULL when unknown.
 */
const char *ra_split_posix_set(const char *name);
const char *ra_split_property_set(const char *name);

#endif
