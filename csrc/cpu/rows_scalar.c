#include "rows.h"

void mq_add_squares_scalar(const float *x, int64_t n, float *sums) {
    mq_assume_add_squares(n);
    mq_add_squares_by_lanes(x, n, sums);
}

void mq_activate_scalar(mq_activation activation, float *x, int64_t n) {
    mq_assume_activate(activation, n);
    mq_activate_in_place(activation, x, n);
}
