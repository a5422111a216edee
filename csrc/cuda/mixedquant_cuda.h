/* The CUDA side of mixedquant.h: the same operations on device memory.
 *
 * Every function enqueues its kernels on `stream` (a cudaStream_t) of the current device and
 * returns at once. It neither allocates nor synchronizes, so a CUDA graph may capture it, after
 * a first call outside the graph: that one queries the device and may load kernels. Arrays,
 * layouts and results are those of the mq_* function of the same name. Pointers are to device
 * memory, except those to structs. Arguments are not checked here: the caller has checked them
 * as csrc/cpu/api.c does. Errors that only the device can see, such as a bad index in perm or a
 * non-finite weight, show in the results as each function states.
 *
 * Functions return 0, or the error that cudaGetLastError gave for the launch. */
#ifndef MIXEDQUANT_CUDA_H
#define MIXEDQUANT_CUDA_H

#include "../mixedquant.h"

#ifdef __cplusplus
extern "C" {
#endif

const char *mq_cuda_message(int error); /* one English sentence; never NULL */

/* The current device's architecture: 75, 80, ... Fails if this build has no kernels for it. */
int mq_cuda_arch(int *arch);

/* Waits for the stream and copies an int from the device. */
int mq_cuda_read_int(const int *at, int *value, void *stream);

/* ---- Channel statistics and sorting ---- */

/* count: int64, rows added before; becomes count + rows. */
int mq_cuda_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                                 int64_t *count, const mq_channel_stats *stats, void *stream);
int mq_cuda_sort_keys(mq_sort_key key, int64_t k, const int64_t *count,
                      const mq_channel_stats *stats, double *keys, void *stream);
/* Compares every pair of keys: k^2 / 2 steps, over all threads. */
int mq_cuda_argsort(const double *keys, int64_t k, int descending, int64_t *indices, void *stream);

/* ---- Groups and nibbles; rows are contiguous ---- */

int mq_cuda_group_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                           int64_t rows, int64_t cols, int8_t *q, float *scales, void *stream);
int mq_cuda_group_dequantize(const mq_group_format *format, const int8_t *q, const float *scales,
                             int64_t rows, int64_t cols, mq_dtype dtype, void *out, void *stream);
int mq_cuda_group_fake_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                                int64_t rows, int64_t cols, void *out, void *stream);
int mq_cuda_group_hadamard(int64_t group_size, int64_t rotation, mq_dtype dtype, const void *x,
                           int64_t rows, int64_t cols, void *out, void *stream);
int mq_cuda_pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, uint8_t *packed,
                         void *stream);
int mq_cuda_unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols, int is_unsigned,
                           int8_t *q, void *stream);

/* ---- Weights; the packed format is the CPU's ---- */

/* w [n][k]. status: an int, initially 0, in which bits of MQ_CUDA_BAD_* are set; the packed
 * weight is then unspecified. seen: k ints of 0, or NULL to skip the check of perm. */
enum { MQ_CUDA_BAD_WEIGHT = 1, MQ_CUDA_BAD_SCALE = 2, MQ_CUDA_BAD_PERM = 4 };
int mq_cuda_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                        const float *group_scales, uint8_t *qweight, uint16_t *scales,
                        void *salient, uint16_t *salient_scales, int *seen, int *status,
                        void *stream);
/* w [count][k]: rows rows[i] of the weight; rows NULL: rows 0 .. count. Where perm holds an index
 * outside [0, k), nothing is written. A row outside [0, n) is NaN. */
int mq_cuda_unpack_rows(const mq_linear *lin, const int64_t *rows, int64_t count, float *w,
                        void *stream);
int mq_cuda_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                       int64_t groups, const float *scales, const float *u, float *w, float *errors,
                       void *stream);

int mq_cuda_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                          int64_t groups, const float *scales, const float *h, float *gradient,
                          float *w, void *stream);

/* ---- The W4A4 linear ---- */

/* A table of multiplying kernels. A kernel's number is its row. */
typedef struct mq_cuda_kernel {
    const char *name;
    int oldest, newest;  /* supported architectures, both ends included: 75, 80, ... */
    int64_t most_tokens; /* chosen for at most so many; it accepts any number */
    int group_multiple;  /* a group's INT4 channels must be a multiple of this, or all in one
                          * group */
    int most_act_bits;
} mq_cuda_kernel;

int mq_cuda_kernel_count(void);
const mq_cuda_kernel *mq_cuda_kernel_at(int kernel); /* NULL outside [0, count) */
/* Whether the kernel can compute lin on this architecture. */
int mq_cuda_kernel_serves(int kernel, const mq_linear *lin, int arch);
/* The first row that serves lin and takes m tokens; -1 if there is none. */
int mq_cuda_kernel_for(const mq_linear *lin, int arch, int64_t m);

/* Bytes of workspace for m tokens of x's dtype. It must be aligned to 16 bytes. */
size_t mq_cuda_linear_workspace(const mq_linear *lin, int kernel, mq_dtype dtype, int64_t m);

/* x [m][k] -> out [m][n]. lin's arrays, x and workspace are aligned to 16 bytes. At most
 * 2^(24 - act_bits) channels per group and 65535 * 32 output channels. An index outside [0, k) in
 * perm counts as a NaN.
 *
 * Results differ from mq_linear_quantize and mq_linear_multiply only in the order of fp32 sums:
 * of products with salient channels, and of groups in the kernels that split them over warps
 * ("decode"). Integer sums are equal. The order depends only on the layer's shape, so calls repeat
 * bit for bit. A token has the same result in every batch of up to 64 tokens, and the same in every
 * larger one. Between these two, and against the CPU, fp32 sums differ in the last bits: in the
 * tests by less than 1e-5 of the sum of the terms' magnitudes. Relative to a sum that cancels, that
 * is more.
 *
 * The first step writes the workspace, the second reads it. The second must directly follow the
 * first on its stream. It may read lin's arrays before the first has ended, so they must be
 * older. */
int mq_cuda_linear_quantize(const mq_linear *lin, int kernel, mq_dtype dtype, const void *x,
                            int64_t m, void *workspace, void *stream);
int mq_cuda_linear_multiply(const mq_linear *lin, int kernel, mq_dtype dtype, int arch,
                            const void *workspace, int64_t m, void *out, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* MIXEDQUANT_CUDA_H */
