/** @file model/kv_names.h  @brief Internal to model/: names of a ring-kv/1 directory, once. */
#ifndef RA_MODEL_KV_NAMES_H
#define RA_MODEL_KV_NAMES_H

#include <stdint.h>
#include <stdio.h>

#define RA_KV_FORMAT      "ring-kv/1"
#define RA_KV_INDEX       "kv.index.json"
#define RA_KV_TOKENS      "tokens.u32.npy"
#define RA_KV_STATES      "states.safetensors"
#define RA_KV_NEXT        "next.safetensors"
#define RA_KV_TENSOR_AXES "[tokens, kv_heads, head_dim]"

enum { RA_KV_NAME_BYTES = 64, RA_KV_DIGEST_BYTES = 40 };

/** "L04.k". */
static inline void ra_kv_tensor_name(int64_t layer, const char *part, char out[RA_KV_NAME_BYTES])
{
    snprintf(out, RA_KV_NAME_BYTES, "L%02lld.%s", (long long)layer, part);
}

/** "kv-00001-of-00004.safetensors" for shard 0 of 4. */
static inline void ra_kv_shard_name(int64_t shard, int64_t shards, char out[RA_KV_NAME_BYTES])
{
    snprintf(out, RA_KV_NAME_BYTES, "kv-%05lld-of-%05lld.safetensors", (long long)(shard + 1),
             (long long)shards);
}

/** "xxh3:" and 32 hex digits of the XXH3-128 of the bytes. */
void ra_kv_digest(const void *bytes, int64_t length, char out[RA_KV_DIGEST_BYTES]);

#endif
