// What all kernels share: launches, elements of any dtype, and the layout of quantized tokens.
//
// Compiled with -fmad=false, as the C code is with -ffp-contract=off: only fmaf fuses a product and
// a sum, so results equal the scalar C kernels bit for bit.
#ifndef MQ_CUDA_COMMON_CUH
#define MQ_CUDA_COMMON_CUH

#include <math.h>
#include <stdint.h>

#include "../quantization.h"
#include "mixedquant_cuda.h"
#include "ptx.cuh"

namespace mq {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;  // per block

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }

template <typename T>
__host__ __device__ __forceinline__ T ceil_div(T a, T b) {
    return a / b + (a % b != 0);
}

template <typename T>
__host__ __device__ __forceinline__ T smaller(T a, T b) {
    return a < b ? a : b;
}

template <typename T>
__host__ __device__ __forceinline__ T larger(T a, T b) {
    return a > b ? a : b;
}

// Dynamic shared memory that any launch may use: 48 KiB minus the static shared memory, which is at
// most 1 KiB in kernels that use dynamic shared memory.
constexpr int64_t kOrdinaryShared = (48 << 10) - 1024;

// What a launch may use on any architecture if it asks for it.
constexpr int64_t kMostShared = (64 << 10) - 1024;

// kernel<<<grid, kThreads, shared, stream>>>(args...). Does nothing for an empty grid. early: the
// kernel may start before the previous one has ended, and calls wait_for_previous itself.
template <typename... Parameters, typename... Args>
int launch_as(bool early, void (*kernel)(Parameters...), dim3 grid, size_t shared, void *stream,
              Args... args) {
    if (!grid.x || !grid.y) return cudaSuccess;
    // Every launch of a kernel sets the same value, since threads share it. If this fails, the
    // launch fails too.
    if (shared > kOrdinaryShared)
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(larger<int64_t>(static_cast<int64_t>(shared), kMostShared)));
#ifdef __CUDACC__
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, args...);
#else
    (void)stream;
    emulator::run(grid, kThreads, shared, early, [=] { kernel(args...); });
#endif
    return cudaGetLastError();  // clears the error, so that the next launch does not report it
                                // again
}

template <typename... Parameters, typename... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, void *stream, Args... args) {
    return launch_as(false, kernel, grid, shared, stream, args...);
}

// Launches a kernel that reads the output of the previous one only after wait_for_previous. Its
// other inputs must be older than the previous kernel.
template <typename... Parameters, typename... Args>
int launch_behind(int arch, void (*kernel)(Parameters...), dim3 grid, size_t shared, void *stream,
                  Args... args) {
    return launch_as(arch >= 90, kernel, grid, shared, stream, args...);
}

// Enough blocks for n jobs of one thread each, for kernels with grid-stride loops.
inline dim3 blocks_for(int64_t jobs) {
    return dim3(
        static_cast<unsigned>(smaller<int64_t>(ceil_div<int64_t>(jobs, kThreads), 1 << 20)));
}

// for (i = this thread's first job; i < n; i += threads in the grid)
#define MQ_GRID_STRIDE(i, n)                                                                 \
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * mq::kThreads + threadIdx.x; i < (n); \
         i += static_cast<int64_t>(gridDim.x) * mq::kThreads)

// ---- Elements ----

__host__ __device__ __forceinline__ int size_of(mq_dtype dtype) {
    return dtype == MQ_F32 ? 4 : dtype == MQ_I8 ? 1 : 2;
}

