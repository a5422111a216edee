/* The CPU's micro-kernels. dispatch.c holds one table of them per instruction set;
 * <kernel>_<isa>.c defines mq_<kernel>_<isa>.
 *
 * Kernels do not check arguments: api.c has. They touch no memory outside the stated arrays.
 * Their results equal the scalar kernels' bit for bit, except that a NaN may have any bits. */
#ifndef MQ_CPU_KERNELS_H
#define MQ_CPU_KERNELS_H

#include "../assume.h"
#include "../quantization.h"
#include "../sizes.h"

/* The families whose kernels are compiled. With MQ_SIMDE, x86 kernels run on any processor:
 * SIMDe emulates them lane by lane, so that every machine tests them. clang before 16 allows
 * NEON's products only with a flag on the whole file. */
#if defined(__x86_64__) || defined(MQ_SIMDE)
#define MQ_X86
#endif
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define MQ_NEON
#endif

#define MQ_INLINE inline __attribute__((always_inline))

enum {
    MQ_TILE_ROWS = 6,                       /* tokens per tile */
    MQ_TILE_ROWS_512 = 12,                  /* the same with 512-bit registers */
    MQ_ROW_CHUNK = 240,                     /* tokens that share one unpacking of weights */
    MQ_BUFFER = MQ_SEGMENT_QUADS * MQ_QUAD, /* values gathered at a time */
    MQ_ROWS_VALUES = 4 * MQ_BUFFER          /* keys or values of some tokens at a time */
};

