/* A tile is up to 12 tokens x 16 output channels: 12 accumulators and 12 fp32 sums of the 32 zmm
 * registers. */
#if defined(__x86_64__)
#define BITS 512
#define TARGET MQ_AVX512VNNI
#define KERNEL(name) name##_avx512vnni
enum { PANELS = 2, FEW_ROWS = 24, HOLD_SUMS = 1 };

#include "multiply_x86.h"

TARGET static MQ_INLINE ints accumulate(ints sums, ints weights, ints codes) {
    return _mm512_dpbusd_epi32(sums, weights, codes);
}

TARGET static MQ_INLINE ints dots_of(ints sums) { return sums; }
#endif
