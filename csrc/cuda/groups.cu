// Group quantization of plain matrices, and nibbles.
#include "common.cuh"

namespace mq {
namespace {

enum group_op { QUANTIZE, FAKE_QUANTIZE, ROTATE };

struct group_args {
    group_op op;
    mq_group_format format;
    int rotation;
    mq_dtype dtype;
    const void *x;
    int64_t rows, cols, groups;
    int8_t *q;
    float *scales;
    void *out;
};

__device__ __forceinline__ void load_part(const group_args &args, int64_t at, int64_t n,
                                          part &values) {
    values.n = static_cast<int>(smaller<int64_t>(n, part::kMost));
    values.fill([&](int e) { return load(args.dtype, args.x, at + e); });
    values.rotate(args.rotation);
}

__device__ __forceinline__ void store_part(const group_args &args, int64_t at, const part &values,
                                           const mq_quantization &to) {
#pragma unroll
    for (int i = 0; i < part::kValues; i++) {
        const int e = values.element(i);
        if (!values.used(i) || e >= values.n) continue;
        const int code = args.op == ROTATE ? 0 : code_of(values.v[i], to);
        if (args.op == QUANTIZE)
            args.q[at + e] = static_cast<int8_t>(code);
        else
            store(args.dtype, args.out, at + e,
                  args.op == ROTATE ? values.v[i] : static_cast<float>(code) * to.scale);
    }
}

__device__ __forceinline__ mq_quantization quantization_for(const group_args &args,
                                                            const mq_extent &of) {
    return mq_quantization_of(args.format.num_bits, args.format.act_format, args.format.clip, of);
}

// Groups of up to 512 values: several lanes per group.
__global__ void __launch_bounds__(kThreads) short_groups(group_args args) {
    const int64_t g = smaller<int64_t>(args.format.group_size, args.cols);
    part values(g);
    const int per_block = kThreads / values.lanes;
    const int64_t jobs = args.rows * args.groups;
    for (int64_t block = blockIdx.x; block * per_block < jobs; block += gridDim.x) {
        const int64_t job = block * per_block + values.in_block();
        const int64_t row = job / args.groups, j = job % args.groups;
        const int64_t at = row * args.cols + j * g;
        load_part(args, at, job < jobs ? smaller(g, args.cols - j * g) : 0, values);
        mq_quantization to = {};
        if (args.op != ROTATE) {
            mq_extent of = values.extent_of();
            reduce(of, values.lanes);
            to = quantization_for(args, of);
            if (args.op == QUANTIZE && job < jobs && values.lane_in_part == 0)
                args.scales[job] = to.scale;
        }
        store_part(args, at, values, to);
    }
}

// Longer groups: one block per group.
__global__ void __launch_bounds__(kThreads, 2) long_groups(group_args args) {
    const int64_t g = args.format.group_size;
    for (int64_t job = blockIdx.x; job < args.rows * args.groups; job += gridDim.x) {
        const int64_t row = job / args.groups, j = job % args.groups;
        const int64_t at = row * args.cols + j * g, n = smaller(g, args.cols - j * g);
        part values(part::kMost);
        mq_quantization to = {};
        if (args.op != ROTATE) {
            mq_extent of = {0, 0};
            for (int64_t i = warp() * part::kMost; i < n; i += kWarps * part::kMost) {
                load_part(args, at + i, n - i, values);
                of = mq_extent_union(of, values.extent_of());
            }
            reduce_block(of);
            to = quantization_for(args, of);
            if (args.op == QUANTIZE && threadIdx.x == 0) args.scales[job] = to.scale;
        }
        for (int64_t i = warp() * part::kMost; i < n; i += kWarps * part::kMost) {
            load_part(args, at + i, n - i, values);
            store_part(args, at + i, values, to);
        }
    }
}

int run(group_args args, void *stream) {
    if (!args.rows || !args.cols) return cudaSuccess;
    const int64_t g = args.format.group_size;
    args.groups = ceil_div(args.cols, g);
    const int64_t jobs = args.rows * args.groups, size = smaller(g, args.cols);
    if (size <= part::kMost)
        return launch(short_groups, blocks_for_groups(jobs, size), 0, stream, args);
    const dim3 grid(static_cast<unsigned>(smaller<int64_t>(jobs, 1 << 24)));
    return launch(long_groups, grid, 0, stream, args);
}

__global__ void __launch_bounds__(kThreads)
    dequantize(bool is_unsigned, const int8_t *q, const float *scales, int64_t rows, int64_t cols,
               int64_t group_size, int64_t groups, mq_dtype dtype, void *out) {
    MQ_GRID_STRIDE(i, rows * cols) {
        const int64_t row = i / cols, col = i % cols;
        const float code =
            static_cast<float>(is_unsigned ? static_cast<int>(static_cast<uint8_t>(q[i])) : q[i]);
        store(dtype, out, i, code * scales[row * groups + col / group_size]);
    }
}

__global__ void __launch_bounds__(kThreads)
    pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, int64_t packed_cols,
                 uint8_t *packed) {
    MQ_GRID_STRIDE(i, rows * packed_cols) {
        const int64_t col = i % packed_cols * 2;
        const int8_t *from = q + i / packed_cols * cols + col;
        const int high = col + 1 < cols ? from[1] & 15 : 0;
        packed[i] = static_cast<uint8_t>((from[0] & 15) | high << 4);
    }
}

__global__ void __launch_bounds__(kThreads)
    unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols, int64_t packed_cols,
                   bool is_unsigned, int8_t *q) {
    MQ_GRID_STRIDE(i, rows * cols) {
        const int64_t row = i / cols, col = i % cols;
        const int code = packed[row * packed_cols + col / 2] >> (col % 2 * 4) & 15;
        q[i] = static_cast<int8_t>(is_unsigned || code < 8 ? code : code - 16);
    }
}

}  // namespace
}  // namespace mq

