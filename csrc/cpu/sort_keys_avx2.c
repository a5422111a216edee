#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

/* Every operation used here is correctly rounded, so results equal the scalar kernel's. */
MQ_AVX2 void mq_sort_keys_avx2(mq_sort_key key, int64_t k, int64_t count,
                               const mq_channel_stats *stats, double *keys) {
    mq_assume_sort_keys(key, k, count);
    const __m256d rows = _mm256_set1_pd((double)count);
    int64_t i = 0;
    if (key == MQ_KEY_MAX)
        for (; i + 4 <= k; i += 4)
            _mm256_storeu_pd(keys + i, _mm256_cvtps_pd(_mm_loadu_ps(stats->abs_max + i)));
    if (key == MQ_KEY_RMS)
        for (; i + 4 <= k; i += 4)
            _mm256_storeu_pd(
                keys + i, _mm256_sqrt_pd(_mm256_div_pd(_mm256_loadu_pd(stats->sq_sum + i), rows)));
    if (key == MQ_KEY_MEAN3STD)
        for (; i + 4 <= k; i += 4) {
            __m256d mean = _mm256_div_pd(_mm256_loadu_pd(stats->abs_sum + i), rows);
            __m256d square = _mm256_div_pd(_mm256_loadu_pd(stats->sq_sum + i), rows);
            __m256d variance = _mm256_sub_pd(square, _mm256_mul_pd(mean, mean));
            /* max_pd returns its second operand if either is NaN, like the scalar comparison */
            __m256d std = _mm256_sqrt_pd(_mm256_max_pd(_mm256_setzero_pd(), variance));
            _mm256_storeu_pd(keys + i,
                             _mm256_add_pd(mean, _mm256_mul_pd(_mm256_set1_pd(3.0), std)));
        }
    mq_channel_stats rest = *stats;
    if (rest.abs_max) rest.abs_max += i;
    if (rest.abs_sum) rest.abs_sum += i;
    if (rest.sq_sum) rest.sq_sum += i;
    if (rest.argmax) rest.argmax += i;
    mq_sort_keys_scalar(key, k - i, count, &rest, keys + i);
}
#endif
