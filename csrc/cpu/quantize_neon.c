#include "kernels.h"

#if defined(MQ_NEON)
#include <string.h>

#include "neon.h"
#include "quantize_groups.h"

mq_extent mq_extent_of_neon(const float *x, int64_t n) {
    mq_assume_extent_of(n);
    const int32x4_t sign = vdupq_n_s32(INT32_MIN);
    int32x4_t max0 = vdupq_n_s32(0), max1 = max0, min0 = max0, min1 = max0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const int32x4_t a = vreinterpretq_s32_f32(vld1q_f32(x + i));
        const int32x4_t b = vreinterpretq_s32_f32(vld1q_f32(x + i + 4));
        /* as int32, values of the other sign are negative and lose to 0 */
        max0 = vmaxq_s32(max0, a);
        max1 = vmaxq_s32(max1, b);
        min0 = vmaxq_s32(min0, veorq_s32(a, sign));
        min1 = vmaxq_s32(min1, veorq_s32(b, sign));
    }
    const mq_extent extent = {(uint32_t)vmaxvq_s32(vmaxq_s32(max0, max1)),
                              (uint32_t)vmaxvq_s32(vmaxq_s32(min0, min1))};
    return mq_extent_union(extent, mq_extent_of_scalar(x + i, n - i));
}

static MQ_INLINE int32x4_t codes_of(const float *x, float inverse, float32x4_t least,
                                    float32x4_t most) {
    const float32x4_t scaled = vmulq_n_f32(vld1q_f32(x), inverse);
    return vcvtnq_s32_f32(vminq_f32(vmaxq_f32(scaled, least), most)); /* rounds half to even */
}

static MQ_INLINE int32_t quantize_group(const float *x, int64_t n, float inverse, int low, int high,
                                        int8_t *q) {
    const float32x4_t least = vdupq_n_f32((float)low), most = vdupq_n_f32((float)high);
    int32x4_t sums = vdupq_n_s32(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        int16x8_t v[4];
        for (int e = 0; e < 4; e++) {
            const int32x4_t codes = codes_of(x + i + 4 * e, inverse, least, most);
            sums = vaddq_s32(sums, codes);
            v[e] = vreinterpretq_s16_s32(codes);
        }
        /* keep the low bytes */
        const int8x16_t ab = vreinterpretq_s8_s16(vuzp1q_s16(v[0], v[1]));
        const int8x16_t cd = vreinterpretq_s8_s16(vuzp1q_s16(v[2], v[3]));
        vst1q_s8(q + i, vuzp1q_s8(ab, cd));
    }
    for (; i + 4 <= n; i += 4) {
        const int32x4_t codes = codes_of(x + i, inverse, least, most);
        sums = vaddq_s32(sums, codes);
        const int16x4_t words = vmovn_s32(codes);
        const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
        memcpy(q + i, &bytes, 4);
    }
    int32_t sum = vaddvq_s32(sums);
    mq_quantize_scalar(x + i, n - i, inverse, low, high, q + i);
    for (; i < n; i++) sum += q[i];
    return -8 * sum;
}

void mq_quantize_neon(const float *x, int64_t n, float inverse, int low, int high, int8_t *q) {
    mq_assume_quantize(x, n, inverse, low, high, q);
    quantize_group(x, n, inverse, low, high, q);
}

void mq_quantize_groups_neon(const mq_linear *lin, const mq_extent *extent, const float *x,
                             int64_t n, int64_t group_size, int8_t *codes, float *scales,
                             int32_t *starts) {
    mq_quantize_groups_by(mq_extent_of_neon, quantize_group, lin, extent, x, n, group_size, codes,
                          scales, starts);
}

/* Stores two quads of two rows; of four rows. */
static MQ_INLINE void store_pairs(int32x4_t v, int8_t *to, int64_t h) {
    const int32x2_t first = vget_low_s32(v), second = vget_high_s32(v);
    memcpy(to, &first, sizeof first);
    memcpy(to + h * MQ_QUAD, &second, sizeof second);
}

static MQ_INLINE void store_fours(int32x4_t low, int32x4_t high, int8_t *to, int64_t h) {
    const int64x2_t a = vreinterpretq_s64_s32(low), b = vreinterpretq_s64_s32(high);
    vst1q_s8(to, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
    vst1q_s8(to + h * MQ_QUAD, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
}

static MQ_INLINE int32x4_t four_quads(const int8_t *from) {
    return vreinterpretq_s32_s8(vld1q_s8(from));
}

/* Four quads at a time; of those, four rows at a time, then two. */
void mq_interleave_neon(const int8_t *from, int64_t stride, int64_t rows, int64_t quads, int8_t *to,
                        int64_t h) {
    mq_assume_interleave(from, stride, rows, quads, to, h);
    const int64_t two_quads = 2 * h * MQ_QUAD;
    int64_t quad = 0;
    for (; quad + 4 <= quads; quad += 4, from += 4 * MQ_QUAD, to += 2 * two_quads) {
        const int8_t *x = from;
        int8_t *y = to;
        int64_t left = rows;
        for (; left >= 2; left -= 2, x += 2 * stride, y += 2 * MQ_QUAD) {
            const int32x4_t a = four_quads(x), b = four_quads(x + stride);
            const int32x4_t low = vzip1q_s32(a, b), high = vzip2q_s32(a, b);
            if (left < 4) {
                store_pairs(low, y, h);
                store_pairs(high, y + two_quads, h);
                continue;
            }
            left -= 2, x += 2 * stride;
            const int32x4_t c = four_quads(x), d = four_quads(x + stride);
            store_fours(low, vzip1q_s32(c, d), y, h);
            store_fours(high, vzip2q_s32(c, d), y + two_quads, h);
            y += 2 * MQ_QUAD;
        }
        mq_interleave_scalar(x, stride, left, 4, y, h);
    }
    mq_interleave_scalar(from, stride, rows, quads - quad, to, h);
}
#endif
