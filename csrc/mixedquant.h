/* MixedQuant: group-wise INT4 weights and activations; salient channels are kept in 16 bits, their
 * weights, as a choice, in 8.
 *
 * The only public C header. The library knows no torch, no Python, no threads and no heap: every
 * buffer is the caller's, every function is re-entrant, and work is split by the caller through the
 * half-open ranges that the functions take. Functions return a status and never print or abort.
 * On any status but MQ_OK the output buffers hold unspecified values.
 *
 * Words: m tokens (rows of x), n output channels, k input channels, g group size.
 * Matrices are row-major; "[a][b]" is contiguous unless a row stride (in elements) is given.
 * Offsets are 64-bit. Non-finite means NaN or Inf. bf16 and fp16 values are passed as uint16_t
 * bits.
 */
#ifndef MIXEDQUANT_H
#define MIXEDQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mq_status {
    MQ_OK = 0,
    MQ_INVALID_POINTER,    /* a pointer is NULL although its array is not empty */
    MQ_INVALID_SIZE,       /* a negative size or stride, a range outside its bounds */
    MQ_INVALID_GROUP_SIZE, /* group size < 1 */
    MQ_INVALID_BITS,       /* bits or largest code outside their range */
    MQ_INVALID_DTYPE,      /* not a value of mq_dtype, or not allowed here */
    MQ_INVALID_PERM,       /* an index outside [0, k) */
    MQ_INVALID_SALIENT,    /* salient channels outside [0, k] */
    MQ_INVALID_SCALE,      /* a scale, or the clip ratio, is negative or non-finite */
    MQ_INVALID_KEY,        /* not a value of mq_sort_key */
    MQ_INVALID_ISA,        /* not a value of mq_isa, or this processor lacks it */
    MQ_INVALID_ROTATION,   /* neither 0 nor a power of two up to MQ_MAX_ROTATION */
    MQ_INVALID_FORMAT,     /* not a value of mq_act_format */
    MQ_NON_FINITE          /* a weight is NaN or Inf, or a salient one overflows its 16-bit type */
} mq_status;

/* One English sentence without a final stop; never NULL. */
const char *mq_status_message(mq_status status);

/* MQ_I8: only of salient weights */
typedef enum mq_dtype { MQ_F32 = 0, MQ_F16 = 1, MQ_BF16 = 2, MQ_I8 = 3 } mq_dtype;

/* ---- Instruction sets ------------------------------------------------------------------------ */

/* Each family's in rising order of preference. Scalar is the specification; the others equal it bit
 * for bit. */
typedef enum mq_isa {
    MQ_ISA_SCALAR = 0,
    MQ_ISA_AVX2 = 1,       /* AVX2, FMA, F16C */
    MQ_ISA_AVXVNNI = 2,    /* and AVX-VNNI: vpdpbusd on 256 bits */
    MQ_ISA_AVX512VNNI = 3, /* AVX-512 F, BW, DQ, VL and VNNI */
    MQ_ISA_NEON = 4,       /* Arm: NEON and its dot product, sdot */
    MQ_ISA_NEONI8MM = 5,   /* and its matrix product, smmla */
    MQ_ISA_COUNT = 6
} mq_isa;

const char *mq_isa_name(mq_isa isa); /* "scalar", "avx2", ...; NULL for any other value */
int mq_isa_supported(mq_isa isa);    /* whether this processor has it */

/* The set in use: the best supported one until mq_isa_set chooses another. Thread-safe; calls that
 * run at that moment finish with the set they began with. */
mq_isa mq_isa_active(void);
mq_status mq_isa_set(mq_isa isa);

/* ---- Channel statistics and sorting ---------------------------------------------------------- */

/* Statistics of k channels; each array [k]. Before the first row: abs_max, abs_sum, sq_sum and
 * argmax 0, minimum +Inf. */
