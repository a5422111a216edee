/* Packs weights into the panels of mixedquant.h, and unpacks them. */
#include <string.h>

#include "ops.h"

static int64_t group_channels(const mq_linear *lin, int64_t j) {
    return mq_min(lin->group_size, lin->k - lin->k_salient - j * lin->group_size);
}

/* The byte and the shift of the code of channel i of group j, output channel c of the panel. */
static uint8_t *code_place(uint8_t *panel, const mq_shape *shape, int64_t j, int64_t i, int64_t c,
                           int *shift) {
    int64_t quad = j * shape->group_quads + i / MQ_QUAD;
    *shift = quad % 2 ? 4 : 0;
    return panel + quad / 2 * MQ_BLOCK_BYTES + c * MQ_QUAD + i % MQ_QUAD;
}

/* Rounds a scale to bf16 for storage; 0 if it is below the smallest normal fp32 number. */
static uint16_t scale_to_bf16(float scale) {
    return scale < MQ_SMALLEST_NORMAL ? 0 : mq_f32_to_bf16(scale);
}

static mq_status pack_group(const mq_channels *row, const mq_shape *shape, const mq_linear *lin,
                            int q_max, const float *given, int64_t j, int64_t c, uint8_t *panel,
                            uint16_t *scale_bits) {
    const int64_t k0 = j * lin->group_size, n = group_channels(lin, j);
    const mq_extent extent = mq_channels_extent(row, k0, n);
    if (mq_magnitude_bits(extent) >= MQ_INFINITY_BITS) return MQ_NON_FINITE;
    const float scale = given ? *given : mq_float_of_bits(mq_magnitude_bits(extent)) / (float)q_max;
    if (!(scale >= 0) || scale >= 0x1.ffp127f) return MQ_INVALID_SCALE; /* rounds to Inf in bf16 */
    *scale_bits = scale_to_bf16(scale);
    const float inverse = mq_inverse_of(mq_bf16_to_f32(*scale_bits));

    float buffer[MQ_BUFFER];
    int8_t codes[MQ_BUFFER];
    for (int64_t i = 0; i < n; i += MQ_BUFFER) {
        const int64_t part = mq_min(MQ_BUFFER, n - i);
        row->kernels->quantize(mq_load_channels(row, k0 + i, part, buffer), part, inverse, -q_max,
                               q_max, codes);
        for (int64_t e = 0; e < part; e++) {
            int shift;
            uint8_t *byte = code_place(panel, shape, j, i + e, c, &shift);
            *byte = (uint8_t)((*byte & ~(15 << shift)) | (codes[e] + 8) << shift);
        }
    }
    return MQ_OK;
}

static mq_status pack_salient_halves(const mq_channels *row, const mq_linear *lin, int64_t c,
                                     uint16_t *panel) {
    const uint16_t infinity = lin->salient_dtype == MQ_F16 ? 0x7c00 : 0x7f80;
    float buffer[MQ_BUFFER];
    uint16_t halves[MQ_BUFFER];
    for (int64_t i = 0; i < lin->k_salient; i += MQ_BUFFER) {
        const int64_t part = mq_min(MQ_BUFFER, lin->k_salient - i);
        const float *x = mq_load_channels(row, lin->k - lin->k_salient + i, part, buffer);
        row->kernels->narrow(lin->salient_dtype, x, part, halves);
        for (int64_t e = 0; e < part; e++) {
            if ((halves[e] & 0x7fff) >= infinity) return MQ_NON_FINITE;
            panel[(i + e) * MQ_PANEL + c] = halves[e];
        }
    }
    return MQ_OK;
}

static mq_status pack_salient_codes(const mq_channels *row, const mq_linear *lin, int64_t c,
                                    int8_t *panel, uint16_t *scale_bits) {
    const int64_t k4 = lin->k - lin->k_salient;
    const mq_extent extent = mq_channels_extent(row, k4, lin->k_salient);
    if (mq_magnitude_bits(extent) >= MQ_INFINITY_BITS) return MQ_NON_FINITE;
    *scale_bits = scale_to_bf16(mq_float_of_bits(mq_magnitude_bits(extent)) / 127);
    const float inverse = mq_inverse_of(mq_bf16_to_f32(*scale_bits));

    float buffer[MQ_BUFFER];
    int8_t codes[MQ_BUFFER];
    for (int64_t i = 0; i < lin->k_salient; i += MQ_BUFFER) {
        const int64_t part = mq_min(MQ_BUFFER, lin->k_salient - i);
        row->kernels->quantize(mq_load_channels(row, k4 + i, part, buffer), part, inverse, -127,
                               127, codes);
        for (int64_t e = 0; e < part; e++) panel[(i + e) * MQ_PANEL + c] = codes[e];
    }
    return MQ_OK;
}

