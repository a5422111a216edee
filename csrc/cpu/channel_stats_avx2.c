#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

MQ_AVX2 static MQ_INLINE __m256 load8(mq_dtype dtype, const void *x, int64_t i) {
    if (dtype == MQ_F32) return _mm256_loadu_ps((const float *)x + i);
    __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)x + i));
    if (dtype == MQ_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* a[0..3] += x, a[4..7] += y */
MQ_AVX2 static MQ_INLINE void add8(double *a, __m256d low, __m256d high) {
    _mm256_storeu_pd(a, _mm256_add_pd(_mm256_loadu_pd(a), low));
    _mm256_storeu_pd(a + 4, _mm256_add_pd(_mm256_loadu_pd(a + 4), high));
}

MQ_AVX2 void mq_channel_stats_avx2(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                                   int64_t col0, int64_t col1, int64_t count,
                                   const mq_channel_stats *stats) {
    mq_assume_channel_stats(dtype, rows, stride, col0, col1, count);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const int64_t vector_end = col0 + (col1 - col0) / 8 * 8;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = col0; c < vector_end; c += 8) {
            __m256 value = load8(dtype, x, r * stride + c);
            __m256 magnitude = _mm256_andnot_ps(sign, value);
            __m256 maximum = _mm256_loadu_ps(stats->abs_max + c);
            __m256 larger = _mm256_cmp_ps(magnitude, maximum, _CMP_GT_OQ);
            int lanes = _mm256_movemask_ps(larger);
            if (lanes) {
                _mm256_storeu_ps(stats->abs_max + c, _mm256_blendv_ps(maximum, magnitude, larger));
                for (; lanes; lanes &= lanes - 1)
                    stats->argmax[c + __builtin_ctz((unsigned)lanes)] = count + r;
            }
            /* min_ps returns its second operand if either is NaN */
            _mm256_storeu_ps(stats->minimum + c,
                             _mm256_min_ps(value, _mm256_loadu_ps(stats->minimum + c)));
            __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
            __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
            const __m256d sign64 = _mm256_set1_pd(-0.0);
            add8(stats->abs_sum + c, _mm256_andnot_pd(sign64, low), _mm256_andnot_pd(sign64, high));
            add8(stats->sq_sum + c, _mm256_mul_pd(low, low), _mm256_mul_pd(high, high));
        }
    }
    mq_channel_stats_scalar(dtype, x, rows, stride, vector_end, col1, count, stats);
}
#endif
