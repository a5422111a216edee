/* Arithmetic on sizes that cannot overflow, for C11 and C++. A negative number, such as MQ_NO_SIZE,
 * stands for a size that does not exist. Whatever is computed from one is negative too, so only the
 * result needs a check. The argument checks (shape.c, api.c, the torch ops) use it. The code behind
 * them relies on their result and uses plain arithmetic. */
#ifndef MQ_SIZES_H
#define MQ_SIZES_H

#include <stdint.h>

#define MQ_NO_SIZE INT64_C(-1)

static inline int64_t mq_size_sum(int64_t a, int64_t b) {
    int64_t sum;
    return a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum) ? MQ_NO_SIZE : sum;
}

static inline int64_t mq_size_product(int64_t a, int64_t b) {
    int64_t product;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) ? MQ_NO_SIZE : product;
}

/* a >= 0, b >= 1 */
static inline int64_t mq_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* Whether offsets into a matrix [rows][cols], in bytes, fit in int64_t: with elements of up to 8
 * bytes, whatever their type. rows, cols >= 1. */
static inline int mq_matrix_fits(int64_t rows, int64_t cols, int64_t stride) {
    return mq_size_product(mq_size_sum(mq_size_product(rows - 1, stride), cols), 8) >= 0;
}

#endif
