#include "rows.h"

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
#endif
