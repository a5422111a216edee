#include "kernels.h"

void mq_widen_scalar(mq_dtype dtype, const uint16_t *x, int64_t n, float *out) {
    mq_assume_widen(dtype, x, n, out);
    for (int64_t i = 0; i < n; i++)
        out[i] = dtype == MQ_F16 ? mq_f16_to_f32(x[i]) : mq_bf16_to_f32(x[i]);
}

void mq_widen_codes_scalar(const int8_t *q, const uint16_t *scales, int64_t n, float *out) {
    mq_assume_widen_codes(q, n, out);
    for (int64_t i = 0; i < n * MQ_PANEL; i++)
        out[i] = (float)q[i] * mq_bf16_to_f32(scales[i % MQ_PANEL]);
}

void mq_narrow_scalar(mq_dtype dtype, const float *x, int64_t n, uint16_t *out) {
    mq_assume_narrow(dtype, x, n, out);
    for (int64_t i = 0; i < n; i++)
        out[i] = dtype == MQ_F16 ? mq_f32_to_f16(x[i]) : mq_f32_to_bf16(x[i]);
}
