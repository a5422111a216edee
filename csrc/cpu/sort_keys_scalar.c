#include <math.h>

#include "kernels.h"

void mq_sort_keys_scalar(mq_sort_key key, int64_t k, int64_t count, const mq_channel_stats *stats,
                         double *keys) {
    mq_assume_sort_keys(key, k, count);
    double rows = (double)count;
    for (int64_t i = 0; i < k; i++) {
        switch (key) {
            case MQ_KEY_ARGMAX: keys[i] = (double)stats->argmax[i]; break;
            case MQ_KEY_MAX: keys[i] = (double)stats->abs_max[i]; break;
            case MQ_KEY_MEAN3STD: {
                double mean = stats->abs_sum[i] / rows;
                double variance = stats->sq_sum[i] / rows - mean * mean;
                keys[i] = mean + 3.0 * sqrt(variance < 0 ? 0 : variance);
                break;
            }
            case MQ_KEY_RMS: keys[i] = sqrt(stats->sq_sum[i] / rows); break;
        }
    }
}
