/* Group quantization of plain matrices, built from the micro-kernels. */
#include <string.h>

#include "ops.h"

static float q_max_of(const mq_group_format *format) {
    return (float)((1 << (format->num_bits - !format->is_unsigned)) - 1);
}

/* The scale of one group of a row. */
static float group_scale(const mq_kernels *kernels, const mq_group_format *format, mq_dtype dtype,
                         const void *row, int64_t k0, int64_t n) {
    mq_extent extent = mq_channels_extent(&(mq_channels){kernels, dtype, row, NULL, 0}, k0, n);
    if (extent.abs_bits >= 0x7f800000u) return mq_float_of_bits(0x7fc00000u);
    return mq_scale_of(
        mq_float_of_bits(format->is_unsigned ? extent.positive_bits : extent.abs_bits),
        q_max_of(format));
}

/* The codes of a group's values k0 .. k0 + n, n <= MQ_BUFFER. */
static void group_codes(const mq_kernels *kernels, const mq_group_format *format, mq_dtype dtype,
                        const void *row, int64_t k0, int64_t n, float scale, int8_t *q) {
    if (!(scale > 0)) {
        memset(q, 0, (size_t)n);
        return;
    }
    float buffer[MQ_BUFFER];
    const float *x = mq_load_channels(&(mq_channels){kernels, dtype, row, NULL, 0}, k0, n, buffer);
    int high = (int)q_max_of(format);
    kernels->quantize(x, n, mq_inverse_of(scale), format->is_unsigned ? 0 : -high, high, q);
}

/* Stores n values at out[i ...] in dtype. */
static void store(const mq_kernels *kernels, mq_dtype dtype, const float *x, int64_t n, void *out,
                  int64_t i) {
    if (dtype == MQ_F32)
        memcpy((float *)out + i, x, (size_t)n * sizeof *x);
    else
        kernels->narrow(dtype, x, n, (uint16_t *)out + i);
}

void mq_run_group_quantize(const mq_kernels *kernels, const mq_group_format *format, mq_dtype dtype,
                           const void *x, int64_t rows, int64_t cols, int64_t stride, int8_t *q,
                           float *scales) {
    for (int64_t r = 0; r < rows; r++) {
        const void *row = (const char *)x + (size_t)(r * stride) * mq_dtype_size(dtype);
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(format->group_size, cols - k0);
            float scale = *scales++ = group_scale(kernels, format, dtype, row, k0, n);
            for (int64_t i = 0; i < n; i += MQ_BUFFER)
                group_codes(kernels, format, dtype, row, k0 + i, mq_min(MQ_BUFFER, n - i), scale,
                            q + r * cols + k0 + i);
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
                kernels->dequantize(q + at, part, format->is_unsigned, scale, buffer);
                store(kernels, dtype, buffer, part, out, at);
            }
        }
    }
}

void mq_run_group_fake_quantize(const mq_kernels *kernels, const mq_group_format *format,
                                mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                                int64_t stride, void *out) {
    float buffer[MQ_BUFFER];
    int8_t codes[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        const void *row = (const char *)x + (size_t)(r * stride) * mq_dtype_size(dtype);
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(format->group_size, cols - k0);
            float scale = group_scale(kernels, format, dtype, row, k0, n);
            for (int64_t i = 0, part; i < n; i += part) {
                part = mq_min(MQ_BUFFER, n - i);
                group_codes(kernels, format, dtype, row, k0 + i, part, scale, codes);
                kernels->dequantize(codes, part, format->is_unsigned, scale, buffer);
                store(kernels, dtype, buffer, part, out, r * cols + k0 + i);
            }
        }
    }
}

void mq_run_group_hadamard(const mq_kernels *kernels, int64_t group_size, int64_t rotation,
                           mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                           int64_t stride, void *out) {
    float buffer[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        const void *row = (const char *)x + (size_t)(r * stride) * mq_dtype_size(dtype);
        const mq_channels channels = {kernels, dtype, row, NULL, rotation};
        for (int64_t k0 = 0, n; k0 < cols; k0 += n) {
            n = mq_min(group_size, cols - k0);
            for (int64_t i = 0, part; i < n; i += part) {
                part = mq_min(MQ_BUFFER, n - i);
                store(kernels, dtype, mq_load_channels(&channels, k0 + i, part, buffer), part, out,
                      r * cols + k0 + i);
            }
        }
    }
}
