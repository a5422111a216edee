/* Two panels at once: processors that start two products per cycle start at most two loads, and
 * 6 tokens x 2 panels need 8 loads for 12 products where 12 tokens x 1 panel need 13. 12
 * accumulators, 12 fp32 sums, 2 weights and a broadcast use 27 of the 32 zmm registers. */
#include "kernels.h"

#if defined(MQ_X86)
#define BITS 512
#define TARGET MQ_AVX512VNNI
#define KERNEL(name) name##_avx512vnni
enum { PANELS = 2, FEW_ROWS = 24, HOLD_SUMS = 1 };

#include "vectors_x86.h"

TARGET static MQ_INLINE ints accumulate(ints sums, ints weights, ints codes) {
    return _mm512_dpbusd_epi32(sums, weights, codes);
}

TARGET static MQ_INLINE ints dots_of(ints sums) { return sums; }

#include "multiply_x86.h"

#include "multiply.h"
#endif
