/* The AVX2 kernel with vpdpbusd, which sums four products in int32. */
#include "kernels.h"

#if defined(MQ_X86)
#define BITS 256
#define TARGET MQ_AVXVNNI
#define KERNEL(name) name##_avxvnni
enum { PANELS = 1, FEW_ROWS = 6, HOLD_SUMS = 0 };

#include "vectors_x86.h"

TARGET static MQ_INLINE ints accumulate(ints sums, ints weights, ints codes) {
    return _mm256_dpbusd_avx_epi32(sums, weights, codes);
}

TARGET static MQ_INLINE ints dots_of(ints sums) { return sums; }

#include "multiply_x86.h"

#include "multiply.h"
#endif
