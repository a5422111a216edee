// Emulates a CUDA block on the CPU, for the tests. Compile csrc/cuda/*.cu as C++ with -include of
// this file.
//
// Blocks run one after another. A block's threads are fibers, which run until they wait for others,
// at a barrier or at a warp's exchange. The emulator makes the worst of everything that a thread
// may not rely on. cp.async reads at once but writes only at the wait. Shared memory starts as
// NaNs. emulator::schedule reverses the order of threads. Asynchronous products (wgmma) write their
// sums at the wait; their inputs must stay unchanged until then, and copies by cp.async must have
// been made visible to them. A wait that cannot end aborts.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

enum schedule { FORWARD, BACKWARD };

struct place {
    dim3 thread, block, block_size, grid_size;
};

extern schedule order;
extern place here;                   // of the running thread
extern unsigned char *shared_bytes;  // the block's dynamic shared memory

// Aborts where a GPU would refuse, for example if a kernel lacks code for its architecture.
[[noreturn]] void fail(const char *what);

// Allows the next launch more dynamic shared memory than the default.
void allow_shared(int bytes);

// Runs body once per thread of every block. is_early: the kernel may start before the previous one
// has ended. Each block must then wait for that (see_previous); until then it finds NaNs where
// hide_from_early says.
void run(dim3 grid, dim3 block, size_t shared, bool is_early, const std::function<void()> &body);
void hide_from_early(void *at, size_t bytes);  // in the next launch
void see_previous();

void barrier();
int barrier_or(int value);
// Every lane of a warp passes `size` bytes, at most 64, and gets those of all lanes, 64 apart.
const unsigned char *exchange(const void *value, size_t size);
void copy_later(void *to, const void *from, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(int pending);

// Asynchronous products: d += sums or d = sums. The 32 sums are the products of a, 4 registers,
// with the matrix in shared memory that the descriptor names: 64 swizzled rows of 32 bytes. The
// fence covers d and a's 16 registers, which must not change afterwards. All warps of a warpgroup
// must issue the same products in the same order.
void fence_for_products();
void fence_products(const void *d, const unsigned *a);
void multiply_later(int *d, const int *sums, const unsigned *a, uint64_t descriptor, bool adds);
void multiply_later(float *d, const float *sums, const unsigned *a, uint64_t descriptor, bool adds);
void commit_products();
void wait_for_products(int pending);
uint64_t shared_address(const void *at);
const unsigned char *byte_of(uint64_t descriptor, unsigned row, unsigned byte);

template <typename T>
struct lanes {
    const unsigned char *bytes;
    T operator[](unsigned lane) const {
        T value;
        memcpy(&value, bytes + 64 * (lane & 31), sizeof value);
        return value;
    }
};

template <typename T>
lanes<T> exchange(const T &value) {
    static_assert(sizeof(T) <= 64);
    return {exchange(&value, sizeof value)};
}

inline unsigned lane() { return here.thread.x & 31; }

}  // namespace emulator

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx emulator::here.thread
#define blockIdx emulator::here.block
#define blockDim emulator::here.block_size
#define gridDim emulator::here.grid_size

[[noreturn]] inline void __trap() { emulator::fail("__trap"); }
inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int value) { return emulator::barrier_or(value); }
inline void __syncwarp() { emulator::exchange(0); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::exchange(value)[emulator::lane() ^ static_cast<unsigned>(mask)];
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    return emulator::exchange(value)[static_cast<unsigned>(source)];
}
inline int __all_sync(unsigned, int value) {
    const auto all = emulator::exchange(value);
    int result = 1;
    for (unsigned i = 0; i < 32; i++) result &= all[i] != 0;
    return result;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++)
        out |= static_cast<unsigned>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    return out;
}
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned atomicXor(unsigned *at, unsigned value) {
    const unsigned before = *at;
    *at ^= value;
    return before;
}
inline int atomicOr(int *at, int value) {
    const int before = *at;
    *at |= value;
    return before;
}

// What the launchers need of the CUDA runtime.
#define __grid_constant__
typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaMemcpyDeviceToHost, cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
    emulator::allow_shared(bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    if (bytes) memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, cudaStream_t) {
    if (bytes) memcpy(to, from, bytes);
    return cudaSuccess;
}
