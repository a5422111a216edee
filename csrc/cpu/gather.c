#include <string.h>

#include "ops.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "two indices are loaded as one integer, the first in its low half");

/* out[i] = x[perm[i]]. The loads limit the speed, so two indices are loaded at once. Stores are
 * 16 bytes wide: a vector load that spans several smaller stores would stall. Each cache line of
 * output prefetches one line of `ahead`; prefetching them all at once would fill the queue that
 * the gather's own loads need. */
#define DEFINE_GATHER(name, type)                                                      \
    static void name(const type *x, const int32_t *perm, int64_t n, const char *ahead, \
                     type *out) {                                                      \
        enum { STORE = 16 / sizeof(type), LINE = 64 / sizeof(type) };                  \
        int64_t i = 0;                                                                 \
        for (; i + LINE <= n; i += LINE) {                                             \
            __builtin_prefetch(ahead + i * (int64_t)sizeof(type), 0, 2);               \
            for (int64_t first = i; first < i + LINE; first += STORE) {                \
                type part[STORE];                                                      \
                for (int e = 0; e < STORE; e += 2) {                                   \
                    uint64_t two;                                                      \
                    memcpy(&two, perm + first + e, sizeof two);                        \
                    part[e] = x[(uint32_t)two];                                        \
                    part[e + 1] = x[two >> 32];                                        \
                }                                                                      \
                memcpy(out + first, part, sizeof part);                                \
            }                                                                          \
        }                                                                              \
        for (; i < n; i++) out[i] = x[perm[i]];                                        \
    }
DEFINE_GATHER(gather_floats, float)
DEFINE_GATHER(gather_halves, uint16_t)

static const float *gather(const mq_channels *from, int64_t k0, int64_t n, float *buffer) {
    const int64_t size = (int64_t)mq_dtype_size(from->dtype);
    const char *here = (const char *)from->row + k0 * size, *ahead = here + from->to_next;
    if (from->dtype == MQ_F32) {
        if (!from->perm) return (const float *)(const void *)here;
        gather_floats(from->row, from->perm + k0, n, ahead, buffer);
        return buffer;
    }
    uint16_t halves[MQ_BUFFER];
    const uint16_t *x = (const uint16_t *)(const void *)here;
    if (from->perm) {
        gather_halves(from->row, from->perm + k0, n, ahead, halves);
        x = halves;
    }
    from->kernels->widen(from->dtype, x, n, buffer);
    return buffer;
}

/* The size of the rotated block that starts where `left` channels of the group remain. */
static int64_t block_size(int64_t rotation, int64_t left) {
    while (rotation > left) rotation /= 2;
    return rotation;
}

void mq_rotate(const mq_kernels *kernels, int64_t rotation, const float *x, int64_t n, float *out) {
    for (int64_t i = 0, size; i < n; i += size) {
        size = block_size(rotation, n - i);
        kernels->hadamard(x + i, size, out + i);
    }
}

const float *mq_load_channels(const mq_channels *from, int64_t k0, int64_t n, float *buffer) {
    const float *x = gather(from, k0, n, buffer);
    if (from->rotation <= 1) return x;
    mq_rotate(from->kernels, from->rotation, x, n, buffer);
    return buffer;
}

mq_extent mq_channels_extent(const mq_channels *from, int64_t k0, int64_t n) {
    mq_extent extent = {0, 0};
    float buffer[MQ_BUFFER];
    for (int64_t i = 0; i < n; i += MQ_BUFFER) {
        int64_t part = mq_min(MQ_BUFFER, n - i);
        const float *x = mq_load_channels(from, k0 + i, part, buffer);
        extent = mq_extent_union(extent, from->kernels->extent_of(x, part));
    }
    return extent;
}
