#include <math.h>

#include "kernels.h"

void mq_hadamard_scalar(float *x, int64_t n) {
    for (int64_t stride = 1; stride < n; stride *= 2) {
        for (int64_t i = 0; i < n; i += 2 * stride) {
            for (int64_t e = i; e < i + stride; e++) {
                float a = x[e], b = x[e + stride];
                x[e] = a + b;
                x[e + stride] = a - b;
            }
        }
    }
    const float norm = 1.0f / sqrtf((float)n);
    for (int64_t i = 0; i < n; i++) x[i] *= norm;
}
