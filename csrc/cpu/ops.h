/* The operations behind api.c. Arguments are valid and kernels are chosen. */
#ifndef MQ_CPU_OPS_H
#define MQ_CPU_OPS_H

#include <string.h>

#include "kernels.h"

void mq_run_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                    int64_t *scratch);

void mq_run_group_quantize(const mq_kernels *kernels, const mq_group_format *format, mq_dtype dtype,
                           const void *x, int64_t rows, int64_t cols, int64_t stride, int8_t *q,
                           float *scales);
void mq_run_group_dequantize(const mq_kernels *kernels, const mq_group_format *format,
                             const int8_t *q, const float *scales, int64_t rows, int64_t cols,
                             mq_dtype dtype, void *out);
void mq_run_group_fake_quantize(const mq_kernels *kernels, const mq_group_format *format,
                                mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                                int64_t stride, void *out);

void mq_run_group_hadamard(const mq_kernels *kernels, int64_t group_size, int64_t rotation,
                           mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                           int64_t stride, void *out);

mq_status mq_run_pack_weight(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                             int q_max, mq_dtype dtype, const void *w, int64_t stride,
                             const float *group_scales, int64_t panel0, int64_t panel1,
                             uint8_t *qweight, uint16_t *scales, void *salient,
                             uint16_t *salient_scales);
/* Writes rows [row0, row1) of w: output channels rows[r], or r if rows is NULL. */
void mq_run_unpack_rows(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                        const int64_t *rows, int64_t row0, int64_t row1, float *w);

void mq_run_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                       int64_t groups, const float *scales, const float *u, float *w,
                       float *errors);
void mq_run_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                          int64_t groups, const float *scales, const float *h, float *gradient,
                          float *w);

/* Negative if it does not fit. */
int64_t mq_workspace_bytes(const mq_shape *shape, int64_t k_salient, int64_t m, int64_t tile_rows);
void mq_run_linear_quantize(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            mq_dtype dtype, const void *x, int64_t stride, int64_t m, int64_t row0,
                            int64_t row1, void *workspace);
void mq_run_linear_multiply(const mq_kernels *kernels, const mq_shape *shape, const mq_linear *lin,
                            int64_t m, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1,
                            const void *workspace, mq_dtype dtype, void *out, int64_t stride);

void mq_run_rms_norm(const mq_kernels *kernels, const mq_norm *norm, mq_dtype dtype, const void *x,
                     int64_t rows, int64_t stride, void *out);
void mq_run_gated(const mq_kernels *kernels, mq_activation activation, mq_dtype dtype,
                  const void *gate_up, int64_t rows, int64_t n, void *out);
void mq_run_rotary(const mq_kernels *kernels, mq_dtype dtype, const void *cos, const void *sin,
                   int64_t heads, int64_t head_dim, void *x);
/* Bytes of a row of codes, [head_dim] values of 4 or 8 bits. */
static inline int64_t mq_kv_row_bytes(int bits, int64_t head_dim) {
    return bits == 8 ? head_dim : mq_ceil_div(head_dim, 2);
}
void mq_run_attend(const mq_kernels *kernels, const mq_attention *attention, mq_dtype dtype,
                   const void *q, int64_t kv0, int64_t kv1, float *scores, void *out);
void mq_run_add(const mq_kernels *kernels, mq_dtype dtype, const void *a, const void *b,
                int64_t count, void *out);

/* Converts x [n] to dtype and stores it at out[i ...]. */
static inline void mq_store(const mq_kernels *kernels, mq_dtype dtype, const float *x, int64_t n,
                            void *out, int64_t i) {
    if (dtype == MQ_F32)
        memcpy((float *)out + i, x, (size_t)n * sizeof *x);
    else
        kernels->narrow(dtype, x, n, (uint16_t *)out + i);
}

/* A row and how to read it: channels perm[0 .. k), or in order if perm is NULL; rotated in
 * blocks if rotation > 1. to_next: byte offset of the row to prefetch, usually the next one; 0
 * for none. */
typedef struct mq_channels {
    const mq_kernels *kernels;
    mq_dtype dtype;
    const void *row;
    const int32_t *perm;
    int64_t rotation, to_next;
} mq_channels;

/* Loads channels k0 .. k0 + n as fp32, n <= MQ_BUFFER. k0 is the start of a group or a multiple
 * of MQ_BUFFER from it. Returns a pointer to them, into buffer or into the row itself. */
const float *mq_load_channels(const mq_channels *from, int64_t k0, int64_t n, float *buffer);

/* The extent of channels k0 .. k0 + n of one group, for any n. */
mq_extent mq_channels_extent(const mq_channels *from, int64_t k0, int64_t n);

/* Rotates n values that start at the start of a group or a multiple of MQ_BUFFER from it. Its
 * own inverse. out may equal x. */
void mq_rotate(const mq_kernels *kernels, int64_t rotation, const float *x, int64_t n, float *out);

#endif
