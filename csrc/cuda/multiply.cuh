// Building blocks of the multiplying kernels. Output channels are rows of the tensor cores'
// products, tokens are columns.
//
// Lane 4 r + t works on panel r / 4 of a pair of panels. Of the pair's 32 output channels it owns
// four neighbours, 4 (r % 4) .. + 3. They are rows r and r + 8 of a first product and of a second
// one. So the lane needs exactly 16 contiguous bytes of packed weights, from block t of a step, and
// stores its four channels of a token together.
#ifndef MQ_CUDA_MULTIPLY_CUH
#define MQ_CUDA_MULTIPLY_CUH

#include "common.cuh"

namespace mq {

struct multiply_args {
    mq_linear lin;
    mq_shape shape;
    slots slot;
    tokens from;
    mq_dtype dtype;  // of out
    void *out;
};

__device__ __forceinline__ int lane_panel() { return lane() / 16; }
__device__ __forceinline__ int lane_channel() { return lane() / 4 % 4 * 4; }
__device__ __forceinline__ int lane_t() { return lane() % 4; }

// ---- Sums ----

// Integer sums start at the bits of 1.5 * 2^23. Read as floats they are 1.5 * 2^23 + sum while
// |sum| < 2^22, so they need no conversion.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// Whether the sum of a whole group, times 16 (see unpack), may reach 2^22: products of codes are
// below 8 * 2^act_bits.
__device__ __forceinline__ bool is_long_group(const multiply_args &args) {
    return args.shape.group_quads > (1 << 13) >> args.lin.act_bits;
}

// The sum in an integer that started there, correct even if the integer wrapped.
__device__ __forceinline__ int sum_of(int dot) {
    return static_cast<int>(static_cast<uint32_t>(dot) - static_cast<uint32_t>(kMagicBits));
}

template <int NT, typename T>
__device__ __forceinline__ void fill(T (&values)[NT][4], T value) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) values[n][e] = value;
}

// The sums of a pair of panels and 8 * NT tokens. Element [h][n][2 i + j] is channel 2 h + i of the
// lane's four and token 8 n + 2 t + j.
template <int NT>
struct pair_sums {
    float y[2][NT][4];
    int dots[2][NT][4];

    __device__ __forceinline__ void clear() { fill(y[0], 0.0f), fill(y[1], 0.0f); }
    __device__ __forceinline__ void start_group() { start_half(0), start_half(1); }
    __device__ __forceinline__ void start_half(int h) { fill(dots[h], kMagicBits); }

    // y = fma(dots * sw, sa, y). sw: bf16 scales of the lane's channels. unit: the value of one
    // step of a dot. sa: scales of tokens 8 n + 2 t and + 1.
    __device__ __forceinline__ void add_group(uint2 sw, float unit, const float2 (&sa)[NT],
                                              bool is_long) {
        add_half(0, sw.x, unit, sa, is_long);
        add_half(1, sw.y, unit, sa, is_long);
    }

    // The same for channels 2 h and 2 h + 1.
    __device__ __forceinline__ void add_half(int h, uint32_t sw, float unit, const float2 (&sa)[NT],
                                             bool is_long) {
        const float scale[2] = {unit * __uint_as_float(sw << 16),
                                unit * __uint_as_float(sw & 0xffff0000u)};
        // larger scales could overflow when multiplied by kMagic
        if (!is_long && scale[0] < 0x1p100f && scale[1] < 0x1p100f) {
            // scales have 8 significant bits, so this is the exact dot * sw, rounded once
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float less = -kMagic * scale[i];
                add_channel(h, i, sa,
                            [&](int dot) { return fmaf(__int_as_float(dot), scale[i], less); });
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                add_channel(h, i, sa,
                            [&](int dot) { return static_cast<float>(sum_of(dot)) * scale[i]; });
        }
    }

    // add_half for sums that start at 0. The conversion costs as much as the magic start, and long
    // groups and large scales need no special case.
    __device__ __forceinline__ void add_plain_half(int h, uint32_t sw, float unit,
                                                   const float2 (&sa)[NT]) {
        const float scale[2] = {unit * __uint_as_float(sw << 16),
                                unit * __uint_as_float(sw & 0xffff0000u)};
#pragma unroll
        for (int i = 0; i < 2; i++)
            add_channel(h, i, sa, [&](int dot) { return static_cast<float>(dot) * scale[i]; });
    }

