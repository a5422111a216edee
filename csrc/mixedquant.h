/* MixedQuant: group-wise INT4 weights and activations. Salient channels stay in 16 bits; their
 * weights may be stored in 8.
 *
 * The only public C header. The library uses no torch, no Python, no threads and no heap.
 * Callers own all buffers. Every function is re-entrant, and callers split work through the
 * half-open ranges that functions take. Functions return a status; they never print or abort.
 * Unless the status is MQ_OK, the contents of output buffers are unspecified.
 *
 * Words: m tokens (rows of x), n output channels, k input channels, g group size. Matrices are
 * row-major; "[a][b]" is contiguous unless a row stride (in elements) is given. Offsets are
 * 64-bit. Non-finite means NaN or Inf. bf16 and fp16 values are passed as uint16_t bits.
 *
 * Sizes: an array, counted up to its last element with 8 bytes per element, must have less than
 * 2^63 bytes, else the status is MQ_INVALID_SIZE. Arguments are checked before any array is read or
 * written, except that perm is checked by reading it. A problem without rows or without columns
 * returns at once, however large the other size. */
#ifndef MIXEDQUANT_H
#define MIXEDQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mq_status {
    MQ_OK = 0,
    MQ_INVALID_POINTER,    /* a pointer is NULL but its array is not empty */
    MQ_INVALID_SIZE,       /* a size or stride is negative or too large, or a range out of bounds */
    MQ_INVALID_GROUP_SIZE, /* group size < 1, or too many channels of a group for int32 sums */
    MQ_INVALID_BITS,       /* number of bits or largest code out of range */
    MQ_INVALID_DTYPE,      /* not a value of mq_dtype, or not allowed here */
    MQ_INVALID_PERM,       /* an index is outside [0, k) */
    MQ_INVALID_ROW,        /* an output channel is outside [0, n) */
    MQ_INVALID_SALIENT,    /* the number of salient channels is outside [0, k] */
    MQ_INVALID_SCALE,      /* a scale is negative or non-finite; the clip is not in [2^-10, 1] */
    MQ_INVALID_KEY,        /* not a value of mq_sort_key */
    MQ_INVALID_ISA,        /* not a value of mq_isa, or this processor lacks it */
    MQ_INVALID_ROTATION,   /* neither 0 nor a power of two up to MQ_MAX_ROTATION */
    MQ_INVALID_FORMAT,     /* not a value of mq_act_format or mq_activation */
    MQ_NON_FINITE          /* a weight is NaN or Inf, or a salient one overflows its 16-bit type */
} mq_status;

/* Returns one English sentence without a final period; never NULL. */
const char *mq_status_message(mq_status status);

/* MQ_I8 is for salient weights only. */
typedef enum mq_dtype { MQ_F32 = 0, MQ_F16 = 1, MQ_BF16 = 2, MQ_I8 = 3 } mq_dtype;

/* ---- Instruction sets ------------------------------------------------------------------------ */

/* Within a family, later is preferred. Scalar is the specification; the others equal it bit for
 * bit. */
typedef enum mq_isa {
    MQ_ISA_SCALAR = 0,
    MQ_ISA_AVX2 = 1,       /* AVX2, FMA, F16C */
    MQ_ISA_AVXVNNI = 2,    /* + AVX-VNNI: vpdpbusd on 256 bits */
    MQ_ISA_AVX512VNNI = 3, /* AVX-512 F, BW, DQ, VL and VNNI */
    MQ_ISA_NEON = 4,       /* Arm NEON with the dot product, sdot */
    MQ_ISA_NEONI8MM = 5,   /* + the matrix product, smmla */
    MQ_ISA_COUNT = 6
} mq_isa;

const char *mq_isa_name(mq_isa isa); /* "scalar", "avx2", ...; NULL for any other value */
int mq_isa_supported(mq_isa isa);    /* whether this processor has it */

/* The set in use: the best supported one, until mq_isa_set chooses another. Thread-safe. Calls
 * already running keep the set they started with. */
mq_isa mq_isa_active(void);
mq_status mq_isa_set(mq_isa isa);

/* ---- Channel statistics and sorting ---------------------------------------------------------- */

/* Statistics of k channels; each array is [k]. Before the first row, minimum is +Inf and the
 * rest is 0. */
typedef struct mq_channel_stats {
    float *abs_max;  /* max|x|; ignores NaN (the sums do not) */
    float *minimum;  /* min x; ignores NaN */
    double *abs_sum; /* sum|x| in row order */
    double *sq_sum;  /* sum x^2 in row order */
    int64_t *argmax; /* row of the first max|x|, counted from the first row ever added */
} mq_channel_stats;

