/* The Walsh-Hadamard transform on x86, for vectors of 256 or 512 bits. hadamard_<isa>.c includes
 * this header after it defines
 *   BITS          the vector size
 *   TARGET        the instruction set's attribute
 *   KERNEL(name)  name_<isa>
 *   SMALLER       the kernel for n < LANES
 *   in_vector     the butterflies of strides below LANES
 * The butterflies run in the scalar kernel's order, so results are equal bit for bit. */
#ifndef MQ_CPU_HADAMARD_X86_H
#define MQ_CPU_HADAMARD_X86_H

#include <math.h>

#include "kernels.h"
#include "vectors_x86.h"

enum {
    LANES = BITS / 32, /* floats per vector */
    AT_ONCE = 8        /* vectors held in registers */
};

/* Applies the strides stride, 2 * stride ... count / 2 * stride. If stride is LANES, applies all
 * smaller strides first. Multiplies by *norm last, unless it is NULL. count is a constant. */
TARGET static MQ_INLINE void pass(const float *x, int64_t n, float *out, int64_t stride, int count,
                                  const floats *norm) {
    for (int64_t block = 0; block < n; block += count * stride) {
        for (int64_t at = block; at < block + stride; at += LANES) {
            floats v[AT_ONCE];
            for (int i = 0; i < count; i++) v[i] = V(loadu_ps)(x + at + i * stride);
            if (stride == LANES)
                for (int i = 0; i < count; i++) v[i] = in_vector(v[i]);
            for (int step = 1; step < count; step *= 2) {
                for (int i = 0; i < count; i++) {
                    if (i & step) continue;
                    const floats a = v[i], b = v[i + step];
                    v[i] = V(add_ps)(a, b);
                    v[i + step] = V(sub_ps)(a, b);
                }
            }
            for (int i = 0; i < count; i++)
                V(storeu_ps)(out + at + i * stride, norm ? V(mul_ps)(v[i], *norm) : v[i]);
        }
    }
}

TARGET void KERNEL(mq_hadamard)(const float *x, int64_t n, float *out) {
    mq_assume_hadamard(x, n, out);
    const floats norm = V(set1_ps)(1.0f / sqrtf((float)n));
    if (n < LANES) {
        SMALLER(x, n, out);
        return;
    }
    switch (n / LANES) {
        case 1: pass(x, n, out, LANES, 1, &norm); return;
        case 2: pass(x, n, out, LANES, 2, &norm); return;
        case 4: pass(x, n, out, LANES, 4, &norm); return;
        case AT_ONCE: pass(x, n, out, LANES, AT_ONCE, &norm); return;
        default: pass(x, n, out, LANES, AT_ONCE, NULL);
    }
    const int64_t stride = AT_ONCE * LANES;
    switch (n / stride) {
        case 2: pass(out, n, out, stride, 2, &norm); return;
        case 4: pass(out, n, out, stride, 4, &norm); return;
        default: pass(out, n, out, stride, AT_ONCE, &norm);
    }
}

#endif
