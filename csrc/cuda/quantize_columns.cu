// Quantizes groups of 32, 64 ... 512 channels, which most layers have.
#include "quantize.cuh"

namespace mq {
namespace {

constexpr int64_t kManyTokens = 1024;  // enough that blocks of two tokens fill any GPU
constexpr int64_t kFewTokens = 256;    // too few for blocks of one token to fill one

constexpr int kSlotChannels = 32, kLaneChannels = 16;  // a lane's channels are half a slot

__device__ __forceinline__ float to_f32(mq_dtype dtype, uint32_t bits) {
    return dtype == MQ_F32   ? __uint_as_float(bits)
           : dtype == MQ_F16 ? f16_to_f32(static_cast<uint16_t>(bits))
                             : __uint_as_float(bits << 16);
}

template <mq_dtype DTYPE>
struct bits_of {
    typedef uint16_t type;
};
template <>
struct bits_of<MQ_F32> {
    typedef uint32_t type;
};

// A channel of the block's tokens, contiguous in shared memory: a lane loads all of them at once.
template <typename T, int ROWS>
struct alignas(sizeof(T) * ROWS) column {
    T row[ROWS];
};

// Extra columns after the channels: for an index outside [0, k), and for no channel.
constexpr int kNanColumn = 0, kZeroColumn = 1, kMoreColumns = 2;

template <mq_dtype DTYPE, int ROWS>
struct columns {
    typedef typename bits_of<DTYPE>::type T;
    typedef column<T, ROWS> type;
    static constexpr int kPerWord = 4 / sizeof(T);
    const quantize_args &args;
    type *at;
    int64_t first;  // token
    int rows, k;

    __device__ __forceinline__ explicit columns(const quantize_args &args_)
        : args(args_),
          at(reinterpret_cast<type *>(dynamic_shared())),
          first(static_cast<int64_t>(blockIdx.x) * ROWS),
          rows(static_cast<int>(smaller<int64_t>(ROWS, args_.to.m - first))),
          k(static_cast<int>(args_.lin.k)) {}

    // Tokens past the last one repeat it.
    __device__ __forceinline__ const unsigned char *token_row(int r) const {
        return args.x + (first + smaller(r, rows - 1)) * k * static_cast<int>(sizeof(T));
    }

    __device__ __forceinline__ void fill() const {
        const int thread = static_cast<int>(threadIdx.x);
        if (k % kPerWord == 0) {
            constexpr int kAhead = 8 / ROWS;  // loads in flight; latency is the bottleneck
            const int words = k / kPerWord;
            for (int w = thread; w < words; w += kThreads * kAhead) {
                uint32_t in[kAhead][ROWS];
#pragma unroll
                for (int i = 0; i < kAhead; i++)
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        if (w + i * kThreads < words)
                            in[i][r] =
                                reinterpret_cast<const uint32_t *>(token_row(r))[w + i * kThreads];
#pragma unroll
                for (int i = 0; i < kAhead; i++) {
                    if (w + i * kThreads >= words) break;
#pragma unroll
                    for (int c = 0; c < kPerWord; c++) {
                        type to;
#pragma unroll
                        for (int r = 0; r < ROWS; r++)
                            to.row[r] =
                                static_cast<T>(in[i][r] >> c * 8 * static_cast<int>(sizeof(T)));
                        at[(w + i * kThreads) * kPerWord + c] = to;
                    }
                }
            }
        } else {
            for (int i = thread; i < k * ROWS; i += kThreads)
                at[i / ROWS].row[i % ROWS] =
                    reinterpret_cast<const T *>(token_row(i % ROWS))[i / ROWS];
        }
        if (thread < ROWS) {
            at[k + kNanColumn].row[thread] = static_cast<T>(DTYPE == MQ_F32   ? 0x7fc00000u
                                                            : DTYPE == MQ_F16 ? 0x7e00u
                                                                              : 0x7fc0u);
            at[k + kZeroColumn].row[thread] = 0;
        }
    }