/* Adds `rows` rows of x [rows][>= col1], row stride `stride`, to channels [col0, col1). count:
 * rows added before. Reads x[r * stride + c] only for c in the range, and writes only the
 * statistics of those channels. Any split into column ranges or row batches gives the same bits. */
mq_status mq_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                                  int64_t col0, int64_t col1, int64_t count,
                                  const mq_channel_stats *stats);

typedef enum mq_sort_key {
    MQ_KEY_ARGMAX = 0,   /* argmax */
    MQ_KEY_MAX = 1,      /* abs_max */
    MQ_KEY_MEAN3STD = 2, /* mean|x| + 3 std|x|, population standard deviation, variance >= 0 */
    MQ_KEY_RMS = 3       /* sqrt(mean x^2) */
} mq_sort_key;

/* Computes keys [k] from the statistics of `count` rows. With 0 rows, all keys are 0. Reads only
 * the arrays that the key needs. */
mq_status mq_sort_keys(mq_sort_key key, int64_t k, int64_t count, const mq_channel_stats *stats,
                       double *keys);

/* Stable argsort of keys [k] into indices [k]; NaN last in either direction. scratch: [k]. */
mq_status mq_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                     int64_t *scratch);

/* ---- Group quantization ---------------------------------------------------------------------- */

/* How values x of a group become codes of b bits. In every format code = clamp(round_half_even(x
 * * (1/s))), in fp32, with 1/s rounded once. Codes are stored minus the zero-point, so all
 * formats multiply alike and x is about code * s.
 *   symmetric:  s = clip max|x| / (2^(b-1) - 1),                -(2^(b-1) - 1) <= code <= 2^(b-1) - 1
 *   unsigned:   s = clip max(x, 0) / (2^b - 1),                              0 <= code <= 2^b - 1
 *   zero-point: s = clip (max(x, 0) + max(-x, 0)) / (2^b - 1),              -z <= code <= 2^b - 1 - z,
 *               z = min(2^b - 1, round_half_even(clip max(-x, 0) (1/s)))
 * If s is below the smallest normal fp32 number, s and all codes are 0. If the group has a
 * non-finite value, s is NaN and all codes are 0. */
typedef enum mq_act_format {
    MQ_ACT_SYMMETRIC = 0,
    MQ_ACT_UNSIGNED = 1,
    MQ_ACT_ZERO_POINT = 2
} mq_act_format;

/* The smallest clip ratio. With a smaller one, x * (1/s) could exceed int16, which kernels convert
 * it to before they clamp it. */
#define MQ_MIN_CLIP 0x1p-10f

/* Rows are cut into groups of group_size values; the last one may be short. */
typedef struct mq_group_format {
    int64_t group_size;       /* >= 1 */
    int num_bits;             /* 2..8; zero-point: 2..7 */
    mq_act_format act_format; /* not zero-point where codes are stored as int8 or uint8 */
    float clip;               /* in [MQ_MIN_CLIP, 1] */
} mq_group_format;

/* x [rows][cols], row stride `stride` >= cols -> q [rows][cols] (uint8_t bits if unsigned),
 * scales [rows][ceil(cols / g)]. */
mq_status mq_group_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, int8_t *q, float *scales);

/* out [rows][cols] = q * s, rounded once to dtype. A NaN scale gives NaN. */
mq_status mq_group_dequantize(const mq_group_format *format, const int8_t *q, const float *scales,
                              int64_t rows, int64_t cols, mq_dtype dtype, void *out);

/* out [rows][cols] = dequantize(quantize(x)) in x's dtype. out must not overlap x. */
mq_status mq_group_fake_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                                 int64_t rows, int64_t cols, int64_t stride, void *out);

/* out [rows][cols] = x with each group rotated in blocks (see mq_linear), rounded once to x's
 * dtype. Its own inverse, up to rounding. rotation: 0, or a power of two up to MQ_MAX_ROTATION. */
mq_status mq_group_hadamard(int64_t group_size, int64_t rotation, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, void *out);

/* ---- Nibbles --------------------------------------------------------------------------------- */

/* q [rows][cols] -> packed [rows][ceil(cols / 2)]: byte i = q[2i] & 15 | (q[2i+1] & 15) << 4. If
 * cols is odd, the high nibble of a row's last byte is 0. */
mq_status mq_pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, uint8_t *packed);

