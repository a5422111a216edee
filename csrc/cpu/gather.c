#include <string.h>

#include "ops.h"

static const float *gather(const mq_kernels *kernels, mq_dtype dtype, const void *row,
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

/* The size of the rotated block that starts where `left` channels of a group are left. */
static int64_t block_size(int64_t rotation, int64_t left) {
    while (rotation > left) rotation /= 2;
    return rotation;
}

void mq_rotate(const mq_kernels *kernels, int64_t rotation, float *x, int64_t n) {
    for (int64_t i = 0, size; i < n; i += size) {
        size = block_size(rotation, n - i);
        kernels->hadamard(x + i, size);
    }
}

const float *mq_load_channels(const mq_channels *from, int64_t k0, int64_t n, float *buffer) {
    const float *x = gather(from->kernels, from->dtype, from->row, from->perm, k0, n, buffer);
    if (from->rotation <= 1) return x;
    if (x != buffer) memcpy(buffer, x, (size_t)n * sizeof *x);
    mq_rotate(from->kernels, from->rotation, buffer, n);
    return buffer;
}

mq_extent mq_channels_extent(const mq_channels *from, int64_t k0, int64_t n) {
    mq_extent extent = {0, 0, 0};
    float buffer[MQ_BUFFER];
    for (int64_t i = 0; i < n; i += MQ_BUFFER) {
        int64_t part = mq_min(MQ_BUFFER, n - i);
        const float *x = mq_load_channels(from, k0 + i, part, buffer);
        extent = mq_extent_union(extent, from->kernels->extent_of(x, part));
    }
    return extent;
}
