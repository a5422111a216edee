#include <math.h>

#include "kernels.h"

#if defined(MQ_NEON)
#include "neon.h"

/* Two strides of butterflies at a time, which halves loads and stores. */
static MQ_INLINE float32x4x4_t four(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    const float32x4_t ab = vaddq_f32(a, b), a_b = vsubq_f32(a, b);
    const float32x4_t cd = vaddq_f32(c, d), c_d = vsubq_f32(c, d);
    return (float32x4x4_t){
        {vaddq_f32(ab, cd), vaddq_f32(a_b, c_d), vsubq_f32(ab, cd), vsubq_f32(a_b, c_d)}};
}

void mq_hadamard_neon(const float *x, int64_t n, float *out) {
    mq_assume_hadamard(x, n, out);
    if (n < 16) {
        mq_hadamard_scalar(x, n, out);
        return;
    }
    for (int64_t i = 0; i < n; i += 16) { /* strides 1 and 2: register r holds the values with i
                                           * % 4 == r */
        const float32x4x4_t v = vld4q_f32(x + i);
        vst4q_f32(out + i, four(v.val[0], v.val[1], v.val[2], v.val[3]));
    }
    int64_t stride = 4;
    for (; 4 * stride <= n; stride *= 4) {
        for (int64_t i = 0; i < n; i += 4 * stride) {
            for (int64_t e = i; e < i + stride; e += 4) {
                const float32x4x4_t v =
                    four(vld1q_f32(out + e), vld1q_f32(out + e + stride),
                         vld1q_f32(out + e + 2 * stride), vld1q_f32(out + e + 3 * stride));
                for (int j = 0; j < 4; j++) vst1q_f32(out + e + j * stride, v.val[j]);
            }
        }
    }
    const float norm = 1.0f / sqrtf((float)n);
    if (stride == n) {
        for (int64_t i = 0; i < n; i += 4)
            vst1q_f32(out + i, vmulq_n_f32(vld1q_f32(out + i), norm));
        return;
    }
    for (int64_t i = 0; i < stride; i += 4) { /* one stride remains */
        const float32x4_t a = vld1q_f32(out + i), b = vld1q_f32(out + i + stride);
        vst1q_f32(out + i, vmulq_n_f32(vaddq_f32(a, b), norm));
        vst1q_f32(out + i + stride, vmulq_n_f32(vsubq_f32(a, b), norm));
    }
}
#endif
