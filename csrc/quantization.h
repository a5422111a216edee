/* The quantization rule of mixedquant.h (mq_act_format), shared by the CPU and CUDA kernels, in
 * C11, C++17 and CUDA C. No build fuses products and sums here, so results are equal bit for
 * bit. */
#ifndef MQ_QUANTIZATION_H
#define MQ_QUANTIZATION_H

#include <math.h>
#include <string.h>

#include "mixedquant.h"

#if defined(__CUDACC__)
#define MQ_RULE __device__ __forceinline__
#elif defined(__cplusplus)
#define MQ_RULE inline
#else
#define MQ_RULE static inline
#endif

#define MQ_SMALLEST_NORMAL 0x1p-126f
#define MQ_INFINITY_BITS 0x7f800000u
#define MQ_NAN_BITS 0x7fc00000u

MQ_RULE float mq_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MQ_RULE uint32_t mq_bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Rounds half to even, the default mode. Each compiler inlines one of these. */
MQ_RULE int mq_round(float value) {
#if defined(__CUDACC__)
    return (int)rintf(value);
#else
    return (int)lrintf(value);
#endif
}

/* The bits of the largest magnitude among positive values, and among negative ones; 0 if there
 * are none. As integers, the bits are in the order of the magnitudes, with Inf < NaN. */
typedef struct mq_extent {
    uint32_t positive_bits, negative_bits;
} mq_extent;

MQ_RULE uint32_t mq_max_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* The bits of the largest magnitude. */
MQ_RULE uint32_t mq_magnitude_bits(mq_extent extent) {
    return mq_max_bits(extent.positive_bits, extent.negative_bits);
}

MQ_RULE mq_extent mq_extent_union(mq_extent a, mq_extent b) {
    const mq_extent both = {mq_max_bits(a.positive_bits, b.positive_bits),
                            mq_max_bits(a.negative_bits, b.negative_bits)};
    return both;
}

MQ_RULE mq_extent mq_extent_with(mq_extent extent, float x) {
    const uint32_t bits = mq_bits_of_float(x), magnitude = bits & 0x7fffffffu;
    const int is_positive = bits == magnitude;
    const mq_extent own = {is_positive ? magnitude : 0, is_positive ? 0 : magnitude};
    return mq_extent_union(extent, own);
}

/* How a group is quantized: code = clamp(round(x * inverse), low, high). */
typedef struct mq_quantization {
    float scale, inverse;
    int low, high;
} mq_quantization;

/* NaN for a non-finite group, 0 for one that is too small. */
MQ_RULE float mq_scale_of(float magnitude_times_clip, float q_max) {
    const float scale = magnitude_times_clip / q_max;
    return scale < MQ_SMALLEST_NORMAL ? 0.0f : scale;
}

/* 1 / scale, or 0 for a scale that is 0, NaN or below the smallest normal. Codes are then 0. */
MQ_RULE float mq_inverse_of(float scale) {
    return scale >= MQ_SMALLEST_NORMAL ? 1.0f / scale : 0.0f;
}

MQ_RULE mq_quantization mq_quantization_of(int num_bits, mq_act_format format, float clip,
                                           mq_extent extent) {
    mq_quantization to = {mq_float_of_bits(MQ_NAN_BITS), 0, 0, 0};
    if (mq_magnitude_bits(extent) >= MQ_INFINITY_BITS) return to;
    const int is_symmetric = format == MQ_ACT_SYMMETRIC;
    const int levels = (1 << (num_bits - is_symmetric)) - 1;
    const float positive = mq_float_of_bits(extent.positive_bits);
    const float negative = mq_float_of_bits(extent.negative_bits);
    float range = positive;
    if (is_symmetric) range = mq_float_of_bits(mq_magnitude_bits(extent));
    if (format == MQ_ACT_ZERO_POINT) range = positive + negative;
    to.scale = mq_scale_of(clip * range, (float)levels);
    to.inverse = mq_inverse_of(to.scale);
    to.high = levels;
    if (is_symmetric) to.low = -levels;
    if (format == MQ_ACT_ZERO_POINT) {
        const float zero = clip * negative * to.inverse;
        to.low = zero < (float)levels ? -mq_round(zero) : -levels;
        to.high = levels + to.low;
    }
    return to;
}

/* The code of x. x * inverse must not be NaN. */
MQ_RULE int mq_code_of(float x, float inverse, int low, int high) {
    const float least = (float)low, most = (float)high;
    float value = x * inverse;
    value = value < least ? least : value;
    value = value > most ? most : value;
    return mq_round(value);
}

#endif
