/* Sums of products in int16, for AVX2 without VNNI. multiply_avx2.c and multiply_avx2_8bit.c say
 * how many an int16 holds. */
#ifndef MQ_CPU_MULTIPLY_INT16_H
#define MQ_CPU_MULTIPLY_INT16_H

#include "vectors_x86.h"

TARGET static MQ_INLINE ints accumulate(ints sums, ints weights, ints codes) {
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, codes));
}

TARGET static MQ_INLINE ints dots_of(ints sums) {
    static const int16_t ones[16]
        __attribute__((aligned(32))) = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return mq_madd_in_memory(sums, ones);
}

#include "multiply_x86.h"

#endif