static inline int64_t mq_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* Views into a workspace. h, the rows of a tile, is min(m, the instruction set's tile_rows).
 * starts: a segment's sum of codes * (weights + 8) starts at -8 * sum(codes), so it ends as the
 * plain dot product. For codes of up to 4 bits, AVX2 sums in int16: its `starts` then holds two
 * such values, one for positions 0 and 1 of each quad, one for positions 2 and 3. Its
 * quantize_groups and multiply_groups agree on this. */
typedef struct mq_activations {
    int64_t m, h;
    int8_t *codes;   /* [tiles][quads][h][4] */
    float *scales;   /* [tiles][groups][h] */
    int32_t *starts; /* [tiles][segments][h] */
    float *salient;  /* [tiles][k_salient][h] */
} mq_activations;

/* ---- Contracts -------------------------------------------------------------------------------
 *
 * Each kernel type is followed by mq_assume_<kernel>, which states what callers guarantee. Every
 * kernel calls it first. */

/* True if the arrays a and b, of so many bytes, do not overlap. */
static MQ_INLINE int mq_are_apart(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes) {
    return (uintptr_t)a + (uintptr_t)a_bytes <= (uintptr_t)b ||
           (uintptr_t)b + (uintptr_t)b_bytes <= (uintptr_t)a;
}

static MQ_INLINE int mq_is_half(mq_dtype dtype) { return dtype == MQ_F16 || dtype == MQ_BF16; }

/* Adds rows of x [rows][>= col1], row stride `stride`, to the statistics of channels [col0, col1).
 * count: rows added before. */
typedef void mq_channel_stats_fn(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                                 int64_t col0, int64_t col1, int64_t count,
                                 const mq_channel_stats *stats);
static MQ_INLINE void mq_assume_channel_stats(mq_dtype dtype, int64_t rows, int64_t stride,
                                              int64_t col0, int64_t col1, int64_t count) {
    MQ_ASSUME(dtype == MQ_F32 || mq_is_half(dtype));
    MQ_ASSUME(rows >= 0 && count >= 0);
    MQ_ASSUME(0 <= col0 && col0 <= col1 && col1 <= stride);
}

/* keys [k] from the arrays that the key needs; `count` rows were seen. */
typedef void mq_sort_keys_fn(mq_sort_key key, int64_t k, int64_t count,
                             const mq_channel_stats *stats, double *keys);
static MQ_INLINE void mq_assume_sort_keys(mq_sort_key key, int64_t k, int64_t count) {
    MQ_ASSUME((unsigned)key <= MQ_KEY_RMS);
    MQ_ASSUME(k >= 0 && count > 0);
}

/* x [n], fp16 or bf16, to fp32. NaN stays NaN. */
typedef void mq_widen_fn(mq_dtype dtype, const uint16_t *x, int64_t n, float *out);
static MQ_INLINE void mq_assume_widen(mq_dtype dtype, const uint16_t *x, int64_t n,
                                      const float *out) {
    MQ_ASSUME(mq_is_half(dtype) && n >= 0);
    MQ_ASSUME(mq_are_apart(x, 2 * n, out, 4 * n));
}

/* out [n][16] = q [n][16] * scales [16], bf16: a panel's int8 weights to fp32. */
typedef void mq_widen_codes_fn(const int8_t *q, const uint16_t *scales, int64_t n, float *out);
static MQ_INLINE void mq_assume_widen_codes(const int8_t *q, int64_t n, const float *out) {
    MQ_ASSUME(n >= 0);
    MQ_ASSUME(mq_are_apart(q, n * MQ_PANEL, out, 4 * n * MQ_PANEL));
}

/* x [n] to fp16 or bf16, rounded half to even. NaN becomes a quiet NaN. */
typedef void mq_narrow_fn(mq_dtype dtype, const float *x, int64_t n, uint16_t *out);
static MQ_INLINE void mq_assume_narrow(mq_dtype dtype, const float *x, int64_t n,
                                       const uint16_t *out) {
    MQ_ASSUME(mq_is_half(dtype) && n >= 0);
    MQ_ASSUME(mq_are_apart(x, 4 * n, out, 2 * n));
}

/* The extent of x [n]. */
typedef mq_extent mq_extent_of_fn(const float *x, int64_t n);
static MQ_INLINE void mq_assume_extent_of(int64_t n) { MQ_ASSUME(n >= 0); }

/* out [n] = x [n] times the orthonormal Hadamard matrix of size n. In place, or without overlap. */
typedef void mq_hadamard_fn(const float *x, int64_t n, float *out);
static MQ_INLINE void mq_assume_hadamard(const float *x, int64_t n, const float *out) {
    MQ_ASSUME(0 < n && n <= MQ_MAX_ROTATION && (n & (n - 1)) == 0);
    MQ_ASSUME(out == x || mq_are_apart(x, 4 * n, out, 4 * n));
}

/* q [n] = clamp(round_half_even(x * inverse), low, high), as the low 8 bits. x is finite. */
typedef void mq_quantize_fn(const float *x, int64_t n, float inverse, int low, int high, int8_t *q);
static MQ_INLINE void mq_assume_quantize(const float *x, int64_t n, float inverse, int low,
                                         int high, const int8_t *q) {
    MQ_ASSUME(n >= 0);
    MQ_ASSUME(0 <= inverse && inverse <= 0x1p126f);
    MQ_ASSUME(-128 <= low && low <= 0 && 0 <= high && high - low <= 255);
    MQ_ASSUME(mq_are_apart(x, 4 * n, q, n));
}

/* Whether all codes fit in a signed byte. */
static MQ_INLINE int mq_act_bits_fit(int bits, mq_act_format format) {
    return 2 <= bits && bits <= (format == MQ_ACT_SYMMETRIC ? 8 : 7);
}

/* Whether activations have more than 4 bits, which the int16 sums of AVX2 hold for a few quads
 * only. */
static MQ_INLINE int mq_has_wide_codes(const mq_linear *lin) { return lin->act_bits > 4; }

/* Quantizes activations x [n] in groups of group_size, the last of which may be short. Writes
 * per group: codes of whole quads, padded with 0; a scale; a start (see mq_activations). The
 * groups fill at most a segment. extent: one for all groups, or NULL to use each group's own. */
typedef void mq_quantize_groups_fn(const mq_linear *lin, const mq_extent *extent, const float *x,
                                   int64_t n, int64_t group_size, int8_t *codes, float *scales,
                                   int32_t *starts);
static MQ_INLINE void mq_assume_quantize_groups(const mq_linear *lin, const float *x, int64_t n,
                                                int64_t group_size, const int8_t *codes) {
    MQ_ASSUME(n > 0 && group_size > 0);
    MQ_ASSUME(mq_ceil_div(n, group_size) * mq_ceil_div(mq_min(n, group_size), MQ_QUAD) <=
              MQ_SEGMENT_QUADS);
    MQ_ASSUME((unsigned)lin->act_format <= MQ_ACT_ZERO_POINT);
    MQ_ASSUME(mq_act_bits_fit(lin->act_bits, lin->act_format));
    MQ_ASSUME(MQ_MIN_CLIP <= lin->clip && lin->clip <= 1);
    MQ_ASSUME(mq_are_apart(x, 4 * n, codes, n));
}

/* to [quads][h][4] = from [rows][stride]; row r holds `quads` quads of token r. */
typedef void mq_interleave_fn(const int8_t *from, int64_t stride, int64_t rows, int64_t quads,
                              int8_t *to, int64_t h);
static MQ_INLINE void mq_assume_interleave(const int8_t *from, int64_t stride, int64_t rows,
                                           int64_t quads, const int8_t *to, int64_t h) {
    MQ_ASSUME(0 <= rows && rows <= h && h <= MQ_TILE_ROWS_512);
    MQ_ASSUME(0 <= quads && quads * MQ_QUAD <= stride);
    MQ_ASSUME(mq_are_apart(from, rows * stride, to, quads * h * MQ_QUAD));
}

/* out [n] = q [n] * scale. */
typedef void mq_dequantize_fn(const int8_t *q, int64_t n, int is_unsigned, float scale, float *out);
static MQ_INLINE void mq_assume_dequantize(const int8_t *q, int64_t n, const float *out) {
    MQ_ASSUME(n >= 0);
    MQ_ASSUME(mq_are_apart(q, n, out, 4 * n));
}

/* q [n] to packed [ceil(n / 2)], as mixedquant.h says of a row, and back. */
typedef void mq_pack_nibbles_fn(const int8_t *q, int64_t n, uint8_t *packed);
typedef void mq_unpack_nibbles_fn(const uint8_t *packed, int64_t n, int is_unsigned, int8_t *q);
static MQ_INLINE void mq_assume_nibbles(const int8_t *q, int64_t n, const uint8_t *packed) {
    MQ_ASSUME(n >= 0);
    MQ_ASSUME(mq_are_apart(q, n, packed, n / 2 + n % 2));
}

/* Tiles [tile0, tile1) exist, and `sums` has room for their rows. */
static MQ_INLINE void mq_assume_tiles(const mq_activations *act, int64_t tile0, int64_t tile1,
                                      const float *sums) {
    MQ_ASSUME(0 < act->h && act->h <= MQ_TILE_ROWS_512);
    MQ_ASSUME(0 <= tile0 && tile0 <= tile1 && tile1 <= mq_ceil_div(act->m, act->h));
    MQ_ASSUME((tile1 - tile0) * act->h <= MQ_ROW_CHUNK);
    MQ_ASSUME(MQ_IS_ALIGNED(sums, 64));
}

/* sums [rows of the tiles][16] += salient channels [s0, s1) of a panel. w [s1 - s0][16]: their
 * fp32 weights. */
typedef void mq_multiply_salient_fn(const mq_activations *act, int64_t k_salient, int64_t tile0,
                                    int64_t tile1, int64_t s0, int64_t s1, const float *w,
                                    float *sums);
static MQ_INLINE void mq_assume_multiply_salient(const mq_activations *act, int64_t k_salient,
                                                 int64_t tile0, int64_t tile1, int64_t s0,
                                                 int64_t s1, const float *sums) {
    mq_assume_tiles(act, tile0, tile1, sums);
    MQ_ASSUME(0 <= s0 && s0 <= s1 && s1 <= k_salient);
}

/* sums [MQ_PANELS_AT_ONCE][MQ_ROW_CHUNK][16] += all groups, for the rows of the tiles and the
 * first `panels` panels. The sums of the other panels are undefined afterwards. qweight and
 * scales point at the first panel. */
typedef void mq_multiply_groups_fn(const mq_activations *act, const mq_shape *shape, int64_t tile0,
                                   int64_t tile1, int64_t panels, const uint8_t *qweight,
                                   const uint16_t *scales, float *sums);
static MQ_INLINE void mq_assume_multiply_groups(const mq_activations *act, const mq_shape *shape,
                                                int64_t tile0, int64_t tile1, int64_t panels,
                                                const float *sums) {
    mq_assume_tiles(act, tile0, tile1, sums);
    MQ_ASSUME(0 < panels && panels <= MQ_PANELS_AT_ONCE);
    MQ_ASSUME(shape->groups == 0 || shape->group_quads > 0);
    MQ_ASSUME(shape->quads <= shape->groups * shape->group_quads);
}

/* sums [16] += squares of x [n]: element i adds to sum i % 16. */
typedef void mq_add_squares_fn(const float *x, int64_t n, float *sums);
static MQ_INLINE void mq_assume_add_squares(int64_t n) { MQ_ASSUME(n >= 0); }

/* x [n] = activation(x). */
typedef void mq_activate_fn(mq_activation activation, float *x, int64_t n);
static MQ_INLINE void mq_assume_activate(mq_activation activation, int64_t n) {
    MQ_ASSUME((unsigned)activation <= MQ_RELU && n >= 0);
}

/* out [rows] = scale * (a [n] . b [rows][n]). */
typedef void mq_dot_rows_fn(const float *a, const float *b, int64_t rows, int64_t n, float scale,
                            float *out);
static MQ_INLINE void mq_assume_dot_rows(int64_t rows, int64_t n) { MQ_ASSUME(rows >= 0 && n > 0); }

/* x [n] = e^(x - most), most >= x. Returns their sum. */
typedef float mq_exponentials_fn(float *x, int64_t n, float most);
static MQ_INLINE void mq_assume_exponentials(int64_t n) { MQ_ASSUME(n >= 0); }

/* sums [n] += a [rows] times b [rows][n], row by row. */
typedef void mq_add_rows_fn(const float *a, const float *b, int64_t rows, int64_t n, float *sums);
static MQ_INLINE void mq_assume_add_rows(int64_t rows, int64_t n) { MQ_ASSUME(rows >= 0 && n > 0); }

/* out [rows][n] = codes * scale + zero, for rows of codes as in mq_kv_blocks. scales, zeros
 * [rows][n / group_size], row stride `stride`; 0 if all rows share them. */
typedef void mq_dequantize_rows_fn(int bits, const uint8_t *codes, int64_t rows, int64_t n,
                                   int64_t group_size, const float *scales, const float *zeros,
                                   int64_t stride, float *out);
static MQ_INLINE void mq_assume_dequantize_rows(int bits, int64_t rows, int64_t n,
                                                int64_t group_size, int64_t stride) {
    MQ_ASSUME(bits == 4 || bits == 8);
    MQ_ASSUME(rows > 0 && n > 0 && rows * n <= MQ_ROWS_VALUES);
    MQ_ASSUME(group_size > 0 && n % group_size == 0);
    MQ_ASSUME(stride == 0 || stride == n / group_size);
}

typedef struct mq_kernels {
    int tile_rows;
    mq_channel_stats_fn *channel_stats;
    mq_sort_keys_fn *sort_keys;
    mq_widen_fn *widen;
    mq_widen_codes_fn *widen_codes;
    mq_narrow_fn *narrow;
    mq_extent_of_fn *extent_of;
    mq_hadamard_fn *hadamard;
    mq_quantize_fn *quantize;
    mq_quantize_groups_fn *quantize_groups[2]; /* by mq_has_wide_codes */
    mq_interleave_fn *interleave;
    mq_dequantize_fn *dequantize;
    mq_pack_nibbles_fn *pack_nibbles;
    mq_unpack_nibbles_fn *unpack_nibbles;
    mq_add_squares_fn *add_squares;
    mq_activate_fn *activate;
    mq_dot_rows_fn *dot_rows;
    mq_exponentials_fn *exponentials;
    mq_add_rows_fn *add_rows;
    mq_dequantize_rows_fn *dequantize_rows;
    mq_multiply_salient_fn *multiply_salient;
    mq_multiply_groups_fn *multiply_groups[2]; /* by mq_has_wide_codes */
} mq_kernels;

/* Returns the table of a supported instruction set. */
const mq_kernels *mq_kernels_of(mq_isa isa);

#define MQ_DECLARE_KERNELS(isa)                       \
    mq_channel_stats_fn mq_channel_stats_##isa;       \
    mq_sort_keys_fn mq_sort_keys_##isa;               \
    mq_widen_fn mq_widen_##isa;                       \
    mq_widen_codes_fn mq_widen_codes_##isa;           \
    mq_narrow_fn mq_narrow_##isa;                     \
    mq_extent_of_fn mq_extent_of_##isa;               \
    mq_hadamard_fn mq_hadamard_##isa;                 \
    mq_quantize_fn mq_quantize_##isa;                 \
    mq_quantize_groups_fn mq_quantize_groups_##isa;   \
    mq_interleave_fn mq_interleave_##isa;             \
    mq_dequantize_fn mq_dequantize_##isa;             \
    mq_pack_nibbles_fn mq_pack_nibbles_##isa;         \
    mq_unpack_nibbles_fn mq_unpack_nibbles_##isa;     \
    mq_add_squares_fn mq_add_squares_##isa;           \
    mq_activate_fn mq_activate_##isa;                 \
    mq_dot_rows_fn mq_dot_rows_##isa;                 \
    mq_exponentials_fn mq_exponentials_##isa;         \
    mq_add_rows_fn mq_add_rows_##isa;                 \
    mq_dequantize_rows_fn mq_dequantize_rows_##isa;   \
    mq_multiply_salient_fn mq_multiply_salient_##isa; \
    mq_multiply_groups_fn mq_multiply_groups_##isa;

MQ_DECLARE_KERNELS(scalar)
MQ_DECLARE_KERNELS(avx2)
MQ_DECLARE_KERNELS(avxvnni)
MQ_DECLARE_KERNELS(avx512vnni)
MQ_DECLARE_KERNELS(neon)
MQ_DECLARE_KERNELS(neoni8mm)
mq_multiply_groups_fn mq_multiply_groups_avx2_8bit;

/* ---- Single values, the same for every instruction set --------------------------------------- */

static inline size_t mq_dtype_size(mq_dtype dtype) {
    return dtype == MQ_F32 ? 4 : dtype == MQ_I8 ? 1 : 2;
}

static inline float mq_bf16_to_f32(uint16_t bits) { return mq_float_of_bits((uint32_t)bits << 16); }

static inline uint16_t mq_f32_to_bf16(float value) {
    uint32_t bits = mq_bits_of_float(value);
    if ((bits & 0x7fffffffu) > MQ_INFINITY_BITS)
        return 0x7fc0; /* rounding could carry a NaN to 0 */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float mq_f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) /* Inf or NaN */
        return mq_float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) /* subnormal: the product with 2^-24 is exact */
        return mq_float_of_bits(sign | mq_bits_of_float((float)magnitude * 0x1p-24f));
    return mq_float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
}

static inline uint16_t mq_f32_to_f16(float value) {
    uint32_t bits = mq_bits_of_float(value), magnitude = bits & 0x7fffffffu;
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 2^16 or more */
    if (magnitude < 0x38800000u) {
        /* Subnormal: adding 0.5 rounds half to even and leaves the result in the low bits. */
        uint32_t shifted = mq_bits_of_float(mq_float_of_bits(magnitude) + 0.5f);
        return (uint16_t)(sign | (shifted - 0x3f000000u));
    }
    return (uint16_t)(sign |
                      ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

/* Element i of an array, as fp32. */
static inline float mq_load(mq_dtype dtype, const void *x, int64_t i) {
    switch (dtype) {
        case MQ_F16: return mq_f16_to_f32(((const uint16_t *)x)[i]);
        case MQ_BF16: return mq_bf16_to_f32(((const uint16_t *)x)[i]);
        case MQ_I8: return (float)((const int8_t *)x)[i];
        default: return ((const float *)x)[i];
    }
}

#endif
