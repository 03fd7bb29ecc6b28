/**
 * @file  tests/moe/cuda_steps_double.h
 * @brief What tests may ask of cuda_steps_double.c.
 */
#ifndef RA_TESTS_MOE_CUDA_STEPS_DOUBLE_H
#define RA_TESTS_MOE_CUDA_STEPS_DOUBLE_H

#include <stdatomic.h>

/** Products of all ranks until one of them fails with RA_ERR_DEVICE; < 0: none does. */
extern atomic_int cuda_double_products_left;

#endif
