#include <math.h>

#include "kernels.h"

void mq_channel_stats_scalar(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                             int64_t col0, int64_t col1, int64_t count,
                             const mq_channel_stats *stats) {
    mq_assume_channel_stats(dtype, rows, stride, col0, col1, count);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = col0; c < col1; c++) {
            float value = mq_load(dtype, x, r * stride + c), magnitude = fabsf(value);
            if (magnitude > stats->abs_max[c]) {
                stats->abs_max[c] = magnitude;
                stats->argmax[c] = count + r;
            }
            if (value < stats->minimum[c]) stats->minimum[c] = value;
            stats->abs_sum[c] += (double)magnitude;
            stats->sq_sum[c] += (double)value * (double)value;
        }
    }
}
