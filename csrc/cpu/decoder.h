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

/* The sum of lanes, halves first. Overwrites them. */
static MQ_INLINE float mq_sum_of_lanes(float *lanes) {
    for (int half = 8; half; half /= 2)
        for (int e = 0; e < half; e++) lanes[e] += lanes[e + half];
    return lanes[0];
}

static MQ_INLINE void mq_dot_rows_by_lanes(const float *a, const float *b, int64_t rows, int64_t n,
                                           float scale, float *out) {
    for (int64_t r = 0; r < rows; r++, b += n) {
        float lanes[16] = {0};
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            for (int e = 0; e < 16; e++) lanes[e] += a[i + e] * b[i + e];
        for (int e = 0; i + e < n; e++) lanes[e] += a[i + e] * b[i + e];
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

static MQ_INLINE void mq_add_rows_by_lanes(const float *a, const float *b, int64_t rows, int64_t n,
                                           float *sums) {
    for (int64_t r = 0; r < rows; r++, b += n)
        for (int64_t i = 0; i < n; i++) sums[i] += a[r] * b[i];
}

#endif