    __device__ __forceinline__ int index(int channel) const {
        return static_cast<unsigned>(channel) < static_cast<unsigned>(k) ? channel : k + kNanColumn;
    }
    // The column of the channel at position i of perm.
    __device__ __forceinline__ int place(int64_t i) const {
        return index(static_cast<int>(channel_at(args, i)));
    }

    // The columns of 4 neighbours in perm, of which n exist. i is a multiple of 4.
    __device__ __forceinline__ void places(int64_t i, int n, int (&to)[4]) const {
        MQ_ASSUME(i % 4 == 0);
        if (n >= 4 && args.lin.perm) {
            const int4 channels = *reinterpret_cast<const int4 *>(args.lin.perm + i);
            to[0] = index(channels.x), to[1] = index(channels.y);
            to[2] = index(channels.z), to[3] = index(channels.w);
            return;
        }
#pragma unroll
        for (int c = 0; c < 4; c++) to[c] = c < n ? place(i + c) : k + kZeroColumn;
    }

    // Stores the salient channels as sums of halves, 4 at a time. bad [ROWS], initially 0, becomes
    // 1 for a token with a non-finite value.
    __device__ __forceinline__ void split(int *bad) const {
        const int64_t k4 = args.lin.k - args.lin.k_salient;
        const int jobs = static_cast<int>(args.to.chunks) * 4 * ROWS;
        for (int job = static_cast<int>(threadIdx.x); job < jobs; job += kThreads) {
            const int r = job % ROWS, s = job / ROWS * 4;
            if (r >= rows) continue;
            float values[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int from = s + c < args.lin.k_salient ? place(k4 + s + c) : k + kZeroColumn;
                values[c] = to_f32(DTYPE, at[from].row[r]);
            }
            if (!store_salient(args, first + r, s, values)) bad[r] = 1;
        }
    }
};

// The channels of a group that the lane's 16 values belong to: e0 + 4 i + c, or e0 + 8 i + c in the
// order EVEN_FIRST. Their codes are 16 contiguous bytes of a slot's record.
struct lane_place {
    int lanes, in_group, e0, step;  // lanes: per group
    bool even_first;

    __device__ __forceinline__ lane_place(const quantize_args &args)
        : lanes(static_cast<int>(args.lin.group_size) / kLaneChannels),
          in_group(lane() & (lanes - 1)),
          even_first(args.to.order == EVEN_FIRST) {
        step = even_first ? 8 : 4;
        e0 = in_group / 2 * kSlotChannels + in_group % 2 * (even_first ? 4 : kLaneChannels);
    }
};

// Rotates a group of n values by strided butterflies.
template <bool WHOLE>
struct rotation_of {
    const lane_place &at;
    int n, size;  // size: of whole blocks

