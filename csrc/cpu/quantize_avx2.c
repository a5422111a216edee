#include "kernels.h"

#if defined(MQ_X86)
#include <string.h>

#include "quantize_groups.h"
#include "x86.h"

MQ_AVX2 static MQ_INLINE uint32_t largest(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

/* The first n of 8 values, n < 8, and zeros */
MQ_AVX2 static MQ_INLINE __m256 load_part(const float *x, int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes));
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
    for (; i < n; i += 8) {
        __m256 part = n - i < 8 ? load_part(x + i, n - i) : _mm256_loadu_ps(x + i);
        __m256i a = _mm256_castps_si256(part);
        max0 = _mm256_max_epi32(max0, a);
        min0 = _mm256_max_epi32(min0, _mm256_xor_si256(a, sign));
    }
    mq_extent extent = {0, largest(_mm256_max_epi32(max0, max1)),
                        largest(_mm256_max_epi32(min0, min1))};
    extent.abs_bits = mq_max_bits(extent.positive_bits, extent.negative_bits);
    return extent;
}

/* The sums of codes at position 0, 1, 2 and 3 of each quad */
MQ_AVX2 static MQ_INLINE __m128i quantize(const float *x, int64_t n, float inverse, int low,
                                          int high, int8_t *q) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256 least = _mm256_set1_ps((float)low), most = _mm256_set1_ps((float)high);
    const __m256i lanes_in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    /* Codes above 127 (8 bits, unsigned) would saturate in signed packs; 16-bit lanes hold both
     * kinds, and the low bytes are what is wanted */
    const __m256i bytes = _mm256_set1_epi16(0xff);
    __m256i sums = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i v[4];
        for (int e = 0; e < 4; e++) {
            __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * e), factor);
            v[e] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, least), most));
            sums = _mm256_add_epi32(sums, v[e]);
        }
        __m256i ab = _mm256_and_si256(_mm256_packs_epi32(v[0], v[1]), bytes);
        __m256i cd = _mm256_and_si256(_mm256_packs_epi32(v[2], v[3]), bytes);
        __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), lanes_in_order);
        _mm256_storeu_si256((__m256i *)(void *)(q + i), packed);
    }
    for (; i < n; i += 8) {
        __m256 part = n - i < 8 ? load_part(x + i, n - i) : _mm256_loadu_ps(x + i);
        __m256 scaled = _mm256_mul_ps(part, factor);
        __m256i v = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, least), most));
        sums = _mm256_add_epi32(sums, v);
        __m256i words = _mm256_and_si256(_mm256_packs_epi32(v, v), bytes);
        __m256i quads = _mm256_packus_epi16(words, words);
        int64_t packed = (int64_t)((uint32_t)_mm256_extract_epi32(quads, 0) |
                                   (uint64_t)(uint32_t)_mm256_extract_epi32(quads, 4) << 32);
        memcpy(q + i, &packed, n - i < 8 ? (size_t)(n - i) : 8);
    }
    return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

MQ_AVX2 void mq_quantize_avx2(const float *x, int64_t n, float inverse, int low, int high,
                              int8_t *q) {
    quantize(x, n, inverse, low, high, q);
}

MQ_AVX2 static MQ_INLINE int32_t quantize_for_int16(const float *x, int64_t n, float inverse,
                                                    int low, int high, int8_t *q) {
    __m128i sums = quantize(x, n, inverse, low, high, q);
    sums = _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), _mm_hadd_epi32(sums, sums)), 3);
    return _mm_cvtsi128_si32(_mm_packs_epi32(sums, sums));
}

MQ_AVX2 static MQ_INLINE int32_t quantize_for_int32(const float *x, int64_t n, float inverse,
                                                    int low, int high, int8_t *q) {
    __m128i sums = quantize(x, n, inverse, low, high, q);
    sums = _mm_hadd_epi32(sums, sums);
    return -8 * (_mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 1));
}

MQ_AVX2 void mq_quantize_groups_avx2(const mq_linear *lin, const mq_extent *extent, const float *x,
                                     int64_t n, int64_t group_size, int8_t *codes, float *scales,
                                     int32_t *starts) {
    mq_quantize_groups_by(mq_extent_of_avx2, quantize_for_int16, lin, extent, x, n, group_size,
                          codes, scales, starts);
}

MQ_AVX2 void mq_quantize_groups_avxvnni(const mq_linear *lin, const mq_extent *extent,
                                        const float *x, int64_t n, int64_t group_size,
                                        int8_t *codes, float *scales, int32_t *starts) {
    mq_quantize_groups_by(mq_extent_of_avx2, quantize_for_int32, lin, extent, x, n, group_size,
                          codes, scales, starts);
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
