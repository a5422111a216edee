// The first step of the linear: gathers by perm, splits off the salient channels, rotates,
// quantizes, and stores codes in the order that the multiplying kernels read. Shared by quantize.cu
// (any group size) and quantize_columns.cu (groups of 32, 64 ... 512 channels).
#ifndef MQ_CUDA_QUANTIZE_CUH
#define MQ_CUDA_QUANTIZE_CUH

#include "common.cuh"

namespace mq {

struct quantize_args {
    mq_linear lin;
    mq_shape shape;
    slots slot;
    tokens to;
    mq_dtype dtype;
    const unsigned char *x;
    bool staged;  // quantize.cu first copies the block's token to shared memory
};

__device__ __forceinline__ int64_t channel_at(const quantize_args &args, int64_t i) {
    return args.lin.perm ? args.lin.perm[i] : i;
}

__device__ __forceinline__ mq_quantization quantization_for(const quantize_args &args,
                                                            const mq_extent &of) {
    return mq_quantization_of(args.lin.act_bits, args.lin.act_format, args.lin.clip, of);
}

// ---- Salient channels ----

__device__ __forceinline__ uint16_t *salient_at(const quantize_args &args, int64_t token, int64_t s,
                                                int term) {
    const int64_t record = (s / 16 * args.to.terms + term) * args.to.stride + token;
    return reinterpret_cast<uint16_t *>(args.to.salient) + record * 16 + s % 16;
}

// Stores salient channels s .. s + 3 of a token as sums of halves; s is a multiple of 4. values:
// the fp32 values, 0 from k_salient on. Returns true if all are finite.
__device__ __forceinline__ bool store_salient(const quantize_args &args, int64_t token, int64_t s,
                                              const float (&values)[4]) {
    MQ_ASSUME(s % 4 == 0 && 0 <= s && s < args.to.chunks * 16);
    MQ_ASSUME(0 <= token && token < args.to.m);
    float rest[4];
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        rest[c] = values[c];
        finite &= (mq_bits_of_float(rest[c]) & MQ_INFINITY_BITS) != MQ_INFINITY_BITS;
    }
    for (int term = 0; term < args.to.terms; term++) {
        uint32_t halves[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            // Truncated, not rounded: the remainder is exact and nothing overflows.
            const uint32_t bits = mq_bits_of_float(rest[c]) & 0xffff0000u;
            halves[c] = args.to.is_f16 ? f32_to_f16(rest[c]) : bits >> 16;
            rest[c] -= mq_float_of_bits(bits);
        }
        *reinterpret_cast<uint2 *>(salient_at(args, token, s, term)) = {
            halves[0] | halves[1] << 16, halves[2] | halves[3] << 16};
    }
    return finite;
}

// Stores a NaN for a token with a non-finite salient value, so that all its outputs are NaN. An Inf
// would make only some outputs Inf, and NaN where a weight is 0.
__device__ __forceinline__ void store_salient_nan(const quantize_args &args, int64_t token) {
    *salient_at(args, token, 0, 0) = args.to.is_f16 ? 0x7e00 : 0x7fc0;
}

// ---- Entries ----

// Launches a kernel of quantize_columns.cu. Returns -1 if they do not take these groups or a token
// with this many channels.
int quantize_by_columns(const quantize_args &args, void *stream);

}  // namespace mq

// Quantizes tokens x [to.m][lin.k] into `to`. Returns a cudaError_t.
int mq_quantize(const mq_linear &lin, const mq::tokens &to, mq_dtype dtype, const void *x,
                void *stream);

#endif