typedef struct mq_channel_stats {
    float *abs_max;  /* max|x|; a NaN is passed over (the sums keep it) */
    float *minimum;  /* min x; a NaN is passed over */
    double *abs_sum; /* sum|x| in row order */
    double *sq_sum;  /* sum x^2 in row order */
    int64_t *argmax; /* row of the first max|x|, counted from the first row ever added */
} mq_channel_stats;

/* Add `rows` rows of x [rows][>= col1], row stride `stride`, to channels [col0, col1).
 * count: rows added before. Reads x[r * stride + c] only for c in the range; writes only those
 * channels' statistics. Any split into column ranges or row batches gives the same bits. */
mq_status mq_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                                  int64_t col0, int64_t col1, int64_t count,
                                  const mq_channel_stats *stats);

typedef enum mq_sort_key {
    MQ_KEY_ARGMAX = 0,   /* argmax */
    MQ_KEY_MAX = 1,      /* abs_max */
    MQ_KEY_MEAN3STD = 2, /* mean|x| + 3 std|x|, population standard deviation, variance >= 0 */
    MQ_KEY_RMS = 3       /* sqrt(mean x^2) */
} mq_sort_key;

/* keys[i] for k channels of which `count` rows were seen (0 rows: all keys 0). Only the arrays that
 * the key needs are read. */
mq_status mq_sort_keys(mq_sort_key key, int64_t k, int64_t count, const mq_channel_stats *stats,
                       double *keys);

/* Stable argsort of keys [k] into indices [k]; NaN last in either direction. scratch: [k]. */
mq_status mq_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                     int64_t *scratch);

/* ---- Group quantization ---------------------------------------------------------------------- */

/* How the values x of a group become codes of b bits. In all formats code = clamp(round_half_even(x *
 * (1/s))), in fp32, 1/s rounded once; codes are kept with the zero-point taken off, so all formats
 * multiply alike, and x is about code * s.
 *   symmetric:  s = clip max|x| / (2^(b-1) - 1),                -(2^(b-1) - 1) <= code <= 2^(b-1) - 1
 *   unsigned:   s = clip max(x, 0) / (2^b - 1),                              0 <= code <= 2^b - 1
 *   zero-point: s = clip (max(x, 0) + max(-x, 0)) / (2^b - 1),              -z <= code <= 2^b - 1 - z,
 *               z = min(2^b - 1, round_half_even(clip max(-x, 0) (1/s)))
 * A group whose s is below the smallest normal fp32 number has s = 0 and codes 0. A group with a
 * non-finite value has s = NaN and codes 0. */
typedef enum mq_act_format {
    MQ_ACT_SYMMETRIC = 0,
    MQ_ACT_UNSIGNED = 1,
    MQ_ACT_ZERO_POINT = 2
} mq_act_format;

/* Rows are cut into groups of group_size values, of which the last may be short. */
typedef struct mq_group_format {
    int64_t group_size;       /* >= 1 */
    int num_bits;             /* 2..8; zero-point: 2..7 */
    mq_act_format act_format; /* not zero-point where codes are stored as int8 or uint8 */
    float clip;               /* in (0, 1] */
} mq_group_format;

/* x [rows][cols], row stride `stride` >= cols -> q [rows][cols] (uint8_t bits when unsigned),
 * scales [rows][ceil(cols / g)]. */
mq_status mq_group_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, int8_t *q, float *scales);

/* out [rows][cols] = q * s, rounded once to dtype. NaN scales give NaN. */
mq_status mq_group_dequantize(const mq_group_format *format, const int8_t *q, const float *scales,
                              int64_t rows, int64_t cols, mq_dtype dtype, void *out);

/* out [rows][cols] = dequantize(quantize(x)) in x's dtype; out must not overlap x. */
mq_status mq_group_fake_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                                 int64_t rows, int64_t cols, int64_t stride, void *out);

/* out [rows][cols] = x with each group rotated in blocks (see mq_linear), rounded once to x's dtype;
 * its own inverse but for rounding. rotation: 0, or a power of two up to MQ_MAX_ROTATION. */
mq_status mq_group_hadamard(int64_t group_size, int64_t rotation, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, void *out);

/* ---- Nibbles --------------------------------------------------------------------------------- */

