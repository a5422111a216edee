/* The column loops of GPTQ and of coordinate descent, once for all instruction sets. The
 * compiler vectorizes the inner loops, and the caller's matrix products between blocks take most
 * of the time. */
#include <math.h>

#include "ops.h"

static float on_grid(float w, float scale, float q_max) {
    float q = w * mq_inverse_of(scale);
    q = q < -q_max ? -q_max : q;
    q = q > q_max ? q_max : q;
    return (rintf(q) + 0.0f) * scale; /* NaN stays NaN; + 0.0f removes negative zeros */
}

void mq_run_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                       int64_t groups, const float *scales, const float *u, float *w,
                       float *errors) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = w + r * cols;
        for (int64_t i = 0; i < cols; i++) {
            const float *u_row = u + i * cols;
            const float rounded =
                on_grid(row[i], scales[r * groups + (col0 + i) / group_size], (float)q_max);
            const float error = (row[i] - rounded) / u_row[i];
            errors[r * cols + i] = error;
            row[i] = rounded;
            for (int64_t j = i + 1; j < cols; j++) row[j] -= error * u_row[j];
        }
    }
}

void mq_run_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                          int64_t groups, const float *scales, const float *h, float *gradient,
                          float *w) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = w + r * cols, *slope = gradient + r * cols;
        for (int64_t i = 0; i < cols; i++) {
            const float *h_row = h + i * cols;
            const float rounded =
                on_grid(row[i] + slope[i] / h_row[i], scales[r * groups + (col0 + i) / group_size],
                        (float)q_max);
            const float step = rounded - row[i];
            row[i] = rounded;
            if (step == 0) continue;
            for (int64_t j = i; j < cols; j++) slope[j] -= step * h_row[j];
        }
    }
}