/* The inverse. Values are in [-8, 7], or in [0, 15] if is_unsigned. */
mq_status mq_unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols, int is_unsigned,
                            int8_t *q);

/* ---- The W4A4 linear ------------------------------------------------------------------------- */

enum {
    MQ_PANEL = 16,          /* output channels per panel of packed weights */
    MQ_QUAD = 4,            /* input channels whose products one instruction sums */
    MQ_BLOCK_BYTES = 64,    /* two quads of a panel's weights */
    MQ_SEGMENT_QUADS = 128, /* an int16 sum holds so many quads of products of up to 8 * 15 */
    MQ_PANELS_AT_ONCE = 2,  /* panels that a kernel may multiply together */
    MQ_MAX_ROTATION = 512   /* 4 * MQ_SEGMENT_QUADS: no rotated block crosses a segment */
};

/* Packed weights; docs/format.md describes them in full. The k4 = k - k_salient INT4 channels
 * come first in perm.
 *   groups = ceil(k4 / g). A group takes group_quads = ceil(min(g, k4) / 4) quads, the last one
 *     only as many as it needs; quads counts all of them. blocks = ceil(quads / 2),
 *     panels = ceil(n / 16)
 *   qweight [panels][blocks][64]: byte c * 4 + i of a block holds code + 8 of channel i of the even
 *     quad (low nibble) and of the odd quad (high nibble), for output channel c of the panel.
 *     Padding holds code 0
 *   scales  [panels][groups][16], bf16
 *   salient [panels][k_salient][16], bf16, fp16 or int8. An int8 weight is code * scale, code in
 *     [-127, 127]
 *   salient_scales [panels][16], bf16, for int8 only: one scale per output channel
 *   segments: groups are summed in parts of at most MQ_SEGMENT_QUADS quads */
typedef struct mq_shape {
    int64_t panels, groups, group_quads, quads, blocks, segments;
} mq_shape;

/* Fills *shape. Requires n, k >= 0, 0 <= k_salient <= k, group_size >= 1, and sizes for which the
 * packed arrays and perm have less than 2^63 bytes. */
mq_status mq_shape_of(int64_t n, int64_t k, int64_t k_salient, int64_t group_size, mq_shape *shape);

/* Rotation cuts the channels of a group, in perm's order, into blocks of `rotation` channels;
 * where fewer remain, into the largest powers of two that fit. It multiplies each block by the
 * orthonormal Hadamard matrix of its size: fp32 butterflies (a + b, a - b) from stride 1 up,
 * then one rounded product with 1/sqrt(size). Weights are rotated when packed and activations
 * when quantized, so their products do not change. */
typedef struct mq_linear {
    int64_t n, k, k_salient, group_size;
    const uint8_t *qweight;
    const uint16_t *scales;
    const void *salient;
    mq_dtype salient_dtype;         /* MQ_BF16, MQ_F16 or MQ_I8 */
    const uint16_t *salient_scales; /* read only if salient_dtype is MQ_I8 */
    const int32_t *perm;            /* [k]; NULL or the identity: channels are read in place */
    const void *bias;               /* [n] or NULL */
    mq_dtype bias_dtype;
    int rotation; /* 0 or 1: none; else a power of two up to MQ_MAX_ROTATION */
    int act_bits; /* b, 2..8; unsigned and zero-point: 2..7 */
    mq_act_format act_format;
    int per_token; /* 0: one scale per token and group; 1: one scale per token */
    float clip;    /* in [MQ_MIN_CLIP, 1] */
    mq_isa isa;    /* the kernels that quantize and multiply; determines the workspace's layout */
} mq_linear;

/* Packs rows [16 * panel0, 16 * panel1) of w [n][k], row stride `stride`. Reads n, k, k_salient,
 * group_size, salient_dtype, perm, rotation and isa of lin; the other fields may be 0.
 *   q_max: weight codes lie in [-q_max, q_max]; 1..7
 *   group_scales: fp32 [n][groups], or NULL for max|w| / q_max per group. Scales are rounded to
 *     bf16 first, or to 0 below the smallest normal; codes are computed from the rounded scale.
 * int8 salient weights follow the same rules, with q_max = 127 and a row's salient channels as its
 * group. Writes the same panels of qweight, scales, salient and, for MQ_I8, salient_scales. If
 * k = 0, writes nothing. */
mq_status mq_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                         int64_t stride, const float *group_scales, int64_t panel0, int64_t panel1,
                         uint8_t *qweight, uint16_t *scales, void *salient,
                         uint16_t *salient_scales);

