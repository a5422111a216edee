#include "decoder.h"

#if defined(MQ_X86)
#include "x86.h"

MQ_AVX2 void mq_add_squares_avx2(const float *x, int64_t n, float *sums) {
    mq_assume_add_squares(n);
    mq_add_squares_by_lanes(x, n, sums);
}

MQ_AVX2 void mq_activate_avx2(mq_activation activation, float *x, int64_t n) {
    mq_assume_activate(activation, n);
    mq_activate_in_place(activation, x, n);
}

MQ_AVX2 void mq_dot_rows_avx2(const float *a, const float *b, int64_t rows, int64_t n, float scale,
                              float *out) {
    mq_assume_dot_rows(rows, n);
    mq_dot_rows_by_lanes(a, b, rows, n, scale, out);
}

MQ_AVX2 float mq_exponentials_avx2(float *x, int64_t n, float most) {
    mq_assume_exponentials(n);
    return mq_exponentials_by_lanes(x, n, most);
}

MQ_AVX2 void mq_add_rows_avx2(const float *a, const float *b, int64_t rows, int64_t n,
                              float *sums) {
    mq_assume_add_rows(rows, n);
    mq_add_rows_by_lanes(a, b, rows, n, sums);
}

MQ_AVX2 void mq_dequantize_rows_avx2(int bits, const uint8_t *codes, int64_t rows, int64_t n,
                                     int64_t group_size, const float *scales, const float *zeros,
                                     int64_t stride, float *out) {
    mq_assume_dequantize_rows(bits, rows, n, group_size, stride);
    mq_dequantize_rows_by_lanes(bits, codes, rows, n, group_size, scales, zeros, stride, out);
}
#endif
