#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

#define TARGET MQ_AVX2
#define KERNEL(name) name##_avx2
#define SMALLER mq_hadamard_scalar

enum { LANES = 8 };
typedef __m256 floats;

TARGET static MQ_INLINE floats load(const float *x) { return _mm256_loadu_ps(x); }
TARGET static MQ_INLINE void store(float *x, floats v) { _mm256_storeu_ps(x, v); }
TARGET static MQ_INLINE floats broadcast(float x) { return _mm256_set1_ps(x); }
TARGET static MQ_INLINE floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
TARGET static MQ_INLINE floats subtract(floats a, floats b) { return _mm256_sub_ps(a, b); }
TARGET static MQ_INLINE floats multiply(floats a, floats b) { return _mm256_mul_ps(a, b); }

/* partner + v in the lower place of a pair, partner - v in the upper one */
TARGET static MQ_INLINE floats in_vector(floats v) {
    const floats by1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const floats by2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const floats by4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    v = _mm256_fmadd_ps(v, by1, _mm256_permute_ps(v, 0xb1));
    v = _mm256_fmadd_ps(v, by2, _mm256_permute_ps(v, 0x4e));
    return _mm256_fmadd_ps(v, by4, _mm256_permute2f128_ps(v, v, 0x01));
}

#include "hadamard.h"
#endif