/* Writes the weight that lin computes with: rows [16 * panel0, min(n, 16 * panel1)) of w, fp32
 * [n][k] in natural channel order. Every entry is code * scale, rotated back, or the salient
 * value. */
mq_status mq_unpack_weight(const mq_linear *lin, int64_t panel0, int64_t panel1, float *w);

/* Writes chosen rows of that weight, for embeddings: w[i] = row rows[i], fp32 [count][k]. rows
 * [count] may hold a row several times; each is checked against [0, n) (MQ_INVALID_ROW). */
mq_status mq_unpack_rows(const mq_linear *lin, const int64_t *rows, int64_t count, float *w);

/* Runs GPTQ's column loop (Frantar et al., 2022) on one block. Rows are independent. For i = 0
 * .. cols,
 *   q = clamp(round_half_even(w[i] * (1/s)), -q_max, q_max) with the column's scale s,
 *   errors[i] = (w[i] - q s) / u[i][i],  w[j] -= errors[i] * u[i][j] for j > i,  w[i] = q s.
 * w, errors [rows][cols]; u [cols][cols], upper triangle read; scales fp32 [rows][groups]. Column i
 * of the block is in group (col0 + i) / group_size, which must be below `groups`; col0 >= 0. A
 * scale of 0 gives 0. NaN stays NaN: if w[i], its scale or its error is NaN (0 / 0, where the
 * diagonal of u has a zero), so are all columns computed from it. Every other w[i] ends on the
 * grid. */
mq_status mq_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                        int64_t groups, const float *scales, const float *u, float *w,
                        float *errors);

/* Runs coordinate descent on GPTQ's objective over one block. Rows are independent. For i = 0 ..
 * cols,
 *   q = clamp(round_half_even((w[i] + gradient[i] / h[i][i]) * (1/s)), -q_max, q_max),
 *   gradient[j] -= (q s - w[i]) * h[i][j] for j >= i,  w[i] = q s.
 * w [rows][cols] holds code * scale. gradient [rows][cols] = (target - w) h, over all columns of
 * the weight. h [cols][cols] is the block of the positive definite matrix. scales, col0 and NaN as
 * in mq_gptq_block. */
mq_status mq_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                           int64_t groups, const float *scales, const float *h, float *gradient,
                           float *w);

/* Bytes of workspace for m tokens; MQ_INVALID_SIZE if they would be 2^63 or more. The workspace
 * must be aligned to 64 bytes. */
mq_status mq_linear_workspace_size(const mq_linear *lin, int64_t m, size_t *bytes);

/* Tokens per tile of the workspace. Ranges [row0, row1) below must start at a multiple of it. */
mq_status mq_linear_tile_rows(const mq_linear *lin, int64_t m, int64_t *rows);

/* Step 1, per token: gathers by perm, splits off the salient channels, quantizes groups. x
 * [m][k], row stride `stride`. Writes the workspace of tokens [row0, row1); row1 is a multiple
 * of the tile or m. Over all tokens it writes every byte, so equal x give equal bytes. Checks
 * perm against [0, k) (MQ_INVALID_PERM). A group has at most (2^31 - 1) / 2^(act_bits + 3) channels
 * (MQ_INVALID_GROUP_SIZE): 2^20 with 8 bits. Uses about 60 KiB of stack. */
mq_status mq_linear_quantize(const mq_linear *lin, mq_dtype dtype, const void *x, int64_t stride,
                             int64_t m, int64_t row0, int64_t row1, void *workspace);

/* Step 2, after step 1 of the same rows: computes out[t][o] for tokens [row0, row1) and output
 * channels [16 * panel0, min(n, 16 * panel1)). out [m][n], row stride `stride`.
 *   y = (sum over salient channels, in order, of fma(x, w))  then per group, in order,
 *       fma(float(sum of qa * qw) * sw, sa, y)  then + bias, all fp32, then rounded to dtype.
 * A token with a non-finite input has NaN outputs. Uses about 80 KiB of stack. */
mq_status mq_linear_multiply(const mq_linear *lin, int64_t m, int64_t row0, int64_t row1,
                             int64_t panel0, int64_t panel1, const void *workspace, mq_dtype dtype,
                             void *out, int64_t stride);

/* ---- Between the linears of a decoder layer ---------------------------------------------------
 *
 * All in dtype fp32, fp16 or bf16, computed in fp32 and rounded as each function states. Every
 * instruction set gives the same bits. Rows are independent. */