    __device__ __forceinline__ void scale_channels(uint2 by) {
        const float scale[4] = {__uint_as_float(by.x << 16), __uint_as_float(by.x & 0xffff0000u),
                                __uint_as_float(by.y << 16), __uint_as_float(by.y & 0xffff0000u)};
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) y[h][n][e] *= scale[2 * h + e / 2];
    }

   private:
    template <typename Scaled>
    __device__ __forceinline__ void add_channel(int h, int i, const float2 (&sa)[NT],
                                                const Scaled &scaled) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float *to = &y[h][n][2 * i];
            const int *dot = &dots[h][n][2 * i];
            to[0] = fmaf(scaled(dot[0]), sa[n].x, to[0]);
            to[1] = fmaf(scaled(dot[1]), sa[n].y, to[1]);
        }
    }
};

// ---- INT4 ----

// Splits a channel's word of a block into codes times 16, of the even and of the odd quad.
__device__ __forceinline__ void unpack(uint32_t word, uint32_t &even, uint32_t &odd) {
    even = xor_and(word << 4, 0x80808080u, 0xf0f0f0f0u);
    odd = xor_and(word, 0x80808080u, 0xf0f0f0f0u);
}

// Unpacks a step's weights to the left sides of both products.
__device__ __forceinline__ void unpack(uint4 words, fragment_a (&a)[2]) {
    unpack(words.x, a[0].r[0], a[0].r[2]);
    unpack(words.y, a[0].r[1], a[0].r[3]);
    unpack(words.z, a[1].r[0], a[1].r[2]);
    unpack(words.w, a[1].r[1], a[1].r[3]);
}

constexpr float kUnpackedUnit = 1.0f / 16;

// Copies the 4-byte numbers of tokens first .. first + 3 from [groups][stride] to shared memory,
// with zeros from token m on.
template <typename T>
__device__ __forceinline__ void copy_by_token(const multiply_args &args, const T *numbers,
                                              int64_t group, int64_t first, T *to) {
    const int64_t left = args.from.m - first;
    copy_async(to, numbers + group * args.from.stride + first,
               left >= 4  ? 16
               : left > 0 ? static_cast<int>(left) * 4
                          : 0);
}

#ifdef MQ_HAS_S4
// Puts a step's weights into half h of the left sides as nibbles, minus their offset.
__device__ __forceinline__ void put_nibbles(uint4 words, int h, fragment_a (&a)[2]) {
    const uint32_t offset = 0x88888888u;
    a[0].r[2 * h] = words.x ^ offset, a[0].r[2 * h + 1] = words.y ^ offset;
    a[1].r[2 * h] = words.z ^ offset, a[1].r[2 * h + 1] = words.w ^ offset;
}

// The right side of a product that sums weights. The lane's nibbles are 1 for channels of the group
// and 0 for channels of other groups or past the last block.
__device__ __forceinline__ uint32_t ones_of(const multiply_args &args, int64_t slot,
                                            int64_t group) {
    if (args.slot.whole() && slot + 1 < args.slot.total) return 0x11111111u;
    const int64_t first = group * args.shape.group_quads;
    const int64_t quads = smaller(args.shape.group_quads, args.shape.quads - first);
    // relative to the group, below 2^32, so unsigned words suffice
    const auto even = static_cast<uint32_t>(args.slot.step(slot, group) * 8 + 2 * lane_t() - first);
    const auto end = static_cast<uint32_t>(quads);
    return (even < end ? 0x01010101u : 0) | (even + 1 < end ? 0x10101010u : 0);
}
#endif

// ---- Salient channels, 16 at a time ----
//
// Lane t takes four channels of the chunk, as two pairs: 4 t .. + 3 (NEIGHBOURS), or 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9, those it holds of a row of 16 halves in shared memory (AS_IN_ROWS).
enum salient_order { NEIGHBOURS, AS_IN_ROWS };

