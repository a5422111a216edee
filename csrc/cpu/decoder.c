/* What lies between the linears of a decoder layer, row by row: norms, activations, sums. */
#include <math.h>
#include <string.h>

#include "ops.h"
#include "decoder.h"

enum { HEADS_AT_ONCE = 8 }; /* that read the same keys and values */

/* x [n] of any dtype as fp32: in place, or in buffer. */
static const float *widened(const mq_kernels *kernels, mq_dtype dtype, const void *x, int64_t i,
                            int64_t n, float *buffer) {
    if (dtype == MQ_F32) return (const float *)x + i;
    kernels->widen(dtype, (const uint16_t *)x + i, n, buffer);
    return buffer;
}

/* Rounds x [n] to dtype. */
static void round_to(const mq_kernels *kernels, mq_dtype dtype, float *x, int64_t n) {
    uint16_t halves[MQ_BUFFER];
    if (dtype == MQ_F32) return;
    kernels->narrow(dtype, x, n, halves);
    kernels->widen(dtype, halves, n, x);
}

static float mean_of_squares(const mq_kernels *kernels, mq_dtype dtype, const void *x, int64_t at,
                             int64_t k) {
    float buffer[MQ_BUFFER], sums[16] = {0};
    for (int64_t i = 0; i < k; i += MQ_BUFFER) {
        const int64_t n = mq_min(MQ_BUFFER, k - i);
        kernels->add_squares(widened(kernels, dtype, x, at + i, n, buffer), n, sums);
    }
    return mq_sum_of_lanes(sums) / (float)k;
}

void mq_run_rms_norm(const mq_kernels *kernels, const mq_norm *norm, mq_dtype dtype, const void *x,
                     int64_t rows, int64_t stride, void *out) {
    const int64_t k = norm->k;
    float buffer[MQ_BUFFER], gains[MQ_BUFFER], y[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        const float scale =
            1.0f / sqrtf(mean_of_squares(kernels, dtype, x, r * stride, k) + norm->eps);
        for (int64_t i = 0; i < k; i += MQ_BUFFER) {
            const int64_t n = mq_min(MQ_BUFFER, k - i);
            const float *values = widened(kernels, dtype, x, r * stride + i, n, buffer);
            const float *weight = widened(kernels, dtype, norm->weight, i, n, gains);
            for (int64_t e = 0; e < n; e++) y[e] = values[e] * scale;
            if (norm->offset == 0) {
                round_to(kernels, dtype, y, n);
                for (int64_t e = 0; e < n; e++) y[e] = weight[e] * y[e];
            } else {
                for (int64_t e = 0; e < n; e++) y[e] = y[e] * (norm->offset + weight[e]);
            }
            mq_store(kernels, dtype, y, n, out, r * k + i);
        }
    }
}

void mq_run_gated(const mq_kernels *kernels, mq_activation activation, mq_dtype dtype,
                  const void *gate_up, int64_t rows, int64_t n, void *out) {
    float gate[MQ_BUFFER], buffer[MQ_BUFFER];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < n; i += MQ_BUFFER) {
            const int64_t part = mq_min(MQ_BUFFER, n - i), at = 2 * r * n + i;
            const float *from = widened(kernels, dtype, gate_up, at, part, gate);
            if (from != gate) memcpy(gate, from, (size_t)part * sizeof *gate);
            kernels->activate(activation, gate, part);
            round_to(kernels, dtype, gate, part);
            const float *up = widened(kernels, dtype, gate_up, at + n, part, buffer);
            for (int64_t e = 0; e < part; e++) gate[e] *= up[e];
            mq_store(kernels, dtype, gate, part, out, r * n + i);
        }
    }
}

void mq_run_add(const mq_kernels *kernels, mq_dtype dtype, const void *a, const void *b,
                int64_t count, void *out) {
    float left[MQ_BUFFER], right[MQ_BUFFER], sums[MQ_BUFFER];
    for (int64_t i = 0; i < count; i += MQ_BUFFER) {
        const int64_t n = mq_min(MQ_BUFFER, count - i);
        const float *x = widened(kernels, dtype, a, i, n, left);
        const float *y = widened(kernels, dtype, b, i, n, right);
        for (int64_t e = 0; e < n; e++) sums[e] = x[e] + y[e];
        mq_store(kernels, dtype, sums, n, out, i);
    }
}

void mq_run_rotary(const mq_kernels *kernels, mq_dtype dtype, const void *cos, const void *sin,
                   int64_t heads, int64_t head_dim, void *x) {
    const int64_t half = head_dim / 2;
    float buffer[MQ_BUFFER], cosines[MQ_BUFFER], sines[MQ_BUFFER], y[MQ_BUFFER], z[MQ_BUFFER];
    const float *c = widened(kernels, dtype, cos, 0, head_dim, cosines);
    const float *s = widened(kernels, dtype, sin, 0, head_dim, sines);
    for (int64_t at = 0; at < heads * head_dim; at += head_dim) {
        const float *from = widened(kernels, dtype, x, at, head_dim, buffer);
        for (int64_t i = 0; i < head_dim; i++) y[i] = from[i] * c[i];
        for (int64_t i = 0; i < half; i++) z[i] = -from[half + i] * s[i];
        for (int64_t i = half; i < head_dim; i++) z[i] = from[i - half] * s[i];
        round_to(kernels, dtype, y, head_dim);
        round_to(kernels, dtype, z, head_dim);
        for (int64_t i = 0; i < head_dim; i++) y[i] += z[i];
        mq_store(kernels, dtype, y, head_dim, x, at);
    }
}

