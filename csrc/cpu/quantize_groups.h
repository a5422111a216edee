/* mq_quantize_groups, written once. Each instruction set passes its own kernels. */
#ifndef MQ_CPU_QUANTIZE_GROUPS_H
#define MQ_CPU_QUANTIZE_GROUPS_H

#include <string.h>

#include "kernels.h"

/* Like mq_quantize_fn, but returns the start for these codes (see mq_activations). */
typedef int32_t mq_quantize_group_fn(const float *x, int64_t n, float inverse, int low, int high,
                                     int8_t *q);

static MQ_INLINE void mq_quantize_groups_by(mq_extent_of_fn *extent_of,
                                            mq_quantize_group_fn *quantize_group,
                                            const mq_linear *lin, const mq_extent *extent,
                                            const float *x, int64_t n, int64_t group_size,
                                            int8_t *codes, float *scales, int32_t *starts) {
    mq_assume_quantize_groups(lin, x, n, group_size, codes);
    const int64_t groups = mq_ceil_div(n, group_size);
    const int64_t whole = mq_ceil_div(mq_min(group_size, n), MQ_QUAD) * MQ_QUAD;
    mq_quantization to[MQ_SEGMENT_QUADS];
    /* In two loops, so that groups do not wait for each other. */
    for (int64_t j = 0; j < groups; j++) {
        const int64_t i = j * group_size;
        const mq_extent own = extent ? *extent : extent_of(x + i, mq_min(group_size, n - i));
        to[j] = mq_quantization_of(lin->act_bits, lin->act_format, lin->clip, own);
    }
    for (int64_t j = 0; j < groups; j++, codes += whole) {
        const int64_t i = j * group_size, channels = mq_min(group_size, n - i);
        scales[j] = to[j].scale;
        starts[j] = 0;
        if (channels % MQ_QUAD) memset(codes + channels / MQ_QUAD * MQ_QUAD, 0, MQ_QUAD);
        if (to[j].inverse > 0)
            starts[j] =
                quantize_group(x + i, channels, to[j].inverse, to[j].low, to[j].high, codes);
        else
            memset(codes, 0, (size_t)channels);
    }
}

#endif
