#include "kernels.h"

#if defined(MQ_X86)
#include "x86.h"

#define TARGET MQ_AVX512VNNI
#define KERNEL(name) name##_avx512vnni
#define SMALLER mq_hadamard_avx2

enum { LANES = 16 };
typedef __m512 floats;

TARGET static MQ_INLINE floats load(const float *x) { return _mm512_loadu_ps(x); }
TARGET static MQ_INLINE void store(float *x, floats v) { _mm512_storeu_ps(x, v); }
TARGET static MQ_INLINE floats broadcast(float x) { return _mm512_set1_ps(x); }
TARGET static MQ_INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
TARGET static MQ_INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
TARGET static MQ_INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }

/* partner + v in the lower place of a pair, partner - v in the upper one */
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

#include "hadamard.h"
#endif
