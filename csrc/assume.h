/* MQ_ASSUME(condition): what a function requires of its caller. Traps if the condition is false
 * and MQ_CHECK_ASSUMPTIONS is defined, as in the tests' builds. Otherwise generates no code. For
 * C, C++ and CUDA C. The condition must have no side effects. */
#ifndef MQ_ASSUME_H
#define MQ_ASSUME_H

#include <stdint.h>

#if !defined(MQ_CHECK_ASSUMPTIONS)
#define MQ_ASSUME(condition) ((void)sizeof(!(condition))) /* compiled, not evaluated */
#elif defined(__CUDA_ARCH__)
#define MQ_ASSUME(condition) ((condition) ? (void)0 : __trap())
#else
#define MQ_ASSUME(condition) ((condition) ? (void)0 : __builtin_trap())
#endif

#define MQ_IS_ALIGNED(pointer, bytes) ((uintptr_t)(pointer) % (bytes) == 0)

#endif
