/* Names for vectors of BITS bits, 256 or 512, so that code is written once for both. */
#ifndef MQ_CPU_VECTORS_X86_H
#define MQ_CPU_VECTORS_X86_H

#include "x86.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define V(op) CONCAT(CONCAT(CONCAT(_mm, BITS), _), op) /* _mm512_op */

typedef CONCAT(__m, BITS) floats;
typedef CONCAT(CONCAT(__m, BITS), i) ints;

#endif
