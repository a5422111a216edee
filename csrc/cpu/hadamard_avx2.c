#include "kernels.h"

#if defined(MQ_X86)
#define BITS 256
#define TARGET MQ_AVX2
#define KERNEL(name) name##_avx2
#define SMALLER mq_hadamard_scalar

#include "vectors_x86.h"

/* The butterflies within a vector: each pair becomes (a + b, a - b). */
TARGET static MQ_INLINE floats in_vector(floats v) {
    const floats by1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const floats by2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const floats by4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    v = _mm256_fmadd_ps(v, by1, _mm256_permute_ps(v, 0xb1));
    v = _mm256_fmadd_ps(v, by2, _mm256_permute_ps(v, 0x4e));
    return _mm256_fmadd_ps(v, by4, _mm256_permute2f128_ps(v, v, 0x01));
}

#include "hadamard_x86.h"
#endif
