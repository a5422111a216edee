/* AVX2 for codes of 5 to 8 bits. maddubs adds two products of at most 15 * 128 in magnitude, so an
 * int16 sum holds 8 quads: 8 * 2 * 15 * 128 < 2^15. Every 8 quads, sums are added to int32 dot
 * products, which start at -8 * sum(codes). */
#include "kernels.h"

#if defined(MQ_X86)
#define BITS 256
#define TARGET MQ_AVX2
#define KERNEL(name) name##_avx2_8bit
#define GROUPS_ONLY
#define SPAN_QUADS 8
enum { PANELS = 1, FEW_ROWS = 6, HOLD_SUMS = 0 };

#include "multiply_int16.h"

#include "multiply.h"
#endif
