#include "kernels.h"

#if defined(MQ_X86)
#include "quantize_x86.h"

MQ_AVX512VNNI static MQ_INLINE mq_extent extent_of(const float *x, int64_t n) {
    __m512i as_signed = _mm512_setzero_si512(), as_unsigned = as_signed;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
        _mm_prefetch((const char *)(x + i) + BYTES_AHEAD, _MM_HINT_T0);
        as_signed = _mm512_max_epi32(as_signed, bits);
        as_unsigned = _mm512_max_epu32(as_unsigned, bits);
    }
    const seen all = {_mm256_max_epi32(_mm512_castsi512_si256(as_signed),
                                       _mm512_extracti64x4_epi64(as_signed, 1)),
                      _mm256_max_epu32(_mm512_castsi512_si256(as_unsigned),
                                       _mm512_extracti64x4_epi64(as_unsigned, 1))};
    return extent_of_seen(with_values(all, x + i, n - i));
}

MQ_AVX512VNNI mq_extent mq_extent_of_avx512vnni(const float *x, int64_t n) {
    mq_assume_extent_of(n);
    return extent_of(x, n);
}

MQ_AVX512VNNI static MQ_INLINE __m512i rounded16(const float *x, __m512 factor) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor));
}

/* codes_of_group for 512 bits; returns the start for these codes. */
MQ_AVX512VNNI static MQ_INLINE int32_t quantize_group(const float *x, int64_t n, float inverse,
                                                      int low, int high, int8_t *q) {
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i least = _mm512_set1_epi8((char)low), most = _mm512_set1_epi8((char)high);
    const __m512i lanes_in_order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i fours = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512i ab =
            _mm512_packs_epi32(rounded16(x + i, factor), rounded16(x + i + 16, factor));
        const __m512i cd =
            _mm512_packs_epi32(rounded16(x + i + 32, factor), rounded16(x + i + 48, factor));
        __m512i codes = _mm512_packs_epi16(ab, cd);
        codes = _mm512_min_epi8(_mm512_max_epi8(codes, least), most);
        fours = _mm512_dpbusd_epi32(fours, _mm512_set1_epi8(1), codes);
        _mm512_storeu_si512(q + i, _mm512_permutexvar_epi32(lanes_in_order, codes));
    }
    const __m256i pairs = codes_of_group(x + i, n - i, inverse, low, high, q + i);
    __m256i halves = _mm256_add_epi32(
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)),
        _mm256_add_epi32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1)));
    __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
    return -8 * _mm_cvtsi128_si32(sums);
}

MQ_AVX512VNNI void mq_quantize_groups_avx512vnni(const mq_linear *lin, const mq_extent *extent,
                                                 const float *x, int64_t n, int64_t group_size,
                                                 int8_t *codes, float *scales, int32_t *starts) {
    mq_quantize_groups_by(extent_of, quantize_group, lin, extent, x, n, group_size, codes, scales,
                          starts);
}
#endif
