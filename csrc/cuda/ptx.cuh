// All instructions that CUDA C has no name for, each as PTX and as equivalent C++. With the C++,
// kernels compile for the CPU (tests/cuda/emulator.h), where the tests run them. MQ_ARCH is the
// target architecture. PTX appears in no other file.
#ifndef MQ_CUDA_PTX_CUH
#define MQ_CUDA_PTX_CUH

#include <stdint.h>

#include "../assume.h"

#ifdef __CUDACC__
#ifdef __CUDA_ARCH__
#define MQ_ARCH (__CUDA_ARCH__ / 10)
#else
#define MQ_ARCH 80 /* the host pass only parses device code */
#endif
#endif

namespace mq {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Memory ----

__device__ __forceinline__ unsigned char *dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(256) unsigned char shared_bytes[];
    return shared_bytes;
#else
    return emulator::shared_bytes;
#endif
}

// Loads 16 bytes that are read once, bypassing L1. ptxas moves ld.global.nc past wait_for_previous,
// so this is a plain load.
__device__ __forceinline__ uint4 load_once(const void *from) {
    MQ_ASSUME(MQ_IS_ALIGNED(from, 16));
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
#else
    return *static_cast<const uint4 *>(from);
#endif
}

// A kernel launched by launch_behind may start when every block of the previous kernel on the
// stream has called start_dependents or ended. The previous kernel's writes are visible after
// wait_for_previous.
__device__ __forceinline__ void start_dependents() {
#if defined(__CUDACC__) && MQ_ARCH >= 90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#ifndef __CUDACC__
    emulator::see_previous();
#elif MQ_ARCH >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// (x ^ a) & b in one instruction with a single constant operand; compilers emit two.
__device__ __forceinline__ uint32_t xor_and(uint32_t x, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(out) : "r"(x), "r"(a), "r"(b));
    return out;
#else
    return (x ^ a) & b;
#endif
}

// Starts a copy of `bytes` of 16 bytes from global to shared memory and fills the rest with zeros.
// Complete after wait_copies.
__device__ __forceinline__ void copy_async(void *to, const void *from, int bytes) {
    MQ_ASSUME(0 <= bytes && bytes <= 16);
    MQ_ASSUME(MQ_IS_ALIGNED(to, 16) && MQ_IS_ALIGNED(from, 16));
#if !defined(__CUDACC__)
    emulator::copy_later(to, from, static_cast<size_t>(bytes), static_cast<size_t>(16 - bytes));
#elif MQ_ARCH >= 80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes)
                 : "memory");
#else
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)  // whole words only
        words[i] = 4 * i < bytes ? static_cast<const uint32_t *>(from)[i] : 0;
    *static_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if !defined(__CUDACC__)
    emulator::commit_copies();
#elif MQ_ARCH >= 80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's committed groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
#if !defined(__CUDACC__)
    emulator::wait_for_copies(PENDING);
#elif MQ_ARCH >= 80
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- 16-bit numbers ----

__device__ __forceinline__ float f16_to_f32(uint16_t bits) {
#ifdef __CUDACC__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float x = __uint_as_float((magnitude << 13) + (112u << 23));
    if (magnitude >= 0x400u) return sign ? -x : x;
    return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(magnitude);
#endif
}

// Rounds to nearest even. NaN stays NaN.
__device__ __forceinline__ uint16_t f32_to_f16(float x) {
#ifdef __CUDACC__
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t out = 0x7c00u;
    if (magnitude > 0x7f800000u)
        out = 0x7e00u;
    else if (magnitude < 0x38800000u)
        out = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    else if (magnitude < 0x477ff000u)
        out = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    return static_cast<uint16_t>(sign | out);
#endif
}

__device__ __forceinline__ uint16_t f32_to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounds two values to nearest even; low goes to the lower half. NaN stays NaN, with any bits.
__device__ __forceinline__ uint32_t f32_to_f16_pair(float low, float high) {
#if defined(__CUDACC__) && MQ_ARCH >= 80
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
#endif
}
__device__ __forceinline__ uint32_t f32_to_bf16_pair(float low, float high) {
#if defined(__CUDACC__) && MQ_ARCH >= 80
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
#endif
}

// ---- Matrix products of a warp: d = a b + c ----
//
// a [16][k] is stored by rows, b [k][8] by columns; c and d are [16][8]. Lane 4 r + t holds
// d[r][2t], d[r][2t + 1], d[r + 8][2t] and d[r + 8][2t + 1]. Its register a[2 h + i] belongs to row
// r + 8 i, its b[h] to column r. Each register holds the t-th of four equal pieces of half h of k:
// 4 bytes, 8 nibbles or 2 halves, the first one lowest. Products may take k in any order that a and
// b share.