using namespace mq;

extern "C" int mq_cuda_group_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                                      int64_t rows, int64_t cols, int8_t *q, float *scales,
                                      void *stream) {
    return run({QUANTIZE, *format, 0, dtype, x, rows, cols, 0, q, scales, nullptr}, stream);
}

extern "C" int mq_cuda_group_fake_quantize(const mq_group_format *format, mq_dtype dtype,
                                           const void *x, int64_t rows, int64_t cols, void *out,
                                           void *stream) {
    return run({FAKE_QUANTIZE, *format, 0, dtype, x, rows, cols, 0, nullptr, nullptr, out}, stream);
}

extern "C" int mq_cuda_group_hadamard(int64_t group_size, int64_t rotation, mq_dtype dtype,
                                      const void *x, int64_t rows, int64_t cols, void *out,
                                      void *stream) {
    const mq_group_format format = {group_size, 8, MQ_ACT_SYMMETRIC, 1};
    return run({ROTATE, format, static_cast<int>(rotation), dtype, x, rows, cols, 0, nullptr,
                nullptr, out},
               stream);
}

extern "C" int mq_cuda_group_dequantize(const mq_group_format *format, const int8_t *q,
                                        const float *scales, int64_t rows, int64_t cols,
                                        mq_dtype dtype, void *out, void *stream) {
    return launch(dequantize, blocks_for(rows * cols), 0, stream,
                  format->act_format == MQ_ACT_UNSIGNED, q, scales, rows, cols, format->group_size,
                  ceil_div(cols, format->group_size), dtype, out);
}

extern "C" int mq_cuda_pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, uint8_t *packed,
                                    void *stream) {
    const int64_t packed_cols = ceil_div<int64_t>(cols, 2);
    return launch(pack_nibbles, blocks_for(rows * packed_cols), 0, stream, q, rows, cols,
                  packed_cols, packed);
}

extern "C" int mq_cuda_unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols,
                                      int is_unsigned, int8_t *q, void *stream) {
    return launch(unpack_nibbles, blocks_for(rows * cols), 0, stream, packed, rows, cols,
                  ceil_div<int64_t>(cols, 2), is_unsigned != 0, q);
}