__device__ __forceinline__ uint32_t pack_halves(float low, float high, bool is_f16) {
    if (is_f16) return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// Stored weights of the lane's four salient channels and four output channels.
struct salient_words {
    uint2 w[4];  // int8 uses only x
};

// Loads the lane's four output channels of a row of 16.
__device__ __forceinline__ uint2 salient_word(const unsigned char *row, mq_dtype stored) {
    if (stored == MQ_I8) return {*reinterpret_cast<const uint32_t *>(row + lane_channel()), 0};
    return *reinterpret_cast<const uint2 *>(row + lane_channel() * 2);
}

// Loads the weights that record `record` of the tokens is multiplied by; zeros where there are
// none.
template <salient_order ORDER = NEIGHBOURS>
__device__ __forceinline__ salient_words load_salient(const multiply_args &args, int64_t panel,
                                                      int record) {
    const int row_bytes = size_of(args.lin.salient_dtype) * 16;
    const int chunk = args.from.terms == 1 ? record : record / args.from.terms;
    const int channel = chunk * 16 + (ORDER == NEIGHBOURS ? 4 * lane_t() : 2 * lane_t());
    const unsigned char *rows = static_cast<const unsigned char *>(args.lin.salient) +
                                (panel * args.lin.k_salient + channel) * row_bytes;
    salient_words words;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int more = ORDER == NEIGHBOURS ? i : i % 2 + i / 2 * 8;
        words.w[i] = {0, 0};
        if (panel < args.shape.panels && channel + more < args.lin.k_salient)
            words.w[i] = salient_word(rows + more * row_bytes, args.lin.salient_dtype);
    }
    return words;
}

__device__ __forceinline__ void salient_left(const salient_words &words, mq_dtype stored,
                                             bool is_f16, fragment_a (&a)[2]) {
    if (stored == MQ_I8) {
        // both half types hold codes exactly; the scale is applied to the sum
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const uint32_t first = words.w[2 * p].x, second = words.w[2 * p + 1].x;
#pragma unroll
            for (int c = 0; c < 4; c++)
                a[c / 2].r[2 * p + c % 2] =
                    pack_halves(static_cast<float>(static_cast<int8_t>(first >> 8 * c)),
                                static_cast<float>(static_cast<int8_t>(second >> 8 * c)), is_f16);
        }
        return;
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const uint2 first = words.w[2 * p], second = words.w[2 * p + 1];
        a[0].r[2 * p] = __byte_perm(first.x, second.x, 0x5410);
        a[0].r[2 * p + 1] = __byte_perm(first.x, second.x, 0x7632);
        a[1].r[2 * p] = __byte_perm(first.y, second.y, 0x5410);
        a[1].r[2 * p + 1] = __byte_perm(first.y, second.y, 0x7632);
    }
}

// Splits fp16 exactly into a sum of two bf16: 11 significant bits are 8 and 3. a becomes the first
// term.
__device__ __forceinline__ void split_halves(fragment_a &a, fragment_a &rest) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = f16_to_f32(static_cast<uint16_t>(a.r[i]));
        const float high = f16_to_f32(static_cast<uint16_t>(a.r[i] >> 16));
        const uint32_t low_bits = __float_as_uint(low) & 0xffff0000u;
        const uint32_t high_bits = __float_as_uint(high) & 0xffff0000u;
        a.r[i] = __byte_perm(low_bits, high_bits, 0x7632);
        rest.r[i] = __byte_perm(__float_as_uint(low - __uint_as_float(low_bits)),
                                __float_as_uint(high - __uint_as_float(high_bits)), 0x7632);
    }
}

template <int NT>
__device__ __forceinline__ void add_salient(pair_sums<NT> &sums, const salient_words &words,
                                            const fragment_b (&b)[NT], mq_dtype stored,
                                            bool is_f16) {
    fragment_a a[2];
    salient_left(words, stored, is_f16, a);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (is_f16) {
#pragma unroll
            for (int n = 0; n < NT; n++) multiply_f16(sums.y[h][n], a[h], b[n]);
            continue;
        }
        if (stored == MQ_F16) {
            fragment_a rest;
            split_halves(a[h], rest);
#pragma unroll
            for (int n = 0; n < NT; n++) multiply_bf16(sums.y[h][n], rest, b[n]);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) multiply_bf16(sums.y[h][n], a[h], b[n]);
    }
}

// ---- Output ----

struct bias_values {
    float v[4];
};

