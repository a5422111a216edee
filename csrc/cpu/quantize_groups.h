/* mq_quantize_groups, written once: each instruction set calls it with kernels of its own. */
#ifndef MQ_CPU_QUANTIZE_GROUPS_H
#define MQ_CPU_QUANTIZE_GROUPS_H

#include <string.h>

#include "kernels.h"

/* As mq_quantize_fn; returns what the sums of products of these codes start from. */
typedef int32_t mq_quantize_group_fn(const float *x, int64_t n, float inverse, int low, int high,
                                     int8_t *q);

static MQ_INLINE void mq_quantize_groups_by(mq_extent_of_fn *extent_of,
                                            mq_quantize_group_fn *quantize_group,
                                            const mq_linear *lin, const mq_extent *extent,
                                            const float *x, int64_t n, int64_t group_size,
                                            int8_t *codes, float *scales, int32_t *starts) {
    for (int64_t i = 0, channels; i < n; i += channels) {
        channels = mq_min(group_size, n - i);
        const int64_t whole = mq_ceil_div(channels, MQ_QUAD) * MQ_QUAD;
        const mq_quantization to =
            mq_quantization_of(lin->act_bits, lin->act_format, lin->clip,
                               extent ? *extent : extent_of(x + i, channels));
        *scales++ = to.scale;
        *starts = 0;
        memset(codes + whole - MQ_QUAD, 0, MQ_QUAD);
        if (to.inverse > 0)
            *starts = quantize_group(x + i, channels, to.inverse, to.low, to.high, codes);
        else
            memset(codes, 0, (size_t)channels);
        starts++;
        codes += whole;
    }
}

#endif
