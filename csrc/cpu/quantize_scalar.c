#include <math.h>

#include "kernels.h"

mq_extent mq_extent_of_scalar(const float *x, int64_t n) {
    mq_extent extent = {0, 0, 0};
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = mq_bits_of_float(x[i]), magnitude = bits & 0x7fffffffu;
        const int is_positive = bits == magnitude;
        extent = mq_extent_union(extent, (mq_extent){magnitude, is_positive ? magnitude : 0,
                                                     is_positive ? 0 : magnitude});
    }
    return extent;
}

void mq_quantize_scalar(const float *x, int64_t n, float inverse, int low, int high, int8_t *q) {
    float least = (float)low, most = (float)high;
    for (int64_t i = 0; i < n; i++) {
        float value = x[i] * inverse;
        value = value < least ? least : value;
        value = value > most ? most : value;
        q[i] = (int8_t)lrintf(value); /* the default rounding mode is half to even */
    }
}

void mq_dequantize_scalar(const int8_t *q, int64_t n, int is_unsigned, float scale, float *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = (is_unsigned ? (float)(uint8_t)q[i] : (float)q[i]) * scale;
}