    __device__ __forceinline__ int block(int i) const {
        if (WHOLE) return size;
        const int e = at.e0 + i / 4 * at.step + i % 4;
        return e < n ? smaller(size, 1 << (31 - __clz(n ^ e))) : 1;
    }
    // Butterflies between registers STEP apart, which hold values `stride` apart.
    template <int STEP>
    __device__ __forceinline__ void in_lane(float (&v)[kLaneChannels], int stride) const {
        if (stride >= size) return;
#pragma unroll
        for (int i = 0; i < kLaneChannels; i++) {
            if (i & STEP || (!WHOLE && stride >= block(i))) continue;
            const float a = v[i], b = v[i + STEP];
            v[i] = a + b;
            v[i + STEP] = a - b;
        }
    }
    __device__ __forceinline__ void between(float (&v)[kLaneChannels], int lanes,
                                            int stride) const {
        if (stride >= size) return;
#pragma unroll
        for (int i = 0; i < kLaneChannels; i++) {
            const float other = __shfl_xor_sync(kAllLanes, v[i], lanes);
            if (WHOLE || stride < block(i))
                v[i] = at.in_group & lanes ? other - v[i] : v[i] + other;
        }
    }
    __device__ __forceinline__ void apply(float (&v)[kLaneChannels]) const {
        in_lane<1>(v, 1);
        in_lane<2>(v, 2);
        if (at.even_first) between(v, 1, 4);
        in_lane<4>(v, at.step);
        in_lane<8>(v, 2 * at.step);
        if (!at.even_first) between(v, 1, 16);
        for (int lanes = 2; lanes < at.lanes; lanes *= 2) between(v, lanes, 16 * lanes);
#pragma unroll
        for (int i = 0; i < kLaneChannels; i++) v[i] *= 1.0f / sqrtf(static_cast<float>(block(i)));
    }
};

// The extent of a group. As signed integers, floats >= 0 are in the order of their bits; as
// unsigned integers, all negative floats are above them.
__device__ __forceinline__ mq_extent extent_of(const float (&v)[kLaneChannels], int lanes) {
    int positive = 0;
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kLaneChannels; i++) {
        const uint32_t bits = __float_as_uint(v[i]);
        const int as_signed = static_cast<int>(bits);
        positive = positive > as_signed ? positive : as_signed;
        any = any > bits ? any : bits;
    }
    mq_extent of = {0, 0};
    of.positive_bits = static_cast<uint32_t>(positive);
    of.negative_bits = any >> 31 ? any & 0x7fffffffu : 0;
    reduce(of, lanes);
    return of;
}

// Four codes plus `zero`, in bytes. Adding 1.5 * 2^23 rounds a float to an integer, in its lowest
// bits.
__device__ __forceinline__ uint32_t codes_of(const float *v, const mq_quantization &to, int zero) {
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
        // a NaN becomes `low`, which is 0 if there can be one
        float value = fmaxf(v[c] * to.inverse, static_cast<float>(to.low));
        value = fminf(value, static_cast<float>(to.high)) + 12582912.0f;
        words[c] = __float_as_uint(value) + static_cast<uint32_t>(zero);
    }
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040),
                       __byte_perm(words[2], words[3], 0x0040), 0x5410);
}

// Several blocks per multiprocessor, because each idles until its tokens arrive. With four, ptxas
// spills registers on sm_100 and sm_120.
template <mq_dtype DTYPE, int ROWS, bool ROTATES>
__global__ void __launch_bounds__(kThreads, ROTATES         ? 2
                                            : MQ_ARCH < 100 ? 4
                                                            : 3)
    quantize_columns(const __grid_constant__ quantize_args args) {
    __shared__ int bad[ROWS];
    start_dependents();
    const columns<DTYPE, ROWS> in(args);
    const lane_place at(args);
    const int k4 = static_cast<int>(args.lin.k - args.lin.k_salient);
    const int group_size = static_cast<int>(args.lin.group_size);
    const int per_block = kThreads / at.lanes, groups = static_cast<int>(args.shape.groups);
    const int begin = static_cast<int>(blockIdx.y) * per_block;
    const int stride = static_cast<int>(gridDim.y) * per_block;
    const auto group_at = [&](int start) {
        return start + static_cast<int>(threadIdx.x) / at.lanes;
    };
    const auto length = [&](int group) {
        return group < groups ? smaller(group_size, k4 - group * group_size) : 0;
    };
    int place[kLaneChannels / 4][4];
    const auto find = [&](int group) {
        const int n = length(group);
#pragma unroll
        for (int i = 0; i < kLaneChannels / 4; i++) {
            const int e = at.e0 + i * at.step;
            in.places(static_cast<int64_t>(group) * group_size + e, n - e, place[i]);
        }
    };

    if (begin < groups) find(group_at(begin));  // while the tokens load
    if (threadIdx.x < ROWS) bad[threadIdx.x] = 0;
    in.fill();
    __syncthreads();
    if (blockIdx.y == 0 && args.lin.k_salient) {
        in.split(bad);
        __syncthreads();
        const int r = static_cast<int>(threadIdx.x);
        if (r < in.rows && bad[r]) store_salient_nan(args, in.first + r);
    }
    for (int start = begin; start < groups; start += stride) {
        const int group = group_at(start), n = length(group);
        if (start != begin) find(group);
        typename columns<DTYPE, ROWS>::type x[kLaneChannels];
#pragma unroll
        for (int i = 0; i < kLaneChannels; i++) x[i] = in.at[place[i / 4][i % 4]];
        const int64_t slot =
            static_cast<int64_t>(group) * (group_size / kSlotChannels) + at.in_group / 2;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float v[kLaneChannels];
#pragma unroll
            for (int i = 0; i < kLaneChannels; i++) v[i] = to_f32(DTYPE, x[i].row[r]);
            if constexpr (ROTATES) {
                const int size = smaller(args.lin.rotation, group_size);
                if (__all_sync(kAllLanes, n == group_size || n == 0))
                    rotation_of<true>{at, n, size}.apply(v);
                else
                    rotation_of<false>{at, n, size}.apply(v);
            }
            const mq_quantization to = quantization_for(args, extent_of(v, at.lanes));
            const int zero = args.to.zeros ? -to.low : 0;
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                words[i] = codes_of(v + 4 * i, to, zero);
                const int left = n - at.e0 - i * at.step;
                if (zero && left < 4) words[i] &= left > 0 ? (1u << 8 * left) - 1 : 0;
            }
            const int64_t token = in.first + r;
            if (r >= in.rows || at.in_group / 2 * kSlotChannels >= n) continue;
            unsigned char *record =
                args.to.codes + (slot * args.to.stride + token) * args.to.record;
            if (args.to.order == NIBBLES) {
                const uint32_t low = 0x0f0f0f0fu;
                *reinterpret_cast<uint2 *>(record + at.in_group % 2 * 8) = {
                    (words[0] & low) | (words[1] & low) << 4, (words[2] & low) | (words[3] & low)
                                                                                     << 4};
            } else {
                *reinterpret_cast<uint4 *>(record + at.in_group % 2 * 16) = {words[0], words[1],
                                                                             words[2], words[3]};
            }
            if (at.in_group) continue;
            args.to.scales[group * args.to.stride + token] = to.scale;
            if (args.to.zeros) args.to.zeros[group * args.to.stride + token] = zero;
        }
    }
}

