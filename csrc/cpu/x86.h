/* What the x86 kernels share: intrinsics, and how a function asks for its instruction set. An
 * attribute on each function, never a flag on the file: code of a flagged file can be chosen by the
 * linker for functions that run on every processor. */
#ifndef MQ_CPU_X86_H
#define MQ_CPU_X86_H

#include <immintrin.h>

#define MQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define MQ_INLINE inline __attribute__((always_inline))

#endif
