#include <string.h>

#include "kernels.h"
#include "quantize_groups.h"

mq_extent mq_extent_of_scalar(const float *x, int64_t n) {
    mq_assume_extent_of(n);
    mq_extent extent = {0, 0};
    for (int64_t i = 0; i < n; i++) extent = mq_extent_with(extent, x[i]);
    return extent;
}

void mq_quantize_scalar(const float *x, int64_t n, float inverse, int low, int high, int8_t *q) {
    mq_assume_quantize(x, n, inverse, low, high, q);
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)mq_code_of(x[i], inverse, low, high);
}

static int32_t quantize_group(const float *x, int64_t n, float inverse, int low, int high,
                              int8_t *q) {
    int32_t sum = 0;
    mq_quantize_scalar(x, n, inverse, low, high, q);
    for (int64_t i = 0; i < n; i++) sum += q[i];
    return -8 * sum;
}

void mq_quantize_groups_scalar(const mq_linear *lin, const mq_extent *extent, const float *x,
                               int64_t n, int64_t group_size, int8_t *codes, float *scales,
                               int32_t *starts) {
    mq_quantize_groups_by(mq_extent_of_scalar, quantize_group, lin, extent, x, n, group_size, codes,
                          scales, starts);
}

void mq_interleave_scalar(const int8_t *from, int64_t stride, int64_t rows, int64_t quads,
                          int8_t *to, int64_t h) {
    mq_assume_interleave(from, stride, rows, quads, to, h);
    for (int64_t quad = 0; quad < quads; quad++, from += MQ_QUAD, to += h * MQ_QUAD)
        for (int64_t r = 0; r < rows; r++) memcpy(to + r * MQ_QUAD, from + r * stride, MQ_QUAD);
}

void mq_dequantize_scalar(const int8_t *q, int64_t n, int is_unsigned, float scale, float *out) {
    mq_assume_dequantize(q, n, out);
    for (int64_t i = 0; i < n; i++)
        out[i] = (is_unsigned ? (float)(uint8_t)q[i] : (float)q[i]) * scale;
}
