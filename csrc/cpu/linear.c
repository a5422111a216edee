/* The two steps of the W4A4 linear: quantize tokens into a workspace, multiply it by panels of
 * weights. */
#include <string.h>

#include "ops.h"

/* Stays negative for no size. */
static int64_t aligned(int64_t bytes) { return mq_size_sum(bytes, 63) & ~INT64_C(63); }

/* Bytes per token of the workspace's parts, in order: codes, scales, starts, salient. */
static void token_sizes(const mq_shape *shape, int64_t k_salient, int64_t sizes[4]) {
    const int64_t of_part[] = {shape->quads, shape->groups, shape->segments, k_salient};
    for (int i = 0; i < 4; i++) sizes[i] = mq_size_product(of_part[i], 4);
}

/* Bytes of each part, rounded up to whole tiles of h tokens and to whole cache lines. */
static void workspace_sizes(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t h,
                            int64_t sizes[4]) {
    const int64_t rows = mq_size_product(mq_ceil_div(m, h ? h : 1), h);
    token_sizes(shape, k_salient, sizes);
    for (int i = 0; i < 4; i++) sizes[i] = aligned(mq_size_product(rows, sizes[i]));
}

int64_t mq_workspace_bytes(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t tile_rows) {
    int64_t sizes[4], bytes = 0;
    workspace_sizes(shape, k_salient, m, mq_min(m, tile_rows), sizes);
    for (int i = 0; i < 4; i++) bytes = mq_size_sum(bytes, sizes[i]);
    return bytes;
}

static mq_activations workspace_view(const mq_shape *shape, int64_t k_salient, int64_t m,
                                     int64_t tile_rows, void *workspace) {
    int64_t sizes[4];
    mq_activations act = {.m = m, .h = mq_min(m, tile_rows)};
    workspace_sizes(shape, k_salient, m, act.h, sizes);
    char *at = workspace;
    act.codes = (int8_t *)at;
    act.scales = (float *)(void *)(at += sizes[0]);
    act.starts = (int32_t *)(void *)(at += sizes[1]);
    act.salient = (float *)(void *)(at + sizes[2]);
    return act;
}

/* Zeros the padding: the missing tokens of the last tile, and the bytes that align the parts. */
static void clear_tails(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t h,
                        void *workspace) {
    int64_t sizes[4], of_token[4];
    workspace_sizes(shape, k_salient, m, h, sizes);
    token_sizes(shape, k_salient, of_token);
    char *at = workspace;
    for (int i = 0; i < 4; at += sizes[i++]) {
        const int64_t whole = m / h * h * of_token[i];
        memset(at + whole, 0, (size_t)(sizes[i] - whole));
    }
}

/* A token in progress: its INT4 channels before k0 are quantized. scales points at the first
 * group's scale, starts at the next segment's start. */
typedef struct token {
    mq_channels int4, salient; /* the token's channels, rotated and unrotated */
    mq_extent extent;          /* of the token, or of a group longer than a segment */
    int64_t k0;
    float *scales, *salient_values;
    int32_t *starts;
} token;

/* Loads channels k0 .. k0 + n: whole groups, or part of one. */
static const float *load_groups(const mq_channels *from, int64_t group_size, int64_t k0, int64_t n,
                                float *buffer) {
    if (from->rotation <= 1) return mq_load_channels(from, k0, n, buffer);
    for (int64_t i = 0, part; i < n; i += part) {
        part = mq_min(group_size, n - i);
        mq_load_channels(from, k0 + i, part, buffer + i);
    }
    return buffer;
}

/* Quantizes the next groups that fit in a segment, or the next segment of a long group. Returns
 * the number of quads of codes written. */
