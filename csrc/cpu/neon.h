/* Intrinsics and target attributes that the NEON kernels share. x86.h says why they are
 * attributes, not flags. */
#ifndef MQ_CPU_NEON_H
#define MQ_CPU_NEON_H

#include <arm_neon.h>

#include "kernels.h"

#define MQ_NEON_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define MQ_NEON_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))

/* Converts four 16-bit values to fp32. */
static MQ_INLINE float32x4_t widen4(mq_dtype dtype, uint16x4_t x) {
    if (dtype == MQ_F16) return vcvt_f32_f16(vreinterpret_f16_u16(x));
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}

#endif
