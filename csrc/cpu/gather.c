#include <string.h>

#include "ops.h"

const float *mq_gather(const mq_kernels *kernels, mq_dtype dtype, const void *row,
                       const int32_t *perm, int64_t k0, int64_t n, float *buffer) {
    if (dtype == MQ_F32) {
        const float *x = row;
        if (!perm) return x + k0;
        for (int64_t i = 0; i < n; i++) buffer[i] = x[perm[k0 + i]];
        return buffer;
    }
    const uint16_t *x = row;
    uint16_t halves[MQ_BUFFER];
    if (perm) {
        for (int64_t i = 0; i < n; i++) halves[i] = x[perm[k0 + i]];
        x = halves;
    } else {
        x += k0;
    }
    kernels->widen(dtype, x, n, buffer);
    return buffer;
}

mq_extent mq_gather_extent(const mq_kernels *kernels, mq_dtype dtype, const void *row,
                           const int32_t *perm, int64_t k0, int64_t n) {
    mq_extent extent = {0, 0};
    float buffer[MQ_BUFFER];
    for (int64_t i = 0; i < n; i += MQ_BUFFER) {
        int64_t part = mq_min(MQ_BUFFER, n - i);
        mq_extent of_part =
            kernels->extent_of(mq_gather(kernels, dtype, row, perm, k0 + i, part, buffer), part);
        if (of_part.abs_bits > extent.abs_bits) extent.abs_bits = of_part.abs_bits;
        if (of_part.max_bits > extent.max_bits) extent.max_bits = of_part.max_bits;
    }
    return extent;
}