// Loads the bias of output channels first .. first + 3. Where there is none it is -0, which changes
// no sum.
__device__ __forceinline__ bias_values load_bias(const multiply_args &args, int64_t first) {
    bias_values bias = {-0.0f, -0.0f, -0.0f, -0.0f};
    if (args.lin.bias)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (first + c < args.lin.n)
                bias.v[c] = load(args.lin.bias_dtype, args.lin.bias, first + c);
    return bias;
}

// Stores four neighbours, aligned to their size.
__device__ __forceinline__ void store_four(mq_dtype dtype, void *to, const float (&y)[4]) {
    if (dtype == MQ_F32)
        *static_cast<float4 *>(to) = {y[0], y[1], y[2], y[3]};
    else if (dtype == MQ_F16)
        *static_cast<uint2 *>(to) = {f32_to_f16_pair(y[0], y[1]), f32_to_f16_pair(y[2], y[3])};
    else
        *static_cast<uint2 *>(to) = {f32_to_bf16_pair(y[0], y[1]), f32_to_bf16_pair(y[2], y[3])};
}

// Adds the bias to y [4] and stores it as output channels first .. first + 3 of a token, up to n.
__device__ __forceinline__ void store_channels(const multiply_args &args, int64_t token,
                                               int64_t first, const bias_values &bias,
                                               float (&y)[4]) {
    const int64_t n = args.lin.n, at = token * n + first;
#pragma unroll
    for (int c = 0; c < 4; c++) y[c] += bias.v[c];
    if (n % 4 == 0) {
        store_four(args.dtype, static_cast<unsigned char *>(args.out) + at * size_of(args.dtype),
                   y);
        return;
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (first + c < n) store(args.dtype, args.out, at + c, y[c]);
}

// store_sums for n a multiple of 4, with the checks that do not depend on the token hoisted.
template <mq_dtype DTYPE, int NT>
__device__ __forceinline__ void store_fours(const multiply_args &args, int64_t token, int64_t first,
                                            const bias_values &bias, const pair_sums<NT> &sums) {
    const int64_t own = token + 2 * lane_t(), row_bytes = args.lin.n * size_of(DTYPE);
    unsigned char *to =
        static_cast<unsigned char *>(args.out) + own * row_bytes + first * size_of(DTYPE);
    const int left = static_cast<int>(smaller<int64_t>(args.from.m - own, 8 * NT));
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (8 * n + j >= left) return;
            float y[4];
#pragma unroll
            for (int c = 0; c < 4; c++) y[c] = sums.y[c / 2][n][c % 2 * 2 + j] + bias.v[c];
            store_four(DTYPE, to + j * row_bytes, y);
        }
        to += 8 * row_bytes;
    }
}

// Stores all sums of the lane's panel, for tokens from `token` on.
template <int NT>
__device__ __forceinline__ void store_sums(const multiply_args &args, int64_t token, int64_t panel,
                                           const pair_sums<NT> &sums) {
    const int64_t first = panel * MQ_PANEL + lane_channel();
    if (first >= args.lin.n) return;
    const bias_values bias = load_bias(args, first);
    if (args.lin.n % 4 == 0) {
        if (args.dtype == MQ_F32)
            store_fours<MQ_F32>(args, token, first, bias, sums);
        else if (args.dtype == MQ_F16)
            store_fours<MQ_F16>(args, token, first, bias, sums);
        else
            store_fours<MQ_BF16>(args, token, first, bias, sums);
        return;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int64_t at = token + 8 * n + 2 * lane_t() + j;
            float y[4];
#pragma unroll
            for (int c = 0; c < 4; c++) y[c] = sums.y[c / 2][n][c % 2 * 2 + j];
            if (at < args.from.m) store_channels(args, at, first, bias, y);
        }
    }
}

}  // namespace mq

// Entries of multiply_*.cu, one per kernel: out = the tokens in args.from times the weights. arch:
// the device's, such as 90. They return a cudaError_t.
int mq_multiply_decode_8(const mq::multiply_args &args, int arch, void *stream);
int mq_multiply_decode_16(const mq::multiply_args &args, int arch, void *stream);
int mq_multiply_decode_32(const mq::multiply_args &args, int arch, void *stream);
int mq_multiply_prefill_s8(const mq::multiply_args &args, int arch, void *stream);
int mq_multiply_prefill_s4(const mq::multiply_args &args, int arch, void *stream);
int mq_multiply_prefill_wgmma(const mq::multiply_args &args, int arch, void *stream);

#endif
