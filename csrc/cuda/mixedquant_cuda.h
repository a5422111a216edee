/* The CUDA side of mixedquant.h: the same operations on device memory.
 *
 * Every function puts its kernels on `stream` (a cudaStream_t) of the current device and returns at
 * once: no allocation, no synchronization, so a CUDA graph may capture it (a first call must come
 * before: it asks the driver what the device is, and may load kernels). Arrays, layouts and results
 * are those of the mq_* function of the same name; all pointers are to device memory, but for structs.
 * Arguments are not checked again: the caller has done as csrc/cpu/api.c does. What only the device
 * knows - a bad index in perm, a weight that is not finite - shows in the results as each function says.
 *
 * Returns 0, or what cudaGetLastError said of the launch. */
#ifndef MIXEDQUANT_CUDA_H
#define MIXEDQUANT_CUDA_H

#include "../mixedquant.h"

#ifdef __cplusplus
extern "C" {
#endif

const char *mq_cuda_message(int error); /* one English sentence; never NULL */

/* The current device's architecture: 75, 80, ... An error where this build has no kernels for it. */
int mq_cuda_arch(int *arch);

/* Waits for the stream and copies an int from the device. */
int mq_cuda_read_int(const int *at, int *value, void *stream);

/* ---- Channel statistics and sorting ---- */

/* count: int64, rows added before; becomes count + rows. */
int mq_cuda_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows, int64_t cols,
                                 int64_t *count, const mq_channel_stats *stats, void *stream);
int mq_cuda_sort_keys(mq_sort_key key, int64_t k, const int64_t *count,
                      const mq_channel_stats *stats, double *keys, void *stream);
/* Compares every pair of keys: k^2 / 2 steps, shared by all threads. */
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

/* w [n][k]. status: int, 0 before; bits of MQ_CUDA_BAD_* are set, and the packed weight is then
 * unspecified. seen: k ints of 0, or NULL not to check perm. */
enum { MQ_CUDA_BAD_WEIGHT = 1, MQ_CUDA_BAD_SCALE = 2, MQ_CUDA_BAD_PERM = 4 };
int mq_cuda_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                        const float *group_scales, uint8_t *qweight, uint16_t *scales,
                        void *salient, uint16_t *salient_scales, int *seen, int *status,
                        void *stream);
/* w [n][k]; what an index outside [0, k) in perm would write is left out. */
int mq_cuda_unpack_weight(const mq_linear *lin, float *w, void *stream);
int mq_cuda_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                       int64_t groups, const float *scales, const float *u, float *w, float *errors,
                       void *stream);

int mq_cuda_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                          int64_t groups, const float *scales, const float *h, float *gradient,
                          float *w, void *stream);

/* ---- The W4A4 linear ---- */

/* Kernels that multiply, a row of one table each. A kernel's number is its place in the table. */
typedef struct mq_cuda_kernel {
    const char *name;
    int oldest, newest;  /* architectures it runs on, both included: 75, 80, ... */
    int64_t most_tokens; /* chosen for at most so many; it multiplies any number */
    int group_multiple;  /* INT4 channels of a group must be a multiple of this, or all one group */
} mq_cuda_kernel;

int mq_cuda_kernel_count(void);
const mq_cuda_kernel *mq_cuda_kernel_at(int kernel); /* NULL outside [0, count) */
/* Whether the kernel can compute lin on this architecture. */
int mq_cuda_kernel_serves(int kernel, const mq_linear *lin, int arch);
/* The first row that serves and takes m tokens; -1: none. */
int mq_cuda_kernel_for(const mq_linear *lin, int arch, int64_t m);

/* Bytes of workspace for m tokens of x's dtype; alignment 16. */
size_t mq_cuda_linear_workspace(const mq_linear *lin, int kernel, mq_dtype dtype, int64_t m);

/* x [m][k] -> out [m][n]. lin's arrays, x and workspace are aligned to 16 bytes. As
 * mq_linear_quantize and mq_linear_multiply, with these differences: products with salient channels
 * are summed in another order, and so are groups in the kernels that split them among warps
 * ("decode"); the integer sums are the same. That order is fixed by the layer's shape, so results
 * are the same in every call, and a token's the same in any batch of up to 64 and in any of more;
 * from the one to the other, and from the CPU, they differ in the last bits of the fp32 sums: by less
 * than 1e-5 of the sum of the terms' magnitudes in the tests, more than that of a sum that cancels.
 * An index outside [0, k) in perm counts as a NaN. Up to 2^20 channels to a group, and 65535 * 32
 * output channels.
 * The two steps by themselves write and read the workspace. The second must stand directly behind the
 * first on its stream: it may read lin's arrays before the first has ended, so they must be older. */
int mq_cuda_linear_quantize(const mq_linear *lin, int kernel, mq_dtype dtype, const void *x,
                            int64_t m, void *workspace, void *stream);
int mq_cuda_linear_multiply(const mq_linear *lin, int kernel, mq_dtype dtype, int arch,
                            const void *workspace, int64_t m, void *out, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* MIXEDQUANT_CUDA_H */
