/** @file base/dtype.h  @brief Element types: sizes, safetensors names, bf16 conversion. */
#ifndef RA_BASE_DTYPE_H
#define RA_BASE_DTYPE_H

#include <stdint.h>
#include <string.h>

/** X(name, bytes, safetensors name). F32 is first: a dtype that nobody set means fp32. */
#define RA_DTYPE_MAP(X)                                                                            \
    X(F32, 4, "F32")                                                                               \
    X(F64, 8, "F64")                                                                               \
    X(F16, 2, "F16")                                                                               \
    X(BF16, 2, "BF16")                                                                             \
    X(I64, 8, "I64")                                                                               \
    X(I32, 4, "I32")                                                                               \
    X(I16, 2, "I16")                                                                               \
    X(I8, 1, "I8")                                                                                 \
    X(U64, 8, "U64")                                                                               \
    X(U32, 4, "U32")                                                                               \
    X(U16, 2, "U16")                                                                               \
    X(U8, 1, "U8")                                                                                 \
    X(BOOL, 1, "BOOL")                                                                             \
    X(F8_E4M3, 1, "F8_E4M3")                                                                       \
    X(F8_E5M2, 1, "F8_E5M2")

#define RA_DTYPE_ENUM(name, bytes, text) RA_##name,
typedef enum ra_dtype { RA_DTYPE_MAP(RA_DTYPE_ENUM) RA_DTYPE_COUNT } ra_dtype_t;
#undef RA_DTYPE_ENUM

/** Bytes of one element. */
int64_t ra_dtype_bytes(ra_dtype_t dtype);
/** safetensors name, such as "BF16". */
const char *ra_dtype_name(ra_dtype_t dtype);
/** @return 0, or -1 when @a name is none of the table. */
int ra_dtype_parse(const char *name, ra_dtype_t *dtype);

/** Address of element @a index of an array of @a dtype. */
static inline void *ra_dtype_at(const void *array, int64_t index, ra_dtype_t dtype)
{
    return (void *)((uintptr_t)array + (uintptr_t)(index * ra_dtype_bytes(dtype)));
}

static inline float ra_bf16_to_f32(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

/** Round to nearest even; NaN stays NaN. */
static inline uint16_t ra_bf16_from_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40);
    }
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return (uint16_t)(bits >> 16);
}

#endif
