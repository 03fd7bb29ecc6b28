/**
 * @file  model/random_weights.h
 * @brief Internal to model/: weights made from a seed, layer by layer, in place of a checkpoint.
 *
 * A value is a function of (seed, tensor name, index) alone: 16 bits of a splitmix64 stream as a
 * number in [-1, 1), times sqrt(3 / in) for a matrix [out, in] (variance 1 / in), 0.01 for a bias;
 * norms are 1. Everything is bf16.
 */
#ifndef RA_MODEL_RANDOM_WEIGHTS_H
#define RA_MODEL_RANDOM_WEIGHTS_H

#include "base/pool.h"
#include "base/tensor.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct ra_random_weights ra_random_weights_t;

/** @param keep  Release frees nothing. @param pool borrowed; fills tensors. */
ra_status_t ra_random_weights_create(uint64_t seed, bool keep, ra_pool_t *pool,
                                     ra_random_weights_t **random_p);
/** Accepts NULL. */
void ra_random_weights_destroy(ra_random_weights_t *random);

/**
 * Note a tensor [rows, columns], or [rows] when @a columns is 0. "model.layers.<l>." at the start
 * of @a name says its layer; tensors of none are layer -1. @a view is filled by acquire.
 */
ra_status_t ra_random_weights_add(ra_random_weights_t *random, ra_tensor_t *view, int64_t rows,
                                  int64_t columns, const char *name);
/** Make the tensors of @a layer and fill their views; one layer at a time unless they are kept.
 * @retval RA_ERR_NOMEM */
ra_status_t ra_random_weights_acquire(ra_random_weights_t *random, int64_t layer);
void ra_random_weights_release(ra_random_weights_t *random, int64_t layer);

#endif