template <mq_dtype DTYPE, int ROWS>
int64_t columns_bytes(const quantize_args &args) {
    typedef typename columns<DTYPE, ROWS>::type type;
    return (args.lin.k + kMoreColumns) * static_cast<int64_t>(sizeof(type));
}

template <mq_dtype DTYPE, int ROWS>
int run_columns(const quantize_args &args, void *stream) {
    // few tokens fill the GPU only if several blocks share each
    const int64_t lanes = args.shape.groups * args.lin.group_size / kLaneChannels;
    const int64_t passes = args.to.m <= kFewTokens ? ceil_div<int64_t>(lanes, kThreads) : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.to.m, ROWS)),
                    static_cast<unsigned>(passes));
    const auto kernel = args.lin.rotation > 1 ? quantize_columns<DTYPE, ROWS, true>
                                              : quantize_columns<DTYPE, ROWS, false>;
    return launch(kernel, grid, static_cast<size_t>(columns_bytes<DTYPE, ROWS>(args)), stream,
                  args);
}

// Two tokens per block, or one if two do not fit in shared memory or would leave the GPU without
// enough blocks. Returns -1 if not even one fits.
template <mq_dtype DTYPE>
int run_dtype(const quantize_args &args, void *stream) {
    if (args.to.m >= kManyTokens && columns_bytes<DTYPE, 2>(args) <= kOrdinaryShared)
        return run_columns<DTYPE, 2>(args, stream);
    if (columns_bytes<DTYPE, 1>(args) <= kMostShared) return run_columns<DTYPE, 1>(args, stream);
    return -1;
}

}  // namespace

int quantize_by_columns(const quantize_args &args, void *stream) {
    const int64_t g = args.lin.group_size;
    const bool is_taken = !args.lin.per_token && args.shape.groups && g >= kSlotChannels &&
                          g <= part::kMost && (g & (g - 1)) == 0;
    if (!is_taken) return -1;
    switch (args.dtype) {
        case MQ_F32: return run_dtype<MQ_F32>(args, stream);
        case MQ_F16: return run_dtype<MQ_F16>(args, stream);
        default: return run_dtype<MQ_BF16>(args, stream);
    }
}

}  // namespace mq
