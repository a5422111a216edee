/* The two steps of the W4A4 linear: quantize tokens into the workspace, multiply panels with it. */
#include <string.h>

#include "ops.h"

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* Bytes of the workspace's parts, in order: codes, scales, starts, salient. */
static void workspace_sizes(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t h,
                            size_t sizes[4]) {
    size_t rows = (size_t)(mq_ceil_div(m, h ? h : 1) * h);
    sizes[0] = aligned(rows * (size_t)shape->quads * MQ_QUAD);
    sizes[1] = aligned(rows * (size_t)shape->groups * sizeof(float));
    sizes[2] = aligned(rows * (size_t)shape->segments * sizeof(int32_t));
    sizes[3] = aligned(rows * (size_t)k_salient * sizeof(float));
}

size_t mq_workspace_bytes(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t tile_rows) {
    size_t sizes[4];
    workspace_sizes(shape, k_salient, m, mq_min(m, tile_rows), sizes);
    return sizes[0] + sizes[1] + sizes[2] + sizes[3];
}

static mq_activations workspace_view(const mq_shape *shape, int64_t k_salient, int64_t m,
                                     int64_t tile_rows, void *workspace) {
    size_t sizes[4];
    mq_activations act = {.m = m, .h = mq_min(m, tile_rows)};
    workspace_sizes(shape, k_salient, m, act.h, sizes);
    char *at = workspace;
    act.codes = (int8_t *)at;
    act.scales = (float *)(void *)(at += sizes[0]);
    act.starts = (int32_t *)(void *)(at += sizes[1]);
    act.salient = (float *)(void *)(at + sizes[2]);
    return act;
}

/* -8 * the sums of codes at positions 0, 1 and at 2, 3 of n whole quads, as two int16. */
static int32_t start_of(const int8_t *codes, int64_t n) {
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < n; i += MQ_QUAD) {
        low += codes[i] + codes[i + 1];
        high += codes[i + 2] + codes[i + 3];
    }
    return (int32_t)((uint32_t)(-8 * low) & 0xffffu) | (int32_t)((uint32_t)(-8 * high) << 16);
}

typedef struct token {
    const mq_shape *shape;
    const mq_linear *lin;
    const mq_activations *act;
    int64_t tile, row_in_tile;
    mq_channels int4, salient; /* the token's channels, rotated and as they are */
} token;

static void quantize_groups(const token *t) {
    const mq_shape *shape = t->shape;
    const mq_linear *lin = t->lin;
    const mq_kernels *kernels = t->int4.kernels;
    const int64_t h = t->act->h, k4 = lin->k - lin->k_salient;
    int8_t *codes = t->act->codes + (t->tile * shape->quads * h + t->row_in_tile) * MQ_QUAD;
    float *scales = t->act->scales + t->tile * shape->groups * h + t->row_in_tile;
    int32_t *starts = t->act->starts + t->tile * shape->segments * h + t->row_in_tile;
    float buffer[MQ_BUFFER];
    int8_t q[MQ_BUFFER];
    mq_extent extent = {0, 0, 0};
    if (lin->per_token)
        for (int64_t k0 = 0, n; k0 < k4; k0 += n) {
            n = mq_min(lin->group_size, k4 - k0);
            extent = mq_extent_union(extent, mq_channels_extent(&t->int4, k0, n));
        }

    for (int64_t k0 = 0, n; k0 < k4; k0 += n) {
        n = mq_min(lin->group_size, k4 - k0);
        /* a group that fits the buffer is read once */
        const float *x = n <= MQ_BUFFER ? mq_load_channels(&t->int4, k0, n, buffer) : NULL;
        if (!lin->per_token)
            extent = x ? kernels->extent_of(x, n) : mq_channels_extent(&t->int4, k0, n);
        const mq_quantization to =
            mq_quantization_of(lin->act_bits, lin->act_format, lin->clip, extent);
        *scales = to.scale;
        scales += h;

        for (int64_t i = 0, part; i < n; i += part) {
            part = mq_min(MQ_BUFFER, n - i);
            if (to.inverse > 0)
                kernels->quantize(x ? x : mq_load_channels(&t->int4, k0 + i, part, buffer), part,
                                  to.inverse, to.low, to.high, q);
            else
                memset(q, 0, (size_t)part);
            const int64_t whole = mq_ceil_div(part, MQ_QUAD) * MQ_QUAD;
            memset(q + part, 0, (size_t)(whole - part));
            *starts = start_of(q, whole);
            starts += h;
            for (int64_t e = 0; e < whole; e += MQ_QUAD, codes += h * MQ_QUAD)
                memcpy(codes, q + e, MQ_QUAD);
        }
    }
}

