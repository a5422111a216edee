/* Intrinsics and target attributes that the x86 kernels share. Each function has its attribute;
 * no file has a flag, because the linker could pick inline functions of such a file for code
 * that runs on every processor. */
#ifndef MQ_CPU_X86_H
#define MQ_CPU_X86_H

#if !defined(MQ_SIMDE)

#include <immintrin.h>
#include <stdint.h>

#define MQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define MQ_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define MQ_AVX512VNNI \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

/* Stops gcc from computing with x before this point: it would carry a second copy of each
 * accumulator through the loop. */
#define MQ_IN_REGISTER(x) __asm__("" : "+v"(x))

/* _mm256_madd_epi16 with 16 values that stay in memory, aligned to 32 bytes. gcc would keep the
 * constant in a register through the preceding loop and spill an accumulator for it. */
MQ_AVX2 static inline __m256i mq_madd_in_memory(__m256i a, const int16_t *values) {
    __asm__("vpmaddwd %1, %0, %0" : "+x"(a) : "m"(*(const __m256i *)(const void *)values));
    return a;
}

#else

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#define MQ_AVX2
#define MQ_AVXVNNI
#define MQ_AVX512VNNI
#define MQ_IN_REGISTER(x) ((void)0)
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32

/* What SIMDe lacks; fmadd, which it rounds twice; and a masked load, which reads all lanes. */
#undef _mm256_fmadd_ps
#undef _mm512_fmadd_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps mq_mm512_maskz_loadu_ps
#define _mm256_fmadd_ps mq_mm256_fmadd_ps
#define _mm512_fmadd_ps mq_mm512_fmadd_ps
#define MQ_DEFINE_FMADD(mm, vector, lanes)                                         \
    static inline vector mq_##mm##_fmadd_ps(vector a, vector b, vector c) {        \
        float x[lanes], y[lanes], z[lanes];                                        \
        _##mm##_storeu_ps(x, a), _##mm##_storeu_ps(y, b), _##mm##_storeu_ps(z, c); \
        for (int i = 0; i < lanes; i++) z[i] = fmaf(x[i], y[i], z[i]);             \
        return _##mm##_loadu_ps(z);                                                \
    }
MQ_DEFINE_FMADD(mm256, __m256, 8)
MQ_DEFINE_FMADD(mm512, __m512, 16)

static inline __m256i mq_madd_in_memory(__m256i a, const int16_t *values) {
    return _mm256_madd_epi16(a, _mm256_loadu_si256((const __m256i *)(const void *)values));
}

static inline __m512 mq_mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = mask & 1u << i ? ((const float *)from)[i] : 0;
    return _mm512_loadu_ps(x);
}

static inline int32_t _mm512_reduce_add_epi32(__m512i a) {
    int32_t x[16], sum = 0;
    _mm512_storeu_si512(x, a);
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}

static inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
    int32_t x[16];
    int8_t low[16];
    _mm512_storeu_si512(x, a);
    for (int i = 0; i < 16; i++) low[i] = (int8_t)x[i];
    return _mm_loadu_si128((const __m128i *)(const void *)low);
}

static inline void _mm_mask_storeu_epi8(void *to, __mmask16 mask, __m128i a) {
    int8_t x[16];
    _mm_storeu_si128((__m128i *)(void *)x, a);
    for (int i = 0; i < 16; i++)
        if (mask & 1u << i) ((int8_t *)to)[i] = x[i];
}

#endif
#endif
