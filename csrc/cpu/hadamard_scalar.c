#include <math.h>
#include <string.h>

#include "kernels.h"

void mq_hadamard_scalar(const float *x, int64_t n, float *out) {
    mq_assume_hadamard(x, n, out);
    if (out != x) memcpy(out, x, (size_t)n * sizeof *x);
    for (int64_t stride = 1; stride < n; stride *= 2) {
        for (int64_t i = 0; i < n; i += 2 * stride) {
            for (int64_t e = i; e < i + stride; e++) {
                float a = out[e], b = out[e + stride];
                out[e] = a + b;
                out[e + stride] = a - b;
            }
        }
    }
    const float norm = 1.0f / sqrtf((float)n);
    for (int64_t i = 0; i < n; i++) out[i] *= norm;
}
