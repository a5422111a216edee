// Packs weights into the CPU's panels (docs/format.md), unpacks them, and runs GPTQ's column loops.
#include "common.cuh"

namespace mq {
namespace {

// The 32-bit word of a panel that holds a quad of an output channel, in one half of its nibbles.
__device__ __forceinline__ int64_t word_of(const mq_shape &shape, int64_t row, int64_t quad) {
    return (row / MQ_PANEL * shape.blocks + quad / 2) * MQ_PANEL + row % MQ_PANEL;
}

// A row's group, as one job: for several lanes if groups have up to 512 values, otherwise for a
// warp, which loops over its parts.
struct row_group {
    int64_t row, group, first, n;  // channels first .. first + n of the INT4 part
};

__device__ __forceinline__ row_group row_group_of(const mq_linear &lin, const mq_shape &shape,
                                                  int64_t job) {
    const int64_t k4 = lin.k - lin.k_salient;
    row_group of;
    of.row = job / shape.groups;
    of.group = job % shape.groups;
    of.first = of.group * lin.group_size;
    of.n = of.row < lin.n ? smaller(lin.group_size, k4 - of.first) : 0;
    return of;
}

// Loops over parts i = 0, 512, .. of a group; every lane runs as many iterations.
#define MQ_PARTS(i, size) for (int64_t i = 0; i < (size); i += part::kMost)

__device__ __forceinline__ int64_t channel_of(const mq_linear &lin, int64_t i) {
    const int64_t channel = lin.perm ? lin.perm[i] : i;
    return channel >= 0 && channel < lin.k ? channel : -1;
}

struct pack_args {
    mq_linear lin;
    mq_shape shape;
    int q_max;
    mq_dtype dtype;
    const void *w;
    const float *group_scales;
    uint32_t *qweight;  // initially 0x88888888: code 0
    uint16_t *scales;   // initially 0
    void *salient;      // initially 0
    uint16_t *salient_scales;
    int *status;
};

// Rounds a scale to bf16 for storage; 0 if it is below the smallest normal number.
__device__ __forceinline__ uint16_t stored_scale(float scale) {
    return scale < MQ_SMALLEST_NORMAL ? 0 : f32_to_bf16(scale);
}

// A channel of a row; 0 where perm is bad.
__device__ __forceinline__ float weight_at(const pack_args &args, int64_t row, int64_t i) {
    const int64_t channel = channel_of(args.lin, i);
    return channel < 0 ? 0.0f : load(args.dtype, args.w, row * args.lin.k + channel);
}

__device__ __forceinline__ void load_part(const pack_args &args, const row_group &of, int64_t i,
                                          part &values) {
    values.n = static_cast<int>(smaller<int64_t>(of.n - i, part::kMost));
    values.fill([&](int e) { return weight_at(args, of.row, of.first + i + e); });
    values.rotate(args.lin.rotation);
}

__global__ void __launch_bounds__(kThreads, 2) pack_groups(pack_args args) {
    const mq_linear &lin = args.lin;
    const int64_t size = smaller(lin.group_size, lin.k - lin.k_salient);
    part values(size);
    const int per_block = kThreads / values.lanes;
    for (int64_t block = blockIdx.x; block * per_block < lin.n * args.shape.groups;
         block += gridDim.x) {
        const int64_t job = block * per_block + values.in_block();
        const row_group of = row_group_of(lin, args.shape, job);
        mq_extent largest = {0, 0};
        MQ_PARTS(i, size) {
            load_part(args, of, i, values);
            largest = mq_extent_union(largest, values.extent_of());
        }
        reduce(largest, values.lanes);
        const bool finite = mq_magnitude_bits(largest) < MQ_INFINITY_BITS;
        float scale = __uint_as_float(mq_magnitude_bits(largest)) / static_cast<float>(args.q_max);
        if (args.group_scales && of.n > 0) scale = args.group_scales[job];
        const bool bad_scale = !(scale >= 0) || scale >= 0x1.ffp127f;  // Inf in bf16
        if (of.n > 0 && !finite) atomicOr(args.status, MQ_CUDA_BAD_WEIGHT);
        if (of.n > 0 && finite && bad_scale) atomicOr(args.status, MQ_CUDA_BAD_SCALE);
        const uint16_t stored = stored_scale(scale);
        if (of.n > 0 && values.lane_in_part == 0)
            args.scales[(of.row / MQ_PANEL * args.shape.groups + of.group) * MQ_PANEL +
                        of.row % MQ_PANEL] = stored;
        mq_quantization to = {};
        to.low = -args.q_max, to.high = args.q_max;
        to.inverse = finite && !bad_scale ? mq_inverse_of(bf16_to_f32(stored)) : 0;
        MQ_PARTS(i, size) {
            if (size > part::kMost) load_part(args, of, i, values);
#pragma unroll
            for (int v = 0; v < part::kValues; v += MQ_QUAD) {
                const int e = values.element(v);
                if (!values.used(v) || e >= values.n) continue;
                uint32_t codes = 0;
#pragma unroll
                for (int c = 0; c < MQ_QUAD; c++) {
                    const int code = e + c < values.n ? code_of(values.v[v + c], to) : 0;
                    codes |= static_cast<uint32_t>(code & 15) << 8 * c;
                }
                // code & 15 is (code + 8) ^ 8; the two quads of a block share words
                const int64_t quad = of.group * args.shape.group_quads + (i + e) / MQ_QUAD;
                atomicXor(&args.qweight[word_of(args.shape, of.row, quad)],
                          codes << (quad % 2 ? 4 : 0));
            }
        }
    }
}

// One warp per row.
__global__ void __launch_bounds__(kThreads, 4) pack_salient(pack_args args) {
    const mq_linear &lin = args.lin;
    const int64_t k4 = lin.k - lin.k_salient;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp(); row < lin.n;
         row += static_cast<int64_t>(gridDim.x) * kWarps) {
        const int64_t at = row / MQ_PANEL * lin.k_salient * MQ_PANEL + row % MQ_PANEL;
        mq_extent largest = {0, 0};
        for (int64_t s = lane(); s < lin.k_salient; s += 32)
            largest = mq_extent_with(largest, weight_at(args, row, k4 + s));
        reduce(largest, 32);
        if (mq_magnitude_bits(largest) >= MQ_INFINITY_BITS) {
            if (lane() == 0) atomicOr(args.status, MQ_CUDA_BAD_WEIGHT);
            continue;
        }
        mq_quantization to = {};
        to.low = -127, to.high = 127;
        if (lin.salient_dtype == MQ_I8) {
            const float scale = __uint_as_float(mq_magnitude_bits(largest)) / 127.0f;
            const uint16_t stored = stored_scale(scale);
            if (lane() == 0) args.salient_scales[row] = stored;
            to.inverse = mq_inverse_of(bf16_to_f32(stored));
        }
        const uint16_t infinity = lin.salient_dtype == MQ_F16 ? 0x7c00 : 0x7f80;
        for (int64_t s = lane(); s < lin.k_salient; s += 32) {
            const float value = weight_at(args, row, k4 + s);
            if (lin.salient_dtype == MQ_I8) {
                static_cast<int8_t *>(args.salient)[at + s * MQ_PANEL] =
                    static_cast<int8_t>(code_of(value, to));
                continue;
            }
            const uint16_t half = narrow(lin.salient_dtype, value);
            if ((half & 0x7fff) >= infinity) atomicOr(args.status, MQ_CUDA_BAD_WEIGHT);
            static_cast<uint16_t *>(args.salient)[at + s * MQ_PANEL] = half;
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    check_perm(const int32_t *perm, int64_t k, int *seen, int *status) {
    MQ_GRID_STRIDE(i, k) {
        const int32_t channel = perm[i];
        if (channel < 0 || channel >= k || atomicOr(&seen[channel], 1))
            atomicOr(status, MQ_CUDA_BAD_PERM);
    }
}

// The weight to unpack, and its rows that are asked for.
struct unpack_args {
    mq_linear lin;
    mq_shape shape;
    const int64_t *rows;  // [count], or nullptr: rows 0 .. count
    int64_t count;
    float *w;  // [count][k]

    __device__ int64_t row_of(int64_t i) const { return rows ? rows[i] : i; }
    __device__ bool has(int64_t row) const { return row >= 0 && row < lin.n; }
};

constexpr float kNoRow = __builtin_nanf("");  // the values of a row that does not exist

__global__ void __launch_bounds__(kThreads) unpack_groups(unpack_args args) {
    const mq_linear &lin = args.lin;
    const mq_shape &shape = args.shape;
    const int64_t size = smaller(lin.group_size, lin.k - lin.k_salient);
    part values(size);
    const int per_block = kThreads / values.lanes;
    const uint32_t *words = reinterpret_cast<const uint32_t *>(lin.qweight);
    for (int64_t block = blockIdx.x; block * per_block < args.count * shape.groups;
         block += gridDim.x) {
        const int64_t job = block * per_block + values.in_block(), to = job / shape.groups;
        row_group of = row_group_of(lin, shape, job % shape.groups);  // of row 0
        float scale = 0;
        if (to >= args.count) {
            of.n = 0;
        } else if (const int64_t row = args.row_of(to); args.has(row)) {
            of.row = row;
            scale = bf16_to_f32(
                lin.scales[(row / MQ_PANEL * shape.groups + of.group) * MQ_PANEL + row % MQ_PANEL]);
        } else {
            scale = kNoRow;
        }
        MQ_PARTS(i, size) {
            values.n = static_cast<int>(smaller<int64_t>(of.n - i, part::kMost));
            values.fill([&](int e) {
                const int64_t quad = of.group * shape.group_quads + (i + e) / MQ_QUAD;
                const uint32_t word = words[word_of(shape, of.row, quad)];
                const int code = (word >> ((quad % 2 ? 4 : 0) + 8 * (e % 4)) & 15) - 8;
                return static_cast<float>(code) * scale;
            });
            values.rotate(lin.rotation);
#pragma unroll
            for (int v = 0; v < part::kValues; v++) {
                const int e = values.element(v);
                if (!values.used(v) || e >= values.n) continue;
                const int64_t channel = channel_of(lin, of.first + i + e);
                if (channel >= 0) args.w[to * lin.k + channel] = values.v[v];
            }
        }
    }
}

__global__ void __launch_bounds__(kThreads) unpack_salient(unpack_args args) {
    const mq_linear &lin = args.lin;
    MQ_GRID_STRIDE(i, args.count * lin.k_salient) {
        const int64_t to = i / lin.k_salient, s = i % lin.k_salient, row = args.row_of(to);
        const int64_t channel = channel_of(lin, lin.k - lin.k_salient + s);
        float value = kNoRow;
        if (args.has(row)) {
            const int64_t at = (row / MQ_PANEL * lin.k_salient + s) * MQ_PANEL + row % MQ_PANEL;
            value = load(lin.salient_dtype, lin.salient, at);
            if (lin.salient_dtype == MQ_I8) value *= bf16_to_f32(lin.salient_scales[row]);
        }
        if (channel >= 0) args.w[to * lin.k + channel] = value;
    }
}

// The column loops of GPTQ and of coordinate descent: one warp per row, column by column.
struct column_args {
    int q_max;
    int64_t rows, cols, col0, group_size, groups;
    const float *scales, *matrix;  // u or h
    float *w, *other;              // errors or gradient
};

__device__ __forceinline__ float on_grid(const column_args &args, int64_t row, int64_t i,
                                         float value) {
    const float scale = args.scales[row * args.groups + (args.col0 + i) / args.group_size];
    const float most = static_cast<float>(args.q_max);
    float q = value * mq_inverse_of(scale);
    q = q < -most ? -most : q;
    q = q > most ? most : q;
    return (rintf(q) + 0.0f) * scale;  // + 0.0f removes negative zeros
}

template <bool DESCEND>
__global__ void __launch_bounds__(kThreads) columns(column_args args) {
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp(); r < args.rows;
         r += static_cast<int64_t>(gridDim.x) * kWarps) {
        float *row = args.w + r * args.cols, *other = args.other + r * args.cols;
        for (int64_t i = 0; i < args.cols; i++) {
            const float *matrix = args.matrix + i * args.cols;
            const float value = row[i];
            const float to = DESCEND ? value + other[i] / matrix[i] : value;
            const float rounded = on_grid(args, r, i, to);
            const float step = DESCEND ? rounded - value : (value - rounded) / matrix[i];
            __syncwarp();  // all lanes have read
            if (lane() == 0) row[i] = rounded;
            if (!DESCEND && lane() == 0) other[i] = step;
            float *moves = DESCEND ? other : row;
            const int64_t first = DESCEND ? i : i + 1;
            if (!DESCEND || step != 0)
                for (int64_t j = first + lane(); j < args.cols; j += 32)
                    moves[j] -= step * matrix[j];
            __syncwarp();
        }
    }
}

dim3 blocks_of_warps(int64_t jobs) {
    return dim3(static_cast<unsigned>(smaller<int64_t>(ceil_div<int64_t>(jobs, kWarps), 1 << 24)));
}

dim3 blocks_of_groups(const mq_linear &lin, const mq_shape &shape, int64_t rows) {
    return blocks_for_groups(rows * shape.groups, smaller(lin.group_size, lin.k - lin.k_salient));
}

}  // namespace
}  // namespace mq

using namespace mq;

extern "C" int mq_cuda_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                                   const float *group_scales, uint8_t *qweight, uint16_t *scales,
                                   void *salient, uint16_t *salient_scales, int *seen, int *status,
                                   void *stream) {
    const mq_shape shape = shape_of(*lin);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const size_t panels = static_cast<size_t>(shape.panels);
    const size_t salient_bytes =
        panels * static_cast<size_t>(lin->k_salient * MQ_PANEL * size_of(lin->salient_dtype));
    int error = cudaSuccess;
    const auto clear = [&](void *array, int byte, size_t bytes) {
        if (!error && bytes) error = cudaMemsetAsync(array, byte, bytes, on);
    };
    clear(qweight, 0x88, panels * static_cast<size_t>(shape.blocks * MQ_BLOCK_BYTES));
    clear(scales, 0, panels * static_cast<size_t>(shape.groups) * 32);
    clear(salient, 0, salient_bytes);
    if (salient_scales) clear(salient_scales, 0, panels * 32);
    if (!error && seen)
        error = launch(check_perm, blocks_for(lin->k), 0, stream, lin->perm, lin->k, seen, status);
    const pack_args args = {*lin,
                            shape,
                            q_max,
                            dtype,
                            w,
                            group_scales,
                            reinterpret_cast<uint32_t *>(qweight),
                            scales,
                            salient,
                            salient_scales,
                            status};
    if (!error && shape.groups)
        error = launch(pack_groups, blocks_of_groups(*lin, shape, lin->n), 0, stream, args);
    if (!error && lin->k_salient)
        error = launch(pack_salient, blocks_of_warps(lin->n), 0, stream, args);
    return error;
}

extern "C" int mq_cuda_unpack_rows(const mq_linear *lin, const int64_t *rows, int64_t count,
                                   float *w, void *stream) {
    const unpack_args args = {*lin, shape_of(*lin), rows, count, w};
    int error = cudaSuccess;
    if (args.shape.groups)
        error = launch(unpack_groups, blocks_of_groups(*lin, args.shape, count), 0, stream, args);
    if (error) return error;
    return launch(unpack_salient, blocks_for(count * lin->k_salient), 0, stream, args);
}

extern "C" int mq_cuda_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0,
                                  int64_t group_size, int64_t groups, const float *scales,
                                  const float *u, float *w, float *errors, void *stream) {
    const column_args args = {q_max, rows, cols, col0, group_size, groups, scales, u, w, errors};
    return launch(columns<false>, blocks_of_warps(rows), 0, stream, args);
}

extern "C" int mq_cuda_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0,
                                     int64_t group_size, int64_t groups, const float *scales,
                                     const float *h, float *gradient, float *w, void *stream) {
    const column_args args = {q_max, rows, cols, col0, group_size, groups, scales, h, w, gradient};
    return launch(columns<true>, blocks_of_warps(rows), 0, stream, args);
}
