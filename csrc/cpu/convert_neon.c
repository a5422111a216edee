#include "kernels.h"

#if defined(MQ_NEON)
#include "neon.h"

void mq_widen_neon(mq_dtype dtype, const uint16_t *x, int64_t n, float *out) {
    mq_assume_widen(dtype, x, n, out);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const uint16x4_t low = vld1_u16(x + i), high = vld1_u16(x + i + 4);
        __builtin_prefetch((const char *)(x + i) + 4096); /* salient weights come from memory */
        vst1q_f32(out + i, widen4(dtype, low));
        vst1q_f32(out + i + 4, widen4(dtype, high));
    }
    mq_widen_scalar(dtype, x + i, n - i, out + i);
}

void mq_widen_codes_neon(const int8_t *q, const uint16_t *scales, int64_t n, float *out) {
    mq_assume_widen_codes(q, n, out);
    float32x4_t factors[4];
    for (int v = 0; v < 4; v++) factors[v] = widen4(MQ_BF16, vld1_u16(scales + 4 * v));
    for (int64_t i = 0; i < n; i++, q += MQ_PANEL, out += MQ_PANEL) {
        const int8x16_t codes = vld1q_s8(q);
        const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_high_s8(codes);
        const int32x4_t wide[4] = {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low),
                                   vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
        for (int v = 0; v < 4; v++)
            vst1q_f32(out + 4 * v, vmulq_f32(vcvtq_f32_s32(wide[v]), factors[v]));
    }
}

static MQ_INLINE uint16x4_t narrow4(mq_dtype dtype, float32x4_t x) {
    if (dtype == MQ_F16) return vreinterpret_u16_f16(vcvt_f16_f32(x));
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), vshrn_n_u32(rounded, 16), vdup_n_u16(0x7fc0));
}

void mq_narrow_neon(mq_dtype dtype, const float *x, int64_t n, uint16_t *out) {
    mq_assume_narrow(dtype, x, n, out);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1_u16(out + i, narrow4(dtype, vld1q_f32(x + i)));
    mq_narrow_scalar(dtype, x + i, n - i, out + i);
}
#endif
