// Quantizes groups of any size, whole tokens with one scale, and tokens with any number of
// channels. quantize_columns.cu takes the groups that most layers have.
#include "quantize.cuh"

namespace mq {
namespace {

// A token's values and its index in the records.
struct token {
    const void *values;
    int64_t at;
};

__device__ __forceinline__ float value_of(const quantize_args &args, const token &of,
                                          int64_t channel) {
    if (channel < 0 || channel >= args.lin.k) return __uint_as_float(0x7fc00000u);
    return load(args.dtype, of.values, channel);
}

// Copies the token to shared memory, 16 bytes at a time if possible.
__device__ __forceinline__ void stage(const quantize_args &args, int64_t token) {
    const int64_t bytes = args.lin.k * size_of(args.dtype);
    unsigned char *to = dynamic_shared();
    const unsigned char *from = args.x + token * bytes;
    if (bytes % 16 == 0) {
        for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16)
            *reinterpret_cast<uint4 *>(to + i) = load_once(from + i);
    } else {
        for (int64_t i = threadIdx.x * 2; i < bytes; i += kThreads * 2)
            *reinterpret_cast<uint16_t *>(to + i) = *reinterpret_cast<const uint16_t *>(from + i);
    }
    __syncthreads();
}

// Zeros what no code overwrites: all slots if groups share steps, otherwise the last slot.
__device__ __forceinline__ void clear_codes(const quantize_args &args, int64_t token) {
    const int64_t from = args.slot.whole() ? args.slot.total - 1 : 0;
    const int words = args.to.record / 4;
    for (int64_t i = threadIdx.x; i < (args.slot.total - from) * words; i += kThreads) {
        const int64_t record = (from + i / words) * args.to.stride + token;
        reinterpret_cast<uint32_t *>(args.to.codes)[record * words + i % words] = 0;
    }
    __syncthreads();
}

__device__ __forceinline__ void split_salient(const quantize_args &args, const token &of) {
    const int64_t k4 = args.lin.k - args.lin.k_salient;
    int non_finite = 0;
    for (int64_t s = threadIdx.x * 4; s < args.to.chunks * 16; s += kThreads * 4) {
        float values[4];
#pragma unroll
        for (int c = 0; c < 4; c++)
            values[c] =
                s + c < args.lin.k_salient ? value_of(args, of, channel_at(args, k4 + s + c)) : 0;
        non_finite |= !store_salient(args, of.at, s, values);
    }
    if (__syncthreads_or(non_finite) && threadIdx.x == 0) store_salient_nan(args, of.at);
}

// The channels of a part: i .. of a group.
struct place {
    int64_t group, i, n;  // n: channels of the group from i on
};

__device__ __forceinline__ place place_of(const quantize_args &args, int64_t group, int64_t i) {
    const int64_t k4 = args.lin.k - args.lin.k_salient, first = group * args.lin.group_size;
    if (group >= args.shape.groups) return {group, i, 0};
    return {group, i, smaller(args.lin.group_size, k4 - first) - i};
}

__device__ __forceinline__ void load_channels(const quantize_args &args, const place &at,
                                              const part &values, int (&channels)[part::kValues]) {
    const int64_t first = at.group * args.lin.group_size + at.i;
#pragma unroll
    for (int v = 0; v < part::kValues; v++) {
        const int e = values.element(v);
        channels[v] =
            values.used(v) && e < values.n ? static_cast<int>(channel_at(args, first + e)) : 0;
    }
}

__device__ __forceinline__ void load_values(const quantize_args &args, const token &of,
                                            const int (&channels)[part::kValues], part &values) {
#pragma unroll
    for (int v = 0; v < part::kValues; v++)
        values.v[v] =
            values.used(v) && values.element(v) < values.n ? value_of(args, of, channels[v]) : 0;
    values.rotate(args.lin.rotation);
}

__device__ __forceinline__ void store_codes(const quantize_args &args, const token &of,
                                            const place &at, const part &values,
                                            const mq_quantization &to) {
    const bool is_nibbles = args.to.order == NIBBLES;
    // a word of nibbles holds two quads, of neighbouring lanes unless a group may start with the
    // second
    const bool in_pairs = is_nibbles && args.shape.group_quads % 2 == 0;
    const int zero = args.to.zeros ? -to.low : 0;
    if (at.i == 0 && values.n > 0 && values.lane_in_part == 0) {
        args.to.scales[at.group * args.to.stride + of.at] = to.scale;
        if (args.to.zeros) args.to.zeros[at.group * args.to.stride + of.at] = zero;
    }
#pragma unroll
    for (int v = 0; v < part::kValues; v += MQ_QUAD) {
        if (!values.used(v)) continue;
        const int e = values.element(v);
        uint32_t codes = 0;
#pragma unroll
        for (int c = 0; c < MQ_QUAD; c++) {
            const int code = e + c < values.n ? code_of(values.v[v + c], to) + zero : 0;
            codes |= static_cast<uint32_t>(code & 255) << 8 * c;
        }
        if (is_nibbles) codes &= 0x0f0f0f0fu;
        if (in_pairs) codes |= __shfl_xor_sync(kAllLanes, codes, 1) << 4;
        if (e >= values.n || (in_pairs && values.lane_in_part % 2)) continue;
        const int64_t quad = at.group * args.shape.group_quads + (at.i + e) / MQ_QUAD;
        const int64_t slot = args.slot.of_quad(quad, at.group);
        unsigned char *record = args.to.codes + (slot * args.to.stride + of.at) * args.to.record;
        uint32_t *word = reinterpret_cast<uint32_t *>(record) + args.to.word_of(quad);
        if (is_nibbles && !in_pairs)
            atomicXor(word, codes << quad % 2 * 4);  // clear_codes set it to 0
        else
            *word = codes;
    }
}

__device__ __forceinline__ token token_of(const quantize_args &args, int64_t at) {
    if (args.staged) return {dynamic_shared(), at};
    return {args.x + at * args.lin.k * size_of(args.dtype), at};
}

// Groups of up to 512 channels with a scale each. Every few lanes work on a group of their own.
__global__ void __launch_bounds__(kThreads) quantize_groups(quantize_args args) {
    const token of = token_of(args, blockIdx.x);
    if (args.staged) stage(args, of.at);
    if (args.shape.groups) clear_codes(args, of.at);
    if (args.lin.k_salient) split_salient(args, of);

    part values(smaller(args.lin.group_size, args.lin.k));
    const int per_block = kThreads / values.lanes;
    int channels[part::kValues];
    for (int64_t start = 0; start < args.shape.groups; start += per_block) {
        const place at = place_of(args, start + values.in_block(), 0);
        values.n = static_cast<int>(at.n);
        load_channels(args, at, values, channels);
        load_values(args, of, channels, values);
        mq_extent largest = values.extent_of();
        reduce(largest, values.lanes);
        store_codes(args, of, at, values, quantization_for(args, largest));
    }
}

// A scale per token, or groups of more than 512 channels: the whole block works on one group. With
// four blocks per multiprocessor ptxas spills registers on sm_75.
__global__ void __launch_bounds__(kThreads, 3) quantize_tokens(quantize_args args) {
    const int64_t size = smaller(args.lin.group_size, args.lin.k);
    const token of = token_of(args, blockIdx.x);
    if (args.staged) stage(args, of.at);
    clear_codes(args, of.at);
    if (args.lin.k_salient) split_salient(args, of);

    part values(size);
    const int per_block = kThreads / values.lanes;
    const int64_t parts = ceil_div<int64_t>(size, part::kMost);  // of a group
    const int64_t together = args.lin.per_token ? args.shape.groups : 1;
    int channels[part::kValues];
    const auto load_part = [&](int64_t job) {
        const place at = place_of(args, job / parts, job % parts * part::kMost);
        values.n = static_cast<int>(smaller<int64_t>(at.n, part::kMost));
        load_channels(args, at, values, channels);
        load_values(args, of, channels, values);
        return at;
    };
    for (int64_t group = 0; group < args.shape.groups; group += together) {
        const int64_t begin = group * parts, end = (group + together) * parts;
        // the last jobs of a round may belong to the next group: they hold no values
        const auto job_at = [&](int64_t start) {
            const int64_t job = start + values.in_block();
            return job < end ? job : args.shape.groups * parts;
        };
        mq_extent largest = {0, 0};
        for (int64_t start = begin; start < end; start += per_block) {
            load_part(job_at(start));
            largest = mq_extent_union(largest, values.extent_of());
        }
        reduce_block(largest);
        const mq_quantization to = quantization_for(args, largest);
        for (int64_t start = begin; start < end; start += per_block) {
            const place at = load_part(job_at(start));
            store_codes(args, of, at, values, to);
        }
    }
}

}  // namespace
}  // namespace mq

using namespace mq;

int mq_quantize(const mq_linear &lin, const tokens &to, mq_dtype dtype, const void *x,
                void *stream) {
    quantize_args args = {};
    args.lin = lin;
    args.shape = shape_of(lin);
    args.slot = slots_of(args.shape);
    args.to = to;
    args.dtype = dtype;
    args.x = static_cast<const unsigned char *>(x);
    const int error = quantize_by_columns(args, stream);
    if (error >= 0) return error;
    const bool alone = lin.per_token || args.shape.group_quads > part::kMost / MQ_QUAD;
    const int64_t row_bytes = ceil_div<int64_t>(lin.k * size_of(dtype), 16) * 16;
    args.staged = row_bytes <= kOrdinaryShared;
    const dim3 grid(static_cast<unsigned>(to.m));
    const size_t shared = args.staged ? static_cast<size_t>(row_bytes) : 0;
    if (alone && args.shape.groups) return launch(quantize_tokens, grid, shared, stream, args);
    return launch(quantize_groups, grid, shared, stream, args);
}
