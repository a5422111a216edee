/* Kernels for what lies between the linears, written once in plain C. decoder_<isa>.c compiles them
 * for an instruction set, so results are equal bit for bit: no product is fused with a sum, and
 * sums have a fixed order. */
#ifndef MQ_CPU_DECODER_H
#define MQ_CPU_DECODER_H

#include <string.h>

#include "kernels.h"

/* e^x within 2 units in the last place for -87 <= x <= 88; x beyond is taken for the nearer end.
 * NaN stays NaN. x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7. */
static MQ_INLINE float mq_exp(float x) {
    const float magic = 12582912.0f; /* adding it rounds to an integer, in the lowest bits */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + magic, n = shifted - magic;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * mq_float_of_bits((mq_bits_of_float(shifted) + 127u) << 23);
}

static MQ_INLINE float mq_activation_of(mq_activation activation, float x) {
    if (activation == MQ_RELU) return x > 0 ? x : x != x ? x : 0;
    /* x / 2 (1 + tanh(z)) = x / (1 + e^(-2 z)) */
    const float z = activation == MQ_SILU ? x : 1.59576912f * (x + 0.044715f * ((x * x) * x));
    return x / (1.0f + mq_exp(-z));
}

static MQ_INLINE void mq_activate_by_lanes(mq_activation activation, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = mq_activation_of(activation, x[i]);
}

static MQ_INLINE void mq_activate_in_place(mq_activation activation, float *x, int64_t n) {
    switch (activation) { /* a constant for each loop */
        case MQ_SILU: mq_activate_by_lanes(MQ_SILU, x, n); break;
        case MQ_GELU_TANH: mq_activate_by_lanes(MQ_GELU_TANH, x, n); break;
        case MQ_RELU: mq_activate_by_lanes(MQ_RELU, x, n); break;
    }
}

/* sums [16]: element i adds to sum i % 16. i starts at a multiple of 16. */
static MQ_INLINE void mq_add_squares_by_lanes(const float *x, int64_t n, float *sums) {
    float lanes[16];
    memcpy(lanes, sums, sizeof lanes);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int e = 0; e < 16; e++) lanes[e] += x[i + e] * x[i + e];
    for (int e = 0; i + e < n; e++) lanes[e] += x[i + e] * x[i + e];
    memcpy(sums, lanes, sizeof lanes);
}

/* The sum of 16 lanes, halves first; in registers, where lanes are. */
static MQ_INLINE float mq_sum_of_lanes(const float *lanes) {
    float eight[8], four[4];
    for (int e = 0; e < 8; e++) eight[e] = lanes[e] + lanes[e + 8];
    for (int e = 0; e < 4; e++) four[e] = eight[e] + eight[e + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static MQ_INLINE void mq_dot_rows_by_lanes(const float *a, const float *b, int64_t rows, int64_t n,
                                           float scale, float *out) {
    const int64_t whole = n / 16 * 16;
    const size_t rest = (size_t)(n - whole) * sizeof *a;
    float a_end[16] = {0}, b_end[16] = {0};
    memcpy(a_end, a + whole, rest);
    for (int64_t r = 0; r < rows; r++, b += n) {
        float lanes[16] = {0};
        for (int64_t i = 0; i < whole; i += 16)
            for (int e = 0; e < 16; e++) lanes[e] += a[i + e] * b[i + e];
        if (rest) {
            memcpy(b_end, b + whole, rest);
            for (int e = 0; e < 16; e++) lanes[e] += a_end[e] * b_end[e];
        }
        out[r] = mq_sum_of_lanes(lanes) * scale;
    }
}

static MQ_INLINE float mq_exponentials_by_lanes(float *x, int64_t n, float most) {
    float lanes[16] = {0};
    for (int64_t i = 0; i < n; i++) x[i] = mq_exp(x[i] - most);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int e = 0; e < 16; e++) lanes[e] += x[i + e];
    for (int e = 0; i + e < n; e++) lanes[e] += x[i + e];
    return mq_sum_of_lanes(lanes);
}

static MQ_INLINE void mq_dequantize_rows_by_lanes(int bits, const uint8_t *restrict codes,
                                                  int64_t rows, int64_t n, int64_t group_size,
                                                  const float *restrict scales,
                                                  const float *restrict zeros, int64_t stride,
                                                  float *restrict out) {
    uint8_t unpacked[MQ_BUFFER];
    const int64_t half = (n + 1) / 2;
    for (int64_t r = 0; r < rows; r++, scales += stride, zeros += stride, out += n) {
        const uint8_t *restrict row = codes + r * (bits == 8 ? n : half);
        if (bits == 4) {
            for (int64_t i = 0; i < half; i++) unpacked[i] = row[i] & 15;
            for (int64_t i = half; i < n; i++) unpacked[i] = row[i - half] >> 4;
            row = unpacked;
        }
        if (group_size == 1) {
            for (int64_t i = 0; i < n; i++) out[i] = (float)row[i] * scales[i] + zeros[i];
            continue;
        }
        for (int64_t i = 0, g = 0; i < n; i += group_size, g++) {
            const float scale = scales[g], zero = zeros[g];
            for (int64_t e = i; e < i + group_size; e++) out[e] = (float)row[e] * scale + zero;
        }
    }
}

/* Columns in blocks whose sums stay in registers */
static MQ_INLINE void mq_add_rows_by_lanes(const float *a, const float *b, int64_t rows, int64_t n,
                                           float *sums) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        float lanes[32];
        memcpy(lanes, sums + i, sizeof lanes);
        for (int64_t r = 0; r < rows; r++)
            for (int e = 0; e < 32; e++) lanes[e] += a[r] * b[r * n + i + e];
        memcpy(sums + i, lanes, sizeof lanes);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = i; e < n; e++) sums[e] += a[r] * b[r * n + e];
}

#endif