/* e^scores / their sum, for one head. */
static void softmax(const mq_kernels *kernels, const uint8_t *mask, int64_t tokens, float *scores) {
    float most = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        if (mask && !mask[t]) scores[t] = -INFINITY;
        most = scores[t] > most || scores[t] != scores[t] ? scores[t] : most;
    }
    const float sum = kernels->exponentials(scores, tokens, most);
    for (int64_t t = 0; t < tokens; t++) scores[t] = mask && !mask[t] ? 0 : scores[t] / sum;
}

/* The keys or the values of one head. */
typedef struct part {
    const void *plain;     /* [tokens][head_dim] */
    const uint8_t *blocks; /* [count], see mq_kv_blocks */
    int64_t row_bytes;     /* of codes */
    int64_t shared;        /* rows that share scales: a block's keys, or a value's one */
    int64_t group_size;    /* channels that share one */
} part;

static part part_of(const mq_attention *of, mq_dtype dtype, int is_values, int64_t kv) {
    const mq_kv_blocks *blocks = &of->blocks;
    const int64_t stride = is_values ? blocks->value_stride : blocks->key_stride;
    const int64_t plain = kv * of->head_stride * (int64_t)mq_dtype_size(dtype);
    part made = {(const char *)(is_values ? of->values : of->keys) + plain, NULL, 0, 0, 0};
    if (blocks->count == 0) return made;
    made.blocks = (const uint8_t *)(is_values ? blocks->values : blocks->keys) + kv * stride;
    made.row_bytes = mq_kv_row_bytes(blocks->bits, of->head_dim);
    made.shared = is_values ? 1 : MQ_KV_BLOCK;
    made.group_size = is_values ? blocks->group_size : 1;
    return made;
}

/* Tokens t .. t + n, of one block if of any, as fp32 [n][head_dim]; n * head_dim <= MQ_ROWS_VALUES. */
static const float *rows_of(const mq_kernels *kernels, const mq_attention *of, mq_dtype dtype,
                            const part *from, int64_t t, int64_t n, float *buffer) {
    const int64_t d = of->head_dim, quantized = of->blocks.count * MQ_KV_BLOCK;
    if (t >= quantized)
        return widened(kernels, dtype, from->plain, (t - quantized) * d, n * d, buffer);
    float scale_buffer[MQ_ROWS_VALUES], zero_buffer[MQ_ROWS_VALUES];
    const int64_t row = d / from->group_size, count = MQ_KV_BLOCK / from->shared * row;
    const int64_t codes_bytes = MQ_KV_BLOCK * from->row_bytes;
    const int64_t bytes = codes_bytes + 2 * count * (int64_t)mq_dtype_size(dtype);
    const uint8_t *block = from->blocks + t / MQ_KV_BLOCK * bytes, *scales = block + codes_bytes;
    const int64_t r = t % MQ_KV_BLOCK, first = r / from->shared * row;
    const int64_t used = from->shared == 1 ? n * row : row;
    kernels->dequantize_rows(of->blocks.bits, block + r * from->row_bytes, n, d, from->group_size,
                             widened(kernels, dtype, scales, first, used, scale_buffer),
                             widened(kernels, dtype, scales, count + first, used, zero_buffer),
                             from->shared == 1 ? row : 0, buffer);
    return buffer;
}

void mq_run_attend(const mq_kernels *kernels, const mq_attention *of, mq_dtype dtype, const void *q,
                   int64_t kv0, int64_t kv1, float *scores, void *out) {
    const int64_t d = of->head_dim, group = of->heads / of->kv_heads, step = MQ_ROWS_VALUES / d;
    const int64_t quantized = of->blocks.count * MQ_KV_BLOCK, tokens = quantized + of->tokens;
    float buffer[MQ_ROWS_VALUES], heads[HEADS_AT_ONCE][MQ_BUFFER];
    for (int64_t at = kv0 * group, count; at < kv1 * group; at += count) {
        const int64_t kv = at / group;
        const part keys = part_of(of, dtype, 0, kv), values = part_of(of, dtype, 1, kv);
        float *weights = scores + (at - kv * group) * tokens;
        count = mq_min(HEADS_AT_ONCE, (kv + 1) * group - at);
        for (int64_t h = 0; h < count; h++) {
            const float *query = widened(kernels, dtype, q, (at + h) * d, d, heads[h]);
            if (query != heads[h]) memcpy(heads[h], query, (size_t)d * sizeof *query);
        }
        for (int64_t t = 0, n; t < tokens; t += n) {
            n = mq_min(step, t < quantized ? MQ_KV_BLOCK - t % MQ_KV_BLOCK : tokens - t);
            const float *rows = rows_of(kernels, of, dtype, &keys, t, n, buffer);
            for (int64_t h = 0; h < count; h++)
                kernels->dot_rows(heads[h], rows, n, d, of->scale, weights + h * tokens + t);
        }
        for (int64_t h = 0; h < count; h++)
            softmax(kernels, of->mask, tokens, weights + h * tokens);
        memset(heads, 0, sizeof heads);
        for (int64_t t = 0, n; t < tokens; t += n) {
            n = mq_min(step, t < quantized ? MQ_KV_BLOCK - t % MQ_KV_BLOCK : tokens - t);
            const float *rows = rows_of(kernels, of, dtype, &values, t, n, buffer);
            for (int64_t h = 0; h < count; h++)
                kernels->add_rows(weights + h * tokens + t, rows, n, d, heads[h]);
        }
        for (int64_t h = 0; h < count; h++)
            mq_store(kernels, dtype, heads[h], d, out, (at + h) * d);
    }
}
