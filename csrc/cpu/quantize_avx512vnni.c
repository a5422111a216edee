#include "kernels.h"

#if defined(MQ_X86)
#include "quantize_groups.h"
#include "x86.h"

/* The lanes of 16 that hold values when fewer are left */
static MQ_INLINE __mmask16 lanes_of(int64_t n) { return (__mmask16)((1u << n) - 1); }

typedef struct extremes {
    __m512i max, min; /* as int32, values of the other sign are negative and lose against 0 */
} extremes;

MQ_AVX512VNNI static MQ_INLINE extremes widened(extremes seen, __m512 x) {
    const __m512i a = _mm512_castps_si512(x), sign = _mm512_set1_epi32((int)0x80000000);
    seen.max = _mm512_max_epi32(seen.max, a);
    seen.min = _mm512_max_epi32(seen.min, _mm512_xor_si512(a, sign));
    return seen;
}

MQ_AVX512VNNI static MQ_INLINE mq_extent extent_of(const float *x, int64_t n) {
    extremes seen = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) seen = widened(seen, _mm512_loadu_ps(x + i));
    if (i < n) seen = widened(seen, _mm512_maskz_loadu_ps(lanes_of(n - i), x + i));
    mq_extent extent = {0, (uint32_t)_mm512_reduce_max_epi32(seen.max),
                        (uint32_t)_mm512_reduce_max_epi32(seen.min)};
    extent.abs_bits = mq_max_bits(extent.positive_bits, extent.negative_bits);
    return extent;
}

MQ_AVX512VNNI mq_extent mq_extent_of_avx512vnni(const float *x, int64_t n) {
    return extent_of(x, n);
}

MQ_AVX512VNNI static MQ_INLINE int32_t quantize_group(const float *x, int64_t n, float inverse,
                                                      int low, int high, int8_t *q) {
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512 least = _mm512_set1_ps((float)low), most = _mm512_set1_ps((float)high);
    __m512i sums = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
        const __m512i v = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, least), most));
        sums = _mm512_add_epi32(sums, v);
        /* not a masked store, which takes several times as long */
        _mm_storeu_si128((__m128i *)(void *)(q + i), _mm512_cvtepi32_epi8(v));
    }
    if (i < n) {
        const __mmask16 lanes = lanes_of(n - i);
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
        const __m512i v = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, least), most));
        sums = _mm512_add_epi32(sums, v);
        _mm_mask_storeu_epi8(q + i, lanes, _mm512_cvtepi32_epi8(v));
    }
    return -8 * _mm512_reduce_add_epi32(sums);
}

MQ_AVX512VNNI void mq_quantize_avx512vnni(const float *x, int64_t n, float inverse, int low,
                                          int high, int8_t *q) {
    quantize_group(x, n, inverse, low, high, q);
}

MQ_AVX512VNNI void mq_quantize_groups_avx512vnni(const mq_linear *lin, const mq_extent *extent,
                                                 const float *x, int64_t n, int64_t group_size,
                                                 int8_t *codes, float *scales, int32_t *starts) {
    mq_quantize_groups_by(extent_of, quantize_group, lin, extent, x, n, group_size, codes, scales,
                          starts);
}
#endif