static int64_t quantize_segment(const mq_shape *shape, const mq_linear *lin, int64_t h, token *t,
                                int8_t *codes) {
    const int64_t k4 = lin->k - lin->k_salient, g = mq_min(lin->group_size, k4), k0 = t->k0;
    const int is_long = shape->group_quads > MQ_SEGMENT_QUADS;
    const int64_t of_group = mq_min(g - k0 % g, k4 - k0);
    const int64_t n = is_long ? mq_min(MQ_BUFFER, of_group)
                              : mq_min(MQ_SEGMENT_QUADS / shape->group_quads * g, k4 - k0);
    float buffer[MQ_BUFFER], scales[MQ_SEGMENT_QUADS];
    int32_t starts[MQ_SEGMENT_QUADS];
    if (is_long && !lin->per_token && k0 % g == 0)
        t->extent = mq_channels_extent(&t->int4, k0, of_group);
    const float *x = load_groups(&t->int4, g, k0, n, buffer);
    t->int4.kernels->quantize_groups[mq_has_wide_codes(lin)](
        lin, is_long || lin->per_token ? &t->extent : NULL, x, n, g, codes, scales, starts);
    const int64_t groups = mq_ceil_div(n, g);
    for (int64_t j = 0; j < groups; j++) {
        t->scales[(k0 / g + j) * h] = scales[j];
        t->starts[j * h] = starts[j];
    }
    t->starts += groups * h;
    t->k0 += n;
    return (groups - 1) * shape->group_quads + mq_ceil_div(n - (groups - 1) * g, MQ_QUAD);
}

/* The extent of all INT4 channels of a token. */
static mq_extent token_extent(const mq_linear *lin, const token *t) {
    const int64_t k4 = lin->k - lin->k_salient, g = mq_min(lin->group_size, k4);
    mq_extent extent = {0, 0};
    for (int64_t k0 = 0; k0 < k4; k0 += g)
        extent = mq_extent_union(extent, mq_channels_extent(&t->int4, k0, mq_min(g, k4 - k0)));
    return extent;
}

static void split_salient(const mq_linear *lin, int64_t h, const token *t) {
    const int64_t k4 = lin->k - lin->k_salient;
    float buffer[MQ_BUFFER];
    uint32_t bits = 0;
    for (int64_t i = 0, part; i < lin->k_salient; i += part) {
        part = mq_min(MQ_BUFFER, lin->k_salient - i);
        const float *x = mq_load_channels(&t->salient, k4 + i, part, buffer);
        bits = mq_max_bits(bits, mq_magnitude_bits(t->salient.kernels->extent_of(x, part)));
        for (int64_t e = 0; e < part; e++) t->salient_values[(i + e) * h] = x[e];
    }
    /* An Inf would make only some outputs Inf, and NaN where a weight is 0; NaN makes all of
     * them NaN. */
    if (bits >= MQ_INFINITY_BITS) *t->salient_values = mq_float_of_bits(MQ_NAN_BITS);
}

/* Quantizes the tokens of a tile. Each token's codes are written contiguously, a few segments at
 * a time, then interleaved. Writing them straight to their places would pull the tile through
 * the cache once per token. */
static void quantize_tile(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                          int64_t h, int64_t rows, token *tokens, int8_t *to) {
    enum { SEGMENTS = 8, STRIDE = SEGMENTS * MQ_BUFFER };
    int8_t codes[MQ_TILE_ROWS_512 * STRIDE];
    const int64_t k4 = lin->k - lin->k_salient;
    do {
        int64_t quads = 0;
        for (int64_t r = 0; r < rows; r++) {
            token *t = tokens + r;
            if (t->k0 == 0) {
                split_salient(lin, h, t);
                if (lin->per_token) t->extent = token_extent(lin, t);
            }
            quads = 0;
            for (int i = 0; i < SEGMENTS && t->k0 < k4; i++)
                quads += quantize_segment(shape, lin, h, t, codes + r * STRIDE + quads * MQ_QUAD);
        }
        kernels->interleave(codes, STRIDE, rows, quads, to, h);
        to += quads * h * MQ_QUAD;
    } while (tokens->k0 < k4);
}

void mq_run_linear_quantize(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            mq_dtype dtype, const void *x, int64_t stride, int64_t m, int64_t row0,
                            int64_t row1, void *workspace) {
    mq_activations act = workspace_view(shape, lin->k_salient, m, kernels->tile_rows, workspace);
    const int64_t h = act.h;
    if (row1 == m) clear_tails(shape, lin->k_salient, m, h, workspace);
    for (int64_t tile = row0 / h, rows; tile * h < row1; tile++) {
        token tokens[MQ_TILE_ROWS_512];
        rows = mq_min(h, row1 - tile * h);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = tile * h + r;
            const void *values = (const char *)x + (size_t)(row * stride) * mq_dtype_size(dtype);
            const int64_t to_next = row + 1 < row1 ? stride * (int64_t)mq_dtype_size(dtype) : 0;
            tokens[r] = (token){
                .int4 = {kernels, dtype, values, lin->perm, lin->rotation, to_next},
                .salient = {kernels, dtype, values, lin->perm, 0, to_next},
                .scales = act.scales + tile * shape->groups * h + r,
                .starts = act.starts + tile * shape->segments * h + r,
                .salient_values = act.salient + tile * lin->k_salient * h + r,
            };
        }
        quantize_tile(kernels, shape, lin, h, rows, tokens,
                      act.codes + tile * shape->quads * h * MQ_QUAD);
    }
}

