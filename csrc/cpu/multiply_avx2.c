/* With codes of up to 4 bits, sums fit in int16. maddubs(weight + 8 as u8, activation as s8) adds
 * two products of at most 15 * 15. Sums of a segment may wrap modulo 2^16 on the way, but they
 * start at -8 * sum(activations), so the final value is the plain dot product, at most 2 * 128 *
 * 8 * 15 < 2^15 in magnitude. 12 accumulators, 2 weight registers, a broadcast and a temporary fill
 * the 16 ymm registers. */
#include "kernels.h"

#if defined(MQ_X86)
#define BITS 256
#define TARGET MQ_AVX2
#define KERNEL(name) name##_avx2
enum { PANELS = 1, FEW_ROWS = 6, HOLD_SUMS = 0 };

#include "multiply_int16.h"

#include "multiply.h"
#endif
