#include "kernels.h"

#if defined(MQ_X86)
#define BITS 512
#define TARGET MQ_AVX512VNNI
#define KERNEL(name) name##_avx512vnni
#define SMALLER mq_hadamard_avx2

#include "vectors_x86.h"

/* The butterflies within a vector: each pair becomes (a + b, a - b). */
TARGET static MQ_INLINE floats in_vector(floats v) {
    const floats by1 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
    const floats by2 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
    const floats by4 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
    const floats by8 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
    v = _mm512_fmadd_ps(v, by1, _mm512_shuffle_ps(v, v, 0xb1));
    v = _mm512_fmadd_ps(v, by2, _mm512_shuffle_ps(v, v, 0x4e));
    v = _mm512_fmadd_ps(v, by4, _mm512_shuffle_f32x4(v, v, 0xb1));
    return _mm512_fmadd_ps(v, by8, _mm512_shuffle_f32x4(v, v, 0x4e));
}

#include "hadamard_x86.h"
#endif
