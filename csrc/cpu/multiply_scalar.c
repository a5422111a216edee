#include <math.h>

#include "kernels.h"

void mq_multiply_salient_scalar(const mq_activations *act, int64_t k_salient, int64_t tile0,
                                int64_t tile1, int64_t s0, int64_t s1, const float *w,
                                float *sums) {
    mq_assume_multiply_salient(act, k_salient, tile0, tile1, s0, s1, sums);
    for (int64_t tile = tile0; tile < tile1; tile++) {
        int64_t rows = mq_min(act->h, act->m - tile * act->h);
        for (int64_t r = 0; r < rows; r++) {
            float *sum = sums + ((tile - tile0) * act->h + r) * MQ_PANEL;
            for (int64_t s = s0; s < s1; s++) {
                float x = act->salient[(tile * k_salient + s) * act->h + r];
                for (int c = 0; c < MQ_PANEL; c++)
                    sum[c] = fmaf(x, w[(s - s0) * MQ_PANEL + c], sum[c]);
            }
        }
    }
}

static int weight_code(const uint8_t *qweight, int64_t quad, int column, int i) {
    uint8_t byte = qweight[quad / 2 * MQ_BLOCK_BYTES + column * MQ_QUAD + i];
    return (quad % 2 ? byte >> 4 : byte & 15) - 8;
}

static void multiply_groups(const mq_activations *act, const mq_shape *shape, int64_t tile0,
                            int64_t tile1, const uint8_t *qweight, const uint16_t *scales,
                            float *sums) {
    for (int64_t row = tile0 * act->h; row < mq_min(tile1 * act->h, act->m); row++) {
        int64_t tile = row / act->h, r = row % act->h;
        float *sum = sums + (row - tile0 * act->h) * MQ_PANEL;
        for (int64_t j = 0; j < shape->groups; j++) {
            int64_t quad1 = mq_min((j + 1) * shape->group_quads, shape->quads);
            float scale = act->scales[(tile * shape->groups + j) * act->h + r];
            for (int c = 0; c < MQ_PANEL; c++) {
                int32_t dot = 0;
                for (int64_t quad = j * shape->group_quads; quad < quad1; quad++) {
                    const int8_t *codes =
                        act->codes + ((tile * shape->quads + quad) * act->h + r) * MQ_QUAD;
                    for (int i = 0; i < MQ_QUAD; i++)
                        dot += codes[i] * weight_code(qweight, quad, c, i);
                }
                float scaled = (float)dot * mq_bf16_to_f32(scales[j * MQ_PANEL + c]);
                sum[c] = fmaf(scaled, scale, sum[c]);
            }
        }
    }
}

void mq_multiply_groups_scalar(const mq_activations *act, const mq_shape *shape, int64_t tile0,
                               int64_t tile1, int64_t panels, const uint8_t *qweight,
                               const uint16_t *scales, float *sums) {
    mq_assume_multiply_groups(act, shape, tile0, tile1, panels, sums);
    for (int64_t p = 0; p < panels; p++)
        multiply_groups(act, shape, tile0, tile1, qweight + p * shape->blocks * MQ_BLOCK_BYTES,
                        scales + p * shape->groups * MQ_PANEL, sums + p * MQ_ROW_CHUNK * MQ_PANEL);
}
