/* What one core can do at best: multiply-accumulates by each instruction that a kernel is built on, and
 * bytes read from memory. benchmarks/linear.py compiles it and sets speeds in relation to it. */
#include <immintrin.h>
#include <stddef.h>
#include <time.h>

enum { CHAINS = 12, ROUNDS = 100000, REPEATS = 10 };

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* 1e9 multiply-accumulates per second, the best of some repeats. step(acc) has `macs` of them. */
#define EACH_CHAIN(i) _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)
#define DEFINE_PEAK(name, isa, vector, zero, macs, step)                              \
    __attribute__((target(isa))) double name(void) {                                  \
        vector acc[CHAINS], x = zero(), product = zero();                             \
        double best = 0;                                                              \
        (void)product;                                                                \
        for (int repeat = 0; repeat < REPEATS; repeat++) {                            \
            EACH_CHAIN (i) acc[i] = zero();                                           \
            const double start = seconds();                                           \
            for (int round = 0; round < ROUNDS; round++)                              \
                EACH_CHAIN (i) step(acc[i]);                                          \
            const double speed = 1e-9 * macs * CHAINS * ROUNDS / (seconds() - start); \
            if (speed > best) best = speed;                                           \
        }                                                                             \
        return best;                                                                  \
    }

#define FMA(acc) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBF16(acc) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBUSD(acc) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBUSD_VEX(acc) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(acc) : "x"(x))
#define MADDUBS(acc)                                              \
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" \
                     : "+x"(acc), "=&x"(product)                  \
                     : "x"(x))

DEFINE_PEAK(peak_fma_256, "avx2,fma", __m256, _mm256_setzero_ps, 8, FMA)
DEFINE_PEAK(peak_fma_512, "avx512f", __m512, _mm512_setzero_ps, 16, FMA)
DEFINE_PEAK(peak_bf16_512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps, 32, DPBF16)
DEFINE_PEAK(peak_maddubs_256, "avx2", __m256i, _mm256_setzero_si256, 32, MADDUBS)
DEFINE_PEAK(peak_dpbusd_256, "avx2,avxvnni", __m256i, _mm256_setzero_si256, 32, DPBUSD_VEX)
DEFINE_PEAK(peak_dpbusd_512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, 64, DPBUSD)

int has_avx512(void) { return __builtin_cpu_supports("avx512f") != 0; }
int has_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }

/* 1e9 bytes per second read in order from `bytes` bytes, more than the caches hold, a multiple of 64 */
__attribute__((target("avx2"))) double memory_read(const char *from, size_t bytes) {
    double best = 0;
    for (int repeat = 0; repeat < 3; repeat++) {
        __m256i sum = _mm256_setzero_si256(), other = sum;
        const double start = seconds();
        for (size_t i = 0; i < bytes; i += 64) {
            _mm_prefetch(from + i + 4096, _MM_HINT_T0);
            sum = _mm256_xor_si256(sum, _mm256_loadu_si256((const __m256i *)(from + i)));
            other = _mm256_xor_si256(other, _mm256_loadu_si256((const __m256i *)(from + i + 32)));
        }
        __asm__ volatile("" : : "x"(sum), "x"(other));
        const double speed = 1e-9 * (double)bytes / (seconds() - start);
        if (speed > best) best = speed;
    }
    return best;
}
