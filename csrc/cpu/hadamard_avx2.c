#include <math.h>

#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

/* Butterflies of strides 1, 2 and 4 inside a register: the partner's value by a shuffle, then the sum
 * in the lower lane of a pair and the lower minus the upper in the upper one. */
MQ_AVX2 static MQ_INLINE __m256 eight(__m256 x) {
    __m256 partner = _mm256_permute_ps(x, 0xb1);
    x = _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xaa);
    partner = _mm256_permute_ps(x, 0x4e);
    x = _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xcc);
    partner = _mm256_permute2f128_ps(x, x, 0x01);
    return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xf0);
}

MQ_AVX2 void mq_hadamard_avx2(float *x, int64_t n) {
    if (n < 16) {
        mq_hadamard_scalar(x, n);
        return;
    }
    const __m256 norm = _mm256_set1_ps(1.0f / sqrtf((float)n));
    for (int64_t i = 0; i < n; i += 16) {
        __m256 a = eight(_mm256_loadu_ps(x + i)), b = eight(_mm256_loadu_ps(x + i + 8));
        _mm256_storeu_ps(x + i, _mm256_add_ps(a, b));
        _mm256_storeu_ps(x + i + 8, _mm256_sub_ps(a, b));
    }
    int64_t stride = 16;
    for (; 4 * stride <= n; stride *= 4) { /* two strides at a time: half the loads and stores */
        for (int64_t i = 0; i < n; i += 4 * stride) {
            for (int64_t e = i; e < i + stride; e += 8) {
                __m256 a = _mm256_loadu_ps(x + e), b = _mm256_loadu_ps(x + e + stride);
                __m256 c = _mm256_loadu_ps(x + e + 2 * stride);
                __m256 d = _mm256_loadu_ps(x + e + 3 * stride);
                __m256 ab = _mm256_add_ps(a, b), a_b = _mm256_sub_ps(a, b);
                __m256 cd = _mm256_add_ps(c, d), c_d = _mm256_sub_ps(c, d);
                _mm256_storeu_ps(x + e, _mm256_add_ps(ab, cd));
                _mm256_storeu_ps(x + e + stride, _mm256_add_ps(a_b, c_d));
                _mm256_storeu_ps(x + e + 2 * stride, _mm256_sub_ps(ab, cd));
                _mm256_storeu_ps(x + e + 3 * stride, _mm256_sub_ps(a_b, c_d));
            }
        }
    }
    for (; stride < n; stride *= 2) {
        for (int64_t i = 0; i < n; i += 2 * stride) {
            for (int64_t e = i; e < i + stride; e += 8) {
                __m256 a = _mm256_loadu_ps(x + e), b = _mm256_loadu_ps(x + e + stride);
                _mm256_storeu_ps(x + e, _mm256_add_ps(a, b));
                _mm256_storeu_ps(x + e + stride, _mm256_sub_ps(a, b));
            }
        }
    }
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), norm));
}
#endif
