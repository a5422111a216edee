#include "kernels.h"

#if defined(MQ_X86)
#include "quantize_x86.h"

MQ_AVX2 static MQ_INLINE mq_extent extent_of(const float *x, int64_t n) {
    const seen none = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    return extent_of_seen(with_values(none, x, n));
}

MQ_AVX2 mq_extent mq_extent_of_avx2(const float *x, int64_t n) {
    mq_assume_extent_of(n);
    return extent_of(x, n);
}

MQ_AVX2 void mq_quantize_avx2(const float *x, int64_t n, float inverse, int low, int high,
                              int8_t *q) {
    mq_assume_quantize(x, n, inverse, low, high, q);
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256 least = _mm256_set1_ps((float)low), most = _mm256_set1_ps((float)high);
    const __m256i lanes_in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    /* Unsigned 8-bit codes above 127 would saturate in signed packs. 16-bit lanes hold both
     * signed and unsigned codes; keep their low bytes. */
    const __m256i bytes = _mm256_set1_epi16(0xff);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i v[4];
        for (int e = 0; e < 4; e++) {
            __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * e), factor);
            v[e] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, least), most));
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
        __m256i words = _mm256_and_si256(_mm256_packs_epi32(v, v), bytes);
        __m256i quads = _mm256_packus_epi16(words, words);
        int64_t packed = (int64_t)((uint32_t)_mm256_extract_epi32(quads, 0) |
                                   (uint64_t)(uint32_t)_mm256_extract_epi32(quads, 4) << 32);
        memcpy(q + i, &packed, n - i < 8 ? (size_t)(n - i) : 8);
    }
}

MQ_AVX2 static MQ_INLINE int32_t quantize_for_int16(const float *x, int64_t n, float inverse,
                                                    int low, int high, int8_t *q) {
    const __m256i pairs = codes_of_group(x, n, inverse, low, high, q);
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
    return _mm_cvtsi128_si32(_mm_slli_epi16(_mm_sub_epi16(_mm_setzero_si128(), sums), 3));
}

MQ_AVX2 static MQ_INLINE int32_t quantize_for_int32(const float *x, int64_t n, float inverse,
                                                    int low, int high, int8_t *q) {
    const __m256i pairs = codes_of_group(x, n, inverse, low, high, q);
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_madd_epi16(sums, _mm_set1_epi16(1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
    return -8 * _mm_cvtsi128_si32(sums);
}

MQ_AVX2 void mq_quantize_groups_avx2(const mq_linear *lin, const mq_extent *extent, const float *x,
                                     int64_t n, int64_t group_size, int8_t *codes, float *scales,
                                     int32_t *starts) {
    mq_quantize_groups_by(extent_of, quantize_for_int16, lin, extent, x, n, group_size, codes,
                          scales, starts);
}

MQ_AVX2 void mq_quantize_groups_avxvnni(const mq_linear *lin, const mq_extent *extent,
                                        const float *x, int64_t n, int64_t group_size,
                                        int8_t *codes, float *scales, int32_t *starts) {
    mq_quantize_groups_by(extent_of, quantize_for_int32, lin, extent, x, n, group_size, codes,
                          scales, starts);
}

/* Loads eight quads of a row. */
MQ_AVX2 static MQ_INLINE __m256i eight_quads(const int8_t *from) {
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}

/* Stores a quad of each of four rows from the lower half of v, and four quads later from its
 * upper half. */
MQ_AVX2 static MQ_INLINE void store_fours(__m256i v, int8_t *to, int64_t h) {
    _mm_storeu_si128((__m128i *)(void *)to, _mm256_castsi256_si128(v));
    _mm_storeu_si128((__m128i *)(void *)(to + 4 * h * MQ_QUAD), _mm256_extracti128_si256(v, 1));
}

/* Stores quads 0, 1, 4 and 5 of two rows. */
MQ_AVX2 static MQ_INLINE void store_pairs(__m256i v, int8_t *to, int64_t h) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    _mm_storel_epi64((__m128i *)(void *)to, low);
    _mm_storel_epi64((__m128i *)(void *)(to + h * MQ_QUAD), _mm_unpackhi_epi64(low, low));
    to += 4 * h * MQ_QUAD;
    _mm_storel_epi64((__m128i *)(void *)to, high);
    _mm_storel_epi64((__m128i *)(void *)(to + h * MQ_QUAD), _mm_unpackhi_epi64(high, high));
}

/* Eight quads at a time; of those, four rows at a time, then two. */
MQ_AVX2 void mq_interleave_avx2(const int8_t *from, int64_t stride, int64_t rows, int64_t quads,
                                int8_t *to, int64_t h) {
    mq_assume_interleave(from, stride, rows, quads, to, h);
    const int64_t quad_stride = h * MQ_QUAD;
    int64_t quad = 0;
    for (; quad + 8 <= quads; quad += 8, from += 8 * MQ_QUAD, to += 8 * quad_stride) {
        const int8_t *x = from;
        int8_t *y = to;
        int64_t left = rows;
        for (int64_t i = 0; i < 8 * quad_stride; i += 64) __builtin_prefetch(to + BYTES_AHEAD + i);
        for (; left >= 2; left -= 2, x += 2 * stride, y += 2 * MQ_QUAD) {
            const __m256i a = eight_quads(x), b = eight_quads(x + stride);
            const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
            if (left < 4) {
                store_pairs(low, y, h);
                store_pairs(high, y + 2 * quad_stride, h);
                continue;
            }
            left -= 2, x += 2 * stride;
            const __m256i c = eight_quads(x), d = eight_quads(x + stride);
            const __m256i low2 = _mm256_unpacklo_epi32(c, d), high2 = _mm256_unpackhi_epi32(c, d);
            store_fours(_mm256_unpacklo_epi64(low, low2), y, h);
            store_fours(_mm256_unpackhi_epi64(low, low2), y + quad_stride, h);
            store_fours(_mm256_unpacklo_epi64(high, high2), y + 2 * quad_stride, h);
            store_fours(_mm256_unpackhi_epi64(high, high2), y + 3 * quad_stride, h);
            y += 2 * MQ_QUAD;
        }
        mq_interleave_scalar(x, stride, left, 8, y, h);
    }
    mq_interleave_scalar(from, stride, rows, quads - quad, to, h);
}

MQ_AVX2 void mq_dequantize_avx2(const int8_t *q, int64_t n, int is_unsigned, float scale,
                                float *out) {
    mq_assume_dequantize(q, n, out);
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
