/* 256-bit helpers that the x86 kernels for groups share. */
#ifndef MQ_CPU_QUANTIZE_X86_H
#define MQ_CPU_QUANTIZE_X86_H

#include <string.h>

#include "quantize_groups.h"
#include "x86.h"

enum { BYTES_AHEAD = 8192 }; /* prefetch distance, for rows that are read in place and for codes */

/* Loads n < 8 values and fills up with zeros. */
MQ_AVX2 static MQ_INLINE __m256 load_part(const float *x, int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes));
}

/* The maxima of the values' bits, read as int32 and as uint32. As int32, positive values are
 * above 0 and larger ones above smaller; as uint32, negative values are above all positive ones,
 * larger magnitudes above smaller. */
typedef struct seen {
    __m256i as_signed, as_unsigned;
} seen;

MQ_AVX2 static MQ_INLINE seen with(seen so_far, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    return (seen){_mm256_max_epi32(so_far.as_signed, bits),
                  _mm256_max_epu32(so_far.as_unsigned, bits)};
}

MQ_AVX2 static MQ_INLINE mq_extent extent_of_seen(seen all) {
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    /* Positive values go to the lower half, magnitudes of negative ones to the upper; otherwise
     * < 0. */
    const __m256i a = all.as_signed, b = _mm256_xor_si256(all.as_unsigned, sign);
    __m256i most = _mm256_max_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                    _mm256_permute2x128_si256(a, b, 0x31));
    most = _mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0x4e));
    most = _mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0xb1));
    most = _mm256_max_epi32(most, _mm256_setzero_si256());
    const mq_extent extent = {(uint32_t)_mm256_extract_epi32(most, 0),
                              (uint32_t)_mm256_extract_epi32(most, 4)};
    return extent;
}

/* Adds x [n], for any n. */
MQ_AVX2 static MQ_INLINE seen with_values(seen so_far, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        _mm_prefetch((const char *)(x + i) + BYTES_AHEAD, _MM_HINT_T0);
        so_far = with(with(so_far, _mm256_loadu_ps(x + i)), _mm256_loadu_ps(x + i + 8));
    }
    if (i + 8 <= n) {
        so_far = with(so_far, _mm256_loadu_ps(x + i));
        i += 8;
    }
    return i < n ? with(so_far, load_part(x + i, n - i)) : so_far;
}

MQ_AVX2 static MQ_INLINE __m256i rounded(__m256 x, __m256 factor) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(x, factor));
}

/* Quantizes x [n] with the group's own scale. x * inverse is then at most 127 / 2^-10, which int32
 * holds, so codes may be narrowed with saturation before they are clamped. (Unsigned codes have no
 * lower limit: values below int32 convert to INT32_MIN.) Returns 16 sums of two codes, alternating
 * between positions 0, 1 and positions 2, 3 of quads. */
MQ_AVX2 static MQ_INLINE __m256i codes_of_group(const float *x, int64_t n, float inverse, int low,
                                                int high, int8_t *q) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256i least = _mm256_set1_epi8((char)low), most = _mm256_set1_epi8((char)high);
    const __m256i lanes_in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sums = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i a = rounded(_mm256_loadu_ps(x + i), factor);
        const __m256i b = rounded(_mm256_loadu_ps(x + i + 8), factor);
        const __m256i c = rounded(_mm256_loadu_ps(x + i + 16), factor);
        const __m256i d = rounded(_mm256_loadu_ps(x + i + 24), factor);
        __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        codes = _mm256_min_epi8(_mm256_max_epi8(codes, least), most);
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes));
        codes = _mm256_permutevar8x32_epi32(codes, lanes_in_order);
        _mm256_storeu_si256((__m256i *)(void *)(q + i), codes);
    }
    for (; i < n; i += 8) {
        const __m256 part = n - i < 8 ? load_part(x + i, n - i) : _mm256_loadu_ps(x + i);
        const __m256i words = _mm256_packs_epi32(rounded(part, factor), _mm256_setzero_si256());
        /* four codes in each half, then zeros, which every range includes */
        __m256i codes = _mm256_packs_epi16(words, _mm256_setzero_si256());
        codes = _mm256_min_epi8(_mm256_max_epi8(codes, least), most);
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes));
        const int64_t eight = (int64_t)((uint32_t)_mm256_extract_epi32(codes, 0) |
                                        (uint64_t)(uint32_t)_mm256_extract_epi32(codes, 4) << 32);
        memcpy(q + i, &eight, n - i < 8 ? (size_t)(n - i) : 8);
    }
    return sums;
}

#endif