struct fragment_a {
    uint32_t r[4];
};
struct fragment_b {
    uint32_t r[2];
};

#ifndef __CUDACC__
// Collects a lane's fragment: PIECES numbers per register, value(register, index).
template <typename D, typename Value>
void multiply_on_host(D (&d)[4], const fragment_a &a, const fragment_b &b, const D (&c)[4],
                      int pieces, const Value &value) {
    struct operands {
        fragment_a a;
        fragment_b b;
    };
    const auto all = emulator::exchange(operands{a, b});
    const unsigned row = emulator::lane() / 4, t = emulator::lane() % 4;
    D out[4];
    for (unsigned e = 0; e < 4; e++) {
        auto sum = value(0, 0, false) * value(0, 0, true);  // 0, of the type of the sums
        for (unsigned from = 0; from < 4; from++) {
            const operands left = all[4 * row + from];
            const operands right = all[4 * (2 * t + e % 2) + from];
            for (unsigned h = 0; h < 2; h++)
                for (int i = 0; i < pieces; i++)
                    sum += value(left.a.r[2 * h + e / 2], i, false) * value(right.b.r[h], i, true);
        }
        out[e] = static_cast<D>(sum + static_cast<decltype(sum)>(c[e]));
    }
    for (int e = 0; e < 4; e++) d[e] = out[e];
}
#endif

// k = 32 signed bytes. Four products on Turing.
__device__ __forceinline__ void multiply_s8(int (&d)[4], const fragment_a &a, const fragment_b &b,
                                            const int (&c)[4]) {
#if !defined(__CUDACC__)
    const auto value = [](uint32_t word, int i, bool) {
        return static_cast<int>(static_cast<int8_t>(word >> 8 * i));
    };
    multiply_on_host(d, a, b, c, 4, value);
#elif MQ_ARCH >= 80
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]), "r"(c[0]),
          "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
    int e[4] = {c[0], c[1], c[2], c[3]};
#pragma unroll
    for (int part = 0; part < 4; part++)  // part = 2 h + i
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(e[part % 2 * 2]), "+r"(e[part % 2 * 2 + 1])
            : "r"(a.r[part]), "r"(b.r[part / 2]));
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = e[i];
#endif
}

// k = 64 nibbles, or only the first half. a is signed; b is signed or 0 .. 15. On Hopper and later
// these instructions call a routine many times slower than multiply_s8, so they are not compiled
// there.
#if MQ_ARCH < 90
#define MQ_HAS_S4 1
enum nibble_range { SIGNED, UNSIGNED };

#define MQ_MULTIPLY_BY_RIGHT \
    if (RIGHT == SIGNED)     \
        MQ_MULTIPLY("s4");   \
    else                     \
        MQ_MULTIPLY("u4")

template <nibble_range RIGHT>
__device__ __forceinline__ void multiply_half_s4(int (&d)[4], const fragment_a &a,
                                                 const fragment_b &b, const int (&c)[4]) {
#if !defined(__CUDACC__)
    const auto value = [](uint32_t word, int i, bool right) {
        const int code = static_cast<int>(word >> 4 * i & 15);
        return right && RIGHT == UNSIGNED ? code : (code ^ 8) - 8;
    };
    multiply_on_host(d, {{a.r[0], a.r[1], 0, 0}}, {{b.r[0], 0}}, c, 8, value);
#elif MQ_ARCH >= 80
#define MQ_MULTIPLY(right)                                          \
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s4." right           \
        ".s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])            \
        : "r"(a.r[0]), "r"(a.r[1]), "r"(b.r[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
    MQ_MULTIPLY_BY_RIGHT;
#undef MQ_MULTIPLY
#else
#define MQ_MULTIPLY(right)                                                                      \
    asm("mma.sync.aligned.m8n8k32.row.col.s32.s4." right ".s32 {%0, %1}, {%2}, {%3}, {%4, %5};" \
        : "=r"(d[2 * i]), "=r"(d[2 * i + 1])                                                    \
        : "r"(a.r[i]), "r"(b.r[0]), "r"(c[2 * i]), "r"(c[2 * i + 1]))
#pragma unroll
    for (int i = 0; i < 2; i++) MQ_MULTIPLY_BY_RIGHT;
#undef MQ_MULTIPLY
#endif
}

template <nibble_range RIGHT>
__device__ __forceinline__ void multiply_s4(int (&d)[4], const fragment_a &a, const fragment_b &b,
                                            const int (&c)[4]) {
#if defined(__CUDACC__) && MQ_ARCH >= 80
#define MQ_MULTIPLY(right)                                                                         \
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4." right                                          \
        ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                 \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                           \
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]), "r"(c[0]), \
          "r"(c[1]), "r"(c[2]), "r"(c[3]))
    MQ_MULTIPLY_BY_RIGHT;
#undef MQ_MULTIPLY
#else
    int sum[4];
    multiply_half_s4<RIGHT>(sum, a, b, c);
    multiply_half_s4<RIGHT>(d, {{a.r[2], a.r[3]}}, {{b.r[1]}}, sum);
#endif
}
#undef MQ_MULTIPLY_BY_RIGHT
#endif

// k = 16 fp16 halves, fp32 sums; d += a b. Two products on Turing.
__device__ __forceinline__ void multiply_f16(float (&d)[4], const fragment_a &a,
                                             const fragment_b &b) {
#if !defined(__CUDACC__)
    const auto value = [](uint32_t word, int i, bool) {
        return static_cast<double>(f16_to_f32(static_cast<uint16_t>(word >> 16 * i)));
    };
    multiply_on_host(d, a, b, d, 2, value);
#elif MQ_ARCH >= 80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#else
#pragma unroll
    for (int h = 0; h < 2; h++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.r[2 * h]), "r"(a.r[2 * h + 1]), "r"(b.r[h]));
#endif
}