__device__ __forceinline__ float bf16_to_f32(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ float load(mq_dtype dtype, const void *x, int64_t i) {
    switch (dtype) {
        case MQ_F32: return static_cast<const float *>(x)[i];
        case MQ_F16: return f16_to_f32(static_cast<const uint16_t *>(x)[i]);
        case MQ_BF16: return bf16_to_f32(static_cast<const uint16_t *>(x)[i]);
        default: return static_cast<float>(static_cast<const int8_t *>(x)[i]);
    }
}

// Rounds value to a 16-bit dtype.
__device__ __forceinline__ uint16_t narrow(mq_dtype dtype, float value) {
    return dtype == MQ_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

__device__ __forceinline__ void store(mq_dtype dtype, void *out, int64_t i, float value) {
    if (dtype == MQ_F32)
        static_cast<float *>(out)[i] = value;
    else
        static_cast<uint16_t *>(out)[i] = narrow(dtype, value);
}

// ---- Shapes and quantized tokens ----

// mq_shape_of for a valid lin.
inline mq_shape shape_of(const mq_linear &lin) {
    mq_shape shape{};
    mq_shape_of(lin.n, lin.k, lin.k_salient, lin.group_size, &shape);
    return shape;
}

// The INT4 channels of packed weights are multiplied in *steps* of 8 quads: 32 channels, 4 blocks
// of 64 bytes. A *slot* is a step as seen by one group: the codes of the group's own channels, and
// zeros in place of the others. If groups are whole steps, slots are steps. Otherwise a step that
// several groups share has one slot for each. So one kernel multiplies groups of any size, and long
// groups at full speed. Groups of fewer than 32 channels use integer products too: that needs no
// second kernel, and products are not the bottleneck there (counts in docs/results.md). The zeros
// cost twice the products at g = 16 and eight times at g = 4.
struct slots {
    int64_t group_quads, groups, total;
    int period;  // log2 of the smallest number of groups that together are whole steps

    // Slots before the group in excess of one per step: one for each group that starts inside a
    // step.
    __host__ __device__ __forceinline__ int64_t more(int64_t group) const {
        return group - (group >> period);
    }
    // The slot of a quad of the group.
    __host__ __device__ __forceinline__ int64_t of_quad(int64_t quad, int64_t group) const {
        return quad / 8 + more(group);
    }
    __host__ __device__ __forceinline__ int64_t first(int64_t group) const {
        return of_quad(group * group_quads, group);
    }
    __host__ __device__ __forceinline__ int64_t end(int64_t group) const {
        return group + 1 == groups ? total : first(group + 1);
    }
    __host__ __device__ __forceinline__ int64_t step(int64_t slot, int64_t group) const {
        return slot - more(group);
    }
    // True if every slot is a step.
    __host__ __device__ __forceinline__ bool whole() const { return period == 0; }
};

inline slots slots_of(const mq_shape &shape) {
    slots of{shape.group_quads, shape.groups, 0, 0};
    while (shape.groups && (shape.group_quads << of.period) % 8) of.period++;
    if (shape.groups) of.total = of.of_quad(shape.quads - 1, shape.groups - 1) + 1;
    return of;
}

// Quantized tokens in a workspace. A record holds one token's data for one slot. The records of a
// slot are contiguous, so a tile of tokens is, too.
//   codes    [slots][stride][32 or 16 bytes]: 8 quads in one of the orders below
//   scales   [groups][stride], fp32
//   zeros    [groups][stride], int32: the zero-points of codes that are stored as nibbles
//   salient  [chunks of 16 channels][terms][stride][16 halves]: the salient channels as sums of
//            `terms` halves, fp16 or bf16, padded with zeros
// stride is m rounded up to 8. Entries past token m are neither read nor written.
enum quad_order {
    IN_ORDER,    // byte i holds code i of the slot
    EVEN_FIRST,  // quads 0, 2, 4, 6, 1, 3, 5, 7
    NIBBLES,     // byte 4 j + i holds code i of quad 2 j (low) and of quad 2 j + 1 (high)
};

struct tokens {
    int64_t m, stride;
    unsigned char *codes, *salient;
    float *scales;
    int *zeros;  // NULL: not needed
    int64_t chunks;
    int terms, record;  // record: bytes of codes per record
    bool is_f16;
    quad_order order;

    // The word of a record that holds a quad.
    __host__ __device__ __forceinline__ int word_of(int64_t quad) const {
        const int q = static_cast<int>(quad % 8);
        return order == IN_ORDER ? q : order == NIBBLES ? q / 2 : q % 2 * 4 + q / 2;
    }
};

// Lays out a workspace. Both factors of a salient product are stored as sums of halves, so that
// tensor cores multiply them exactly.
inline tokens tokens_in(void *workspace, const mq_linear &lin, quad_order order, mq_dtype dtype,
                        int64_t m, size_t *bytes) {
    const mq_shape shape = shape_of(lin);
    tokens to{};
    to.m = m;
    to.stride = ceil_div<int64_t>(m, 8) * 8;
    to.order = order;
    to.record = order == NIBBLES ? 16 : 32;
    to.chunks = ceil_div<int64_t>(lin.k_salient, 16);
    // 11 (fp16) and 24 (fp32) significant bits fit in two and three bf16 terms of 8
    to.is_f16 = dtype == MQ_F16 && lin.salient_dtype != MQ_BF16;
    to.terms = dtype == MQ_F32 ? 3 : dtype == MQ_F16 && !to.is_f16 ? 2 : 1;
    const int64_t codes = slots_of(shape).total * to.stride * to.record;
    const int64_t scales = shape.groups * to.stride * 4;
    // a nibble holds codes 0 .. 15 but not codes minus a zero-point, which need a byte
    const int64_t zeros = order == NIBBLES && lin.act_format == MQ_ACT_ZERO_POINT ? scales : 0;
    to.codes = static_cast<unsigned char *>(workspace);
    if (workspace) to.scales = reinterpret_cast<float *>(to.codes + codes);
    if (workspace && zeros) to.zeros = reinterpret_cast<int *>(to.codes + codes + scales);
    if (workspace) to.salient = to.codes + codes + scales + zeros;
    if (bytes)
        *bytes =
            static_cast<size_t>(codes + scales + zeros + to.chunks * to.terms * to.stride * 32);
    return to;
}

// ---- Groups ----

// The code of x; 0 if the group has no scale.
__device__ __forceinline__ int code_of(float x, const mq_quantization &to) {
    return to.inverse > 0 ? mq_code_of(x, to.inverse, to.low, to.high) : 0;
}

// Combines the extents of each `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ void reduce(mq_extent &of, int lanes) {
    MQ_ASSUME(0 < lanes && lanes <= 32 && (lanes & (lanes - 1)) == 0);
    for (int step = lanes / 2; step; step /= 2) {
        const mq_extent other = {__shfl_xor_sync(kAllLanes, of.positive_bits, step),
                                 __shfl_xor_sync(kAllLanes, of.negative_bits, step)};
        of = mq_extent_union(of, other);
    }
}

// Combines the extents of the block, for every thread.
__device__ __forceinline__ void reduce_block(mq_extent &of) {
    __shared__ mq_extent parts[kWarps];
    reduce(of, 32);
    __syncthreads();  // the previous call may still read parts
    if (lane() == 0) parts[warp()] = of;
    __syncthreads();
    for (int w = 0; w < kWarps; w++) of = mq_extent_union(of, parts[w]);
}

// Up to 512 neighbouring values of one group, distributed over 1, 2, 4 ... 32 lanes, a quad per
// lane in turn. v[i] is value element(i) of the group's part.
struct part {
    static constexpr int kMost = 512, kValues = 16;
    float v[kValues];
    int lanes, lane_in_part, n;  // n <= 0: no values

    // The number of lanes for a group, or part of one, of up to `size` values.
    static __host__ __device__ __forceinline__ int lanes_for(int64_t size) {
        int lanes = 1;
        while (lanes < 32 && 4 * lanes < size) lanes *= 2;
        return lanes;
    }

    __device__ __forceinline__ explicit part(int64_t size) : lanes(lanes_for(size)), n(0) {
        MQ_ASSUME(size >= 0);
        lane_in_part = lane() & (lanes - 1);
    }
    // Index of this lane's part in the block.
    __device__ __forceinline__ unsigned in_block() const {
        return threadIdx.x / static_cast<unsigned>(lanes);
    }
    __device__ __forceinline__ int element(int i) const {
        return (i / 4 * lanes + lane_in_part) * 4 + i % 4;
    }
    // True if v[i] may hold a value in any of the warp's parts. The same in all lanes.
    __device__ __forceinline__ bool used(int i) const { return i < 4 || lanes == 32; }

    // Sets the values: value(e) for e in [0, n).
    template <typename Value>
    __device__ __forceinline__ void fill(const Value &value) {
#pragma unroll
        for (int i = 0; i < kValues; i++) v[i] = used(i) && element(i) < n ? value(element(i)) : 0;
    }

    __device__ __forceinline__ mq_extent extent_of() const {
        mq_extent of = {0, 0};
#pragma unroll
        for (int i = 0; i < kValues; i++)
            if (used(i) && element(i) < n) of = mq_extent_with(of, v[i]);
        return of;
    }

    // The size of the block in which value e is rotated: the largest power of two that fits, up to
    // `rotation`. The blocks before it are larger, so e and n differ only in lower bits.
    __device__ __forceinline__ int block(int e, int rotation) const {
        return e < n ? smaller(rotation, 1 << (31 - __clz(n ^ e))) : 1;
    }

    __device__ __forceinline__ void rotate(int rotation) {
        MQ_ASSUME(0 <= rotation && rotation <= kMost && (rotation & (rotation - 1)) == 0);
        if (rotation <= 1) return;
        butterflies<1>(rotation, 1);
        butterflies<2>(rotation, 2);
        for (int step = 1; step < lanes; step *= 2) {
#pragma unroll
            for (int i = 0; i < kValues; i++) {
                if (!used(i)) continue;
                const float other = __shfl_xor_sync(kAllLanes, v[i], step);
                if (4 * step < block(element(i), rotation))
                    v[i] = lane_in_part & step ? other - v[i] : v[i] + other;
            }
        }
        if (lanes == 32) {
            butterflies<4>(rotation, 128);
            butterflies<8>(rotation, 256);
        }
#pragma unroll
        for (int i = 0; i < kValues; i++)
            if (used(i)) v[i] *= 1.0f / sqrtf(static_cast<float>(block(element(i), rotation)));
    }

   private:
    // Butterflies between registers STEP apart, which hold values `stride` apart.
    template <int STEP>
    __device__ __forceinline__ void butterflies(int rotation, int stride) {
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            if (i & STEP || !used(i)) continue;
            const float a = v[i], b = v[i + STEP];
            if (stride < block(element(i), rotation)) {
                v[i] = a + b;
                v[i + STEP] = a - b;
            }
        }
    }
};

// Enough blocks for so many groups of up to `size` values, for kernels with grid-stride loops.
inline dim3 blocks_for_groups(int64_t groups, int64_t size) {
    const int64_t blocks = ceil_div<int64_t>(groups, kThreads / part::lanes_for(size));
    return dim3(static_cast<unsigned>(smaller<int64_t>(blocks, 1 << 24)));
}

}  // namespace mq

#endif
