/* With codes of up to 4 bits, sums fit in int16. maddubs(weight + 8 as u8, activation as s8) adds two
 * products of at most 15 * 15. Sums of a segment may wrap modulo 2^16 on the way, but they start
 * at -8 * sum(activations), so the final value is the plain dot product, at most 2 * 128 * 8 *
 * 15 < 2^15 in magnitude. 12 accumulators, 2 weight registers, a broadcast and a temporary fill
 * the 16 ymm registers. */
#include "kernels.h"

#if defined(MQ_X86)
#define BITS 256
#define TARGET MQ_AVX2
#define KERNEL(name) name##_avx2
enum { PANELS = 1, FEW_ROWS = 6, HOLD_SUMS = 0 };

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

#include "multiply.h"
#endif
