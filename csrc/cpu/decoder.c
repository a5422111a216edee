/* What lies between the linears of a decoder layer, row by row: norms, activations, sums. */
#include <math.h>
#include <string.h>

#include "ops.h"
#include "decoder.h"

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
static void softmax(const mq_kernels *kernels, const mq_attention *of, float *scores) {
    float most = -INFINITY;
    for (int64_t t = 0; t < of->tokens; t++) {
        if (of->mask && !of->mask[t]) scores[t] = -INFINITY;
        most = scores[t] > most || scores[t] != scores[t] ? scores[t] : most;
    }
    const float sum = kernels->exponentials(scores, of->tokens, most);
    for (int64_t t = 0; t < of->tokens; t++)
        scores[t] = of->mask && !of->mask[t] ? 0 : scores[t] / sum;
}

void mq_run_attend(const mq_kernels *kernels, const mq_attention *of, mq_dtype dtype, const void *q,
                   int64_t kv0, int64_t kv1, float *scores, void *out) {
    const int64_t d = of->head_dim, group = of->heads / of->kv_heads, step = MQ_BUFFER / d;
    float buffer[MQ_BUFFER], query[MQ_BUFFER], sums[MQ_BUFFER];
    for (int64_t kv = kv0; kv < kv1; kv++) {
        for (int64_t t = 0, n; t < of->tokens; t += n) {
            n = mq_min(step, of->tokens - t);
            const float *rows =
                widened(kernels, dtype, of->keys, kv * of->head_stride + t * d, n * d, buffer);
            for (int64_t h = 0; h < group; h++)
                kernels->dot_rows(widened(kernels, dtype, q, (kv * group + h) * d, d, query), rows,
                                  n, d, of->scale, scores + h * of->tokens + t);
        }
        for (int64_t h = 0; h < group; h++) {
            float *weights = scores + h * of->tokens;
            softmax(kernels, of, weights);
            memset(sums, 0, (size_t)d * sizeof *sums);
            for (int64_t t = 0, n; t < of->tokens; t += n) {
                n = mq_min(step, of->tokens - t);
                const float *rows = widened(kernels, dtype, of->values,
                                            kv * of->head_stride + t * d, n * d, buffer);
                kernels->add_rows(weights + t, rows, n, d, sums);
            }
            mq_store(kernels, dtype, sums, d, out, (kv * group + h) * d);
        }
    }
}
