/* Group quantization of plain matrices, built from micro-kernels. */
#include <string.h>

#include "ops.h"

static mq_quantization quantization_of(const mq_group_format *format, const mq_channels *row,
                                       int64_t k0, int64_t n) {
    return mq_quantization_of(format->num_bits, format->act_format, format->clip,
                              mq_channels_extent(row, k0, n));
}

/* Quantizes values k0 .. k0 + n of a group, n <= MQ_BUFFER. */
static void quantize(const mq_channels *row, mq_quantization to, int64_t k0, int64_t n, int8_t *q) {
    float buffer[MQ_BUFFER];
    if (to.inverse > 0)
        row->kernels->quantize(mq_load_channels(row, k0, n, buffer), n, to.inverse, to.low, to.high,
                               q);
    else
        memset(q, 0, (size_t)n);
}

static const void *row_at(mq_dtype dtype, const void *x, int64_t offset) {
    return (const char *)x + (size_t)offset * mq_dtype_size(dtype);
}

void mq_run_group_quantize(const mq_kernels *kernels, const mq_group_format *format, mq_dtype dtype,
                           const void *x, int64_t rows, int64_t cols, int64_t stride, int8_t *q,
                           float *scales) {
    for (int64_t r = 0; r < rows; r++) {
        const mq_channels row = {kernels, dtype, row_at(dtype, x, r * stride), NULL, 0, 0};
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(format->group_size, cols - k0);
            const mq_quantization to = quantization_of(format, &row, k0, n);
            *scales++ = to.scale;
            for (int64_t i = 0; i < n; i += MQ_BUFFER)
                quantize(&row, to, k0 + i, mq_min(MQ_BUFFER, n - i), q + r * cols + k0 + i);
        }
    }
}

void mq_run_group_dequantize(const mq_kernels *kernels, const mq_group_format *format,
                             const int8_t *q, const float *scales, int64_t rows, int64_t cols,
                             mq_dtype dtype, void *out) {
    float buffer[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(format->group_size, cols - k0);
            float scale = *scales++;
            for (int64_t i = 0, part; i < n; i += part) {
                part = mq_min(MQ_BUFFER, n - i);
                int64_t at = r * cols + k0 + i;
                kernels->dequantize(q + at, part, format->act_format == MQ_ACT_UNSIGNED, scale,
                                    buffer);
                mq_store(kernels, dtype, buffer, part, out, at);
            }
        }
    }
}

void mq_run_group_fake_quantize(const mq_kernels *kernels, const mq_group_format *format,
                                mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                                int64_t stride, void *out) {
    const int is_unsigned = format->act_format == MQ_ACT_UNSIGNED;
    float buffer[MQ_BUFFER];
    int8_t codes[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        const mq_channels row = {kernels, dtype, row_at(dtype, x, r * stride), NULL, 0, 0};
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(format->group_size, cols - k0);
            const mq_quantization to = quantization_of(format, &row, k0, n);
            for (int64_t i = 0, part; i < n; i += part) {
                part = mq_min(MQ_BUFFER, n - i);
                quantize(&row, to, k0 + i, part, codes);
                kernels->dequantize(codes, part, is_unsigned, to.scale, buffer);
                mq_store(kernels, dtype, buffer, part, out, r * cols + k0 + i);
            }
        }
    }
}

void mq_run_group_hadamard(const mq_kernels *kernels, int64_t group_size, int64_t rotation,
                           mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                           int64_t stride, void *out) {
    float buffer[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        const mq_channels row = {kernels, dtype, row_at(dtype, x, r * stride), NULL, rotation, 0};
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(group_size, cols - k0);
            for (int64_t i = 0, part; i < n; i += part) {
                part = mq_min(MQ_BUFFER, n - i);
                mq_store(kernels, dtype, mq_load_channels(&row, k0 + i, part, buffer), part, out,
                         r * cols + k0 + i);
            }
        }
    }
}
