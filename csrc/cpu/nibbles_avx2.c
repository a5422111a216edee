#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

MQ_AVX2 void mq_pack_nibbles_avx2(const int8_t *q, int64_t n, uint8_t *packed) {
    mq_assume_nibbles(q, n, packed);
    const __m256i nibble = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(0x1001);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i codes = _mm256_loadu_si256((const __m256i *)(const void *)(q + i));
        /* even + 16 * odd in 16-bit lanes */
        __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), weights);
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i *)(void *)(packed + i / 2), _mm256_castsi256_si128(bytes));
    }
    mq_pack_nibbles_scalar(q + i, n - i, packed + i / 2);
}

MQ_AVX2 void mq_unpack_nibbles_avx2(const uint8_t *packed, int64_t n, int is_unsigned, int8_t *q) {
    mq_assume_nibbles(q, n, packed);
    const __m128i nibble = _mm_set1_epi8(15), eight = _mm_set1_epi8(is_unsigned ? 0 : 8);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(packed + i / 2));
        __m128i low = _mm_and_si128(bytes, nibble);
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        /* (code ^ 8) - 8 sign-extends a nibble */
        low = _mm_sub_epi8(_mm_xor_si128(low, eight), eight);
        high = _mm_sub_epi8(_mm_xor_si128(high, eight), eight);
        _mm_storeu_si128((__m128i *)(void *)(q + i), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((__m128i *)(void *)(q + i + 16), _mm_unpackhi_epi8(low, high));
    }
    mq_unpack_nibbles_scalar(packed + i / 2, n - i, is_unsigned, q + i);
}
#endif