// The same for bf16. Turing's tensor cores lack it, so there lanes exchange factors with shuffles.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const fragment_a &a,
                                              const fragment_b &b) {
#if MQ_ARCH < 80
    const int row = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int from = 0; from < 4; from++) {
            uint32_t left[2], right[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                left[i] = __shfl_sync(kAllLanes, a.r[2 * h + i], 4 * row + from);
                right[i] = __shfl_sync(kAllLanes, b.r[h], 4 * (2 * t + i) + from);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const uint32_t x = left[e / 2], y = right[e % 2];
                d[e] = fmaf(__uint_as_float(x << 16), __uint_as_float(y << 16), d[e]);
                d[e] =
                    fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u), d[e]);
            }
        }
    }
#elif defined(__CUDACC__)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#else
    const auto value = [](uint32_t word, int i, bool) {
        return static_cast<double>(__uint_as_float(i ? word & 0xffff0000u : word << 16));
    };
    multiply_on_host(d, a, b, d, 2, value);
#endif
}

// ---- Asynchronous matrix products of a warpgroup, Hopper only ----
//
// d += a b for a [64][32 bytes], d [64][64] and b [32 bytes][64], of bytes or halves. Each warp
// holds 16 rows of a and d as fragments as above, d[n] for columns 8 n .. + 7. The columns of b are
// 64 rows of 32 bytes in shared memory. All four warps of a warpgroup must issue the same products.
// From fence_products to wait_products, d and a must not be touched.

constexpr int kColumnTiles = 8;  // of a product: 8 columns each
constexpr int kLeftSides = 4;    // registers that one fence of products covers

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (!defined(__CUDACC__) && MQ_ARCH == 90)
#define MQ_HAS_WGMMA 1

// The place of 16-byte unit `unit` in a row. Rows start at a multiple of 256 bytes. The "32-byte
// swizzle" puts the same unit of 8 rows into different banks.
__device__ __forceinline__ int swizzled(int row, int unit) { return unit ^ (row >> 2 & 1); }

// Makes this thread's writes to shared memory, and its completed copies, visible to products that
// start after the next barrier.
__device__ __forceinline__ void fence_for_products() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulator::fence_for_products();
#endif
}

#define MQ_FOUR(c, v) c(v[0]), c(v[1]), c(v[2]), c(v[3])
#define MQ_SUMS(c, d)                                                                         \
    MQ_FOUR(c, d[0]), MQ_FOUR(c, d[1]), MQ_FOUR(c, d[2]), MQ_FOUR(c, d[3]), MQ_FOUR(c, d[4]), \
        MQ_FOUR(c, d[5]), MQ_FOUR(c, d[6]), MQ_FOUR(c, d[7])
#define MQ_LEFT(a) \
    MQ_FOUR("+r", a[0].r), MQ_FOUR("+r", a[1].r), MQ_FOUR("+r", a[2].r), MQ_FOUR("+r", a[3].r)
#define MQ_D                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// Orders the operands: earlier writes stay before it, later reads stay after the wait.
__device__ __forceinline__ void fence_products(int (&d)[kColumnTiles][4],
                                               fragment_a (&a)[kLeftSides]) {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" : MQ_SUMS("+r", d), MQ_LEFT(a)::"memory");
#else
    emulator::fence_products(*d, a[0].r);
#endif
}
__device__ __forceinline__ void fence_products(float (&d)[kColumnTiles][4],
                                               fragment_a (&a)[kLeftSides]) {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" : MQ_SUMS("+f", d), MQ_LEFT(a)::"memory");
#else
    emulator::fence_products(*d, a[0].r);
#endif
}

