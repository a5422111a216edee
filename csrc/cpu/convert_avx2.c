#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

MQ_AVX2 void mq_widen_avx2(mq_dtype dtype, const uint16_t *x, int64_t n, float *out) {
    mq_assume_widen(dtype, x, n, out);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)(x + i));
        _mm_prefetch((const char *)(x + i) + 4096, _MM_HINT_T0); /* salient weights come from
                                                                  * memory */
        __m256 wide =
            dtype == MQ_F16
                ? _mm256_cvtph_ps(halves)
                : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
        _mm256_storeu_ps(out + i, wide);
    }
    mq_widen_scalar(dtype, x + i, n - i, out + i);
}

MQ_AVX2 void mq_widen_codes_avx2(const int8_t *q, const uint16_t *scales, int64_t n, float *out) {
    mq_assume_widen_codes(q, n, out);
    float factors[MQ_PANEL];
    mq_widen_avx2(MQ_BF16, scales, MQ_PANEL, factors);
    const __m256 low = _mm256_loadu_ps(factors), high = _mm256_loadu_ps(factors + 8);
    for (int64_t i = 0; i < n; i++, q += MQ_PANEL, out += MQ_PANEL) {
        __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)q);
        __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
        __m256 second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)));
        _mm256_storeu_ps(out, _mm256_mul_ps(first, low));
        _mm256_storeu_ps(out + 8, _mm256_mul_ps(second, high));
    }
}

MQ_AVX2 static MQ_INLINE __m128i narrow_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256i top = _mm256_srli_epi32(rounded, 16);
    top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

MQ_AVX2 void mq_narrow_avx2(mq_dtype dtype, const float *x, int64_t n, uint16_t *out) {
    mq_assume_narrow(dtype, x, n, out);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 wide = _mm256_loadu_ps(x + i);
        __m128i halves =
            dtype == MQ_F16 ? _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT) : narrow_bf16(wide);
        _mm_storeu_si128((__m128i *)(void *)(out + i), halves);
    }
    mq_narrow_scalar(dtype, x + i, n - i, out + i);
}
#endif
