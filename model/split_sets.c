/**
 * @file  model/split_sets.c
 * @brief Names of character sets in split patterns, as insides of PCRE2 classes.
 */
#include "model/split_pattern.h"

#include <string.h>

typedef struct named_set {
    const char *name; /* lower case, no separators */
    const char *inside;
} named_set_t;

static const named_set_t posix_sets[] = {
    {"alnum", "\\p{Alphabetic}\\p{Nd}"}, {"alpha", "\\p{Alphabetic}"}, {"ascii", "\\x00-\\x7f"},
    {"blank", "\\p{Zs}\\x09"},           {"cntrl", "\\p{Cc}"},         {"digit", "\\p{Nd}"},
    {"lower", "\\p{Lowercase}"},         {"punct", "\\p{P}\\p{S}"},    {"space", RA_CLASS_SPACE},
    {"upper", "\\p{Uppercase}"},         {"word", RA_CLASS_WORD},      {"xdigit", "0-9A-Fa-f"},
};
static const named_set_t property_sets[] = {
    {"alnum", "\\p{Alphabetic}\\p{Nd}"},
    {"alpha", "\\p{Alphabetic}"},
    {"any", "\\x{0}-\\x{10ffff}"},
    {"ascii", "\\x00-\\x7f"},
    {"assigned", "\\P{Cn}"},
    {"blank", "\\p{Zs}\\x09"},
    {"cntrl", "\\p{Cc}"},
    {"digit", "\\p{Nd}"},
    {"lower", "\\p{Lowercase}"},
    {"punct", "\\p{P}"},
    {"space", RA_CLASS_SPACE},
    {"upper", "\\p{Uppercase}"},
    {"word", RA_CLASS_WORD},
    {"xdigit", "0-9A-Fa-f"},
    {"letter", "\\p{L}"},
    {"lc", "\\p{L&}"},
    {"casedletter", "\\p{L&}"},
    {"uppercaseletter", "\\p{Lu}"},
    {"lowercaseletter", "\\p{Ll}"},
    {"titlecaseletter", "\\p{Lt}"},
    {"modifierletter", "\\p{Lm}"},
    {"otherletter", "\\p{Lo}"},
    {"mark", "\\p{M}"},
    {"combiningmark", "\\p{M}"},
    {"nonspacingmark", "\\p{Mn}"},
    {"spacingmark", "\\p{Mc}"},
    {"enclosingmark", "\\p{Me}"},
    {"number", "\\p{N}"},
    {"decimalnumber", "\\p{Nd}"},
    {"letternumber", "\\p{Nl}"},
    {"othernumber", "\\p{No}"},
    {"punctuation", "\\p{P}"},
    {"connectorpunctuation", "\\p{Pc}"},
    {"dashpunctuation", "\\p{Pd}"},
    {"openpunctuation", "\\p{Ps}"},
    {"closepunctuation", "\\p{Pe}"},
    {"initialpunctuation", "\\p{Pi}"},
    {"finalpunctuation", "\\p{Pf}"},
    {"otherpunctuation", "\\p{Po}"},
    {"symbol", "\\p{S}"},
    {"mathsymbol", "\\p{Sm}"},
    {"currencysymbol", "\\p{Sc}"},
    {"modifiersymbol", "\\p{Sk}"},
    {"othersymbol", "\\p{So}"},
    {"separator", "\\p{Z}"},
    {"spaceseparator", "\\p{Zs}"},
    {"lineseparator", "\\p{Zl}"},
    {"paragraphseparator", "\\p{Zp}"},
    {"other", "\\p{C}"},
    {"control", "\\p{Cc}"},
    {"format", "\\p{Cf}"},
    {"surrogate", "\\p{Cs}"},
    {"privateuse", "\\p{Co}"},
    {"unassigned", "\\p{Cn}"},
};

static const char *find_set(const named_set_t *sets, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(sets[i].name, name) == 0) {
            return sets[i].inside;
        }
    }
    return NULL;
}

const char *ra_split_posix_set(const char *name)
{
    return find_set(posix_sets, RA_ARRAY_LEN(posix_sets), name);
}

const char *ra_split_property_set(const char *name)
{
    return find_set(property_sets, RA_ARRAY_LEN(property_sets), name);
}
