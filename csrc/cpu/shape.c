/* Shapes of packed weights and status messages. The CUDA library links this file too. */
#include "kernels.h"

const char *mq_status_message(mq_status status) {
    switch (status) {
        case MQ_OK: return "no error";
        case MQ_INVALID_POINTER: return "a pointer is NULL although its array is not empty";
        case MQ_INVALID_SIZE:
            return "a size, stride or range is negative, too large or out of bounds";
        case MQ_INVALID_GROUP_SIZE:
            return "the group size must be at least 1, and int32 must hold the sums of a group";
        case MQ_INVALID_BITS: return "the number of bits is out of range";
        case MQ_INVALID_DTYPE: return "the dtype is not supported here";
        case MQ_INVALID_PERM: return "perm holds an index outside [0, k)";
        case MQ_INVALID_ROW: return "rows holds an index outside [0, out_features)";
        case MQ_INVALID_SALIENT: return "the number of salient channels must be in [0, k]";
        case MQ_INVALID_SCALE:
            return "a scale or clip ratio is negative, too large or not finite, or a clip ratio is "
                   "below 2^-10";
        case MQ_INVALID_KEY: return "unknown sort key";
        case MQ_INVALID_ISA: return "the instruction set is unknown or this processor lacks it";
        case MQ_INVALID_ROTATION: return "the rotation must be 0 or a power of two up to 512";
        case MQ_INVALID_FORMAT: return "unknown activation format or function";
        case MQ_NON_FINITE: return "a weight is NaN or Inf, or a salient one too large for 16 bits";
    }
    return "unknown status";
}

/* Divides k4 > 0 INT4 channels into groups, quads, blocks and segments. */
static void divide(int64_t k4, int64_t group_size, mq_shape *shape) {
    shape->groups = mq_ceil_div(k4, group_size);
    shape->group_quads = mq_ceil_div(mq_min(group_size, k4), MQ_QUAD);
    const int64_t last = mq_ceil_div(k4 - (shape->groups - 1) * group_size, MQ_QUAD);
    shape->quads = (shape->groups - 1) * shape->group_quads + last;
    shape->blocks = mq_ceil_div(shape->quads, 2);
    shape->segments = (shape->groups - 1) * mq_ceil_div(shape->group_quads, MQ_SEGMENT_QUADS) +
                      mq_ceil_div(last, MQ_SEGMENT_QUADS);
}

/* Whether every array of a packed weight fits: per output channel, 4 bytes of a block, and at most
 * 4 bytes of each scale and salient weight. */
static int packed_weight_fits(const mq_shape *shape, int64_t k, int64_t k_salient) {
    const int64_t items = mq_size_sum(mq_size_sum(shape->blocks, shape->groups), k_salient);
    const int64_t row = mq_size_product(mq_size_sum(items, 1), 4);
    const int64_t rows = mq_size_product(shape->panels, MQ_PANEL);
    return mq_size_product(rows, row) >= 0 && mq_size_product(k, sizeof(int32_t)) >= 0;
}

mq_status mq_shape_of(int64_t n, int64_t k, int64_t k_salient, int64_t group_size,
                      mq_shape *shape) {
    if (!shape) return MQ_INVALID_POINTER;
    if (n < 0 || k < 0) return MQ_INVALID_SIZE;
    if (k_salient < 0 || k_salient > k) return MQ_INVALID_SALIENT;
    if (group_size < 1) return MQ_INVALID_GROUP_SIZE;
    const int64_t k4 = k - k_salient;
    *shape = (mq_shape){.panels = mq_ceil_div(n, MQ_PANEL)};
    if (k4 > 0) divide(k4, group_size, shape);
    return packed_weight_fits(shape, k, k_salient) ? MQ_OK : MQ_INVALID_SIZE;
}