/* Converts the weights of a panel's salient channels [s0, s1) to fp32: w [s1 - s0][16]. */
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

/* out = sums + bias for tokens [first, last) and `panels` panels from panel0 on. sums is
 * [panels][MQ_ROW_CHUNK][16]. */
static void store_sums(const mq_kernels *kernels, const mq_linear *lin, int64_t panel0,
                       int64_t panels, int64_t first, int64_t last, float *sums, mq_dtype dtype,
                       void *out, int64_t stride) {
    enum { ROWS_AHEAD = 16 }; /* otherwise each store waits for its cache line */
    const int64_t size = (int64_t)mq_dtype_size(dtype);
    const int64_t n0 = panel0 * MQ_PANEL, columns = mq_min(panels * MQ_PANEL, lin->n - n0);
    float bias[MQ_PANELS_AT_ONCE * MQ_PANEL];
    if (lin->bias)
        for (int64_t c = 0; c < columns; c++) bias[c] = mq_load(lin->bias_dtype, lin->bias, n0 + c);
    for (int64_t row = first; row < last; row++) {
        if (row + ROWS_AHEAD < last)
            for (int64_t c = 0; c < columns; c += 64 / size)
                __builtin_prefetch((const char *)out +
                                   ((row + ROWS_AHEAD) * stride + n0 + c) * size);
        for (int64_t c = 0, n; c < columns; c += n) {
            float *sum = sums + (c / MQ_PANEL * MQ_ROW_CHUNK + row - first) * MQ_PANEL;
            const int64_t at = row * stride + n0 + c;
            n = mq_min(MQ_PANEL, columns - c);
            if (lin->bias)
                for (int64_t i = 0; i < n; i++) sum[i] += bias[c + i];
            if (dtype != MQ_F32)
                kernels->narrow(dtype, sum, n, (uint16_t *)out + at);
            else if (n == MQ_PANEL) /* a constant size */
                memcpy((float *)out + at, sum, MQ_PANEL * sizeof *sum);
            else
                memcpy((float *)out + at, sum, (size_t)n * sizeof *sum);
        }
    }
}

void mq_run_linear_multiply(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            int64_t m, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1,
                            const void *workspace, mq_dtype dtype, void *out, int64_t stride) {
    /* the workspace is only read */
    mq_activations act =
        workspace_view(shape, lin->k_salient, m, kernels->tile_rows, (void *)(uintptr_t)workspace);
    _Alignas(64) float sums[MQ_PANELS_AT_ONCE][MQ_ROW_CHUNK * MQ_PANEL];
    const int64_t chunk = MQ_ROW_CHUNK / act.h * act.h;
    mq_multiply_groups_fn *multiply_groups = kernels->multiply_groups[mq_has_wide_codes(lin)];
    for (int64_t p = panel0, panels; p < panel1; p += panels) {
        panels = mq_min(MQ_PANELS_AT_ONCE, panel1 - p);
        for (int64_t first = row0; first < row1; first += chunk) {
            const int64_t last = mq_min(first + chunk, row1);
            const int64_t tile0 = first / act.h, tile1 = mq_ceil_div(last, act.h);
            const size_t bytes = (size_t)((last - first) * MQ_PANEL) * sizeof(float);
            for (int64_t i = 0; i < MQ_PANELS_AT_ONCE; i++) memset(sums[i], 0, bytes);
            for (int64_t i = 0; i < panels; i++)
                add_salient(kernels, lin, &act, tile0, tile1, p + i, sums[i]);
            multiply_groups(&act, shape, tile0, tile1, panels,
                            lin->qweight + p * shape->blocks * MQ_BLOCK_BYTES,
                            lin->scales + p * shape->groups * MQ_PANEL, sums[0]);
            store_sums(kernels, lin, p, panels, first, last, sums[0], dtype, out, stride);
        }
    }
}