// in units of 16 bytes; the offset from 8 rows to the next 8; 3: the swizzle
__device__ __forceinline__ uint64_t matrix_at(const void *rows) {
#ifdef __CUDACC__
    const uint64_t address = __cvta_generic_to_shared(rows);
#else
    const uint64_t address = emulator::shared_address(rows);
#endif
    return address >> 4 | uint64_t{1} << 16 | uint64_t{256 >> 4} << 32 | uint64_t{3} << 62;
}

#ifndef __CUDACC__
// Collects PIECES numbers of each register of a, value(word, i).
template <typename D, typename Value>
void multiply_later_on_host(D (&d)[kColumnTiles][4], const fragment_a &a, uint64_t b, bool adds,
                            int pieces, const Value &value) {
    const auto all = emulator::exchange(a);
    const unsigned row = emulator::lane() / 4, t = emulator::lane() % 4;
    D sums[kColumnTiles][4];
    for (unsigned n = 0; n < kColumnTiles; n++)
        for (unsigned e = 0; e < 4; e++) {
            auto sum = value(0, 0) * value(0, 0);  // 0, of the type of the sums
            for (unsigned k = 0; k < 32; k += 4) {
                uint32_t right;
                memcpy(&right, emulator::byte_of(b, 8 * n + 2 * t + e % 2, k), 4);
                for (int i = 0; i < pieces; i++)
                    sum +=
                        value(all[4 * row + k % 16 / 4].r[k / 16 * 2 + e / 2], i) * value(right, i);
            }
            sums[n][e] = static_cast<D>(sum);
        }
    emulator::multiply_later(*d, *sums, a.r, b, adds);
}
#endif

// Signed bytes. adds: d += a b; otherwise d = a b.
__device__ __forceinline__ void multiply_later(int (&d)[kColumnTiles][4], const fragment_a &a,
                                               const void *rows, bool adds) {
    const uint64_t b = matrix_at(rows);
#ifdef __CUDACC__
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " MQ_D
        ", {%32, %33, %34, %35}, %36, p;\n}"
        : MQ_SUMS("+r", d)
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b), "r"(static_cast<int>(adds)));
#else
    const auto value = [](uint32_t word, int i) {
        return static_cast<int>(static_cast<int8_t>(word >> 8 * i));
    };
    multiply_later_on_host(d, a, b, adds, 4, value);
#endif
}

// fp16 or bf16 halves; d += a b.
template <bool IS_F16>
__device__ __forceinline__ void multiply_later(float (&d)[kColumnTiles][4], const fragment_a &a,
                                               const void *rows) {
    const uint64_t b = matrix_at(rows);
#ifdef __CUDACC__
#define MQ_MULTIPLY(type)                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MQ_D \
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                           \
                 : MQ_SUMS("+f", d)                                                   \
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b))
    if (IS_F16)
        MQ_MULTIPLY("f16");
    else
        MQ_MULTIPLY("bf16");
#undef MQ_MULTIPLY
#else
    const auto value = [](uint32_t word, int i) {
        const uint32_t bits = word >> 16 * i & 0xffffu;
        return static_cast<double>(IS_F16 ? f16_to_f32(static_cast<uint16_t>(bits))
                                          : __uint_as_float(bits << 16));
    };
    multiply_later_on_host(d, a, b, true, 2, value);
#endif
}

__device__ __forceinline__ void commit_products() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulator::commit_products();
#endif
}

// Waits until at most PENDING committed groups of products are in flight. d and a must not belong
// to those.
template <int PENDING>
__device__ __forceinline__ void wait_products(int (&d)[kColumnTiles][4],
                                              fragment_a (&a)[kLeftSides]) {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %48;"
                 : MQ_SUMS("+r", d), MQ_LEFT(a)
                 : "n"(PENDING)
                 : "memory");
#else
    (void)d, (void)a;
    emulator::wait_for_products(PENDING);
#endif
}
template <int PENDING>
__device__ __forceinline__ void wait_products(float (&d)[kColumnTiles][4],
                                              fragment_a (&a)[kLeftSides]) {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %48;"
                 : MQ_SUMS("+f", d), MQ_LEFT(a)
                 : "n"(PENDING)
                 : "memory");
#else
    (void)d, (void)a;
    emulator::wait_for_products(PENDING);
#endif
}

#undef MQ_FOUR
#undef MQ_SUMS
#undef MQ_LEFT
#undef MQ_D
#endif

}  // namespace mq

#endif
