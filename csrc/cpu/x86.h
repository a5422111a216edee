/* What the x86 kernels share: intrinsics, and how a function asks for its instruction set. An
 * attribute on each function, never a flag on the file: code of a flagged file can be chosen by the
 * linker for functions that run on every processor. */
#ifndef MQ_CPU_X86_H
#define MQ_CPU_X86_H

#include <immintrin.h>

#define MQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define MQ_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define MQ_AVX512VNNI \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define MQ_IN_REGISTER(x) __asm__("" : "+v"(x))
#define MQ_INLINE inline __attribute__((always_inline))

#endif
