#include "kernels.h"

#if defined(__x86_64__)
#include "x86.h"

MQ_AVX2 static MQ_INLINE uint32_t largest(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

MQ_AVX2 mq_extent mq_extent_of_avx2(const float *x, int64_t n) {
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    __m256i max0 = _mm256_setzero_si256(), max1 = max0, min0 = max0, min1 = max0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(x + i + 8));
        /* as int32, values of the other sign are negative and lose against 0 */
        max0 = _mm256_max_epi32(max0, a);
        max1 = _mm256_max_epi32(max1, b);
        min0 = _mm256_max_epi32(min0, _mm256_xor_si256(a, sign));
        min1 = _mm256_max_epi32(min1, _mm256_xor_si256(b, sign));
    }
    mq_extent extent = {0, largest(_mm256_max_epi32(max0, max1)),
                        largest(_mm256_max_epi32(min0, min1))};
    extent.abs_bits = mq_max_bits(extent.positive_bits, extent.negative_bits);
    return mq_extent_union(extent, mq_extent_of_scalar(x + i, n - i));
}

MQ_AVX2 void mq_quantize_avx2(const float *x, int64_t n, float inverse, int low, int high,
                              int8_t *q) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256 least = _mm256_set1_ps((float)low), most = _mm256_set1_ps((float)high);
    const __m256i lanes_in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i v[4];
        for (int e = 0; e < 4; e++) {
            __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * e), factor);
            scaled = _mm256_min_ps(_mm256_max_ps(scaled, least), most);
            v[e] = _mm256_cvtps_epi32(scaled);
        }
        /* Codes above 127 (8 bits, unsigned) would saturate in signed packs; 16-bit lanes hold
         * both kinds, and the low bytes are what is wanted */
        const __m256i bytes = _mm256_set1_epi16(0xff);
        __m256i ab = _mm256_and_si256(_mm256_packs_epi32(v[0], v[1]), bytes);
        __m256i cd = _mm256_and_si256(_mm256_packs_epi32(v[2], v[3]), bytes);
        __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), lanes_in_order);
        _mm256_storeu_si256((__m256i *)(void *)(q + i), packed);
    }
    mq_quantize_scalar(x + i, n - i, inverse, low, high, q + i);
}

MQ_AVX2 void mq_dequantize_avx2(const int8_t *q, int64_t n, int is_unsigned, float scale,
                                float *out) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i codes = _mm_loadl_epi64((const __m128i *)(const void *)(q + i));
        __m256i wide = is_unsigned ? _mm256_cvtepu8_epi32(codes) : _mm256_cvtepi8_epi32(codes);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), factor));
    }
    mq_dequantize_scalar(q + i, n - i, is_unsigned, scale, out + i);
}
#endif
