/* Packing of weights into the panel layout of mixedquant.h, and back. */
#include <string.h>

#include "ops.h"

static int64_t group_channels(const mq_linear *lin, int64_t j) {
    return mq_min(lin->group_size, lin->k - lin->k_salient - j * lin->group_size);
}

/* Where the code of a group's channel i of output channel c lies: a byte of the panel and a shift.
 */
static uint8_t *code_place(uint8_t *panel, const mq_shape *shape, int64_t j, int64_t i, int64_t c,
                           int *shift) {
    int64_t quad = j * shape->group_quads + i / MQ_QUAD;
    *shift = quad % 2 ? 4 : 0;
    return panel + quad / 2 * MQ_BLOCK_BYTES + c * MQ_QUAD + i % MQ_QUAD;
}

static mq_status pack_group(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            int q_max, mq_dtype dtype, const void *row, const float *given,
                            int64_t j, int64_t c, uint8_t *panel, uint16_t *scale_bits) {
    int64_t k0 = j * lin->group_size, n = group_channels(lin, j);
    mq_extent extent = mq_gather_extent(kernels, dtype, row, lin->perm, k0, n);
    if (extent.abs_bits >= 0x7f800000u) return MQ_NON_FINITE;
    float scale = given ? *given : mq_float_of_bits(extent.abs_bits) / (float)q_max;
    if (!(scale >= 0) || mq_bits_of_float(scale) >= 0x7f7f8000u) /* rounds to Inf in bf16 */
        return MQ_INVALID_SCALE;
    *scale_bits = scale < 0x1p-126f ? 0 : mq_f32_to_bf16(scale);
    float inverse = mq_inverse_of(mq_bf16_to_f32(*scale_bits));

    float buffer[MQ_BUFFER];
    int8_t codes[MQ_BUFFER];
    for (int64_t i = 0; i < n; i += MQ_BUFFER) {
        int64_t part = mq_min(MQ_BUFFER, n - i);
        const float *x = mq_gather(kernels, dtype, row, lin->perm, k0 + i, part, buffer);
        kernels->quantize(x, part, inverse, -q_max, q_max, codes);
        for (int64_t e = 0; e < part; e++) {
            int shift;
            uint8_t *byte = code_place(panel, shape, j, i + e, c, &shift);
            *byte = (uint8_t)((*byte & ~(15 << shift)) | (codes[e] + 8) << shift);
        }
    }
    return MQ_OK;
}

static mq_status pack_salient(const mq_kernels *kernels, const mq_linear *lin, mq_dtype dtype,
                              const void *row, int64_t c, uint16_t *panel) {
    float buffer[MQ_BUFFER];
    uint16_t halves[MQ_BUFFER];
    for (int64_t i = 0; i < lin->k_salient; i += MQ_BUFFER) {
        int64_t part = mq_min(MQ_BUFFER, lin->k_salient - i);
        const float *x =
            mq_gather(kernels, dtype, row, lin->perm, lin->k - lin->k_salient + i, part, buffer);
        if (kernels->extent_of(x, part).abs_bits >= 0x7f800000u) return MQ_NON_FINITE;
        kernels->narrow(lin->salient_dtype, x, part, halves);
        for (int64_t e = 0; e < part; e++) panel[(i + e) * MQ_PANEL + c] = halves[e];
    }
    return MQ_OK;
}

mq_status mq_run_pack_weight(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                             int q_max, mq_dtype dtype, const void *w, int64_t stride,
                             const float *group_scales, int64_t panel0, int64_t panel1,
                             uint8_t *qweight, uint16_t *scales, void *salient) {
    for (int64_t p = panel0; p < panel1; p++) {
        uint8_t *panel = qweight + p * shape->blocks * MQ_BLOCK_BYTES;
        uint16_t *panel_scales = scales + p * shape->groups * MQ_PANEL;
        uint16_t *panel_salient = (uint16_t *)salient + p * lin->k_salient * MQ_PANEL;
        memset(panel, 0x88, (size_t)(shape->blocks * MQ_BLOCK_BYTES));
        if (shape->groups) memset(panel_scales, 0, (size_t)(shape->groups * MQ_PANEL) * 2);
        if (lin->k_salient) memset(panel_salient, 0, (size_t)(lin->k_salient * MQ_PANEL) * 2);

        for (int64_t c = 0; c < mq_min(MQ_PANEL, lin->n - p * MQ_PANEL); c++) {
            int64_t o = p * MQ_PANEL + c;
            const void *row = (const char *)w + (size_t)(o * stride) * mq_dtype_size(dtype);
            for (int64_t j = 0; j < shape->groups; j++) {
                mq_status status =
                    pack_group(kernels, shape, lin, q_max, dtype, row,
                               group_scales ? group_scales + o * shape->groups + j : NULL, j, c,
                               panel, panel_scales + j * MQ_PANEL + c);
                if (status != MQ_OK) return status;
            }
            mq_status status = pack_salient(kernels, lin, dtype, row, c, panel_salient);
            if (status != MQ_OK) return status;
        }
    }
    return MQ_OK;
}

void mq_run_unpack_weight(const mq_shape *shape, const mq_linear *lin, int64_t panel0,
                          int64_t panel1, float *w) {
    int64_t k4 = lin->k - lin->k_salient;
    for (int64_t o = panel0 * MQ_PANEL; o < mq_min(panel1 * MQ_PANEL, lin->n); o++) {
        int64_t p = o / MQ_PANEL, c = o % MQ_PANEL;
        /* only read; code_place serves packing too */
        uint8_t *panel = (uint8_t *)(uintptr_t)(lin->qweight + p * shape->blocks * MQ_BLOCK_BYTES);
        for (int64_t i = 0; i < lin->k; i++) {
            float value;
            if (i < k4) {
                int64_t j = i / lin->group_size;
                int shift;
                const uint8_t *byte =
                    code_place(panel, shape, j, i - j * lin->group_size, c, &shift);
                value = (float)(((*byte >> shift) & 15) - 8) *
                        mq_bf16_to_f32(lin->scales[(p * shape->groups + j) * MQ_PANEL + c]);
            } else {
                value = mq_load(lin->salient_dtype, lin->salient,
                                (p * lin->k_salient + i - k4) * MQ_PANEL + c);
            }
            w[o * lin->k + (lin->perm ? lin->perm[i] : i)] = value;
        }
    }
}