/* q [rows][cols] -> packed [rows][ceil(cols / 2)]: byte i = q[2i] & 15 | (q[2i+1] & 15) << 4; the
 * high nibble of an odd row's last byte is 0. */
mq_status mq_pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, uint8_t *packed);

/* The inverse; values in [-8, 7], or [0, 15] when is_unsigned. */
mq_status mq_unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols, int is_unsigned,
                            int8_t *q);

/* ---- The W4A4 linear ------------------------------------------------------------------------- */

enum {
    MQ_PANEL = 16,          /* output channels in a panel of packed weights */
    MQ_QUAD = 4,            /* input channels whose products are summed by one instruction */
    MQ_BLOCK_BYTES = 64,    /* a panel's weights of two quads */
    MQ_SEGMENT_QUADS = 128, /* quads whose products, of up to 8 * 15, an int16 sum holds exactly */
    MQ_PANELS_AT_ONCE = 2,  /* panels that a kernel may multiply together */
    MQ_MAX_ROTATION = 512   /* 4 * MQ_SEGMENT_QUADS: no rotated block crosses a segment */
};

/* Packed weights (docs/format.md has the page). k4 = k - k_salient INT4 channels come first in perm.
 *   groups = ceil(k4 / g); a group takes group_quads = ceil(min(g, k4) / 4) quads, the last one only
 *     what it needs; quads = those of all groups; blocks = ceil(quads / 2); panels = ceil(n / 16)
 *   qweight [panels][blocks][64]: byte c * 4 + i of a block holds, for output channel c of the panel,
 *     code + 8 of channel i of the even quad (low nibble) and of the odd quad (high nibble); padding
 *     holds code 0
 *   scales  [panels][groups][16], bf16
 *   salient [panels][k_salient][16], bf16, fp16 or int8; an int8 weight is code * scale, code in
 *     [-127, 127]
 *   salient_scales [panels][16], bf16, only beside int8: one scale per output channel
 *   segments: parts of at most MQ_SEGMENT_QUADS quads that groups are summed in */
typedef struct mq_shape {
    int64_t panels, groups, group_quads, quads, blocks, segments;
} mq_shape;

/* Fills *shape; n, k >= 0, 0 <= k_salient <= k, group_size >= 1. */
mq_status mq_shape_of(int64_t n, int64_t k, int64_t k_salient, int64_t group_size, mq_shape *shape);

/* Rotation: a group's channels, in perm's order, are cut into blocks of `rotation` channels (where
 * fewer are left, of the largest powers of two that fit), and each block is multiplied with the
 * orthonormal Hadamard matrix of its size: fp32 butterflies (a + b, a - b) from stride 1 up, then one
 * product with 1/sqrt(size), rounded. Weights are rotated when packed and activations when quantized,
 * so that their products stay what they were. */
typedef struct mq_linear {
    int64_t n, k, k_salient, group_size;
    const uint8_t *qweight;
    const uint16_t *scales;
    const void *salient;
    mq_dtype salient_dtype;         /* MQ_BF16, MQ_F16 or MQ_I8 */
    const uint16_t *salient_scales; /* read where salient_dtype is MQ_I8 */
    const int32_t *perm;            /* [k]; NULL or the identity: channels are read in place */
    const void *bias;               /* [n] or NULL */
    mq_dtype bias_dtype;
    int rotation; /* 0 or 1: none; else a power of two up to MQ_MAX_ROTATION */
    int act_bits; /* b, 2..4 */
    mq_act_format act_format;
    int per_token; /* 0: a scale per token and group; 1: a scale per token */
    float clip;    /* in (0, 1] */
    mq_isa isa;    /* the kernels that quantize and multiply; fixes the workspace's layout */
} mq_linear;