static void split_salient(const token *t) {
    const mq_linear *lin = t->lin;
    const int64_t h = t->act->h, k4 = lin->k - lin->k_salient;
    float *salient = t->act->salient + t->tile * lin->k_salient * h + t->row_in_tile;
    float buffer[MQ_BUFFER];
    uint32_t bits = 0;
    for (int64_t i = 0, part; i < lin->k_salient; i += part) {
        part = mq_min(MQ_BUFFER, lin->k_salient - i);
        const float *x = mq_load_channels(&t->salient, k4 + i, part, buffer);
        bits = mq_max_bits(bits, t->salient.kernels->extent_of(x, part).abs_bits);
        for (int64_t e = 0; e < part; e++) salient[(i + e) * h] = x[e];
    }
    /* An Inf would leave some outputs Inf, and the sign of a zero weight would decide others */
    if (bits >= 0x7f800000u) salient[0] = mq_float_of_bits(0x7fc00000u);
}

void mq_run_linear_quantize(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            mq_dtype dtype, const void *x, int64_t stride, int64_t m, int64_t row0,
                            int64_t row1, void *workspace) {
    mq_activations act = workspace_view(shape, lin->k_salient, m, kernels->tile_rows, workspace);
    for (int64_t row = row0; row < row1; row++) {
        const void *values = (const char *)x + (size_t)(row * stride) * mq_dtype_size(dtype);
        const token t = {
            .shape = shape,
            .lin = lin,
            .act = &act,
            .tile = row / act.h,
            .row_in_tile = row % act.h,
            .int4 = {kernels, dtype, values, lin->perm, lin->rotation},
            .salient = {kernels, dtype, values, lin->perm, 0},
        };
        quantize_groups(&t);
        split_salient(&t);
    }
}

/* The weights of the panel's salient channels [s0, s1) as fp32: w [s1 - s0][16] */
static void widen_salient(const mq_kernels *kernels, const mq_linear *lin, int64_t panel,
                          int64_t s0, int64_t s1, float *w) {
    const int64_t at = (panel * lin->k_salient + s0) * MQ_PANEL, n = s1 - s0;
    if (lin->salient_dtype == MQ_I8)
        kernels->widen_codes((const int8_t *)lin->salient + at,
                             lin->salient_scales + panel * MQ_PANEL, n, w);
    else
        kernels->widen(lin->salient_dtype, (const uint16_t *)lin->salient + at, n * MQ_PANEL, w);
}

static void add_salient(const mq_kernels *kernels, const mq_linear *lin, const mq_activations *act,
                        int64_t tile0, int64_t tile1, int64_t panel, float *sums) {
    enum { CHANNELS = 256 };
    float w[CHANNELS * MQ_PANEL];
    for (int64_t s = 0; s < lin->k_salient; s += CHANNELS) {
        int64_t end = mq_min(s + CHANNELS, lin->k_salient);
        widen_salient(kernels, lin, panel, s, end, w);
        kernels->multiply_salient(act, lin->k_salient, tile0, tile1, s, end, w, sums);
    }
}

void mq_run_linear_multiply(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            int64_t m, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1,
                            const void *workspace, mq_dtype dtype, void *out, int64_t stride) {
    /* the views are written in step 1 only */
    mq_activations act =
        workspace_view(shape, lin->k_salient, m, kernels->tile_rows, (void *)(uintptr_t)workspace);
    float sums[MQ_ROW_CHUNK * MQ_PANEL], bias[MQ_PANEL];
    const int64_t chunk = MQ_ROW_CHUNK / act.h * act.h;
    for (int64_t p = panel0; p < panel1; p++) {
        const int64_t columns = mq_min(MQ_PANEL, lin->n - p * MQ_PANEL);
        for (int64_t c = 0; c < columns; c++)
            bias[c] = lin->bias ? mq_load(lin->bias_dtype, lin->bias, p * MQ_PANEL + c) : 0;
        for (int64_t first = row0; first < row1; first += chunk) {
            const int64_t last = mq_min(first + chunk, row1);
            const int64_t tile0 = first / act.h, tile1 = mq_ceil_div(last, act.h);
            memset(sums, 0, (size_t)((tile1 - tile0) * act.h * MQ_PANEL) * sizeof *sums);
            add_salient(kernels, lin, &act, tile0, tile1, p, sums);
            kernels->multiply_groups(&act, shape, tile0, tile1,
                                     lin->qweight + p * shape->blocks * MQ_BLOCK_BYTES,
                                     lin->scales + p * shape->groups * MQ_PANEL, sums);
            for (int64_t row = first; row < last; row++) {
                float *sum = sums + (row - first) * MQ_PANEL;
                int64_t at = row * stride + p * MQ_PANEL;
                if (lin->bias)
                    for (int64_t c = 0; c < columns; c++) sum[c] += bias[c];
                if (dtype == MQ_F32)
                    memcpy((float *)out + at, sum, (size_t)columns * sizeof *sum);
                else
                    kernels->narrow(dtype, sum, columns, (uint16_t *)out + at);
            }
        }
    }
}
