#include "kernels.h"

#if defined(MQ_NEON)
#include "neon.h"

/* a[0..1] += x, a[2..3] += y */
static MQ_INLINE void add4(double *a, float64x2_t x, float64x2_t y) {
    vst1q_f64(a, vaddq_f64(vld1q_f64(a), x));
    vst1q_f64(a + 2, vaddq_f64(vld1q_f64(a + 2), y));
}

void mq_channel_stats_neon(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                           int64_t col0, int64_t col1, int64_t count,
                           const mq_channel_stats *stats) {
    mq_assume_channel_stats(dtype, rows, stride, col0, col1, count);
    const int64_t vector_end = col0 + (col1 - col0) / 4 * 4;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = col0; c < vector_end; c += 4) {
            const int64_t at = r * stride + c;
            const float32x4_t value = dtype == MQ_F32
                                          ? vld1q_f32((const float *)x + at)
                                          : widen4(dtype, vld1_u16((const uint16_t *)x + at));
            const float32x4_t magnitude = vabsq_f32(value), maximum = vld1q_f32(stats->abs_max + c);
            const uint32x4_t larger = vcgtq_f32(magnitude, maximum);
            if (vmaxvq_u32(larger)) {
                vst1q_f32(stats->abs_max + c, vbslq_f32(larger, magnitude, maximum));
                for (int i = 0; i < 4; i++)
                    if (magnitude[i] > maximum[i]) stats->argmax[c + i] = count + r;
            }
            /* comparisons with NaN are false */
            const float32x4_t minimum = vld1q_f32(stats->minimum + c);
            vst1q_f32(stats->minimum + c, vbslq_f32(vcltq_f32(value, minimum), value, minimum));
            const float64x2_t low = vcvt_f64_f32(vget_low_f32(value));
            const float64x2_t high = vcvt_high_f64_f32(value);
            add4(stats->abs_sum + c, vabsq_f64(low), vabsq_f64(high));
            add4(stats->sq_sum + c, vmulq_f64(low, low), vmulq_f64(high, high));
        }
    }
    mq_channel_stats_scalar(dtype, x, rows, stride, vector_end, col1, count, stats);
}
#endif