/* Packs rows [16 * panel0, 16 * panel1) of w [n][k], row stride `stride`. Reads lin's n, k,
 * k_salient, group_size, salient_dtype, perm, rotation and isa; the other fields may be 0.
 *   q_max: weight codes lie in [-q_max, q_max]; 1..7
 *   group_scales: fp32 [n][groups] to use, or NULL: max|w| / q_max per group. Scales are rounded to
 *     bf16 first and codes computed with the rounded scale; below the smallest normal: 0.
 * int8 salient weights follow the same rules, with 127 for q_max and a row's salient channels for
 * the group.
 * Writes the same panels of qweight, scales, salient and (MQ_I8) salient_scales; where k = 0,
 * nothing. */
mq_status mq_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                         int64_t stride, const float *group_scales, int64_t panel0, int64_t panel1,
                         uint8_t *qweight, uint16_t *scales, void *salient,
                         uint16_t *salient_scales);

/* The weight that lin computes with: rows [16 * panel0, min(n, 16 * panel1)) of w, fp32 [n][k] in
 * the channels' natural order. Every entry is code * scale, rotated back, or the salient value. */
mq_status mq_unpack_weight(const mq_linear *lin, int64_t panel0, int64_t panel1, float *w);

/* One block of GPTQ's column loop (Frantar et al., 2022), rows independent: for i = 0 .. cols,
 *   q = clamp(round_half_even(w[i] * (1/s)), -q_max, q_max) with the column's scale s,
 *   errors[i] = (w[i] - q s) / u[i][i],  w[j] -= errors[i] * u[i][j] for j > i,  w[i] = q s.
 * w, errors [rows][cols]; u [cols][cols], of which the upper triangle is read; scales fp32
 * [rows][groups]: column i of the block is in group (col0 + i) / group_size. A scale of 0 gives 0. */
mq_status mq_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                        int64_t groups, const float *scales, const float *u, float *w,
                        float *errors);

/* One block of coordinate descent on what GPTQ minimizes, rows independent: for i = 0 .. cols,
 *   q = clamp(round_half_even((w[i] + gradient[i] / h[i][i]) * (1/s)), -q_max, q_max),
 *   gradient[j] -= (q s - w[i]) * h[i][j] for j >= i,  w[i] = q s.
 * w [rows][cols] holds code * scale; gradient [rows][cols] = (target - w) h, over all columns of the
 * weight; h [cols][cols], the block of the positive definite matrix; scales as in mq_gptq_block. */
mq_status mq_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                           int64_t groups, const float *scales, const float *h, float *gradient,
                           float *w);

/* Bytes of workspace for m tokens; alignment 64. */
mq_status mq_linear_workspace_size(const mq_linear *lin, int64_t m, size_t *bytes);

/* Tokens in one tile of the workspace's layout; [row0, row1) below must start at its multiples. */
mq_status mq_linear_tile_rows(const mq_linear *lin, int64_t m, int64_t *rows);

/* Step 1, per token: gather by perm, split off the salient channels, quantize groups. x [m][k], row
 * stride `stride`. Writes the workspace of tokens [row0, row1), row1 a multiple of the tile or m; with
 * all of them every byte of it, so that equal x give equal bytes.
 * perm is checked against [0, k) (MQ_INVALID_PERM). Uses about 60 KiB of stack. */
mq_status mq_linear_quantize(const mq_linear *lin, mq_dtype dtype, const void *x, int64_t stride,
                             int64_t m, int64_t row0, int64_t row1, void *workspace);

/* Step 2, after step 1 of the same rows: out[t][o] for tokens [row0, row1) and output channels
 * [16 * panel0, min(n, 16 * panel1)); out [m][n], row stride `stride`.
 *   y = (sum over salient channels, in order, of fma(x, w))  then per group, in order,
 *       fma(float(sum of qa * qw) * sw, sa, y)  then + bias, all fp32, then rounded to dtype.
 * A token with a non-finite input has NaN outputs. Uses about 80 KiB of stack. */
mq_status mq_linear_multiply(const mq_linear *lin, int64_t m, int64_t row0, int64_t row1,
                             int64_t panel0, int64_t panel1, const void *workspace, mq_dtype dtype,
                             void *out, int64_t stride);

#ifdef __cplusplus
}
#endif
#endif /* MIXEDQUANT_H */