mq_status mq_run_pack_weight(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                             int q_max, mq_dtype dtype, const void *w, int64_t stride,
                             const float *group_scales, int64_t panel0, int64_t panel1,
                             uint8_t *qweight, uint16_t *scales, void *salient,
                             uint16_t *salient_scales) {
    const int is_int8 = lin->salient_dtype == MQ_I8;
    const size_t salient_bytes =
        (size_t)(lin->k_salient * MQ_PANEL) * mq_dtype_size(lin->salient_dtype);
    for (int64_t p = panel0; p < panel1; p++) {
        uint8_t *panel = qweight + p * shape->blocks * MQ_BLOCK_BYTES;
        uint16_t *panel_scales = scales + p * shape->groups * MQ_PANEL;
        void *panel_salient = (char *)salient + (size_t)p * salient_bytes;
        if (shape->groups) memset(panel, 0x88, (size_t)(shape->blocks * MQ_BLOCK_BYTES));
        if (shape->groups) memset(panel_scales, 0, (size_t)(shape->groups * MQ_PANEL) * 2);
        if (lin->k_salient) memset(panel_salient, 0, salient_bytes);
        if (is_int8) memset(salient_scales + p * MQ_PANEL, 0, MQ_PANEL * sizeof *salient_scales);

        for (int64_t c = 0; c < mq_min(MQ_PANEL, lin->n - p * MQ_PANEL); c++) {
            int64_t o = p * MQ_PANEL + c;
            const void *values = (const char *)w + (size_t)(o * stride) * mq_dtype_size(dtype);
            const mq_channels int4 = {kernels, dtype, values, lin->perm, lin->rotation, 0};
            const mq_channels natural = {kernels, dtype, values, lin->perm, 0, 0};
            mq_status status = MQ_OK;
            for (int64_t j = 0; j < shape->groups && status == MQ_OK; j++)
                status = pack_group(&int4, shape, lin, q_max,
                                    group_scales ? group_scales + o * shape->groups + j : NULL, j,
                                    c, panel, panel_scales + j * MQ_PANEL + c);
            if (status == MQ_OK)
                status = is_int8 ? pack_salient_codes(&natural, lin, c, panel_salient,
                                                      salient_scales + o)
                                 : pack_salient_halves(&natural, lin, c, panel_salient);
            if (status != MQ_OK) return status;
        }
    }
    return MQ_OK;
}

/* Decodes channels i .. i + n of group j, output channel c, to values that are still rotated. */
static void decode(const mq_shape *shape, const uint8_t *panel, float scale, int64_t j, int64_t i,
                   int64_t n, int64_t c, float *values) {
    for (int64_t e = 0; e < n; e++) {
        int shift; /* not written: code_place also serves packing */
        const uint8_t *byte = code_place((uint8_t *)(uintptr_t)panel, shape, j, i + e, c, &shift);
        values[e] = (float)(((*byte >> shift) & 15) - 8) * scale;
    }
}

void mq_run_unpack_rows(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                        const int64_t *rows, int64_t row0, int64_t row1, float *w) {
    const int64_t k4 = lin->k - lin->k_salient;
    float values[MQ_BUFFER];
    for (int64_t r = row0; r < row1; r++) {
        const int64_t o = rows ? rows[r] : r, p = o / MQ_PANEL, c = o % MQ_PANEL;
        const uint8_t *panel = lin->qweight + p * shape->blocks * MQ_BLOCK_BYTES;
        float *row = w + r * lin->k;
        for (int64_t j = 0; j < shape->groups; j++) {
            const float scale = mq_bf16_to_f32(lin->scales[(p * shape->groups + j) * MQ_PANEL + c]);
            const int64_t k0 = j * lin->group_size, n = group_channels(lin, j);
            for (int64_t i = 0; i < n; i += MQ_BUFFER) {
                const int64_t part = mq_min(MQ_BUFFER, n - i);
                decode(shape, panel, scale, j, i, part, c, values);
                if (lin->rotation > 1) mq_rotate(kernels, lin->rotation, values, part, values);
                for (int64_t e = 0; e < part; e++)
                    row[lin->perm ? lin->perm[k0 + i + e] : k0 + i + e] = values[e];
            }
        }
        const float scale =
            lin->salient_dtype == MQ_I8 ? mq_bf16_to_f32(lin->salient_scales[o]) : 1;
        for (int64_t s = 0; s < lin->k_salient; s++)
            row[lin->perm ? lin->perm[k4 + s] : k4 + s] =
                scale *
                mq_load(lin->salient_dtype, lin->salient, (p * lin->k_salient + s) * MQ_PANEL + c);
    }
}
