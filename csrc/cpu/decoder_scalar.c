#include "decoder.h"

void mq_add_squares_scalar(const float *x, int64_t n, float *sums) {
    mq_assume_add_squares(n);
    mq_add_squares_by_lanes(x, n, sums);
}

void mq_activate_scalar(mq_activation activation, float *x, int64_t n) {
    mq_assume_activate(activation, n);
    mq_activate_in_place(activation, x, n);
}

void mq_dot_rows_scalar(const float *a, const float *b, int64_t rows, int64_t n, float scale,
                        float *out) {
    mq_assume_dot_rows(rows, n);
    mq_dot_rows_by_lanes(a, b, rows, n, scale, out);
}

float mq_exponentials_scalar(float *x, int64_t n, float most) {
    mq_assume_exponentials(n);
    return mq_exponentials_by_lanes(x, n, most);
}

void mq_add_rows_scalar(const float *a, const float *b, int64_t rows, int64_t n, float *sums) {
    mq_assume_add_rows(rows, n);
    mq_add_rows_by_lanes(a, b, rows, n, sums);
}

void mq_dequantize_rows_scalar(int bits, const uint8_t *codes, int64_t rows, int64_t n,
                               int64_t group_size, const float *scales, const float *zeros,
                               int64_t stride, float *out) {
    mq_assume_dequantize_rows(bits, rows, n, group_size, stride);
    mq_dequantize_rows_by_lanes(bits, codes, rows, n, group_size, scales, zeros, stride, out);
}