/* RMSNorm (Zhang and Sennrich, 2019) with gains offset + weight. */
typedef struct mq_norm {
    int64_t k;          /* >= 1 */
    const void *weight; /* [k], of x's dtype */
    float eps, offset;  /* >= 0, finite */
} mq_norm;

/* out [rows][k] = y * (offset + weight), y = x / sqrt(mean(x^2) + eps), for x [rows][k], row stride
 * `stride` >= k. With offset 0, y is rounded to dtype first. out must not overlap x. */
mq_status mq_rms_norm(const mq_norm *norm, mq_dtype dtype, const void *x, int64_t rows,
                      int64_t stride, void *out);

typedef enum mq_activation {
    MQ_SILU = 0,      /* x / (1 + e^-x) */
    MQ_GELU_TANH = 1, /* x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
    MQ_RELU = 2       /* max(x, 0) */
} mq_activation;

/* out [rows][n] = activation(gate) * up, for gate_up [rows][2 n]: a row holds gate [n], then up
 * [n]. The activation is within 2^-20 |x| of the exact one, then rounded to dtype. out must not
 * overlap gate_up. */
mq_status mq_gated(mq_activation activation, mq_dtype dtype, const void *gate_up, int64_t rows,
                   int64_t n, void *out);

/* out [count] = a + b. out may be a or b. */
mq_status mq_add(mq_dtype dtype, const void *a, const void *b, int64_t count, void *out);

/* x [heads][head_dim] = x * cos + h * sin, in place, with h = (-x[half:], x[:half]): rotary
 * position embedding (Su et al., 2021) as transformers computes it, every product rounded to
 * dtype. cos, sin [head_dim]. head_dim is even, at most 512. */
mq_status mq_rotary(mq_dtype dtype, const void *cos, const void *sin, int64_t heads,
                    int64_t head_dim, void *x);

#define MQ_KV_BLOCK 32

/* Tokens of a key-value cache as codes, in blocks of MQ_KV_BLOCK tokens. A block of keys or of
 * values of one head holds, without gaps:
 *   codes   [MQ_KV_BLOCK][row]: unsigned. With 8 bits a row is [head_dim]. With 4 bits it is
 *           [h], h = ceil(head_dim / 2): byte i has channel i in its low bits, h + i in its high
 *           ones.
 *   scales  of dtype: of keys [head_dim]; of values [MQ_KV_BLOCK][head_dim / group_size]
 *   zeros   as the scales
 * An element is code * scale + zero, in fp32, each operation rounded. */
typedef struct mq_kv_blocks {
    const void *keys, *values;        /* [kv_heads][count] blocks; aligned for fp32 */
    int64_t key_stride, value_stride; /* bytes from one head to the next; multiples of 4, at least
                                        * `count` blocks */
    int64_t count;                    /* >= 0; if 0, nothing else here is read */
    int bits;                         /* 4 or 8 */
    int64_t group_size;               /* divides head_dim, >= 1 */
} mq_kv_blocks;

/* Bytes of a block of keys and of a block of values. */
mq_status mq_kv_block_sizes(int bits, int64_t group_size, mq_dtype dtype, int64_t head_dim,
                            size_t *key_bytes, size_t *value_bytes);

/* The attention of one token of a sequence to all tokens in its cache: first those of the blocks,
 * then `tokens` others. all = MQ_KV_BLOCK * blocks.count + tokens. */
typedef struct mq_attention {
    int64_t heads, kv_heads;   /* heads is a multiple of kv_heads >= 1 */
    int64_t head_dim;          /* 1..512 */
    int64_t tokens;            /* in keys and values, the own one included; >= 1 */
    int64_t head_stride;       /* elements from one head of keys or values to the next; at least
                              * tokens * head_dim */
    const void *keys, *values; /* [kv_heads][tokens][head_dim] */
    const uint8_t *mask;       /* [all], 0 for tokens to ignore, but not for all; or NULL */
    float scale;               /* of products of queries and keys; finite */
    mq_kv_blocks blocks;
} mq_attention;

/* out [heads][head_dim] = softmax(scale * q keys^T) values, for the heads of q that read kv heads
 * [kv0, kv1), in fp32, rounded once. scores: heads / kv_heads * all floats of scratch. */
mq_status mq_attend(const mq_attention *attention, mq_dtype dtype, const void *q, int64_t kv0,
                    int64_t kv1, float *scores, void *out);

#ifdef __cplusplus
}
#endif
#endif /* MIXEDQUANT_H */
